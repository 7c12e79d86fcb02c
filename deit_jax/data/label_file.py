"""Reads label files: rows of an image's name and its class, as CSV in its common variants."""

import csv
import functools
import io
import itertools
import os
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from deit_jax.errors import InputError
from deit_jax.folders import is_folder, join, normalise, printable, read_bytes

_DELIMITERS = "\t,; "
_SAMPLE = 100  # lines that show which one it is
# Headers of the two columns, in other spellings too ("File Name"); the first that is there counts.
_NAMES = (
    *("filename", "file_name", "filepath", "file_path", "file", "path", "image_path", "image_name"),
    *("image_file", "image_filename", "image", "img", "image_id", "img_id", "picture", "photo"),
    *("name", "id"),
)
_LABELS = (
    *("label", "labels", "label_id", "label_name", "class", "classes", "class_id", "class_name"),
    *("classname", "category", "category_id", "category_name", "target", "species", "breed", "y"),
)
_INDEX = ("", "unnamed:_0", "index", "idx")
_NUMBER = re.compile(r"[+-]?\d+(\.0*)?")  # pandas writes a column with gaps as 3.0

Place = tuple[str, str]  # split, and path in it


class Row(NamedTuple):
    """A row of a label file."""

    line: int  # from 1
    name: str
    label: str


class Images:
    """The images of the splits by the names that a label file may give them.

    That is SPLIT/PATH or PATH, with or without the suffix, in any Unicode normalisation.
    """

    def __init__(self, paths: dict[str, list[str]]) -> None:
        """Takes the paths of each split ("": the root itself)."""
        self.paths = paths
        self._exact = {split: set(of_split) for split, of_split in paths.items()}

    @functools.cached_property
    def _by_name(self) -> dict[str, dict[str, list[str]]]:
        return self._table(lambda path: path)

    @functools.cached_property
    def _by_stem(self) -> dict[str, dict[str, list[str]]]:
        return self._table(lambda path: os.path.splitext(path)[0])

    def _table(self, key: Callable[[str], str]) -> dict[str, dict[str, list[str]]]:
        tables: dict[str, dict[str, list[str]]] = {}
        for split, paths in self.paths.items():
            table = tables[split] = {}
            for path in paths:
                table.setdefault(normalise(key(path)), []).append(path)
        return tables

    def _places(self, name: str) -> list[Place]:
        places = []
        for split, paths in self._exact.items():
            places += [(split, p) for p in {name, name.removeprefix(f"{split}/")} if p in paths]
        return places

    def has(self, word: str) -> bool:
        """Returns whether a word names an image, without the tables that `find` makes."""
        paths = itertools.chain.from_iterable(self.paths.values())
        likely = (path for path in paths if path.startswith(word))
        return any(word in (path, os.path.splitext(path)[0]) for path in likely)

    def find(self, name: str) -> list[Place]:
        """Returns the images that a name may mean."""
        if places := self._places(name):  # nearly always, and quick
            return places
        name = normalise(name).removeprefix("./")
        for written in dict.fromkeys((name, name.replace("\\", "/"))):
            for by_stem in (False, True):
                found = set()
                for split, paths in (self._by_stem if by_stem else self._by_name).items():
                    for key in (written, written.removeprefix(f"{split}/")):
                        found.update((split, path) for path in paths.get(key, ()))
                if found:
                    return sorted(found)
        return []


def read_rows(path: str, images: Images) -> tuple[list[Row], list[str]]:
    """Reads the rows of a label file.

    Columns are separated by commas, tabs, semicolons or spaces. A header says which two of them
    count; without one there are two, or three of which the first counts the rows.

    Args:
      path: the file.
      images: the first row is no header if it names one of them.

    Returns:
      The rows, and notes.

    Raises:
      InputError: no file, no text in UTF-8, or lines that are not as described.
    """
    if is_folder(path):
        raise InputError(f"config.dataset.label_file: {path} is a folder, expected a file")
    table = _cells(path, _text(path))
    if not table:
        raise InputError(f"{path} has no rows, expected lines of 'name,label'")
    (at, first, notes), rows = _columns(path, table, images), []
    for line, cells in table[first:]:
        name, label = (cells[i].strip() if i < len(cells) else "" for i in at)
        if not name or not label or len(cells) > len(table[0][1]):
            wide = "; quote a name with the separator in it" if len(cells) > 2 else ""
            raise InputError(
                f"{path}, line {line}: {','.join(cells)!r}, expected 'name,label'{wide}"
            )
        rows.append(Row(line, name, normalise(label)))
    if not rows:
        raise InputError(f"{path} has a header and no rows")
    return rows, notes


def _text(path: str) -> str:
    try:
        data = read_bytes(path)
    except InputError as error:
        raise type(error)(f"config.dataset.label_file, a path in dataset.root: {error}") from None
    if b"\0" in data[:4096]:
        raise InputError(f"{path} is not text in UTF-8, perhaps UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line}: byte {data[error.start]:#x} is not UTF-8, perhaps Latin-1; save "
            "the file as UTF-8"
        ) from None


def _cells(path: str, text: str) -> list[tuple[int, list[str]]]:
    """Returns the number and the cells of each line that is not empty."""
    sample = [line for line in text.splitlines()[:_SAMPLE] if line.strip()]

    def splits(delimiter: str) -> int:
        return sum(len(cells) > 1 for cells in csv.reader(sample, delimiter=delimiter))

    table, reader = [], None
    try:
        delimiter = max(_DELIMITERS, key=splits)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for cells in reader:
            if delimiter == " ":  # names may hold spaces, labels not
                *name, label = " ".join(cells).rstrip().rsplit(" ", 1)
                cells = [*name, label]
            if "".join(cells).strip():
                table.append((reader.line_num, cells))
    except csv.Error as error:
        line = reader.line_num if reader else 1
        raise InputError(f"{path}, line {line}: {error}; check the quotes") from None
    return table


def _columns(
    path: str, table: list[tuple[int, list[str]]], images: Images
) -> tuple[tuple[int, int], int, list[str]]:
    """Returns the columns of name and label, the number of header lines (0 or 1), and notes."""
    line, first = table[0]
    words = [re.sub(r"[\s-]+", "_", cell.strip()).casefold() for cell in first]
    known = [i for i, word in enumerate(words) if word in _LABELS]
    names = sorted(
        (i for i, w in enumerate(words) if w in _NAMES), key=lambda i: _NAMES.index(words[i])
    )
    usual = {*_NAMES, *_LABELS, *_INDEX}
    is_image = [
        images.has(cell.strip()) if word in usual else bool(images.find(cell.strip()))
        for word, cell in zip(words, first, strict=True)
    ]
    if (known or names) and not any(is_image):
        columns = [i for i, word in enumerate(words) if word not in _INDEX]
        name, label = names[0] if names else None, known[0] if len(known) == 1 else None
        if len(columns) == 2 and name is None:
            name = next(i for i in columns if i != label)
        if len(columns) == 2 and label is None:
            label = next(i for i in columns if i != name)
        if name is not None and label is not None and name != label:
            left = [first[i] for i in columns if i not in (name, label)]
            used = f"{path}: the columns {first[name]} and {first[label]} count"
            return (name, label), 1, [f"{used}, {', '.join(left)} not"] if left else []
    elif len(first) == 2:
        return ((1, 0) if is_image == [False, True] else (0, 1)), 0, []
    elif len(first) == 3 and _counts([cells[0] for _, cells in table]):
        return (1, 2), 0, []
    raise InputError(
        f"{path}, line {line}: {','.join(first)!r}, expected 'name,label', or a header that names "
        "two columns filename and label"
    )


def _counts(cells: Sequence[str]) -> bool:
    """Returns whether a column numbers its rows."""
    numbers = list(map(str, range(len(cells) + 1)))
    return list(cells) in (numbers[:-1], numbers[1:])


def place_rows(
    path: str, rows: Sequence[Row], images: Images, *, some: bool
) -> tuple[dict[int, Place], list[str]]:
    """Finds the image of each row.

    Args:
      path: the label file.
      rows: its rows.
      images: of the splits.
      some: whether a row may name an image that is not there.

    Returns:
      The images by their line, and notes.

    Raises:
      InputError: a name that means no image, or several.
    """
    place_of, elsewhere, renamed = {}, [], []
    for line, name, _ in rows:
        places = images.find(name)
        if len(places) == 1:
            place_of[line] = places[0]
            found = places[0][1]
            if not name.endswith(found) and not _is_in(os.path.splitext(found)[0], name):
                renamed.append(f"{name!a} = {found!a}")
        elif some and not places:
            elsewhere.append(name)
        else:
            raise InputError(_no_place(path, line, name, places, images, line == rows[0].line))
    notes = []
    if elsewhere:
        notes.append(f"{path}: {len(elsewhere):,} rows name no image here, first {elsewhere[0]!r}")
    if renamed:
        notes.append(
            f"{path}: {len(renamed):,} names have another Unicode normalisation than on the disk, "
            f"matched: {renamed[0]}"
        )
    return place_of, notes


def _is_in(part: str, name: str) -> bool:
    return part in name.replace("\\", "/")


def _no_place(
    path: str, line: int, name: str, places: list[Place], images: Images, first: bool
) -> str:
    row = f"{path}, line {line}: {printable(name)}"
    if places:
        meant = " or ".join(printable(join(*place)) for place in sorted(places))
        both = "in both splits" if len({split for split, _ in places}) > 1 else "not one image"
        return f"{row} is {both}; write {meant}"
    where = " or ".join(sorted(images.paths)) or "the folder"
    header = "; a header must name the columns filename and label" if first else ""
    return f"{row} is not in {where}; remove the row or restore the file{header}"


def number_classes(
    dataset: ConfigDict, path: str, rows: Sequence[Row]
) -> tuple[list[int], int, tuple[str, ...], list[str]]:
    """Returns each row's class number, the number of classes, their names if any, and notes.

    Labels are numbers, or names that are numbered in sorted order.

    Raises:
      InputError: a label outside of the classes.
    """
    numeric = all(_NUMBER.fullmatch(row.label) for row in rows)
    names = () if numeric else tuple(sorted({row.label for row in rows}))
    number_of = {name: i for i, name in enumerate(names)}
    numbers = [int(float(row.label)) if numeric else number_of[row.label] for row in rows]
    num_classes = dataset.num_classes or max(numbers) + 1
    from_1 = f"; the labels are {min(numbers)} to {max(numbers)}: subtract 1" * (min(numbers) == 1)
    for number, (line, name, label) in zip(numbers, rows, strict=True):
        if not 0 <= number < num_classes:
            found = f"label {number}" if numeric else f"class {label!r}"
            count = "" if numeric else f" (there are {len(names)} classes)"
            raise InputError(
                f"{path}, line {line}: {found} of {printable(name)} is outside the class range "
                f"0..{num_classes - 1}{count}; correct it or config.dataset.num_classes{from_1}"
            )
    notes = []
    if empty := sorted(set(range(num_classes)) - set(numbers)):
        listed = ", ".join(map(str, empty[:5])) + (", …" if len(empty) > 5 else "")
        notes.append(f"{path}: no row has class {listed} ({len(empty)} of {num_classes} classes)")
        if empty[0] == 0:
            notes[0] += "; labels that count from 1 stay so: subtract 1, or class 0 has no images"
    return numbers, num_classes, names, notes
