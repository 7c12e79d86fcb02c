"""main.py that starts sooner, for tests that compile more than they train.

python -m tests.small_main --config=configs/digits.py ...

The models of the digits have two blocks in place of four or six, and every process of a run uses
JAX's compilation cache.
"""

import dataclasses
import runpy
import types
from pathlib import Path

from jax._src import compiler

from deit_jax.models import registry

SCRIPT = Path(__file__).resolve()


def models() -> dict[str, object]:
    """The registry, with two blocks in the models of the digits; goes in the place of its own."""
    names = ("deit_testing", "deit_testing_distilled", "regnety_testing")
    entries = {name: registry._MODELS[name] for name in names}
    return registry._MODELS | {
        name: dataclasses.replace(entry, options=entry.options | {"depth": 2})
        for name, entry in entries.items()
    }


def use_cache_in_every_process() -> None:
    """JAX lets process 0 alone write programs to its cache, but on CPUs each has its own keys."""
    alone = types.SimpleNamespace(process_id=0, client=None)
    compiler.distributed = types.SimpleNamespace(global_state=alone)


if __name__ == "__main__":
    registry._MODELS = models()
    use_cache_in_every_process()
    runpy.run_path(str(SCRIPT.parent.parent / "main.py"), run_name="__main__")
