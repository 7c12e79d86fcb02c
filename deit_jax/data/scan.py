"""Decodes every example of a split once: names those a run could not use, counts the others."""

import collections
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from deit_jax.data.ahead import ahead_of
from deit_jax.data.crop import without_lines
from deit_jax.data.decode import decode
from deit_jax.data.failures import ERRORS, reason_of
from deit_jax.data.source import Source
from deit_jax.data.stream import no_autograph, untuned

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_COLOUR_TYPE = 25  # offset of this byte in a PNG file
_CHUNK = 64  # examples handed from TensorFlow to Python at a time

# Of what `_colours` returns: the components of a JPEG, 10 + the colour type of a PNG.
_COLOURS = {
    1: "grey", 3: "RGB", 4: "CMYK",
    10: "grey", 12: "RGB", 13: "palette", 14: "alpha", 16: "alpha",
}  # fmt: skip

# Of the usable examples, what `survey` keeps.
_COLUMNS = [("index", "i8"), ("label", "i8"), ("height", "i4"), ("width", "i4"), ("hash", "i8")]


class Example(NamedTuple):
    """An example that was decoded."""

    index: int
    label: int
    height: int
    width: int
    colours: str  # of the file: "grey", "RGB", "CMYK", "palette" or "alpha"; "" where not known
    fingerprint: int  # int64, equal for equal files, and hardly ever for others


class Unreadable(NamedTuple):
    """An example that training could not use."""

    index: int
    reason: str


def scan(source: Source, *, short: int | None, workers: int) -> Iterator[Example | Unreadable]:
    """Yields what is known of every example of a split, in order.

    Whole images are decoded, by training's decoder. Memory stays small for any number of examples.

    Args:
      source: the split.
      short: what a run resizes the images' short side to, of `transforms.short_side`.
      workers: how many images are decoded at a time.
    """

    ahead = ahead_of(source, 0)

    @tf.function(autograph=False)
    def look(entry: dict[str, tf.Tensor]) -> tuple[tf.Tensor, ...]:
        index = entry["index"]
        data, label = ahead.parse(entry) if "data" in entry else source.fetch(index)
        image = decode(data)
        shape = tf.shape(image)
        height, width, _ = tf.unstack(shape if short is None else without_lines(shape, short))
        hashed = tf.bitcast(tf.fingerprint(tf.reshape(data, (1, -1)))[0], tf.int64)
        return index, label, height, width, _colours(data), hashed

    dataset = _indices(0, source.num_examples)
    if ahead is not None:
        dataset = ahead.read(dataset)
    dataset = dataset.map(look, num_parallel_calls=workers, deterministic=True).ignore_errors()
    due = 0
    for chunk in untuned(dataset.batch(_CHUNK)).as_numpy_iterator():
        for facts in zip(*(column.tolist() for column in chunk), strict=True):
            index, label, height, width, colours, fingerprint = facts
            if due < index:
                yield from _missed(range(due, index), look)
            yield Example(index, label, height, width, _COLOURS.get(colours, ""), fingerprint)
            due = index + 1
    yield from _missed(range(due, source.num_examples), look)


def _indices(begin: int, end: int) -> tf.data.Dataset:
    return tf.data.Dataset.range(begin, end).map(no_autograph(lambda index: {"index": index}))


def _missed(indices: range, look: Callable) -> Iterator[Unreadable]:
    """Loads again, one by one, what the parallel pass dropped, which does not say why."""
    # Not called here: outside of tf.data, TensorFlow's errors tell of the whole program.
    loaded = iter(untuned(_indices(indices.start, indices.stop).map(look)))
    for index in indices:
        try:
            next(loaded)
            reason = "could not be read at first, but later; check the storage"
        except ERRORS as error:
            reason = reason_of(error)
        yield Unreadable(index, reason)


def _colours(data: tf.Tensor) -> tf.Tensor:
    """Returns a key of _COLOURS, or another number where the colours are not known."""
    if data.dtype != tf.string:
        return tf.constant(0)

    def png() -> tf.Tensor:
        colour_type = tf.io.decode_raw(tf.strings.substr(data, _PNG_COLOUR_TYPE, 1), tf.uint8)[0]
        return 10 + tf.cast(colour_type, tf.int32)

    def other() -> tf.Tensor:
        is_png = tf.strings.substr(data, 0, len(_PNG)) == _PNG
        return tf.cond(is_png, png, lambda: tf.constant(0))

    return tf.cond(tf.io.is_jpeg(data), lambda: tf.io.extract_jpeg_shape(data)[2], other)


def survey(
    source: Source,
    *,
    image_size: int,
    short: int | None,
    workers: int,
    seen: Callable[[dict[str, str] | None], None] = lambda problem: None,
) -> tuple[dict[str, Any], np.ndarray]:
    """Decodes a split and counts what it holds.

    Args:
      source: the split.
      image_size: side that training wants, pixels.
      short: as in `scan`.
      workers: images decoded at a time.
      seen: called for each example, with the `name` and `reason` of one that cannot be used.

    Returns:
      A report ready for JSON, and what `in_both` needs.
    """
    table = np.zeros(source.num_examples, _COLUMNS)
    colours: collections.Counter[str] = collections.Counter()
    problems, usable = [], 0
    for example in scan(source, short=short, workers=workers):
        reason = problem = None
        if isinstance(example, Unreadable):
            reason = example.reason
        elif not 0 <= example.label < source.num_classes:
            reason = f"label {example.label} is outside the classes 0..{source.num_classes - 1}"
        else:
            index, label, height, width, colour, fingerprint = example
            table[usable] = (index, label, height, width, fingerprint)
            colours[colour] += 1
            usable += 1
        if reason:
            problem = {"name": source.example_id(example.index), "reason": reason}
            problems.append(problem)
        seen(problem)
    table = table[:usable]
    per_class = np.bincount(table["label"], minlength=source.num_classes)
    names = source.class_names or tuple(map(str, range(source.num_classes)))
    report = {
        "description": source.description,
        "images": source.num_examples,
        "problems": problems,
        "classes": list(names),
        "images_per_class": _spread(per_class),
        "empty_classes": [names[k] for k in np.flatnonzero(per_class == 0)],
        "height": _spread(table["height"]),
        "width": _spread(table["width"]),
        "aspect": _spread(table["width"] / table["height"]),
        "smaller": int((np.minimum(table["height"], table["width"]) < image_size).sum()),
        "colours": {colour: count for colour, count in colours.most_common() if colour},
        "notes": list(source.notes),
        "passed_over": {reason: list(names) for reason, names in source.passed_over.items()},
        "repeated": usable - len(np.unique(table["hash"])),
    }
    return report, table


def _spread(values: np.ndarray) -> dict[str, float] | None:
    """Minimum, median and maximum; None of nothing."""
    if not len(values):
        return None
    least, middle, most = (float(f"{f(values):.4g}") for f in (np.min, np.median, np.max))
    return {"min": least, "median": middle, "max": most}


def in_both(sources: dict[str, Source], tables: dict[str, np.ndarray]) -> list[dict[str, str]]:
    """Returns, for every eval image that is a copy of a train image, the names of the two.

    Args:
      sources: "train" and "eval".
      tables: of `survey`, by the same names.
    """
    hashes, first = np.unique(tables["train"]["hash"], return_index=True)
    pairs = []
    for row in tables["eval"][np.isin(tables["eval"]["hash"], hashes)]:
        twin = tables["train"][first[np.searchsorted(hashes, row["hash"])]]
        rows = {"train": twin, "eval": row}
        pairs.append({s: sources[s].example_id(int(rows[s]["index"])) for s in rows})
    return pairs
