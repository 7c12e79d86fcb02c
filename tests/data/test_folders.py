"""A table of the folders that people have, and what is read from each."""

import json
import os

import numpy as np
import pytest

from deit_jax import folders
from deit_jax.cli.main import main
from deit_jax.cli.predict import find_images
from deit_jax.config.files import load_config
from deit_jax.data import open_source, train_batches
from deit_jax.errors import InputError
from deit_jax.training import checks
from deit_jax.training.setup import check
from tests.data.conftest import NFC, NFD, make_files, plan_of, read_split, refused
from tests.oracles.torchvision_ops import import_torchvision

LATIN = os.fsdecode(b"caf\xe9.png")
PLAIN = ("train/ant/1.png", "train/bee/2.png", "val/ant/3.png")


SUFFIXES = ("JPG", "Jpeg", "JPE", "jfif", "WebP", "PNG", "gif", "BMP", "tif", "Pgm")
SYSTEM = (  # what Windows, macOS, Linux, Jupyter and NAS boxes leave
    *("ant/.DS_Store", "ant/Thumbs.db", "desktop.ini", "ant/._1.png", "@eaDir", "__MACOSX"),
    *(".ipynb_checkpoints", "lost+found", "bee/.hidden.png", "bee/@eaDir", "$RECYCLE.BIN"),
)
CIRCLE = "1 links in a circle"
# Kind: files beside PLAIN, images of the train split by class beside those of PLAIN, words of the
# notes, and the files that are passed over.
FOLDERS = {
    "plain": ((), {}, "", []),
    "sub-folders": (("train/ant/x/y/4.png",), {"ant": ["x/y/4"]}, "", []),
    "suffixes": (
        tuple(f"train/ant/5.{suffix}" for suffix in SUFFIXES),
        {"ant": [f"5.{suffix}" for suffix in SUFFIXES]}, "", [],
    ),
    "no suffix": (
        ("train/ant/n01", "train/ant/README"),
        {"ant": ["n01"]}, "1 without suffix and no image (ant/README)", ["ant/README"],
    ),
    "system files": (
        tuple(f"train/{name}" + "/1.png" * ("." not in name[-4:]) for name in SYSTEM),
        {}, "11 hidden or of the system", sorted(SYSTEM),
    ),
    "system folders": (
        ("train/ant/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg",),
        {}, "1 hidden or of the system", ["ant/@eaDir"],
    ),
    "annotations": (
        ("train/ant/1.xml", "train/ant/2.xml", "train/ant/t.txt"),
        {}, "2 .xml (ant/1.xml), 1 .txt (ant/t.txt)", ["ant/1.xml", "ant/2.xml", "ant/t.txt"],
    ),
    "loose images": (("train/4.png",), {}, "1 images beside the class folders", ["4.png"]),
    "linked class": (("store/4.png", "train/cow -> ../store"), {"cow": ["4"]}, "", []),
    "linked sub-folder": (
        ("store/4.png", "train/ant/more -> ../../store"), {"ant": ["more/4"]}, "", [],
    ),
    "linked image": (("train/bee/4.png -> ../ant/1.png",), {"bee": ["4"]}, "", []),
    "link to itself": (("train/ant/up -> .",), {}, CIRCLE, ["ant/up"]),
    "a class that is a link to all": (("train/all -> .",), {}, CIRCLE, ["all"]),
    "link to the root": (("train/ant/up -> ../..",), {}, CIRCLE, ["ant/up"]),
    "links to one another": (
        ("store/a/4.png", "store/a/b -> ../b", "store/b/a -> ../a", "train/cow -> ../store/a"),
        {"cow": ["4"]}, CIRCLE, ["cow/b/a"],
    ),
    "a link to nothing": (("train/ant/t -> gone",), {}, "1 broken links", ["ant/t"]),
    "a pipe": (("train/ant/p.fifo.png",), {}, "neither file nor folder", ["ant/p.fifo.png"]),
    "not UTF-8": ((f"train/ant/{LATIN}",), {"ant": ["caf\\xe9"]}, "", []),
    "class not UTF-8": ((f"train/{LATIN}/4.png",), {"caf\\xe9.png": ["4"]}, "", []),
    "a line break": (("train/ant/4\n.png",), {"ant": ["4\\n"]}, "", []),
    "another alphabet": (("train/蟻/四.png",), {"蟻": ["四"]}, "", []),
    "odd characters": (("train/a [b] *#%/4,'.png",), {"a [b] *#%": ["4,'"]}, "", []),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders(tmp_path, dataset_config, kind):
    files, more, note, passed = FOLDERS[kind]
    make_files(tmp_path, [*PLAIN, *files])
    dataset_config.root = str(tmp_path)
    read, notes, left = read_split(dataset_config, "train")
    found = {}
    for name, paths in read.items():
        found[name] = sorted(path.split("/", 2)[2].removesuffix(".png") for path in paths)
    names = {"ant", "bee", *more}
    plain = {"ant": ["1"], "bee": ["2"]}
    assert found == {name: sorted(plain.get(name, []) + more.get(name, [])) for name in names}
    assert note in notes
    assert bool(notes) == bool(note)
    assert left == passed
    train, evaluation = (open_source(dataset_config, split) for split in ("train", "eval"))
    assert evaluation.class_names == train.class_names  # bee has no images to evaluate


def test_classes_match_in_any_unicode_normalisation(tmp_path, dataset_config):
    make_files(tmp_path, [*PLAIN, f"train/{NFC}/4.png", f"val/{NFD}/5.png"])
    dataset_config.root = str(tmp_path)
    read, notes, _ = read_split(dataset_config, "eval")
    assert read == {"ant": ["val/ant/3.png"], NFC: [f"val/{NFD}/5.png"]}
    assert "matched: 'cafe\\u0301' = 'caf\\xe9'" in notes


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("test", "validation", "valid", "val"), "val"),
        (("test", "validation", "valid"), "valid"),
        (("test", "validation"), "validation"),
        (("test",), "test"),
    ],
)
def test_the_evaluation_split_has_many_names(tmp_path, dataset_config, names, taken):
    make_files(tmp_path, ["train/ant/1.png", *(f"{name}/ant/{name}.png" for name in names)])
    dataset_config.update({"root": str(tmp_path), "eval_split": "holdout"})
    read, notes, _ = read_split(dataset_config, "eval")
    assert read == {"ant": [f"{taken}/ant/{taken}.png"]}
    assert notes == f"{tmp_path} has no folder holdout: the folder {taken} is the evaluation split"
    assert not open_source(dataset_config, "train").notes


@pytest.mark.parametrize(
    ("files", "fields", "split", "words"),
    [
        (("train/cow/notes.txt",), {}, "train", ["train/cow holds no images", ".jfif"]),
        (("train/ant/4.heic", "train/ant/5.HEIC"), {}, "train", ["ant/4.heic", "2 such files"]),
        (("train/ant/4.png -> gone.png",), {}, "train", ["ant/4.png is a link to nothing"]),
        (("train/ant/4.png -> 4.png",), {}, "train", ["ant/4.png is a link to nothing"]),
        ((f"train/{NFC}/1.png", f"train/{NFD}/1.png"), {}, "train", ["'cafe\\u0301'", "twice"]),
        (("val/elk/4.png",), {}, "eval", ["val/elk", "not in"]),
        ((), {"eval_split": "val", "train_split": "val2"}, "train", ["val2", "holds train, val"]),
        ((), {"train_split": "trian"}, "train", ["did you mean train?"]),
    ],
)
def test_folders_that_are_refused(tmp_path, dataset_config, files, fields, split, words):
    make_files(tmp_path, [*PLAIN, *files])
    dataset_config.update({"root": str(tmp_path)} | fields)
    line = refused(dataset_config, split)
    for word in words:
        assert word in line


REMEDIES = ("one folder a class", "config.dataset.label_file")


@pytest.mark.parametrize(
    ("files", "fields", "words"),
    [
        (
            ("train/ant/1.png",),
            {},
            ["none of val, valid, validation, test", "set root to", "train"],
        ),
        (("ant/1.png", "bee/2.png"), {"eval_fraction": 0.0}, ["eval_fraction is 0"]),
        (("Training/ant/1.png", "Testing/ant/1.png"), {}, ["holds Testing, Training"]),
        (("images/ant/1.png", "images/bee/2.png"), {}, ["one folder, images", "/images?"]),
        (("pets/train/a/1.png", "birds/b/2.png"), {}, ["pets/train looks like a split"]),
        (("ant/1.png", "bee/2.png"), {}, ["one image a class"]),
        (("notes.txt",), {}, ["holds no folders"]),
        (("1.png",), {}, [" holds 1 image and no class", *REMEDIES]),
        (("1.png", "2.png", "notes.txt"), {}, [" holds 2 images and no class", *REMEDIES]),
        (
            ("train/ant/1.png", "test/2.png"),
            {},
            ["test holds 1 image and no class", *REMEDIES, "or set root to", "/train to hold"],
        ),
    ],
)
def test_roots_without_splits_that_are_refused(tmp_path, dataset_config, files, fields, words):
    make_files(tmp_path, files)
    dataset_config.update({"root": str(tmp_path)} | fields)
    line = refused(dataset_config, "eval")
    for word in words:
        assert word in line


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(("fraction", "held_out"), [(0.1, [1, 2, 0]), (0.9, [9, 18, 0])])
def test_one_folder_of_classes_is_split(tmp_path, dataset_config, fraction, held_out, labelled):
    names = [f"{c}/{i}.png" for c, n in (("ant", 10), ("bee", 20), ("cow", 1)) for i in range(n)]
    make_files(tmp_path, names)
    dataset_config.update({"root": str(tmp_path), "eval_fraction": fraction})
    if labelled:
        rows = "".join(f"{name},{name[:3]}\n" for name in names)
        (tmp_path / "labels.csv").write_text(rows)
        dataset_config.label_file = "labels.csv"
    sources = {split: open_source(dataset_config, split) for split in ("train", "eval")}
    ids = {s: [x.example_id(i) for i in range(x.num_examples)] for s, x in sources.items()}
    assert sorted(ids["train"] + ids["eval"]) == sorted(f"{tmp_path}/{name}" for name in names)
    counts = np.bincount(sources["eval"].labels, minlength=3).tolist()
    assert counts == held_out
    (told,) = {source.notes[0] for source in sources.values()}
    assert f"{31 - sum(held_out)} to train and {sum(held_out)} to evaluate" in told
    again = open_source(dataset_config, "eval")
    assert again.fingerprint() == sources["eval"].fingerprint() != sources["train"].fingerprint()
    dataset_config.train_fraction = 0.5  # of what is not held out
    part = open_source(dataset_config, "train")
    assert {part.example_id(i) for i in range(part.num_examples)} < set(ids["train"])


def test_nested_folders_are_read_as_torchvision_reads_them(tmp_path, dataset_config):
    names = ["a/z.png", "a/b/1.png", "a/b c/2.png", "a/b/c/3.png", "a b/4.PNG", "a/B.Jpg"]
    names += ["a/é/5.png", "a/a", "a/b/0"]  # two without suffix
    make_files(tmp_path, [f"train/{name}" for name in names])
    (tmp_path / "train/a/link").symlink_to(tmp_path / "train/a b")
    dataset_config.root = str(tmp_path)
    source = open_source(dataset_config, "train")
    every = {"is_valid_file": lambda path: True}  # by default, torchvision wants a suffix
    reference = import_torchvision().datasets.ImageFolder(f"{tmp_path}/train", **every)
    found = [(source.example_id(i), int(source.labels[i])) for i in range(source.num_examples)]
    assert found == reference.samples
    assert list(source.class_names) == reference.classes
    # As it was before nested folders were read: runs compare it when they go on.
    (tmp_path / "plain").mkdir()
    for name in ("x/1.png", "y/2.png"):
        make_files(tmp_path / "plain/train", [name])
    dataset_config.root = str(tmp_path / "plain")
    assert open_source(dataset_config, "train").fingerprint() == "aa37238a569d0194"


def test_prediction_walks_folders_alike(tmp_path, capsys):
    make_files(
        tmp_path, ["b/1.png", "a.JFIF", "x", "@eaDir/1.png", "b/._1.png", "t.txt", "b/up -> .."]
    )
    found = [str(path.relative_to(tmp_path)) for path in find_images([str(tmp_path)])]
    assert found == ["a.JFIF", "b/1.png", "x"]
    line = capsys.readouterr().err
    assert line == (
        f"note: {tmp_path}: no images: 2 hidden or of the system (@eaDir), 1 .txt (t.txt), "
        "1 links in a circle (b/up)\n"
    )


def test_check_data_names_what_does_not_count(tmp_path, capsys):
    make_files(
        tmp_path, [*PLAIN, "train/bee/@eaDir/2.png", *(f"train/ant/{i}.xml" for i in range(9))]
    )
    flags = ("check-data", "--config=folder", f"--config.dataset.root={tmp_path}", "--workers=1")
    assert main(list(flags)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  not data, 1 hidden or of the system: bee/@eaDir" in lines
    names = "ant/0.xml, ant/1.xml, ant/2.xml … ant/6.xml, ant/7.xml, ant/8.xml"
    assert f"  not data, 9 .xml: {names}" in lines
    assert main([*flags, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["splits"]["train"]
    assert len(report["passed_over"][".xml"]) == 9
    assert report["notes"] == [
        f"{tmp_path}/train: not data: 9 .xml (ant/0.xml), 1 hidden or of the system (bee/@eaDir)"
    ]


def test_a_run_says_once_what_it_made_of_the_folder(tmp_path, capsys):
    names = [f"{label}/{i}.png" for label in ("ant", "bee") for i in range(5)]
    make_files(tmp_path / "data", [*names, "bee/notes.txt"])
    config = load_config("folder:plain")
    config.dataset.root = str(tmp_path / "data")
    config.model.name = "deit_testing"
    config.train.batch_size = 8
    config.mixing.group_size = 8
    check(config, str(tmp_path / "run"))
    assert capsys.readouterr().out.splitlines() == [
        f"note: {tmp_path}/data has no folders train and val: its 10 images in 2 classes are split "
        "by eval_fraction 0.1, 8 to train and 2 to evaluate",
        f"note: {tmp_path}/data: not data: 1 .txt (bee/notes.txt)",
    ]


@pytest.mark.parametrize("gone", [False, True])
def test_errors_name_files_that_are_not_utf8(tmp_path, dataset_config, plain_config, gone):
    file = tmp_path / "train/ant" / LATIN
    make_files(tmp_path, [f"train/ant/{LATIN}"])
    dataset_config.root = str(tmp_path)
    source = open_source(dataset_config, "train")
    file.unlink()
    if not gone:
        file.write_bytes(b"no picture")
    with pytest.raises(InputError) as caught:
        next(train_batches(source, plan_of(plain_config, batch_size=1)))
    assert f"{tmp_path}/train/ant/caf\\xe9.png cannot be used: " in str(caught.value)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    def scandir(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match=f"{tmp_path} cannot be read \\(Permission denied"):
        folders.walk(str(tmp_path))


def test_console_lines_survive_a_terminal_of_ascii(run_python):
    code = "from deit_jax.console import log; log('4 × caf\\udce9')"
    found = run_python("-c", code, env={"PYTHONIOENCODING": "ascii:strict"})
    assert (found.returncode, found.stdout) == (0, "4 \\xd7 caf\\udce9\n")


def test_splits_of_other_classes_are_refused(tmp_path, dataset_config):
    """A label of one split would mean another class in the other; of one class there is no loss."""
    sources = []
    for root, classes in (("a", ("ant", "bee")), ("b", ("ant", "cow")), ("c", ("ant",))):
        make_files(tmp_path / root, [f"train/{name}/1.png" for name in classes])
        dataset_config.root = str(tmp_path / root)
        sources.append(open_source(dataset_config, "train"))
    first, other, single = sources
    checks.check_data(first, first, None)
    with pytest.raises(InputError, match="class 1 is 'bee' in one and 'cow' in the other"):
        checks.check_data(first, other, None)
    with pytest.raises(InputError, match="has one class, ant: there is nothing to learn"):
        checks.check_data(single, single, None)
