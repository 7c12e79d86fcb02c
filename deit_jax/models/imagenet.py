"""The 1000 classes of ImageNet-1k: their WordNet ids, and names for people.

Data sets name the classes by id, and so does a model trained on one; tools show the names.
"""

import functools
from pathlib import Path

_FILE = Path(__file__).with_name("imagenet_classes.txt")  # "n01440764 tench", one class a line
_MAX_OTHER_SPELLINGS = 50  # of the 1000: sources agree on the classes, not on every name


def wnids() -> tuple[str, ...]:
    """The WordNet ids in the order of the classes, which is their sorted order."""
    return tuple(_table())


def names() -> tuple[str, ...]:
    """A readable name for each class in the same order, no two alike even in lower case."""
    return tuple(_table().values())


def readable(class_name: str) -> str:
    """The readable name where `class_name` is a WordNet id of ImageNet-1k, else as it is."""
    return _table().get(class_name, class_name)


def wnid_of_names(names: tuple[str, ...]) -> tuple[str, ...] | None:
    """The WordNet ids of label texts, or None unless they are ImageNet-1k in its usual order.

    A text is a WordNet id, or a name with or without synonyms after commas ("tench, Tinca tinca"),
    of which the first counts, in any case. A few names may be spelt differently; names that stand
    at one another's place are another order, however few.
    """
    ids, own = wnids(), [_plain(name) for name in _table().values()]
    if len(names) != len(ids):
        return None
    found = [_plain(name) for name in names]
    other = {
        i
        for i, (text, name, wnid) in enumerate(zip(found, own, ids, strict=True))
        if text not in (name, wnid)
    }
    place = {name: i for known in (own, ids) for i, name in enumerate(known)}
    moved = any(place.get(found[i]) in other for i in other)
    return None if moved or len(other) > _MAX_OTHER_SPELLINGS else ids


def _plain(text: str) -> str:
    """The first synonym without the "(bird)" that sets our two cranes apart."""
    return text.split(",")[0].split(" (")[0].replace("_", " ").strip().lower()


@functools.cache
def _table() -> dict[str, str]:
    """WordNet id to readable name."""
    lines = _FILE.read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines)
