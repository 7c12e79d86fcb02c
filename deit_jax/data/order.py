"""Position arithmetic: which example stands in which row of which batch.

The training stream is endless. Its element at position p is a pure function of (seed, p): p gives
the epoch and the place in it, a keyed permutation gives the image, and p seeds the augmentation.
There are no shuffle buffers, so any step starts at once and a run resumes by its step number alone.
Rows belong to the global batch first and to processes second; more processes change nothing.
"""

import dataclasses

import tensorflow as tf

from deit_jax.errors import InputError

NONE = -1  # in place of a row, a position or an example: there is none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """The order of the training stream, as arithmetic on int64 scalars."""

    num_examples: int
    batch_size: int
    steps_per_epoch: int
    seed: int
    repeats: int
    group_size: int

    def __post_init__(self) -> None:
        if self.batch_size % self.group_size:
            raise InputError(
                f"group_size is {self.group_size}, which does not divide the batch of "
                f"{self.batch_size}; choose a divisor"
            )
        images = self.steps_per_epoch * self.batch_size
        views = self.num_examples * self.repeats
        if not 0 < images <= views:
            raise InputError(
                f"an epoch of {self.steps_per_epoch} batches of {self.batch_size} does not fit "
                f"{self.num_examples} examples × {self.repeats} repeats; choose a batch and a "
                f"number of steps whose product is in 1..{views}"
            )

    @property
    def _epoch_size(self) -> int:
        return self.steps_per_epoch * self.batch_size

    @property
    def _slots_per_epoch(self) -> int:
        """An epoch permutes the split and repeats every image in place; a slot is its repeats."""
        return -(-self._epoch_size // self.repeats)

    def slots(self, step: tf.Tensor) -> tf.Tensor:
        """The slots, counted over all epochs, with views in the batch of a step; int64 [n]."""
        epoch, offset = _divmod(step * self.batch_size, self._epoch_size)
        first, last = offset // self.repeats, (offset + self.batch_size - 1) // self.repeats
        return epoch * self._slots_per_epoch + tf.range(first, last + 1)

    def positions(self, slots: tf.Tensor) -> tf.Tensor:
        """Stream positions [n, repeats] of the views in slots [n]; NONE past an epoch's end."""
        epoch, slot = _divmod(slots[:, None], self._slots_per_epoch)
        offset = slot * self.repeats + tf.range(self.repeats, dtype=tf.int64)
        return tf.where(offset < self._epoch_size, epoch * self._epoch_size + offset, NONE)

    def row(self, positions: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        """Rows of the positions in the global batch of a step; NONE where they are not in it.

        The reference's sampler deals positions to its W GPUs in turn, so that the repeats of an
        image go to different GPUs: row j of GPU g in a batch has position g + W·j.
        """
        batch, position = _divmod(positions, self.batch_size)
        place, group = _divmod(position, self.batch_size // self.group_size)
        return tf.where(batch == step, group * self.group_size + place, NONE)

    def index(self, slots: tf.Tensor, unreadable: list[int] | None = None) -> tf.Tensor:
        """Examples in slots [n]; unreadable ones give way to the next in the order."""
        epoch, slot = _divmod(slots, self._slots_per_epoch)

        def shuffled(slot: tf.Tensor) -> tf.Tensor:
            if self.num_examples == 1:  # index_shuffle needs two
                return tf.zeros_like(slot)
            return tf.random.experimental.index_shuffle(
                slot % self.num_examples,
                seed=tf.stack([tf.cast(self.seed, tf.int64), epoch[0]]),
                max_index=tf.constant(self.num_examples - 1, tf.int64),
            )

        index = shuffled(slot)
        if not unreadable:
            return index

        def advance(slot: tf.Tensor, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            slot = tf.where(among(index, unreadable), slot + 1, slot)
            return slot, shuffled(slot)

        _, index = tf.while_loop(
            lambda _, index: tf.reduce_any(among(index, unreadable)), advance, (slot, index)
        )
        return index


@dataclasses.dataclass(frozen=True)
class Rows:
    """This process's share of the rows of every global batch."""

    batch_size: int
    process_index: int
    process_count: int

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise InputError(
                f"batch_size is {self.batch_size}, expected a positive multiple of the "
                f"{self.process_count} processes that share it"
            )

    @property
    def local(self) -> int:
        """How many they are."""
        return self.batch_size // self.process_count

    @property
    def first(self) -> int:
        """The first of them in the global batch."""
        return self.process_index * self.local

    def local_row(self, row: tf.Tensor) -> tf.Tensor:
        """Rows among this process's, of rows of the global batch; NONE for those of others."""
        mine = (row >= self.first) & (row < self.first + self.local)
        return tf.where(mine, row - self.first, NONE)


def _divmod(a: tf.Tensor, b: int) -> tuple[tf.Tensor, tf.Tensor]:
    return a // b, a % b


def among(index: tf.Tensor, listed: list[int]) -> tf.Tensor:
    """Which of the examples [n] are listed, bool [n]."""
    return tf.reduce_any(index[:, None] == tf.constant(listed, tf.int64), axis=1)
