"""Prints, as JSON, the collectives in a run's compiled train step; for a process with many devices.

python tests/data_parallel_check.py WORKDIR [config overrides as GROUP.FIELD=INT ...]
"""

import collections
import json
import sys

import jax
import numpy as np
from flax import nnx

from configs import digits_distill
from deit_jax.checkpoints.training import TrainCheckpoints
from deit_jax.models import registry
from deit_jax.models.network import split_model
from deit_jax.parallel.mesh import batch_sharding, replicate, to_global
from deit_jax.planning.collectives import read
from deit_jax.training import loop
from deit_jax.training.setup import check, initial_state


def collectives(workdir: str, overrides: list[str]) -> dict[str, int]:
    """Counts the collective operations in the optimised HLO of the step."""
    config = digits_distill.get_config()
    config.mixing.random_erasing = 0.25
    config.model.drop_path_rate = 0.1
    config.optimizer.clip_norm = 1.0
    config.mixing.cutmix_alpha = 1.0
    for override in overrides:
        name, value = override.split("=")
        group, field = name.split(".")
        config[group][field] = int(value)
    setup = check(config, workdir)
    # A teacher with random weights has the same program as a trained one.
    model = registry.create_model("regnety_testing", num_classes=10, rngs=nnx.Rngs(0))
    teacher, variables = split_model(model)
    manager = TrainCheckpoints(workdir, keep=1)
    state, shardings, _, _ = initial_state(setup, manager)
    step = loop.jit_train_step(setup, shardings, teacher)
    batch = {
        "image": np.zeros((config.train.batch_size, 32, 32, 3), np.uint8),
        "label": np.zeros(config.train.batch_size, np.int32),
    }
    batch = to_global(batch, batch_sharding(setup.mesh))
    variables = replicate(variables, setup.mesh)
    text = step.lower(state, variables, batch).compile().as_text()
    return dict(collections.Counter(one.kind for one in read(text, jax.device_count())))


if __name__ == "__main__":
    print(json.dumps(collectives(sys.argv[1], sys.argv[2:]) | {"devices": jax.device_count()}))
