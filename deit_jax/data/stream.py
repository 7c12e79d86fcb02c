"""Position arithmetic: which example stands in which row of which batch.

The training stream is endless. Its element at position p is a pure function of (seed, p): p gives
the epoch and the place in it, a keyed permutation gives the image, and p seeds the augmentation.
There are no shuffle buffers, so any step starts at once and a run resumes by its step number alone.
Rows belong to the global batch first and to processes second; more processes change nothing.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from deit_jax.data import ops
from deit_jax.data.sources import Source
from deit_jax.errors import InputError

_PREFETCH = 2  # batches; a DeiT batch of 1024 is 154 MB

Batch = dict[str, np.ndarray]


def train_batches(
    source: Source,
    input_config: ConfigDict,
    *,
    image_size: int,
    batch_size: int,
    steps_per_epoch: int,
    seed: int,
    start_step: int = 0,
    group_size: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Yields this process's rows of the global batches from `start_step` on, without end.

    Args:
      source: the train split.
      input_config: the `input` group of the config.
      image_size: side S of the images.
      batch_size: rows of the global batch.
      steps_per_epoch: batches after which a new permutation begins.
      seed: of order and augmentation.
      start_step: number of the first batch; any number is as quick as 0.
      group_size: consecutive rows that stand for one GPU of the reference (`_Order.position`).
      process_index: of this process.
      process_count: processes that share the batch; each takes batch_size / process_count rows.

    Returns:
      {"image": uint8 [b, S, S, 3], "label": int32 [b]}, read-only.

    Raises:
      InputError: arguments that do not fit together; while iterating, an example that cannot be
        read, by name.
    """
    order = _Order(
        num_examples=source.num_examples,
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        seed=seed,
        repeats=input_config.repeats,
        group_size=group_size or batch_size,
    )
    rows = _Rows(batch_size, process_index, process_count)
    transform = ops.train_transform(input_config, image_size=image_size)

    def load(row: tf.Tensor) -> dict[str, tf.Tensor]:
        position = order.position(row)
        data, label = source.fetch(order.index(position))
        image = transform(data, tf.stack([tf.cast(seed, tf.int64), position]))
        return {"image": image, "label": _checked(label, source.num_classes)}

    def name(row: tf.Tensor) -> str:
        return source.example_id(int(order.index(order.position(row))))

    dataset = tf.data.Dataset.range(start_step * rows.local, tf.int64.max)
    return _iterate(dataset, load, name, rows, first_batch=start_step, source=source)


def eval_batches(
    source: Source,
    input_config: ConfigDict,
    *,
    image_size: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Yields this process's rows of one pass over the split, every example once, in order.

    Every process yields ceil(num_examples / batch_size) batches; rows past the end are zeros with
    mask 0.

    Returns:
      {"image": uint8 [b, S, S, 3], "label": int32 [b], "mask": float32 [b]}, read-only.

    Raises:
      InputError: as `train_batches`.
    """
    rows = _Rows(batch_size, process_index, process_count)
    transform = ops.eval_transform(input_config, image_size=image_size)

    def example(row: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        data, label = source.fetch(row)
        return transform(data), _checked(label, source.num_classes)

    def padding() -> tuple[tf.Tensor, tf.Tensor]:
        return tf.zeros((image_size, image_size, 3), tf.uint8), tf.constant(0, tf.int32)

    def load(row: tf.Tensor) -> dict[str, tf.Tensor]:
        real = row < source.num_examples
        image, label = tf.cond(real, lambda: example(row), padding)
        return {"image": image, "label": label, "mask": tf.cast(real, tf.float32)}

    def name(row: tf.Tensor) -> str:
        return source.example_id(int(row))

    batches = -(-source.num_examples // batch_size)
    dataset = tf.data.Dataset.range(batches * rows.local)
    return _iterate(dataset, load, name, rows, first_batch=0, source=source)


def example_ids(
    source: Source,
    *,
    step: int,
    batch_size: int,
    steps_per_epoch: int,
    seed: int,
    repeats: int,
    group_size: int | None = None,
) -> list[str]:
    """The names of the examples in the global training batch of a step, row by row."""
    order = _Order(
        num_examples=source.num_examples,
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        seed=seed,
        repeats=repeats,
        group_size=group_size or batch_size,
    )
    rows = tf.data.Dataset.range(step * batch_size, (step + 1) * batch_size)
    indices = rows.map(lambda row: order.index(order.position(row)))
    return [source.example_id(int(index)) for index in indices.as_numpy_iterator()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Order:
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

    def position(self, row: tf.Tensor) -> tf.Tensor:
        """Stream position of a global row, counted over all batches.

        The reference's sampler deals positions to its W GPUs in turn, so that the repeats of an
        image go to different GPUs: row j of GPU g in a batch has position g + W·j.
        """
        batch, row = row // self.batch_size, row % self.batch_size
        group, place = row // self.group_size, row % self.group_size
        return batch * self.batch_size + group + place * (self.batch_size // self.group_size)

    def index(self, position: tf.Tensor) -> tf.Tensor:
        """Example at a stream position: each epoch permutes the split, then repeats in place."""
        epoch_size = self.steps_per_epoch * self.batch_size
        epoch, offset = position // epoch_size, position % epoch_size
        if self.num_examples == 1:  # index_shuffle needs two
            return tf.zeros_like(offset)
        return tf.random.experimental.index_shuffle(
            offset // self.repeats,
            seed=tf.stack([tf.cast(self.seed, tf.int64), epoch]),
            max_index=tf.constant(self.num_examples - 1, tf.int64),
        )


@dataclasses.dataclass(frozen=True)
class _Rows:
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
        return self.batch_size // self.process_count

    def global_row(self, local_row: tf.Tensor) -> tf.Tensor:
        """Global row, counted over all batches, of a local row, counted likewise."""
        batch, row = local_row // self.local, local_row % self.local
        return batch * self.batch_size + self.process_index * self.local + row


def _iterate(
    dataset: tf.data.Dataset,
    load: Callable[[tf.Tensor], dict[str, tf.Tensor]],
    name: Callable[[tf.Tensor], str],
    rows: _Rows,
    *,
    first_batch: int,
    source: Source,
) -> Iterator[Batch]:
    """Loads and batches the local rows in `dataset`; a failure names its example."""
    dataset = dataset.map(rows.global_row)
    dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    dataset = dataset.batch(rows.local, drop_remainder=True).prefetch(_PREFETCH)
    iterator = dataset.as_numpy_iterator()
    for number in itertools.count(first_batch):
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except tf.errors.OpError:
            # tf.data does not say which element failed: load the batch again, one by one.
            span = tf.data.Dataset.range(number * rows.local, (number + 1) * rows.local)
            singles = iter(span.map(rows.global_row).map(load))
            for row in span.map(rows.global_row):
                try:
                    next(singles)
                except tf.errors.OpError as cause:
                    raise InputError(
                        f"{source.description}: {name(row)} cannot be used: {_reason(cause)}; "
                        "replace or remove it"
                    ) from cause
            raise
        yield batch


def _checked(label: tf.Tensor, num_classes: int) -> tf.Tensor:
    inside = (label >= 0) & (label < num_classes)
    message = f"label outside the class range 0..{num_classes - 1}:"
    with tf.control_dependencies([tf.debugging.Assert(inside, [message, label])]):
        return tf.identity(label)


def _reason(error: tf.errors.OpError) -> str:
    """TensorFlow's message in one line, without node names."""
    text = re.sub(r"\[\[.*?\]\]|\{\{.*?\}\}|\[Op:.*?\]|name:", " ", error.message)
    return " ".join(text.split())
