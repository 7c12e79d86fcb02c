"""deit-jax plot: what is drawn is what metrics.jsonl says."""

import contextlib
import importlib.util
import json
import math

import pytest
from PIL import Image

from deit_jax.cli import figures, plot
from deit_jax.training.metrics import MetricWriter


def write_run(folder, *, epochs=True, heads=False, teacher=None, scale=1.0):
    """Writes what training writes; returns the folder."""
    folder.mkdir()
    writer = MetricWriter(str(folder), steps_per_epoch=2 if epochs else 0)
    for step in (2, 4, 6):
        values = {"loss": scale / step, "learning_rate": 1e-3 / step, "images_per_second": 10.0}
        writer.write(step, "train", values if step != 4 else values | {"loss": math.nan})
        evaluated = {"top1": 10.0 * step, "loss": scale / step + 1}
        if heads:
            evaluated |= {"top1_cls": 9.0 * step, "top1_dist": 8.0 * step}
        writer.write(step, "eval", evaluated, data="digest")
    final = {"top1": 60.0} | ({"teacher_top1": teacher} if teacher else {})
    writer.write(6, "final", final)
    writer.close()
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn."""
    found, new_figure = [], figures.new_figure

    @contextlib.contextmanager
    def kept(*arguments):
        with new_figure(*arguments) as figure:
            found.append(figure)
            yield figure

    monkeypatch.setattr(figures, "new_figure", kept)
    return found


def curves(axes):
    """Its lines: colour, x and y."""
    return [(line.get_color(), *map(list, line.get_data())) for line in axes.lines]


def test_curves_of_two_runs(deit_jax_command, drawn, tmp_path):
    one = write_run(tmp_path / "one", heads=True, teacher=70.0)
    other = write_run(tmp_path / "other", scale=2.0)
    ended = deit_jax_command("plot", one, other, "--out=c.png", "--json")
    assert ended.status == 0, ended.err
    assert json.loads(ended.out)["axis"] == "epoch"
    with Image.open("c.png") as image:
        assert image.size == (1350, 900)
    (figure,) = drawn
    loss, accuracy, rate, speed = figure.axes
    first, second = figures.COLOURS[:2]
    train = curves(loss)[0]
    assert train[:2] == (first, [1, 2, 3])
    assert train[2][::2] == [0.5, 1 / 6]
    assert math.isnan(train[2][1])  # a gap where the loss was no number
    assert curves(loss)[3] == (second, [1, 2, 3], [2.0, 1.5, pytest.approx(4 / 3)])
    assert curves(accuracy)[:3] == [
        (first, [1, 2, 3], [20, 40, 60]),
        (first, [1, 2, 3], [18, 36, 54]),
        (first, [1, 2, 3], [16, 32, 48]),
    ]
    assert curves(accuracy)[3][2] == [70, 70]  # the teacher's
    assert len(accuracy.lines) == 5
    assert curves(rate)[1] == (second, [1, 2, 3], [1e-3 / step for step in (2, 4, 6)])
    assert curves(speed)[0][2] == [10, 10, 10]
    words = [text.get_text() for text in accuracy.get_legend().get_texts()]
    assert words == ["top-1", "class head", "distillation head", "teacher"]
    assert rate.get_legend() is None
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "other"]


def test_steps_where_a_run_has_no_epochs_and_lines_cut_short(deit_jax_command, drawn, tmp_path):
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", epochs=False)
    with (other / plot.FILE).open("a") as file:
        file.write('{"step": "x", "split": "train", "loss": 1}\n[]\n{"step": 7, "split": "tr')
    ended = deit_jax_command("plot", one, other)
    assert ended.status == 0
    assert "left out 3 line(s)" in ended.err
    assert ended.out == f"{tmp_path / 'curves.png'}: one, other\n"
    assert curves(drawn[0].axes[1])[1][1] == [2, 4, 6]
    assert drawn[0].axes[0].get_xlabel() == "step"


def test_the_same_data_give_the_same_file(deit_jax_command, tmp_path):
    run, out = write_run(tmp_path / "run"), tmp_path / "c.svg"
    texts = []
    for _ in range(2):
        assert deit_jax_command("plot", run, f"--out={out}").status == 0
        texts.append(out.read_bytes())
    assert texts[0] == texts[1]
    assert texts[0].startswith(b"<?xml")


def test_runs_with_one_name_get_their_path(tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c"]
    assert plot.names(folders) == [str(folders[0]), str(folders[1]), "c"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "RUN"),
        ("run --out=c.pdf", "ends in .png or .svg"),
        ("run run", "each named once"),
        ("run nowhere", "nowhere holds no metrics.jsonl"),
        ("empty", "no metrics yet"),
        ("s3://bucket/run", "s3:// is not supported"),
    ],
)
def test_a_mistake_is_one_line(deit_jax_command, tmp_path, arguments, words):
    write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / plot.FILE).write_text("")
    ended = deit_jax_command("plot", *arguments.split())
    assert (ended.status, ended.out) == (2, "")
    assert words in ended.err.splitlines()[-1]
    assert not list(tmp_path.glob("c*"))


def test_matplotlib_is_missing(deit_jax_command, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ended = deit_jax_command("plot", write_run(tmp_path / "run"))
    assert ended.status == 2
    assert ended.err == "error: figures need matplotlib; pip install 'deit-jax[plot]'\n"
