"""The gradient of a batch, taken in micro-batches one after the other: less memory, same update."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

Tree = dict[str, object]
# gradient(params, batch_stats, images, targets, key) → (gradients, batch_stats, metrics)
Gradient = Callable[[Tree, Tree, jax.Array, jax.Array, jax.Array], tuple[Tree, Tree, dict]]


def accumulate(
    gradient: Gradient,
    params: Tree,
    batch_stats: Tree,
    images: jax.Array,
    targets: jax.Array,
    key: jax.Array,
    *,
    steps: int,
    replicated: NamedSharding | None = None,
) -> tuple[Tree, Tree, dict]:
    """Returns what `gradient` would for the whole batch, from `steps` passes over parts of it.

    Where the gradient is a mean over images, so is the result: the same but for rounding. Noise
    that the network draws for itself (stochastic depth) has the same distribution but other draws,
    and BatchNorm normalises each micro-batch by its own statistics and records them one after the
    other, as PyTorch does.

    Args:
      gradient: of one micro-batch; metrics are scalars that are means over its images.
      params: what the gradient is taken of.
      batch_stats: BatchNorm statistics before the batch.
      images: [B,H,W,3], augmented and mixed as one batch.
      targets: [B,K].
      key: of the network's noise.
      steps: the number of micro-batches; divides the images of every device.
      replicated: any sharding of the mesh over which the batch lies, if there is one.
    """
    if steps == 1:
        return gradient(params, batch_stats, images, targets, key)

    def one(carry: tuple[Tree, Tree], micro: tuple) -> tuple[tuple[Tree, Tree], dict]:
        total, batch_stats = carry
        grads, batch_stats, metrics = gradient(params, batch_stats, *micro)
        return (jax.tree.map(jnp.add, total, grads), batch_stats), metrics

    parts = [micro_batches(x, steps, replicated) for x in (images, targets)]
    keys = jax.random.split(key, steps)
    zeros = jax.tree.map(jnp.zeros_like, params)
    (total, batch_stats), metrics = jax.lax.scan(one, (zeros, batch_stats), (*parts, keys))
    mean = jax.tree.map(lambda x: x / steps, total)
    return mean, batch_stats, jax.tree.map(lambda x: x.mean(0), metrics)


def micro_batches(x: jax.Array, steps: int, replicated: NamedSharding | None) -> jax.Array:
    """Cuts rows [B,...] into [steps,B/steps,...], a share of every device's rows in each.

    Consecutive rows of the batch lie on one device: micro-batches of consecutive rows would leave
    the other devices idle, or move images between them.
    """
    mesh = None if replicated is None else replicated.mesh
    devices = 1 if mesh is None else mesh.size
    x = x.reshape(devices, steps, -1, *x.shape[1:]).swapaxes(0, 1)
    x = x.reshape(steps, -1, *x.shape[3:])
    if mesh is None:
        return x
    rows = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))
    return jax.lax.with_sharding_constraint(x, rows)
