"""Batches of images for training and evaluation, from any step on, for any number of processes.

Which example stands in which row is arithmetic (`order`). The views of an image in one process's
rows of a batch are loaded together, since reading and decoding cost as much as all the rest.
"""

from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf
from absl import logging

from deit_jax.data import transforms
from deit_jax.data.ahead import ahead_of
from deit_jax.data.failures import ERRORS, is_transient, reason_of
from deit_jax.data.order import NONE, Order, among
from deit_jax.data.plan import InputPlan
from deit_jax.data.source import Source
from deit_jax.errors import InputError, TransientError
from deit_jax.parallel import cpus

_PREFETCH = 2  # batches; a DeiT batch of 1024 is 154 MB
_OUTSIDE = "label outside the class range"  # a mistake in the data set, not a broken image

# There is no Python control flow to convert, and looking for it takes a second at every start.
no_autograph = tf.autograph.experimental.do_not_convert

Batch = dict[str, np.ndarray]
Tensors = dict[str, tf.Tensor]
Fetch = Callable[[Tensors], tuple[tf.Tensor, tf.Tensor]]  # an entry → its image and its label


def train_batches(source: Source, plan: InputPlan, *, start_step: int = 0) -> "Batches":
    """Yields this process's rows of the global batches from a step on, without end.

    Args:
      source: the train split.
      plan: the input plan of the run.
      start_step: number of the first batch; any number is as quick as 0.

    Returns:
      {"image": uint8 [b, S, S, 3], "label": int32 [b]}, read-only, b = plan.local_rows. Where
      `on_bad_image` is "skip", the next readable image of the epoch takes the place of one that
      cannot be read.

    Raises:
      InputError: a plan that does not fit the split; while iterating, an example that is broken,
        by name.
      TransientError: while iterating, an example that the storage does not deliver now.
    """
    order = Order(plan, source.num_examples)
    transform = transforms.train_transform(plan.input, image_size=plan.image_size)

    def units(step: tf.Tensor, unreadable: list[int]) -> Tensors:
        slots = order.slots(step)
        positions = order.positions(slots)
        rows = order.local_row(positions, step)
        views = {"index": order.index(slots, unreadable), "position": positions, "row": rows}
        mine = tf.reduce_any(rows != NONE, axis=1)
        views = {name: tf.boolean_mask(value, mine) for name, value in views.items()}
        by_row = tf.argsort(tf.reduce_max(views["row"], axis=1))
        return {name: tf.gather(value, by_row) for name, value in views.items()}

    def load(unit: Tensors, fetch: Fetch) -> Tensors:
        present = unit["row"] != NONE
        positions = tf.boolean_mask(unit["position"], present)
        data, label = fetch(unit)
        seed = tf.fill(tf.shape(positions), tf.cast(plan.seed, tf.int64))
        rows = {
            "image": transform(data, tf.stack([seed, positions], axis=1)),
            "label": tf.fill(tf.shape(positions), _checked(label, source.num_classes)),
        }
        # In a single group the rows come in order already, and sorting would copy the batch.
        if plan.input.repeats > 1 and plan.group_size < plan.batch_size:
            rows["row"] = tf.boolean_mask(unit["row"], present)
        return rows

    return Batches(source, plan, units, load, steps=(start_step, tf.int64.max))


def eval_batches(source: Source, plan: InputPlan) -> "Batches":
    """Yields this process's rows of one pass over a split: every example once, in order.

    Every process yields ceil(num_examples / batch_size) batches; rows past the end are zeros with
    mask 0, and so are images that cannot be read where `on_bad_image` is "skip".

    Args:
      source: the split.
      plan: the input plan of the run; its seed, groups and epochs play no part.

    Returns:
      {"image": uint8 [b, S, S, 3], "label": int32 [b], "mask": float32 [b]}, read-only.

    Raises:
      InputError, TransientError: while iterating, as in `train_batches`.
    """
    transform = transforms.eval_transform(plan.input, image_size=plan.image_size)

    def units(step: tf.Tensor, unreadable: list[int]) -> Tensors:
        rows = plan.first_row + tf.range(plan.local_rows, dtype=tf.int64)
        index = step * plan.batch_size + rows
        real = (index < source.num_examples) & ~among(index, unreadable)
        return {"index": tf.where(real, index, NONE)}

    def example(unit: Tensors, fetch: Fetch) -> tuple[tf.Tensor, tf.Tensor]:
        data, label = fetch(unit)
        return transform(data), _checked(label, source.num_classes)

    def padding() -> tuple[tf.Tensor, tf.Tensor]:
        return tf.zeros((plan.image_size, plan.image_size, 3), tf.uint8), tf.constant(0, tf.int32)

    def load(unit: Tensors, fetch: Fetch) -> Tensors:
        real = unit["index"] != NONE
        image, label = tf.cond(real, lambda: example(unit, fetch), padding)
        return {
            "image": image[None],
            "label": label[None],
            "mask": tf.cast(real, tf.float32)[None],
        }

    return Batches(source, plan, units, load, steps=(0, -(-source.num_examples // plan.batch_size)))


def example_ids(source: Source, plan: InputPlan, step: int) -> list[str]:
    """Returns the names of the examples in the global training batch of a step, row by row.

    Those that cannot be read are named where they would stand.
    """
    order = Order(plan, source.num_examples)
    step = tf.constant(step, tf.int64)
    slots = order.slots(step)
    rows = order.row(order.positions(slots), step).numpy()
    ids = [""] * plan.batch_size
    for index, views in zip(order.index(slots).numpy(), rows, strict=True):
        for row in views[views != NONE]:
            ids[row] = source.example_id(int(index))
    return ids


class Batches(Iterator[Batch]):
    """Batches of one process, in order.

    Attributes:
      skipped: examples that could not be read so far, by name, each with the reason. Always empty
        unless `on_bad_image` is "skip": the first such example is an error then.
    """

    def __init__(
        self,
        source: Source,
        plan: InputPlan,
        units: Callable[[tf.Tensor, list[int]], Tensors],
        load: Callable[[Tensors, Fetch], Tensors],
        *,
        steps: tuple[int, int],
    ) -> None:
        """Opens the batches of a range of steps.

        Args:
          source: the split.
          plan: the input plan of the run.
          units: (step, unreadable examples) → what to load: one entry an example, with its `index`.
          load: an entry, and what gives its image and its label → one or more rows of the batch.
          steps: the first step and the one after the last.
        """
        self.skipped: dict[str, str] = {}
        self._source, self._plan, self._units = source, plan, units
        self._ahead = ahead_of(source, plan.input.read_threads)

        def load_entry(entry: Tensors) -> Tensors:
            if "data" in entry:
                return load(entry, self._ahead.parse)
            return load(entry, lambda entry: source.fetch(entry["index"]))

        # Traced once, however often the stream begins anew.
        self._load = tf.function(load_entry, autograph=False)
        self._step, self._end = steps
        self._unreadable: list[int] = []
        self._failed_at = -1  # the step at which reading failed and then did not
        self._iterator = self._open()

    def __next__(self) -> Batch:
        while True:
            try:
                batch = next(self._iterator)
            except ERRORS as error:
                self._find_unreadable(error)
                self._iterator = self._open()
            else:
                self._step += 1
                return batch

    def _open(self) -> Iterator[Batch]:
        dataset = tf.data.Dataset.range(self._step, self._end)
        dataset = dataset.flat_map(self._entries)
        if self._ahead is not None:
            dataset = self._ahead.read(dataset)
        workers = cpus.available()
        dataset = dataset.map(self._load, num_parallel_calls=workers, deterministic=True)
        dataset = dataset.rebatch(self._plan.local_rows, drop_remainder=True).map(_in_order_of_rows)
        return untuned(dataset.prefetch(_PREFETCH)).as_numpy_iterator()

    @no_autograph
    def _entries(self, step: tf.Tensor) -> tf.data.Dataset:
        return tf.data.Dataset.from_tensor_slices(self._units(step, self._unreadable))

    def _find_unreadable(self, error: Exception) -> None:
        """Finds what cannot be loaded in the present batch; raises unless it may be skipped."""
        # tf.data does not say which element failed: load the batch again, one by one.
        entries = self._entries(tf.constant(self._step, tf.int64))
        loaded = iter(untuned(entries.map(self._load)))
        found = False
        for entry in untuned(entries).as_numpy_iterator():
            try:
                next(loaded)
            except ERRORS as cause:
                name, reason = self._source.example_id(int(entry["index"])), reason_of(cause)
                if name in self.skipped:  # it is in the batch twice, once in place of another
                    continue
                found = True
                if is_transient(cause):  # skipping it would change what is trained on
                    raise TransientError(
                        f"{self._source.description}: {name} cannot be read now: {reason}; "
                        "check the storage and try again"
                    ) from cause
                if self._plan.input.on_bad_image != "skip" or _OUTSIDE in reason:
                    raise InputError(
                        f"{self._source.description}: {name} cannot be used: {reason}; "
                        "replace or remove it"
                    ) from cause
                self.skipped[name] = reason
                logging.warning("%s is skipped (%d so far): %s", name, len(self.skipped), reason)
                self._unreadable.append(int(entry["index"]))
        if not found:
            if self._failed_at == self._step:
                raise error
            self._failed_at = self._step
            logging.warning(
                "%s: an image could not be read at first, but later; check the storage",
                self._source.description,
            )
            return
        if len(self._unreadable) == self._source.num_examples:
            raise InputError(
                f"{self._source.description}: none of its {self._source.num_examples} images can "
                f"be read ({name}: {reason})"
            ) from error


def untuned(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Returns the data set without tf.data's tuning, which gains nothing and may cost a minute.

    Its thread sleeps for up to a minute, and closing an iterator waits for it: TensorFlow wakes it
    just before it sets the flag to end, so that it may go back to sleep.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


@no_autograph
def _in_order_of_rows(batch: Tensors) -> Tensors:
    if "row" not in batch:
        return batch
    order = tf.argsort(batch.pop("row"))
    return {name: tf.gather(value, order) for name, value in batch.items()}


def _checked(label: tf.Tensor, num_classes: int) -> tf.Tensor:
    """Returns the label; fails while running where there is no such class."""
    inside = (label >= 0) & (label < num_classes)
    message = f"{_OUTSIDE} 0..{num_classes - 1}:"
    with tf.control_dependencies([tf.debugging.Assert(inside, [message, label])]):
        return tf.identity(label)
