"""Image folders: one folder a class, or images with a label file."""

import collections
import dataclasses
import os
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from deit_jax import pictures, storage
from deit_jax.data import buckets, label_file
from deit_jax.data.source import Source, fixed_fraction, read_threads
from deit_jax.errors import InputError, did_you_mean
from deit_jax.folders import (
    Found,
    describe,
    is_folder,
    join,
    normalise,
    printable,
    subfolders,
    walk,
)
from deit_jax.trees import digest

EVAL_NAMES = ("val", "valid", "validation", "test")  # tried in this order
# A folder of such a name is not a class where ROOT holds the class folders itself.
_SPLIT_NAMES = {
    *EVAL_NAMES,
    *("train", "training", "trainset", "valset", "testing", "testset", "eval"),
}
_SUFFIXES = ", ".join(pictures.SUFFIXES)
_HELD_OUT_SEED = 1  # train_fraction has 0

Splits = dict[str, str | None]  # "train" and "eval": the folder in ROOT, "" for ROOT itself


class Listing(NamedTuple):
    """The images of a split."""

    files: list[str]  # paths in its folder
    labels: list[int]
    num_classes: int
    class_names: tuple[str, ...]
    notes: list[str]
    passed_over: dict[str, list[str]]


@dataclasses.dataclass(eq=False, kw_only=True)
class FolderSource(Source):
    """Image files of one split, read when fetched."""

    folder: str
    files: list[bytes]  # paths in the folder
    labels: tf.Tensor  # int32 [n]

    def __post_init__(self) -> None:
        # For fetch alone: to take one from it in Python costs as much as ten reads.
        self._files = tf.constant(self.files, tf.string)

    def fetch(self, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """See Source."""
        folder = os.fsencode(self.folder)
        path = tf.strings.join([folder, tf.gather(self._files, index)], separator="/")
        read = buckets.read_file if storage.is_remote(self.folder) else tf.io.read_file
        return self.parse(read(path), index)

    def read(self, index: int) -> bytes:
        """See Source."""
        path = os.path.join(os.fsencode(self.folder), self.files[index])
        if storage.is_remote(self.folder):
            return buckets.read(path.decode())
        with open(path, "rb") as file:
            return file.read()

    def parse(self, data: tf.Tensor, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """See Source."""
        return data, tf.gather(self.labels, index)

    def fingerprint(self) -> str:
        """See Source."""
        names = b"\n".join(self.files)
        return digest(np.frombuffer(names, np.uint8), self.labels)

    def example_id(self, index: int) -> str:
        """Returns the path of the file; what cannot be printed in it is escaped."""
        return printable(f"{self.folder}/{os.fsdecode(self.files[index])}")


def open_folder(dataset: ConfigDict, split: str) -> FolderSource:
    """Opens ROOT/SPLIT/CLASS/…/IMAGE, or with `label_file` ROOT/SPLIT/…/IMAGE.

    Classes are numbered in the order of their sorted names and files are sorted, as torchvision's
    ImageFolder does. The train split says which classes there are, where it exists. Without folders
    for the splits, ROOT/CLASS/…/IMAGE (or ROOT/…/IMAGE) is split by `eval_fraction`.

    Args:
      dataset: the `dataset` group of the config.
      split: "train" or "eval".

    Raises:
      InputError: folders, files or labels that are missing, empty or do not agree.
    """
    if not dataset.root:
        raise InputError("config.dataset.root is empty, expected the folder that holds the splits")
    root = os.fspath(storage.path_of(dataset.root))
    if not is_folder(root):
        raise InputError(
            f"config.dataset.root is {dataset.root!r}, which is not a folder; check the path"
        )
    splits, notes = _find_splits(dataset, root)
    if splits[split] is None:
        raise InputError(_no_such_split(dataset, root, splits, split))
    folder = join(root, splits[split])
    read = _read_label_file if dataset.label_file else _read_class_folders
    listing = read(dataset, root, splits, split)
    notes = [*notes, *listing.notes] if split == "eval" else listing.notes
    labels = np.asarray(listing.labels)
    chosen = np.arange(len(labels))
    if not splits[split]:
        held_out = _held_out(root, labels, dataset.eval_fraction)
        rest = np.delete(chosen, held_out)
        chosen = rest if split == "train" else held_out
        notes = [
            f"{root} has no folders {dataset.train_split} and {dataset.eval_split}: its "
            f"{len(labels):,} images in {listing.num_classes} classes are split by eval_fraction "
            f"{dataset.eval_fraction:g}, {len(rest):,} to train and {len(held_out):,} to evaluate",
            *notes,
        ]
    if split == "train":
        chosen = chosen[fixed_fraction(labels[chosen], dataset.train_fraction)]
    if passed := describe(listing.passed_over):
        notes = [*notes, f"{folder}: not data: {passed}"]
    return FolderSource(
        read_threads=read_threads(root),
        description=f"folder {printable(folder)}",
        num_examples=len(chosen),
        num_classes=listing.num_classes,
        class_names=tuple(map(printable, listing.class_names)),
        notes=tuple(map(printable, notes)),
        passed_over=listing.passed_over,
        folder=folder,
        files=[os.fsencode(listing.files[i]) for i in chosen],
        labels=tf.constant(labels[chosen], tf.int32),
    )


def _find_splits(dataset: ConfigDict, root: str) -> tuple[Splits, list[str]]:
    """Returns where the splits are, None for one that is not there, and notes."""
    wanted = {split: dataset[f"{split}_split"] for split in ("train", "eval")}
    splits: Splits = {
        split: name if name and is_folder(join(root, name)) else None
        for split, name in wanted.items()
    }
    if splits["eval"] is None:
        others = (name for name in EVAL_NAMES if name != wanted["train"])
        splits["eval"] = next((name for name in others if is_folder(join(root, name))), None)
        if splits["eval"]:
            found = f"the folder {splits['eval']} is the evaluation split"
            return splits, [f"{root} has no folder {wanted['eval'] or 'for evaluation'}: {found}"]
    if splits == {"train": None, "eval": None} and dataset.eval_fraction:
        folders = subfolders(root)
        if (folders or dataset.label_file) and not _SPLIT_NAMES & {
            name.casefold() for name in folders
        }:
            splits = {"train": "", "eval": ""}
    return splits, []


def _no_such_split(dataset: ConfigDict, root: str, splits: Splits, split: str) -> str:
    name, present = dataset[f"{split}_split"], subfolders(root)
    loose = [] if present else _walk(root).images.get("", [])
    if loose and not dataset.label_file:
        return _no_classes(root, len(loose), "")
    listed = ", ".join(present[:8]) + (", …" if len(present) > 8 else "") or "no folders"
    tried = f" and none of {', '.join(EVAL_NAMES)}" if split == "eval" else ""
    hint = ""
    if splits["train"]:
        hint = f"; to hold out a part of the training images, set root to {root}/{splits['train']}"
    elif splits["eval"] is None and not dataset.eval_fraction:
        hint = "; config.dataset.eval_fraction is 0, or ROOT could be split"
    return (
        f"config.dataset.{split}_split is {name!r}, but {join(root, name)} is not a folder; {root} "
        f"holds {listed}{tried}{did_you_mean(name, present)}{hint}"
    )


def _no_classes(folder: str, images: int, more: str) -> str:
    """Says what to do with a folder of images alone; `more` is a further remedy, or ""."""
    remedy = "put the images into one folder a class, or set config.dataset.label_file"
    return f"{folder} holds {_count(images, 'image')} and no class folders; {remedy}{more}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _walk(folder: str) -> Found:
    found = walk(folder)
    for paths, what, remedy in (
        (found.broken, "a link to nothing", "restore its target or remove it"),
        (found.unreadable, "an image that cannot be read", "convert it to JPEG or PNG"),
    ):
        if paths:
            more = f" ({len(paths):,} such files)" if len(paths) > 1 else ""
            raise InputError(f"{printable(join(folder, paths[0]))} is {what}{more}; {remedy}")
    return found


def _held_out(root: str, labels: np.ndarray, fraction: float) -> np.ndarray:
    """Returns the indices of the fraction of each class, but of no class all images."""
    held_out = fixed_fraction(labels, fraction, seed=_HELD_OUT_SEED)
    classes, first, counts = np.unique(labels[held_out], return_index=True, return_counts=True)
    whole = counts == np.bincount(labels)[classes]
    held_out = np.delete(held_out, first[whole])
    if not len(held_out):
        raise InputError(f"{root} has one image a class, too few to split; add images")
    return held_out


def _read_class_folders(dataset: ConfigDict, root: str, splits: Splits, split: str) -> Listing:
    folder = join(root, splits[split])
    found = _walk(folder)
    of_class = collections.defaultdict(list)  # its own folder and those below it
    for at in sorted(found.images):
        of_class[at.partition("/")[0]].append(at)
    loose = found.images[of_class.pop("")[0]]
    present = sorted(of_class)
    if not present:
        more = ""
        if split == "eval" and splits["train"]:
            more = f", or set root to {root}/{splits['train']} to hold out a part of it"
        raise InputError(_no_classes(folder, len(loose), more))
    if loose:
        found.passed_over["images beside the class folders"] = loose
    if not splits[split]:
        _check_unsplit(root, present, found)
    # Whoever only evaluates may have no train split.
    train = join(root, splits["train"] if splits["train"] is not None else splits["eval"])
    names = present if train == folder else subfolders(train)
    number = {normalise(name): i for i, name in enumerate(names)}
    if len(number) < len(names):
        twin = next(n for i, n in enumerate(names) if number[normalise(n)] != i)
        raise InputError(
            f"{train} holds {twin!a} twice, in two Unicode normalisations; make it one folder"
        )
    unknown = [name for name in present if normalise(name) not in number]
    if unknown:
        raise InputError(
            f"{printable(f'{folder}/{unknown[0]}')}: this class is not in {train} ({len(unknown)} "
            "such classes); both splits need the same class folders"
        )
    if dataset.num_classes not in (0, len(names)):
        raise InputError(
            f"config.dataset.num_classes is {dataset.num_classes}, but {train} has "
            f"{_count(len(names), 'class folder')}; set {len(names)}, or 0 to infer it"
        )
    notes = []
    if renamed := [name for name in present if name not in set(names)]:
        twin = names[number[normalise(renamed[0])]]
        notes.append(
            f"{folder}: {len(renamed)} class folders have another Unicode normalisation than in "
            f"{train}, matched: {renamed[0]!a} = {twin!a}"
        )
    files: list[str] = []
    labels: list[int] = []
    for name in present:
        images = [f"{at}/{image}" for at in of_class[name] for image in found.images[at]]
        if not images:
            raise InputError(
                f"{printable(f'{folder}/{name}')} holds no images ({_SUFFIXES}); fill or remove it"
            )
        files += images
        labels += [number[normalise(name)]] * len(images)
    return Listing(files, labels, len(names), tuple(names), notes, found.passed_over)


def _check_unsplit(root: str, present: list[str], found: Found) -> None:
    """Raises InputError where the folders in ROOT are hardly classes."""
    if len(present) == 1:
        raise InputError(
            f"{root} holds no splits and one folder, {printable(present[0])}, expected one folder "
            f"a class; should config.dataset.root be {printable(f'{root}/{present[0]}')}?"
        )
    for at in found.images:
        if _SPLIT_NAMES & set(at.casefold().split("/")):
            raise InputError(
                f"{printable(f'{root}/{at}')} looks like a split in what should be a class folder; "
                "set config.dataset.root to the folder that holds the splits, or rename it"
            )


def _read_label_file(dataset: ConfigDict, root: str, splits: Splits, split: str) -> Listing:
    own, folder, path = splits[split], join(root, splits[split]), f"{root}/{dataset.label_file}"
    found = {name: _walk(join(root, name)) for name in set(splits.values()) if name is not None}
    images = label_file.Images({name: one.paths() for name, one in found.items()})
    files = images.paths[own]
    if not files:
        raise InputError(f"{folder} holds no images ({_SUFFIXES})")
    rows, notes = label_file.read_rows(path, images)
    # A name that is nowhere may be in the split that is not here.
    place_of, told = label_file.place_rows(path, rows, images, some=None in splits.values())
    numbers, num_classes, class_names, more = label_file.number_classes(dataset, path, rows)
    notes += told + more
    label_of: dict[label_file.Place, int] = {}
    for (line, name, _), number in zip(rows, numbers, strict=True):
        if line in place_of and label_of.setdefault(place_of[line], number) != number:
            raise InputError(
                f"{path}, line {line}: {printable(name)} already has another label; remove one"
            )
    missing = [image for image in files if (own, image) not in label_of]
    if missing:
        hint = "add a row or remove the file"
        if len(missing) == len(files) and splits["train"] and split == "eval":
            hint = f"to hold out a part of {splits['train']}, set config.dataset.root to it"
        raise InputError(
            f"{printable(join(folder, missing[0]))}: no label in {path} ({len(missing)} such files "
            f"of {len(files)}); {hint}"
        )
    labels = [label_of[own, image] for image in files]
    return Listing(files, labels, num_classes, class_names, notes, found[own].passed_over)
