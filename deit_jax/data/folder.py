"""Image folders: one folder a class, or one folder of images with a label file."""

import dataclasses
import os
import re
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

Row = tuple[int, str, str]  # of a label file: line number, name and label
Listing = tuple[list[str], list[int], int, tuple[str, ...]]  # files, labels, classes, their names


@dataclasses.dataclass(eq=False, kw_only=True)
class FolderSource(Source):
    """Image files of one split, read when fetched."""

    folder: str
    files: tf.Tensor  # string [n], paths in the folder
    labels: tf.Tensor  # int32 [n]

    def fetch(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """See Source."""
        path = tf.strings.join([self.folder, tf.gather(self.files, index)], separator="/")
        return tf.io.read_file(path), tf.gather(self.labels, index)

    def fingerprint(self) -> str:
        """See Source."""
        return digest("\n".join(file.decode() for file in self.files.numpy()), self.labels)

    def example_id(self, index: int) -> str:
        """Returns the path of the file."""
        return f"{self.folder}/{self.files[index].numpy().decode()}"


def open_folder(dataset: ConfigDict, split: str) -> FolderSource:
    """Opens ROOT/SPLIT/CLASS/IMAGE, or with `label_file` ROOT/SPLIT/IMAGE.

    Classes are numbered in the order of their sorted names and files are sorted, as torchvision's
    ImageFolder does. The train split says which classes there are, where it exists.

    Args:
      dataset: the `dataset` group of the config.
      split: "train" or "eval".

    Raises:
      InputError: folders, files or labels that are missing, empty or do not agree.
    """
    root, name = dataset.root.rstrip("/") or dataset.root, dataset[f"{split}_split"]
    if not root:
        raise InputError("config.dataset.root is empty, expected the folder that holds the splits")
    if not tf.io.gfile.isdir(root):
        raise InputError(f"config.dataset.root is {root!r}, which is not a folder; check the path")
    folder = f"{root}/{name}"
    if not name or not tf.io.gfile.isdir(folder):
        present = ", ".join(_list(root)[0]) or "no folders"
        raise InputError(
            f"config.dataset.{split}_split is {name!r}, but {folder} is not a folder; {root} holds "
            f"{present}"
        )
    read = _read_label_file if dataset.label_file else _read_class_folders
    files, labels, num_classes, class_names = read(dataset, root, name)
    labels = np.asarray(labels)
    if split == "train":
        chosen = fixed_fraction(labels, dataset.train_fraction)
        files, labels = [files[i] for i in chosen], labels[chosen]
    return FolderSource(
        description=f"folder {folder}",
        num_examples=len(files),
        num_classes=num_classes,
        class_names=class_names,
        folder=folder,
        files=tf.constant(files, tf.string),
        labels=tf.constant(labels, tf.int32),
    )


def _read_class_folders(dataset: ConfigDict, root: str, split: str) -> Listing:
    folder, train = f"{root}/{split}", f"{root}/{dataset.train_split}"
    present, images = _list(folder)
    if not present:
        hint = "set config.dataset.label_file" if images else "expected one folder a class"
        raise InputError(f"{folder} holds {len(images)} images and no class folders; {hint}")
    if not tf.io.gfile.isdir(train):
        train = folder  # whoever only evaluates may have no train split
    names = _list(train)[0]
    unknown = sorted(set(present) - set(names))
    if unknown:
        raise InputError(
            f"{folder}/{unknown[0]}: this class is not in {train} ({len(unknown)} such classes); "
            "both splits need the same class folders"
        )
    if dataset.num_classes not in (0, len(names)):
        raise InputError(
            f"config.dataset.num_classes is {dataset.num_classes}, but {train} has {len(names)} "
            f"class folders; set {len(names)}, or 0 to infer it"
        )
    with ThreadPoolExecutor(16) as pool:  # listing a bucket is waiting, not work
        listed = list(pool.map(lambda name: _list(f"{folder}/{name}"), present))
    files: list[str] = []
    labels: list[int] = []
    number = {name: i for i, name in enumerate(names)}
    for name, (folders, images) in zip(present, listed, strict=True):
        if folders or not images:  # torchvision's ImageFolder would read the folders too
            found = f"the folder {folders[0]}" if folders else "no images"
            raise InputError(
                f"{folder}/{name} holds {found}, expected images ({', '.join(_READABLE)}) and no "
                "folders; move, fill or remove it"
            )
        files += [f"{name}/{image}" for image in images]
        labels += [number[name]] * len(images)
    return files, labels, len(names), tuple(names)


def _read_label_file(dataset: ConfigDict, root: str, split: str) -> Listing:
    """Reads rows of SPLIT/NAME and label, or of NAME where one split alone has such a file."""
    images = _list(f"{root}/{split}")[1]
    if not images:
        raise InputError(f"{root}/{split} holds no images ({', '.join(_READABLE)})")
    path = f"{root}/{dataset.label_file}"
    rows = _parse_rows(path)
    numbers, num_classes, class_names = _number_classes(dataset, path, rows)
    splits = {dataset.train_split, dataset.eval_split}
    folders = [name for name in splits if tf.io.gfile.isdir(f"{root}/{name}")]
    known = {f"{name}/{file}" for name in folders for file in _list(f"{root}/{name}")[1]}
    label_of: dict[str, int] = {}
    for (line, name, _), number in zip(rows, numbers, strict=True):
        places = sorted(known & {name, *(f"{split}/{name}" for split in splits)})
        if not places:
            raise InputError(
                f"{path}, line {line}: {name} is not in {' or '.join(sorted(splits))} under "
                f"{root}; remove the row or restore the file"
            )
        if len(places) > 1:
            raise InputError(
                f"{path}, line {line}: {name} is in both splits; write {' or '.join(places)}"
            )
        if label_of.setdefault(places[0], number) != number:
            raise InputError(f"{path}, line {line}: {name} already has another label; remove one")
    missing = [image for image in images if f"{split}/{image}" not in label_of]
    if missing:
        raise InputError(
            f"{root}/{split}/{missing[0]}: no label in {path} ({len(missing)} such files of "
            f"{len(images)}); add a row or remove the file"
        )
    labels = [label_of[f"{split}/{image}"] for image in images]
    return images, labels, num_classes, class_names


def _parse_rows(path: str) -> list[Row]:
    """Reads lines of "name,label" or "name label", after a header or none."""
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
        if rows or name.lower() not in _HEADER:
            rows.append((line, name, label))
    if not rows:
        raise InputError(f"{path} has no rows, expected lines of 'name,label'")
    return rows


def _number_classes(
    dataset: ConfigDict, path: str, rows: list[Row]
) -> tuple[list[int], int, tuple[str, ...]]:
    """Returns each row's class number, the number of classes, and their names where they have any.

    Labels are numbers, or names that are numbered in sorted order.
    """
    numeric = all(re.fullmatch(r"[+-]?\d+", label) for _, _, label in rows)
    names = () if numeric else tuple(sorted({label for _, _, label in rows}))
    number_of = {name: i for i, name in enumerate(names)}
    numbers = [int(label) if numeric else number_of[label] for _, _, label in rows]
    num_classes = dataset.num_classes or max(numbers) + 1
    for number, (line, name, label) in zip(numbers, rows, strict=True):
        if not 0 <= number < num_classes:
            found = f"label {number}" if numeric else f"class {label!r}"
            count = "" if numeric else f" (there are {len(names)} classes)"
            raise InputError(
                f"{path}, line {line}: {found} of {name} is outside the class range "
                f"0..{num_classes - 1}{count}; correct it or config.dataset.num_classes"
            )
    return numbers, num_classes, names


def _list(folder: str) -> tuple[list[str], list[str]]:
    """Returns the sorted names of a folder's folders and of its images, without hidden ones."""
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
