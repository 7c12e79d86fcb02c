"""The table of ImageNet classes against the lists that timm and torchvision carry."""

import importlib.resources

import pytest

from deit_jax.models import imagenet
from tests.oracles.torchvision_ops import import_torchvision

NAMES = tuple(map(imagenet.readable, imagenet.wnids()))


@pytest.fixture(scope="module")
def lemmas():
    """WordNet id to all its names, as Hugging Face's models spell their labels."""
    import_torchvision()
    folder = importlib.resources.files("timm.data") / "_info"
    ids = (folder / "imagenet_synsets.txt").read_text("utf-8").split()
    lines = (folder / "imagenet_synset_to_lemma.txt").read_text("utf-8").splitlines()
    known = dict(line.split("\t") for line in lines)
    return {wnid: known[wnid] for wnid in ids}


def test_ids_are_timms_and_sorted(lemmas):
    assert len(imagenet.wnids()) == 1000
    assert imagenet.wnids() == tuple(lemmas) == tuple(sorted(set(imagenet.wnids())))


def test_names_are_torchvisions_made_distinct(lemmas):
    import_torchvision()
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    ours = NAMES
    assert len({name.lower() for name in ours}) == len(ours) == 1000
    changed = {
        theirs: name
        for name, theirs in zip(ours, _IMAGENET_CATEGORIES, strict=True)
        if name != theirs
    }
    assert changed == {
        "crane bird": "crane (bird)",
        "crane": "crane (machine)",
        "maillot tank suit": "maillot (tank suit)",
        "Cardigan": "Cardigan (Welsh corgi)",
        "cardigan": "cardigan (knitwear)",
    }
    for name, synonyms in zip(ours, lemmas.values(), strict=True):
        assert name.split(" (")[0] == synonyms.split(",")[0]


def test_readable():
    assert imagenet.readable("n02012849") == "crane (bird)"
    for other in ("n00004475", "tench", "", "7"):
        assert imagenet.readable(other) == other


def test_label_texts_of_every_source_are_recognised(lemmas):
    import_torchvision()
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    ids = imagenet.wnids()
    sources = {
        "hugging face": tuple(lemmas.values()),
        "upper case": tuple(name.upper() for name in lemmas.values()),
        "torchvision": tuple(_IMAGENET_CATEGORIES),
        "underscores": tuple(name.replace(" ", "_") for name in _IMAGENET_CATEGORIES),
        "ours": NAMES,
        "ids": ids,
    }
    for source, names in sources.items():
        assert imagenet.wnid_of_names(names) == ids, source


def test_a_few_other_spellings_pass_and_more_do_not():
    names, ids = list(NAMES), imagenet.wnids()
    names[:50] = [f"fish {i}" for i in range(50)]
    assert imagenet.wnid_of_names(tuple(names)) == ids
    names[50] = "fish 50"
    assert imagenet.wnid_of_names(tuple(names)) is None
    # One name used twice is a spelling: the class that it belongs to stands at its own place.
    names = list(NAMES)
    names[836] = names[837]
    assert imagenet.wnid_of_names(tuple(names)) == ids


def test_another_order_or_number_is_refused(lemmas):
    for names in (tuple(lemmas.values()), imagenet.wnids()):
        for first, second in ((0, 1), (10, 900)):
            swapped = list(names)
            swapped[first], swapped[second] = swapped[second], swapped[first]
            assert imagenet.wnid_of_names(tuple(swapped)) is None
        assert imagenet.wnid_of_names(names[1:] + names[:1]) is None
        assert imagenet.wnid_of_names(names[:999]) is None
        assert imagenet.wnid_of_names((*names, "background")) is None
    assert imagenet.wnid_of_names(()) is None
    assert imagenet.wnid_of_names(tuple(f"LABEL_{i}" for i in range(1000))) is None
