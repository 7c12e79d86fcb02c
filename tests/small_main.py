"""main.py that starts sooner, for tests that compile more than they train.

python -m tests.small_main --config=configs/digits.py ...

The models of the digits have two blocks in place of four or six, the digits are read without the
rest of scikit-learn, and every process of a run uses JAX's compilation cache.
"""

import dataclasses
import importlib.util
import runpy
import sys
import types
from pathlib import Path

import numpy as np
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


def read_digits_alone() -> None:
    """Puts a module that only loads the digits in the place of scikit-learn, which takes 2 s."""
    spec = importlib.util.find_spec("sklearn")
    file = Path(spec.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")

    def load_digits() -> types.SimpleNamespace:
        table = np.loadtxt(file, delimiter=",")
        images, target = table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(int)
        return types.SimpleNamespace(images=images, target=target)

    package, datasets = types.ModuleType("sklearn"), types.ModuleType("sklearn.datasets")
    package.__spec__, datasets.load_digits = spec, load_digits
    sys.modules |= {"sklearn": package, "sklearn.datasets": datasets}


def use_cache_in_every_process() -> None:
    """JAX lets process 0 alone write programs to its cache, but on CPUs each has its own keys."""
    alone = types.SimpleNamespace(process_id=0, client=None)
    compiler.distributed = types.SimpleNamespace(global_state=alone)


if __name__ == "__main__":
    registry._MODELS = models()
    read_digits_alone()
    use_cache_in_every_process()
    runpy.run_path(str(SCRIPT.parent.parent / "main.py"), run_name="__main__")
