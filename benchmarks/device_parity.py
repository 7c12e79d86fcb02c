"""One training step on two devices from the same weights and images: do they agree?"""

from typing import Any

import jax
import numpy as np
import optax

from benchmarks import jax_step
from benchmarks.jax_step import Work
from benchmarks.turns import Program

# The relative difference of all gradients together that is still rounding. In bfloat16 it is what
# the CPU's own step in bfloat16 differs from that in float32, and half as much again.
FLOAT32, MARGIN = 1e-4, 1.5

Row = dict[str, Any]


def build(work: Work, *, on_cpu: bool) -> Program:
    """Takes a step in float32 and one in bfloat16; facts `float32` and `bfloat16` tell of them.

    Each has `loss`, `grad_norm` and `gradient`, all gradients in one float32 array.
    """
    if on_cpu:
        jax.config.update("jax_platforms", "cpu")
    facts = {dtype: _step(work._replace(dtype=dtype)) for dtype in ("float32", "bfloat16")}
    return Program(lambda count: None, facts, lambda: None)


def _step(work: Work) -> Row:
    step, (state, *rest) = jax_step.train(work)
    rng = np.random.default_rng(0)

    def drawn(old: jax.Array) -> jax.Array:  # not by JAX, whose normal variables differ in rounding
        noise = 0.02 * rng.standard_normal(old.shape, np.float32)
        return jax.device_put(np.asarray(old).round() + noise, old.sharding)  # scales are near 1

    model = state.model.replace(params=jax.tree.map(drawn, state.model.params))
    state, metrics = step(state.replace(model=model), *rest)
    # After one step Adam's mean is a tenth of the gradient. The new weights would tell less: its
    # first update is nearly a sign, and the sign of a gradient near zero is chance.
    leaves = jax.tree.leaves(optax.tree_utils.tree_get(state.opt_state, "mu"))
    gradient = np.concatenate([np.asarray(x, np.float32).ravel() for x in leaves])
    return {name: float(metrics[name]) for name in ("loss", "grad_norm")} | {"gradient": gradient}


def compare(device: Row, cpu: Row) -> list[Row]:
    """Returns a row for each dtype, from the facts of two processes.

    `difference` is relative to the CPU's gradient in float32, whichever dtype the device had.
    """

    def difference(gradient: np.ndarray) -> float:
        exact = cpu["float32"]["gradient"]
        return float(np.linalg.norm(gradient - exact) / np.linalg.norm(exact))

    limits = {"float32": FLOAT32, "bfloat16": MARGIN * difference(cpu["bfloat16"]["gradient"])}
    rows = []
    for dtype, limit in limits.items():
        found = difference(device[dtype]["gradient"])
        rows.append(
            {
                "program": dtype,
                "loss": device[dtype]["loss"],
                "loss_cpu": cpu[dtype]["loss"],
                "difference": found,
                "limit": limit,
                "holds": found <= limit,
            }
        )
    return rows
