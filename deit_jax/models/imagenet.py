"""Names the 1000 classes of ImageNet-1k: WordNet ids for data sets, readable names for people.

Data sets name the classes by id, and so does a model trained on one; tools show the names.
"""

import functools
from pathlib import Path

_FILE = Path(__file__).with_name("imagenet_classes.txt")  # "n01440764 tench", one class a line
_MAX_OTHER_SPELLINGS = 50  # of the 1000: sources agree on the classes, not on every name


def wnids() -> tuple[str, ...]:
    """Returns the WordNet ids in the order of the classes, which is their sorted order."""
    return tuple(_table())


def readable(class_name: str) -> str:
    """Returns the readable name of a WordNet id of ImageNet-1k, and any other name as it is."""
    return _table().get(class_name, class_name)


def wnid_of_names(names: tuple[str, ...]) -> tuple[str, ...] | None:
    """Returns the WordNet ids of label texts, or None unless they are ImageNet-1k in its order.

    A text is a WordNet id or a name, in any case; of synonyms ("tench, Tinca tinca") the first
    counts. A few names may be spelt differently, but where even two classes have swapped places,
    the order is another one.
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
    """Returns the first synonym, without the "(bird)" that tells our two cranes apart."""
    return text.split(",")[0].split(" (")[0].replace("_", " ").strip().lower()


@functools.cache
def _table() -> dict[str, str]:
    """Reads {WordNet id: readable name}; the names are distinct even in lower case."""
    lines = _FILE.read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines)
