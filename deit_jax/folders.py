"""Walks folders of images as people have them: nested, linked, with what systems leave in them.

All access to folders of images is in `is_folder`, `list_folder` and `read_bytes`.
"""

import collections
import dataclasses
import errno
import os
import unicodedata
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from deit_jax import pictures, storage
from deit_jax.console import escaped
from deit_jax.errors import InputError, TransientError

# What operating systems, NAS boxes and notebooks leave in folders, besides hidden files.
_OF_SYSTEMS = {
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "__macosx"),
    *("$recycle.bin", "recycler", "system volume information", "lost+found", "__pycache__"),
    *("@eadir", "@tmp", "@__thumb", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"),
    *("network trash folder", "temporary items"),
}
_UNNAMED = "without suffix and no image"
_UNREADABLE = (".heic", ".heif", ".jxl")  # pictures that neither decoder reads
_SUFFIXES = frozenset(pictures.SUFFIXES)
_WRONG_PLACE = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_THREADS = 16  # listing is waiting, not work, in a bucket above all
_NAMED = 6  # so many reasons are told apart in one line


class Entry(NamedTuple):
    """What a folder holds under a name."""

    name: str
    kind: str  # folder, file, broken (a link to nothing) or special (a pipe, a socket, a device)
    link: bool


@dataclasses.dataclass
class Found:
    """What a walk found, in paths relative to where it began."""

    images: dict[str, list[str]]  # of every folder ("": the top) the sorted names
    broken: list[str]  # links to nothing with the suffix of an image; they are in `images`, too
    unreadable: list[str]  # images that no decoder reads, by their suffix
    passed_over: dict[str, list[str]]  # all others, by what they are

    def paths(self) -> list[str]:
        """Returns the images in torchvision's order: by folder, then by name."""
        return [join(at, name) for at in sorted(self.images) for name in self.images[at]]


def walk(top: str) -> Found:
    """Finds the images in a folder and all below it; links are followed, but not in circles.

    An image has one of `pictures.SUFFIXES`, in any case, or none and the first bytes of an image.

    Raises:
      InputError: a folder that cannot be listed.
    """
    found = Found({}, [], [], collections.defaultdict(list))
    level = [("", (os.path.realpath(top),))]
    with ThreadPoolExecutor(_THREADS) as pool:
        while level:  # all folders of a depth at once
            listed = pool.map(list_folder, [join(top, at) for at, _ in level])
            deeper = []
            for (at, chain), entries in zip(level, listed, strict=True):
                for name, link in _sort_out(found, at, entries):
                    if own := _descend(chain, join(top, at, name), link):
                        deeper.append((join(at, name), own))
                    else:
                        found.passed_over["links in a circle"].append(join(at, name))
            level = deeper
        unnamed = found.passed_over.pop(_UNNAMED, [])
        firsts = pool.map(lambda path: read_bytes(join(top, path), pictures.FIRST_BYTES), unnamed)
        for path, first in zip(unnamed, firsts, strict=True):
            if pictures.kind(first):
                at, _, name = path.rpartition("/")
                found.images[at].append(name)
            else:
                found.passed_over[_UNNAMED].append(path)
    for names in found.images.values():
        names.sort()
    return found


def _sort_out(found: Found, at: str, entries: list[Entry]) -> list[tuple[str, bool]]:
    """Adds to `found` what a folder holds; returns its folders, and whether they are links."""
    names, folders = [], []
    found.images[at] = names
    for name, kind, link in entries:
        if kind == "file" and name[name.rfind(".") :].lower() in _SUFFIXES and name[0] != ".":
            names.append(name)  # the rule, by millions: first and quick
            continue
        path, suffix = join(at, name), os.path.splitext(name)[1].lower()
        if is_hidden(name):
            found.passed_over["hidden or of the system"].append(path)
        elif kind == "folder":
            folders.append((name, link))
        elif kind == "broken" and suffix in _SUFFIXES:
            names.append(name)
            found.broken.append(path)
        elif kind == "file" and suffix in _UNREADABLE:
            found.unreadable.append(path)
        else:
            what = {"broken": "broken links", "special": "neither file nor folder"}
            found.passed_over[what.get(kind, suffix or _UNNAMED)].append(path)
    return folders


def subfolders(top: str) -> list[str]:
    """Returns the names of the folders in a folder that `walk` enters, sorted.

    Raises:
      InputError: it cannot be listed.
    """
    above = (os.path.realpath(top),)
    folders = [e for e in list_folder(top) if e.kind == "folder" and not is_hidden(e.name)]
    return [e.name for e in folders if _descend(above, join(top, e.name), e.link)]


def _descend(chain: tuple[str, ...], path: str, link: bool) -> tuple[str, ...] | None:
    """Returns the real paths that lead to a folder, the last of each stretch without links.

    None for a link to a folder that the walk is in: it would come back here for ever.
    """
    if not link:
        return (*chain[:-1], join(chain[-1], path.rpartition("/")[2]))
    target = os.path.realpath(path)
    above = target.rstrip("/") + "/"
    return None if any(f"{real}/".startswith(above) for real in chain) else (*chain, target)


def is_hidden(name: str) -> bool:
    """Returns whether a name is hidden or of the system: never data."""
    return name.startswith(".") or name.casefold() in _OF_SYSTEMS


def is_folder(path: str) -> bool:
    """Returns whether there is a folder of this name."""
    return storage.path_of(path).is_dir()


def list_folder(folder: str) -> list[Entry]:
    """Returns what a folder holds, sorted by name.

    Raises:
      InputError: it cannot be listed.
    """
    try:
        if storage.is_remote(folder):
            return sorted(
                Entry(name, "folder" if is_folder else "file", False)
                for name, is_folder in storage.list_bucket(folder)
            )
        with os.scandir(folder) as entries:
            return sorted(Entry(e.name, _kind(e), e.is_symlink()) for e in entries)
    except OSError as error:
        raise _unreadable(folder, error) from error


def read_bytes(path: str, count: int = -1) -> bytes:
    """Returns the first `count` bytes of a file, all by default.

    Raises:
      InputError: it cannot be read.
    """
    try:
        with storage.path_of(path).open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise _unreadable(path, error) from error


def _kind(entry: os.DirEntry) -> str:
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "folder"
        os.stat(entry.path)
    except OSError:  # links to one another, too
        return "broken"
    return "special"


def _unreadable(path: str, error: OSError) -> InputError:
    kind = InputError if error.errno in _WRONG_PLACE else TransientError
    return kind(
        f"{printable(path)} cannot be read ({error.strerror or error}); check path and permissions"
    )


def join(*parts: str) -> str:
    """Joins the parts that are not empty by slashes."""
    return "/".join(filter(None, parts))


def normalise(name: str) -> str:
    """Returns the Unicode normal form in which names are compared: macOS decomposes them."""
    return unicodedata.normalize("NFC", name)


def first_other(names: Sequence[str], others: Sequence[str]) -> tuple[int, str, str] | None:
    """Returns the number of the first class whose two names differ, and these; None without one.

    Names that differ in nothing but their Unicode normal form are the same name.
    """
    for number, (name, other) in enumerate(zip(names, others, strict=False)):
        if normalise(name) != normalise(other):
            return number, name, other
    return None


def printable(name: str) -> str:
    """Returns a name as one line: bytes that are not UTF-8 and control characters escaped."""
    return escaped(os.fsencode(name).decode("utf-8", "backslashreplace"), one_line=True)


def describe(passed_over: Mapping[str, Sequence[str]]) -> str:
    """Returns in a few words what a walk passed over, each reason with one of its names."""
    reasons = sorted(passed_over.items(), key=lambda item: -len(item[1]))
    told = [f"{len(p):,} {reason} ({printable(p[0])})" for reason, p in reasons[:_NAMED]]
    if rest := sum(len(paths) for _, paths in reasons[_NAMED:]):
        told.append(f"{rest:,} others")
    return ", ".join(told)
