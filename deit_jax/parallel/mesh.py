"""The device mesh, and where arrays live on it."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA, FSDP = "data", "fsdp"
_MIN_SHARDED_SIZE = 2**14  # smaller arrays cost more to gather than to keep


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds a (devices / fsdp) × fsdp mesh over all devices of all processes, or over `devices`.

    Devices are in the order of their processes, so that row k of a batch is row k of the global
    array. `jax.make_mesh` may interleave hosts, and refuses the GPUs of several hosts.
    """
    devices = jax.devices() if devices is None else devices
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    grid = np.asarray(ordered).reshape(-1, fsdp)
    # With Explicit axes plain model code does not type-check.
    return Mesh(grid, (DATA, FSDP), axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding under which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def state_shardings(mesh: Mesh, shapes: object) -> object:
    """Returns the sharding of every array of a state: its largest divisible axis over `fsdp`.

    Args:
      mesh: the device mesh; with an `fsdp` axis of 1 everything is replicated.
      shapes: a tree of arrays or ShapeDtypeStructs.
    """
    size = mesh.shape[FSDP]

    def sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = [i for i in np.argsort(leaf.shape)[::-1] if leaf.shape[i] % size == 0]
        if size == 1 or not axes or np.prod(leaf.shape) < _MIN_SHARDED_SIZE:
            return replicated(mesh)
        spec = [None] * len(leaf.shape)
        spec[axes[0]] = FSDP
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(sharding, shapes)


def with_shardings(shapes: object, shardings: object) -> object:
    """Returns a tree of arrays or shapes as ShapeDtypeStructs with `shardings`."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def device_bytes(tree: object) -> int:
    """Returns the bytes that a tree of arrays, or of shapes with shardings, takes on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def to_global(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Builds global arrays from this process's rows (first axis) of a batch."""
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


def to_host(tree: object) -> object:
    """Copies a tree of device arrays, sharded or not, to NumPy arrays on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def sum_over_processes(mine: int) -> int:
    """Returns the sum of `mine` over all processes; every process must call it."""
    return int(multihost_utils.process_allgather(np.int32(mine)).sum())


def wait_for_all(what: str) -> None:
    """Blocks until every process has called it; `what` names the place in time-out messages."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def describe_mesh(mesh: Mesh) -> str:
    """Returns one line about the devices, for the start-up summary."""
    device = mesh.devices.flat[0]
    axes = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return (
        f"{axes} on {mesh.size} {device.device_kind} device(s), {jax.process_count()} process(es)"
    )
