"""A table of the label files that people have, and what is read from each."""

import pytest

from deit_jax.data import open_source
from tests.data.conftest import NFC, NFD, make_files, read_split, refused

FLAT = ("train/a.png", "train/b.png", "val/c d.png")
LABELS = [  # of a, b and c d: names
    ("fox", "elk", "owl"),
    ("1", "0", "2"),
]
# Kind: text, or bytes, with {0} {1} {2} in place of the labels.
LABEL_FILES = {
    "no header": "a.png,{0}\nb.png,{1}\nc d.png,{2}\n",
    "filename,label": "filename,label\na.png,{0}\nb.png,{1}\nc d.png,{2}\n",
    "with the split": "File Name,Class\ntrain/a.png,{0}\ntrain/b.png,{1}\nval/c d.png,{2}\n",
    "image_id,label": "image_id,label\na,{0}\nb,{1}\nc d,{2}\n",
    "id,breed": "id,breed\na,{0}\nb,{1}\nc d,{2}\n",
    "file,class": "file,class\n./a.png,{0}\n./b.png,{1}\nc d.png,{2}\n",
    "other word": "plate,label\na.png,{0}\nb.png,{1}\nc d.png,{2}\n",
    "other label": "image,kind of animal\na.png,{0}\nb.png,{1}\nc d.png,{2}\n",
    "index column": ",filename,label\n0,a.png,{0}\n1,b.png,{1}\n2,c d.png,{2}\n",
    "index without header": "0,a.png,{0}\n1,b.png,{1}\n2,c d.png,{2}\n",
    "label first": "label,image\n{0},a.png\n{1},b.png\n{2},c d.png\n",
    "label first, no header": "{0},a.png\n{1},b.png\n{2},c d.png\n",
    "more columns": "id,filename,width,label\n7,a.png,2,{0}\n9,b.png,2,{1}\n3,c d.png,2,{2}\n",
    "quotes": '"filename","label"\n"a.png","{0}"\nb.png,"{1}"\n"c d.png",{2}\n',
    "CRLF": "filename,label\r\na.png,{0}\r\nb.png,{1}\r\nc d.png,{2}\r\n",
    "old Mac": "a.png,{0}\rb.png,{1}\rc d.png,{2}",
    "BOM": "\ufeffa.png,{0}\nb.png,{1}\nc d.png,{2}\n",
    "BOM and header": "\ufefffilename,label\na.png,{0}\nb.png,{1}\nc d.png,{2}\n",
    "TSV": "filename\tlabel\na.png\t{0}\nb.png\t{1}\nc d.png\t{2}\n",
    "semicolons": "filename;label\na.png;{0}\nb.png;{1}\nc d.png;{2}\n",
    "spaces": "a.png {0}\n\nb.png   {1}\nc d.png {2} \n",
    "quoted spaces": 'a.png {0}\nb.png {1}\n"c d.png" {2}\n',
    "spaces around": " a.png , {0}\nb.png,{1} \nc d.png,{2}\n\n\n",
    "Windows paths": "train\\a.png,{0}\ntrain\\b.png,{1}\nval\\c d.png,{2}\n",
}  # fmt: skip


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("kind", LABEL_FILES)
def test_label_files(tmp_path, dataset_config, kind, labels):
    make_files(tmp_path, FLAT)
    (tmp_path / "labels.csv").write_bytes(LABEL_FILES[kind].format(*labels).encode())
    dataset_config.update({"root": str(tmp_path), "label_file": "labels.csv"})
    a, b, c = labels
    train, notes, _ = read_split(dataset_config, "train")
    assert train == {a: ["train/a.png"], b: ["train/b.png"]}
    assert read_split(dataset_config, "eval")[0] == {c: ["val/c d.png"]}
    assert notes == (
        f"{tmp_path}/labels.csv: the columns filename and label count, id, width not"
        if kind == "more columns"
        else ""
    )


@pytest.mark.parametrize(
    ("names", "text", "fields", "expected", "note"),
    [
        (("train/s/a.png", "train/b.png"), "s/a.png,x\nb.png,y\n", {}, {"x": 1, "y": 1}, ""),
        ((f"train/{NFD}.png",), f"{NFC}.png,x\n", {}, {"x": 1}, "another Unicode normalisation"),
        ((f"train/{NFC}.png",), f"{NFD},x\n", {}, {"x": 1}, "another Unicode normalisation"),
        (("train/a.png",), f"a.png,{NFD}\n", {}, {NFC: 1}, ""),
        (("train/a.png", "train/b.png"), "a,1\nb,2\n", {}, {"1": 1, "2": 1}, "class 0 has no"),
        (("train/a.png", "train/b.png"), "a,0.0\nb,2.0\n", {}, {"0": 1, "2": 1}, "(1 of 3 "),
        (("train/a.png",), "a.png,0\n", {"num_classes": 2}, {"0": 1}, "no row has class 1"),
        (("train/a.png",), "a.png,x\nz.png,y\n", {}, {"x": 1}, "1 rows name no"),
        (("train/id.png", "train/b.png"), "id,class\nb,breed\n", {}, {"class": 1, "breed": 1}, ""),
        (("train/a.jpg.png", "train/x.txt"), "a.jpg,x\n", {}, {"x": 1}, "1 .txt"),
    ],
)  # fmt: skip
def test_labels_and_their_notes(tmp_path, dataset_config, names, text, fields, expected, note):
    make_files(tmp_path, names)
    (tmp_path / "labels.csv").write_text(text)
    dataset_config.update({"root": str(tmp_path), "label_file": "labels.csv"} | fields)
    read, notes, _ = read_split(dataset_config, "train")
    assert {name: len(files) for name, files in read.items()} == expected
    assert note in notes
    assert bool(notes) == bool(note)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a.png,fox\nb.png,elk\n".encode("utf-16"), ["UTF-16", "save it as UTF-8"]),
        ("a.png,fox\nb.png,élk\n".encode("latin-1"), ["line 2", "0xe9", "Latin-1", "as UTF-8"]),
        ("a.png,1\nb.png,2\nc d.png,3\n", ["line 3", "0..2", "1 to 3: subtract 1"]),
        ("a.png,fox\nb,c.png,elk\nc d.png,owl\n", ["line 2", "quote"]),
        ('a.png,fox\n"b.png,elk\nc d.png,owl\n', ["check the quotes"]),
        ("a.png,fox\nb.png,\nc d.png,owl\n", ["line 2", "expected 'name,label'"]),
        ("filename,label\n", ["has a header and no rows"]),
        ("filename,class,label\na.png,1,fox\n", ["line 1", "filename and label"]),
        ("image,cat,dog\na.png,0,1\nb.png,1,0\n", ["line 1", "filename and label"]),
        ("plate,kind\na.png,fox\nb.png,elk\nc d.png,owl\n", ["line 1: plate", "a header"]),
        ("a.png,fox\nb.png,elk\nc d.png,owl\nz.png,elk\n", ["line 4: z.png is not in"]),
        ("a.png,fox\n", ["train/b.png: no label"]),
    ],
)  # fmt: skip
def test_label_files_that_are_refused(tmp_path, dataset_config, text, words):
    make_files(tmp_path, FLAT)
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "labels.csv").write_bytes(data)
    fields = {"root": str(tmp_path), "label_file": "labels.csv"}
    dataset_config.update(fields | {"num_classes": 3})
    line = refused(dataset_config)
    for word in words:
        assert word in line


def test_an_unlabelled_test_folder_is_no_evaluation_split(tmp_path, dataset_config):
    """As Kaggle has it: train, test and labels of train alone."""
    make_files(tmp_path, ["train/a.png", "train/b.png", "train/c.png", "test/d.png"])
    (tmp_path / "labels.csv").write_text("id,breed\na,fox\nb,fox\nc,fox\n")
    dataset_config.update({"root": str(tmp_path), "label_file": "labels.csv"})
    assert "to hold out a part of train, set config.dataset.root" in refused(dataset_config, "eval")
    dataset_config.update({"root": f"{tmp_path}/train", "label_file": "../labels.csv"})
    assert [open_source(dataset_config, s).num_examples for s in ("train", "eval")] == [2, 1]
