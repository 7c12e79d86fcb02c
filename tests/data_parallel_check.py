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
from deit_jax import checkpoint, loop, parallel, startup, steps
from deit_jax import collectives as crossings
from deit_jax.models import registry


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
    setup = startup.check(config, workdir)
    # A teacher with random weights has the same program as a trained one.
    model = registry.create_model("regnety_testing", num_classes=10, rngs=nnx.Rngs(0))
    teacher, variables = steps.split_model(model)
    manager = checkpoint.TrainCheckpoints(workdir, keep=1)
    state, shardings, _, _ = startup.initial_state(setup, manager)
    step = loop.jit_train_step(setup, shardings, teacher)
    batch = {
        "image": np.zeros((config.train.batch_size, 32, 32, 3), np.uint8),
        "label": np.zeros(config.train.batch_size, np.int32),
    }
    batch = parallel.to_global(batch, parallel.batch_sharding(setup.mesh))
    variables = parallel.replicate(variables, setup.mesh)
    text = step.lower(state, variables, batch).compile().as_text()
    return dict(collections.Counter(one.kind for one in crossings.read(text, jax.device_count())))


if __name__ == "__main__":
    print(json.dumps(collectives(sys.argv[1], sys.argv[2:]) | {"devices": jax.device_count()}))
