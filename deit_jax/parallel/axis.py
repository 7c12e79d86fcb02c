"""What one device's program does for the whole batch, where each sees only its share of the rows.

Under `jax.pmap` a device computes on consecutive rows of the batch, at its own place along a named
axis. What is random for each row is drawn for all rows by every device, which then keeps its own:
so the noise is that of the one program over a mesh. An axis of None is that program, which sees
every row.
"""

import jax


def count(axis_name: str | None) -> int:
    """How many devices share the batch."""
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)


def own_rows(tree: object, axis_name: str | None) -> object:
    """This device's share of the first axis of arrays that are the same on every device."""
    if axis_name is None:
        return tree
    place = jax.lax.axis_index(axis_name)

    def own(x: jax.Array) -> jax.Array:
        rows = len(x) // count(axis_name)
        return jax.lax.dynamic_slice_in_dim(x, place * rows, rows)

    return jax.tree.map(own, tree)


def mean(tree: object, axis_name: str | None) -> object:
    """The mean over the whole batch of what are means over the devices' shares."""
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)
