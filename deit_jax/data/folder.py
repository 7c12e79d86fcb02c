"""Image folders: one folder a class, or one folder of images with a label file."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from deit_jax.data.source import Source, fixed_fraction
from deit_jax.errors import InputError
from deit_jax.trees import digest

_READABLE = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
# torchvision's ImageFolder reads these too: skipping them in silence would change the data set.
_UNREADABLE = (".ppm", ".pgm", ".tif", ".tiff", ".webp")
_HEADER = ("filename", "file", "image", "path", "name")


class FolderSource(Source):
    """Image files of one split, read when fetched."""

    def __init__(
        self,
        folder: str,
        files: Sequence[str],
        labels: np.ndarray,
        *,
        num_classes: int,
        class_names: tuple[str, ...],
    ) -> None:
        super().__init__(
            description=f"folder {folder}",
            num_examples=len(files),
            num_classes=num_classes,
            class_names=class_names,
            encoded=True,
        )
        self._folder = folder
        self._files = tf.constant(files, tf.string)
        self._labels = tf.constant(labels, tf.int32)

    def fetch(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """See Source."""
        path = tf.strings.join([self._folder, tf.gather(self._files, index)], separator="/")
        return tf.io.read_file(path), tf.gather(self._labels, index)

    def fingerprint(self) -> str:
        """See Source."""
        return digest("\n".join(f.decode() for f in self._files.numpy()), self._labels)

    def example_id(self, index: int) -> str:
        """The path of the file."""
        return f"{self._folder}/{self._files[index].numpy().decode()}"


def open_folder(dataset: ConfigDict, split: str) -> FolderSource:
    """Opens ROOT/SPLIT/CLASS/IMAGE, or with `label_file` ROOT/SPLIT/IMAGE.

    Classes are numbered in the order of their sorted names and files are sorted, as torchvision's
    ImageFolder does. The train split says which classes there are, where it exists.

    Raises:
      InputError: folders, files or labels that are missing, empty or do not agree.
    """
    root = dataset.root.rstrip("/") or dataset.root
    if not root:
        raise InputError("config.dataset.root is empty, expected the folder that holds the splits")
    folder = _split_folder(dataset, root, split)
    if dataset.label_file:
        files, labels, num_classes, class_names = _read_flat(dataset, root, split)
    else:
        files, labels, class_names = _read_class_folders(dataset, root, split)
        num_classes = len(class_names)
    if split == "train":
        chosen = fixed_fraction(labels, dataset.train_fraction)
        files, labels = [files[i] for i in chosen], labels[chosen]
    return FolderSource(folder, files, labels, num_classes=num_classes, class_names=class_names)


def _split_folder(dataset: ConfigDict, root: str, split: str) -> str:
    name = dataset[f"{split}_split"]
    folder = f"{root}/{name}"
    if not tf.io.gfile.isdir(root):
        raise InputError(f"config.dataset.root is {root!r}, which is not a folder; check the path")
    if not name or not tf.io.gfile.isdir(folder):
        present = ", ".join(_list(root)[0]) or "no folders"
        raise InputError(
            f"config.dataset.{split}_split is {name!r}, but {folder} is not a folder; {root} holds "
            f"{present}"
        )
    return folder


def _read_class_folders(
    dataset: ConfigDict, root: str, split: str
) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
    folder = _split_folder(dataset, root, split)
    present, images = _list(folder)
    if not present:
        hint = "set config.dataset.label_file" if images else "expected one folder a class"
        raise InputError(f"{folder} holds {len(images)} images and no class folders; {hint}")
    # Someone who only evaluates may have no train split; its own folders are the classes then.
    train = f"{root}/{dataset.train_split}"
    names = _list(train)[0] if tf.io.gfile.isdir(train) else present
    unknown = sorted(set(present) - set(names))
    if unknown:
        raise InputError(
            f"{folder}/{unknown[0]}: this class is not in {train} ({len(unknown)} such classes); "
            "both splits need the same class folders"
        )
    if dataset.num_classes not in (0, len(names)):
        raise InputError(
            f"config.dataset.num_classes is {dataset.num_classes}, but "
            f"{folder if names is present else train} has {len(names)} class folders; set "
            f"{len(names)}, or 0 to infer it"
        )
    with ThreadPoolExecutor(16) as pool:  # listing a bucket is slow, not laborious
        listed = list(pool.map(lambda name: _list(f"{folder}/{name}")[1], present))
    files: list[str] = []
    labels: list[int] = []
    number = {name: i for i, name in enumerate(names)}
    for name, images in zip(present, listed, strict=True):
        if not images:
            raise InputError(
                f"{folder}/{name} holds no images ({', '.join(_READABLE)}); remove the folder or "
                "fill it"
            )
        files += [f"{name}/{image}" for image in images]
        labels += [number[name]] * len(images)
    return files, np.asarray(labels), tuple(names)


def _read_flat(
    dataset: ConfigDict, root: str, split: str
) -> tuple[list[str], np.ndarray, int, tuple[str, ...]]:
    folder = _split_folder(dataset, root, split)
    images = _list(folder)[1]
    if not images:
        raise InputError(f"{folder} holds no images ({', '.join(_READABLE)})")
    path = f"{root}/{dataset.label_file}"
    rows = _read_label_file(path)
    numeric = all(re.fullmatch(r"[+-]?\d+", label) for _, label, _ in rows)
    names = () if numeric else tuple(sorted({label for _, label, _ in rows}))
    number = {name: i for i, name in enumerate(names)}
    numbers = [int(label) if numeric else number[label] for _, label, _ in rows]
    num_classes = dataset.num_classes or max(numbers) + 1
    for label, (name, _, line) in zip(numbers, rows, strict=True):
        if not 0 <= label < num_classes:
            found = f"label {label} of {name}" if numeric else f"class {names[label]!r} of {name}"
            limit = f"0..{num_classes - 1}"
            raise InputError(
                f"{path}, line {line}: {found} is outside the class range {limit}"
                + ("" if numeric else f" (there are {len(names)} classes)")
                + "; correct it or config.dataset.num_classes"
            )
    label_of = _match_files(dataset, root, path, rows, numbers)[dataset[f"{split}_split"]]
    missing = [image for image in images if image not in label_of]
    if missing:
        raise InputError(
            f"{folder}/{missing[0]}: no label in {path} ({len(missing)} such files of "
            f"{len(images)}); add a row or remove the file"
        )
    return images, np.asarray([label_of[image] for image in images]), num_classes, names


def _read_label_file(path: str) -> list[tuple[str, str, int]]:
    """Rows (file name, label, line number) of "name,label" or "name label" lines."""
    if not tf.io.gfile.exists(path):
        raise InputError(
            f"config.dataset.label_file: {path} does not exist; the path is relative to "
            "config.dataset.root"
        )
    with tf.io.gfile.GFile(path) as file:
        lines = file.read().splitlines()
    rows = []
    for line, text in enumerate(lines, 1):
        if not text.strip():
            continue
        parts = text.rsplit(",", 1) if "," in text else text.rsplit(None, 1)
        if len(parts) != 2 or not all(part.strip() for part in parts):
            raise InputError(f"{path}, line {line}: {text!r}, expected 'name,label'")
        name, label = (part.strip() for part in parts)
        if not (not rows and name.lower() in _HEADER):
            rows.append((name, label, line))
    if not rows:
        raise InputError(f"{path} has no rows, expected lines of 'name,label'")
    return rows


def _match_files(
    dataset: ConfigDict,
    root: str,
    path: str,
    rows: list[tuple[str, str, int]],
    numbers: list[int],
) -> dict[str, dict[str, int]]:
    """Split folder → file name → label.

    A row says SPLIT/NAME, or only NAME where one split alone has it.
    """
    found: dict[str, set[str]] = {}
    for split in {dataset.train_split, dataset.eval_split}:
        folder = f"{root}/{split}"
        found[split] = set(_list(folder)[1]) if tf.io.gfile.isdir(folder) else set()
    label_of: dict[str, dict[str, int]] = {split: {} for split in found}
    for (name, _, line), number in zip(rows, numbers, strict=True):
        head, _, tail = name.partition("/")
        if head in found and tail:
            places = [(head, tail)] if tail in found[head] else []
        else:
            places = [(split, name) for split in sorted(found) if name in found[split]]
        if not places:
            raise InputError(
                f"{path}, line {line}: {name} is not in {' or '.join(sorted(found))} under {root}; "
                "remove the row or restore the file"
            )
        if len(places) > 1:
            raise InputError(
                f"{path}, line {line}: {name} is in both {places[0][0]} and {places[1][0]}; write "
                f"{places[0][0]}/{name} or {places[1][0]}/{name}"
            )
        split, file = places[0]
        if label_of[split].setdefault(file, number) != number:
            raise InputError(f"{path}, line {line}: {name} already has another label; remove one")
    return label_of


def _list(folder: str) -> tuple[list[str], list[str]]:
    """Sorted names of the folders and of the images in a folder, hidden ones left out."""
    folders, images = [], []
    for entry in sorted(name.rstrip("/") for name in tf.io.gfile.listdir(folder)):
        extension = os.path.splitext(entry)[1].lower()
        if entry.startswith("."):
            continue
        if extension in _READABLE:
            images.append(entry)
        elif tf.io.gfile.isdir(f"{folder}/{entry}"):
            folders.append(entry)
        elif extension in _UNREADABLE:
            raise InputError(
                f"{folder}/{entry}: {extension} images cannot be read; convert them to JPEG or PNG"
            )
    return folders, images
