"""Position arithmetic: which example stands in which row of which batch.

The training stream is endless. Its element at position p is a pure function of (seed, p): p gives
the epoch and the place in it, a keyed permutation gives the image, and p seeds the augmentation.
There are no shuffle buffers, so any step starts at once and a run resumes by its step number alone.
Rows belong to the global batch first and to processes second; more processes change nothing.
"""

import dataclasses

import tensorflow as tf

from deit_jax.data.plan import InputPlan
from deit_jax.errors import InputError

NONE = -1  # in place of a row, a position or an example: there is none
_SEED_BITS, _KEY_BITS = 32, 8  # of a seed, and of those that a permutation tells apart


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of the training stream of so many examples, as arithmetic on int64 tensors.

    An epoch permutes the split and repeats every image in place. A slot is the place of an image
    with its repeats, counted over all epochs; a position is that of a view, of which an epoch has
    steps_per_epoch · batch_size.

    Raises:
      InputError: an epoch has more views than there are examples and repeats.
    """

    plan: InputPlan
    num_examples: int

    def __post_init__(self) -> None:
        plan, most = self.plan, self.num_examples * self.plan.input.repeats
        if not 0 < self._epoch_size <= most:
            raise InputError(
                f"an epoch of {plan.steps_per_epoch} batches of {plan.batch_size} does not fit "
                f"{self.num_examples} examples × {plan.input.repeats} repeats; choose a batch and "
                f"a number of steps whose product is in 1..{most}"
            )

    @property
    def _epoch_size(self) -> int:
        return self.plan.steps_per_epoch * self.plan.batch_size

    @property
    def _slots_per_epoch(self) -> int:
        return -(-self._epoch_size // self.plan.input.repeats)

    def slots(self, step: tf.Tensor) -> tf.Tensor:
        """Returns the slots that have views in the batch of a step (int64 scalar), int64 [n]."""
        batch_size, repeats = self.plan.batch_size, self.plan.input.repeats
        epoch, offset = _divmod(step * batch_size, self._epoch_size)
        first, last = offset // repeats, (offset + batch_size - 1) // repeats
        return epoch * self._slots_per_epoch + tf.range(first, last + 1)

    def positions(self, slots: tf.Tensor) -> tf.Tensor:
        """Returns the positions in slots [n], int64 [n, repeats]; NONE past an epoch's end."""
        epoch, slot = _divmod(slots[:, None], self._slots_per_epoch)
        repeats = self.plan.input.repeats
        offset = slot * repeats + tf.range(repeats, dtype=tf.int64)
        return tf.where(offset < self._epoch_size, epoch * self._epoch_size + offset, NONE)

    def row(self, positions: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        """Returns the rows of positions in the global batch of a step; NONE for those not in it.

        The reference's sampler deals positions to its W GPUs in turn, so that the repeats of an
        image go to different GPUs: row j of GPU g in a batch has position g + W·j.
        """
        batch_size, group_size = self.plan.batch_size, self.plan.group_size
        batch, position = _divmod(positions, batch_size)
        place, group = _divmod(position, batch_size // group_size)
        return tf.where(batch == step, group * group_size + place, NONE)

    def local_row(self, positions: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        """Returns the rows of positions in this process's batch of a step; NONE as `row` has it."""
        row = self.row(positions, step) - self.plan.first_row
        return tf.where((row >= 0) & (row < self.plan.local_rows), row, NONE)

    def index(self, slots: tf.Tensor, unreadable: list[int] | None = None) -> tf.Tensor:
        """Returns the examples in slots [n]; unreadable ones give way to the next in the order."""
        epoch, slot = _divmod(slots, self._slots_per_epoch)

        def shuffled(slot: tf.Tensor) -> tf.Tensor:
            return self._permuted(slot % self.num_examples, epoch[0])

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

    def _permuted(self, slot: tf.Tensor, epoch: tf.Tensor) -> tf.Tensor:
        """Returns the places [n] of an epoch's permutation.

        TensorFlow's cipher takes the lowest bits of seed and epoch: 8 of each for up to 65,537
        examples, 12 for ImageNet's. What is above the lowest 8 permutes once more, so that epoch
        256 is not epoch 0 again.
        """
        if self.num_examples == 1:  # index_shuffle needs two
            return slot
        seed = tf.stack([tf.cast(self.plan.seed, tf.int64), epoch])
        for shift in range(0, _SEED_BITS, _KEY_BITS):
            key = tf.bitwise.right_shift(seed, tf.constant(shift, tf.int64))
            again = tf.random.experimental.index_shuffle(
                slot, seed=key, max_index=tf.constant(self.num_examples - 1, tf.int64)
            )
            slot = tf.where(tf.reduce_any(key > 0), again, slot) if shift else again
        return slot


def among(index: tf.Tensor, listed: list[int]) -> tf.Tensor:
    """Returns which of the examples [n] are listed, bool [n]."""
    return tf.reduce_any(index[:, None] == tf.constant(listed, tf.int64), axis=1)


def _divmod(a: tf.Tensor, b: int) -> tuple[tf.Tensor, tf.Tensor]:
    return a // b, a % b
