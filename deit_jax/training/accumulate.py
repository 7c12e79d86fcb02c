"""The gradient of a batch, taken in micro-batches one after the other: less memory, same update."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from deit_jax.models.network import Tree, Variables

# loss(params, batch_stats, images, targets, key) → (mean loss, (batch_stats, metrics))
Loss = Callable[[Tree, Tree, jax.Array, jax.Array, jax.Array], tuple[jax.Array, tuple[Tree, dict]]]


def gradient(
    loss: Loss,
    model: Variables,
    images: jax.Array,
    targets: jax.Array,
    key: jax.Array,
    *,
    steps: int = 1,
    replicated: NamedSharding | None = None,
) -> tuple[Tree, Tree, dict]:
    """Returns the gradient of `loss`, and the BatchNorm statistics and metrics that it gives.

    With several `steps` the gradient and the metrics are means over the micro-batches: the same
    but for rounding, since the loss is a mean over images. Noise that the network draws for itself
    (stochastic depth) has the same distribution but other draws, and BatchNorm normalises each
    micro-batch by its own statistics and records them one after the other, as PyTorch does.

    Args:
      loss: of one micro-batch, with the metrics as scalars.
      model: the parameters, and the BatchNorm statistics before the batch.
      images: [B,H,W,3], augmented and mixed as one batch.
      targets: [B,K].
      key: of the network's noise.
      steps: the number of micro-batches; divides the images of every device.
      replicated: any sharding on the mesh over which the batch lies, if there is one.
    """

    def one(batch_stats: Tree, *micro: jax.Array) -> tuple[Tree, Tree, dict]:
        grads, (batch_stats, metrics) = jax.grad(loss, has_aux=True)(
            model.params, batch_stats, *micro
        )
        return grads, batch_stats, metrics

    if steps == 1:
        return one(model.batch_stats, images, targets, key)

    def add(carry: tuple[Tree, Tree], micro: tuple) -> tuple[tuple[Tree, Tree], dict]:
        total, batch_stats = carry
        grads, batch_stats, metrics = one(batch_stats, *micro)
        return (jax.tree.map(jnp.add, total, grads), batch_stats), metrics

    zeros = jax.tree.map(jnp.zeros_like, model.params)
    parts = [micro_batches(x, steps, replicated) for x in (images, targets)]
    xs = (*parts, jax.random.split(key, steps))
    (total, batch_stats), metrics = jax.lax.scan(add, (zeros, model.batch_stats), xs)
    mean = jax.tree.map(lambda x: x / steps, total)
    return mean, batch_stats, jax.tree.map(lambda x: x.mean(0), metrics)


def micro_batches(x: jax.Array, steps: int, replicated: NamedSharding | None) -> jax.Array:
    """Cuts rows [B,...] into [steps,B/steps,...], each with a share of every device's rows.

    Consecutive rows of the batch lie on one device: micro-batches of consecutive rows would leave
    the other devices idle, or move images between them.
    """
    devices = 1 if replicated is None else replicated.mesh.size
    x = x.reshape(devices, steps, -1, *x.shape[1:]).swapaxes(0, 1)
    x = x.reshape(steps, -1, *x.shape[3:])
    if replicated is None:
        return x
    mesh = replicated.mesh
    rows = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))
    return jax.lax.with_sharding_constraint(x, rows)
