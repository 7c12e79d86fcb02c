"""The devices of a program that is being traced, for what XLA does not divide among them itself.

A Pallas kernel is a program for one device. Within `of(mesh)` the code that calls one knows which
devices there are, and `on_each` runs it on each of them with its own rows of the batch.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax
from jax.sharding import Mesh

from deit_jax.parallel import axis
from deit_jax.parallel.mesh import batch_sharding, replicated

_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)

_anywhere: contextvars.ContextVar[bool] = contextvars.ContextVar("anywhere", default=False)


@contextlib.contextmanager
def anywhere() -> Iterator[None]:
    """Says that what is traced within is a program for devices that are not known."""
    token = _anywhere.set(True)
    try:
        yield
    finally:
        _anywhere.reset(token)


@contextlib.contextmanager
def of(mesh: Mesh | None) -> Iterator[None]:
    """Says that what is traced within is a program for the devices of `mesh`, if there is one."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def platform() -> str | None:
    """Returns the platform that the program is for, or None where its devices are not known.

    They are within `of`, under pmap, and where JAX has one device only; never within `anywhere`.
    """
    if _anywhere.get():
        return None
    mesh = _mesh.get()
    if mesh is not None:
        return mesh.devices.flat[0].platform
    if axis.count() > 1 or jax.device_count() == 1:
        return jax.default_backend()
    return None


def on_each(function: Callable[..., jax.Array], rows: jax.Array, *whole: jax.Array) -> jax.Array:
    """Calls `function` on each device with its rows of the batch; what it returns are its rows.

    Args:
      function: of the arrays that follow; its gradients with respect to `whole` are added up.
      rows: an array whose first axis is the batch.
      whole: arrays that every device has.
    """
    mesh = _mesh.get()
    if mesh is None or mesh.size == 1:
        return function(rows, *whole)
    batch = batch_sharding(mesh).spec
    specs = (batch, *[replicated(mesh).spec] * len(whole))
    # Kernels say nothing of how their results vary over the devices.
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=batch, check_vma=False)
    return mapped(rows, *whole)
