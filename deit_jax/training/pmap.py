"""The training step under `jax.pmap`: one program a device, in place of one over the mesh.

Between steps the state, the teacher and the batch are the mesh program's arrays, so that
evaluation, checkpoints and model folders do not know the difference, and a run may change over.
"""

from collections.abc import Callable

import jax
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec

from deit_jax.models.network import Network, Variables
from deit_jax.parallel import axis
from deit_jax.parallel.mesh import batch_sharding
from deit_jax.training.run import Run
from deit_jax.training.state import TrainState
from deit_jax.training.step import make_train_step


def pmap_train_step(
    run: Run, teacher: Network | None
) -> Callable[[TrainState, Variables | None, dict], tuple[TrainState, dict]]:
    """Returns what `loop.jit_train_step` does, for `parallel.backend` "pmap"."""
    mesh = run.mesh
    step = make_train_step(run.config, run.plan, run.network, run.optimizer, teacher=teacher)
    # Without an axis of devices in state and metrics: they are equal on all, and go on as they are.
    pmapped = jax.pmap(
        step,
        axis_name=axis.NAME,
        in_axes=(None, None, 0),
        out_axes=None,
        donate_argnums=0,
        devices=list(mesh.devices.flat),
    )
    by_device = jax.jit(
        lambda batch: jax.tree.map(lambda x: x.reshape(mesh.size, -1, *x.shape[1:]), batch),
        out_shardings=batch_sharding(mesh),
    )
    whole, rows = PartitionSpec(), batch_sharding(mesh).spec
    # pmap knows the arrays of its own process only; these two change no buffer.
    to_local = multihost_utils.global_array_to_host_local_array
    to_global = multihost_utils.host_local_array_to_global_array

    def train_step(
        state: TrainState, teacher_variables: Variables | None, batch: dict
    ) -> tuple[TrainState, dict]:
        state, teacher_variables = to_local((state, teacher_variables), mesh, whole)
        batch = to_local(by_device(batch), mesh, rows)
        return to_global(pmapped(state, teacher_variables, batch), mesh, whole)

    return train_step
