"""The one line that a mistake ends in."""

from collections.abc import Callable

import pytest

from deit_jax.errors import InputError


def refusal(action: Callable, *arguments: object, kind: type[InputError] = InputError) -> str:
    """Calls the action, which has to raise this very kind of InputError; returns its one line."""
    with pytest.raises(InputError) as caught:
        action(*arguments)
    assert caught.type is kind
    message = str(caught.value)
    assert "\n" not in message
    return message
