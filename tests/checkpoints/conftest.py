"""Orbax as quiet as in a program."""

import gc
import logging
import sys
from collections.abc import Iterator

import pytest

from deit_jax import couplings


@pytest.fixture(autouse=True)
def silence(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a program has it: without pages on stderr about what is reported in one line."""
    monkeypatch.setattr(logging.getLogger("absl"), "filters", [])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    couplings.silence_orbax()
    yield
    gc.collect()  # what Orbax's failed reads leave behind is reported now, not in a later test
