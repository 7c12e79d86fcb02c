"""Per-device helpers for pmap: take this device's rows, average over devices.

Under `jax.pmap` over the axis `NAME` a device sees only its own consecutive rows of the batch. What
is random for each row is drawn for all rows on every device, which then keeps its own rows, so that
the draws are those of one program over all devices. Outside such a pmap the functions do nothing.
"""

import jax

NAME = "pmap"


def count() -> int:
    """Returns the number of devices that share the batch: 1 outside pmap."""
    try:
        return jax.lax.axis_size(NAME)
    except NameError:  # how JAX says that the axis is not bound
        return 1


def own_rows(tree: object) -> object:
    """Returns this device's rows of arrays that are the same on every device."""
    devices = count()
    if devices == 1:
        return tree
    place = jax.lax.axis_index(NAME)

    def own(x: jax.Array) -> jax.Array:
        rows = len(x) // devices
        return jax.lax.dynamic_slice_in_dim(x, place * rows, rows)

    return jax.tree.map(own, tree)


def mean(tree: object) -> object:
    """Returns the mean over the devices, each of which holds the mean over its own rows."""
    return tree if count() == 1 else jax.lax.pmean(tree, NAME)
