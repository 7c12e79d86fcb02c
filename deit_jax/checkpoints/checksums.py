"""Checksums of arrays and of what is written about them, so that no bit on a disk flips unnoticed.

An array's checksum is the sum, modulo 2³², of a bijective mix of every element's bits with its
place. Any change of one element changes it; so does, but for one case in 2³², any other change.
Sums of parts add up: it does not depend on where the array lives, nor on its sharding.
"""

import functools
import json
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deit_jax import storage, trees
from deit_jax.errors import TransientError
from deit_jax.parallel import hosts

Parts = dict[str, dict[str, int]]  # by an array's name, the sums of its shards by their first place
_BLOCK = 2**15  # words of an array on the host that are mixed at once, in the processor's cache


def of(tree: Any, what: str) -> dict[str, str]:
    """Returns the checksum of every array by its name; every process of a run calls it.

    Device arrays are summed where they live. They may be donated as soon as this returns.

    Args:
      tree: of NumPy arrays or device arrays, sharded in any way.
      what: names the place in errors.

    Raises:
      TransientError: processes hold different copies of an array.
    """
    parts = map(json.loads, hosts.gather(f"the checksums of {what}", json.dumps(part(tree))))
    sums, differing = _join(parts)
    if differing:
        raise TransientError(
            f"{differing} is not the same on all processes, so that {what} is not saved; a device "
            "may be faulty; run the same command to go on from the last checkpoint"
        )
    return sums


def part(tree: Any) -> Parts:
    """Returns the sums of what this process holds of every array, for `check`."""
    arrays = trees.flat(tree)
    # All sums are on their way before the first is waited for.
    pending = {name: _shards(x) for name, x in arrays.items() if isinstance(x, jax.Array)}
    fetched = jax.device_get(pending)
    return {
        name: {place: int(rows.sum(dtype=np.uint32)) for place, rows in fetched[name].items()}
        if name in fetched
        else {"": _host_sum(np.asarray(x))}
        for name, x in arrays.items()
    }


def check(kept: dict[str, str], parts: Iterable[Parts]) -> None:
    """Compares arrays with their checksums.

    Args:
      kept: what `of` returned; it may be of more arrays than these.
      parts: from `part` of every process.

    Raises:
      ValueError: it names an array that differs, or has no checksum.
    """
    sums, differing = _join(parts)
    wrong = [name for name, value in sums.items() if kept.get(name) != value]
    if wrong or differing:
        more = f", nor do {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"{differing or wrong[0]} does not agree with its checksum{more}")


def seal(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns fields as JSON has them, with a digest of all of them at the end."""
    fields = json.loads(json.dumps(fields))
    return fields | {"digest": _digest(fields)}


def unseal(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields that `seal` got. Without a digest they are taken as they are.

    Raises:
      ValueError: they have changed.
    """
    digest = fields.get("digest")
    fields = {name: value for name, value in fields.items() if name != "digest"}
    if digest not in (None, _digest(fields)):
        raise ValueError("it does not agree with its digest")
    return fields


def read_sealed(file: storage.Path) -> dict[str, Any]:
    """Reads the fields that were sealed in a JSON file.

    Raises:
      OSError: it cannot be read.
      ValueError: it holds no fields, or they have changed.
    """
    content = storage.parse_json(file.read_bytes())
    if not isinstance(content, dict):
        raise ValueError(f"{content!r:.20} in place of fields")
    return unseal(content)


def _digest(fields: dict[str, Any]) -> str:
    return trees.digest(json.dumps(fields, sort_keys=True))


def _join(parts: Iterable[Parts]) -> tuple[dict[str, str], str | None]:
    """Returns the checksums, and the name of an array of which two processes differ, if any."""
    joined: Parts = {}
    differing = None
    for sums in parts:
        for name, shards in sums.items():
            known = joined.setdefault(name, {})
            if any(known.get(place, value) != value for place, value in shards.items()):
                differing = differing or name
            known |= shards
    checksums = {name: f"{sum(shards.values()) % 2**32:08x}" for name, shards in joined.items()}
    return checksums, differing


def _mix(words: Any, places: Any) -> Any:
    """Mixes uint32 words with their places: bijective in the word; also those of jax."""
    # Without the mixing, swapped elements that differ in few bits would often leave the sum equal.
    x = words ^ (places * np.uint32(0x9E3779B9))
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)  # "lowbias32" of hash-prospector
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def _host_sum(array: np.ndarray) -> int:
    flat = np.ascontiguousarray(array).reshape(-1)
    words = flat.view(f"uint{8 * min(array.dtype.itemsize, 4)}")
    total = 0
    for start in range(0, words.size, _BLOCK):
        block = words[start : start + _BLOCK].astype(np.uint32)
        places = np.arange(start, start + block.size).astype(np.uint32)
        total += int(_mix(block, places).sum(dtype=np.uint64))
    return total % 2**32


def _shards(array: jax.Array) -> dict[str, jax.Array]:
    """Returns sums over the shards that this process holds, by their first place in the array."""
    inside = array.sharding.shard_shape(array.shape)
    split = tuple(k for k, size in enumerate(array.shape) if inside[k] != size)
    found = {}
    for shard in _device_sums(array, split).addressable_shards:
        place = ",".join(str(index.start or 0) for index in shard.index)
        found.setdefault(place, shard.data)
    return found


@functools.partial(jax.jit, static_argnums=1)
def _device_sums(array: jax.Array, split: tuple[int, ...]) -> jax.Array:
    """Sums over all axes but those that are split over devices: no device waits for another."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(array, f"uint{8 * min(array.dtype.itemsize, 4)}")
    words, places, stride = words.astype(jnp.uint32), np.uint32(0), 1
    for axis in reversed(range(words.ndim)):
        iota = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        places += iota * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    rest = tuple(axis for axis in range(words.ndim) if axis not in split)
    return _mix(words, places).sum(axis=rest, dtype=jnp.uint32)
