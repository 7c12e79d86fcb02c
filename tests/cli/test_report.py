"""report: its figures are those of the model, its page shows foreign names as text alone."""

import base64
import dataclasses
import io
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import deit_jax
from deit_jax.cli import report_page
from deit_jax.inference import quality

HOSTILE = (
    "<script>alert(1)<\u2215script>",  # no slash in the name of a folder
    '"><img src=x onerror=alert(1)>',
    " onclick=alert(1) ",
    "&lt;b&gt;",
    "a\u202egnp.b",
)
_ATTRIBUTES = {
    *("charset", "http-equiv", "content", "name", "lang", "class", "style", "alt", "src"),
    *("width", "height", "viewbox", "x", "y", "cx", "cy", "r", "d", "fill", "stroke", "font-size"),
}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A model of five classes with odd names, images of four of them, and one file of rubbish."""
    root = tmp_path_factory.mktemp("report")
    model = deit_jax.create_model("deit_testing_distilled", num_classes=5, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for head in (model.head, model.head_dist):
        head.kernel[...] = rng.normal(0, 0.4, head.kernel.shape)
    model.info = dataclasses.replace(model.info, class_names=HOSTILE, crop_ratio=0.875)
    deit_jax.save_model(root / "model", model)
    files = {}
    for number in range(13):
        path = root / "val" / HOSTILE[number % 4] / f"{number}'\"<b>.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((50, 44), Image.Resampling.BICUBIC).save(path)
        files[str(path)] = number % 4
    odd = os.fsencode(root / "val" / HOSTILE[3]) + b"/\xff.png"
    with open(odd, "wb") as file:
        file.write(b"no image")
    return root, model, files


@pytest.fixture
def report(case, deit_jax_command):
    root, _, _ = case
    return lambda *flags: deit_jax_command("report", f"--model={root / 'model'}", *flags)


class _Page(HTMLParser):
    """Collects the text, and refuses what the page should not have."""

    def __init__(self):
        super().__init__()
        self.text, self.tags = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert tag not in ("script", "link", "iframe", "object", "base", "form", "a")
        for name, value in attributes:
            assert name in _ATTRIBUTES, (tag, name)
            assert name != "src" or value.startswith("data:image/")

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.slow
def test_the_figures_are_the_models_and_names_are_text(case, report, tmp_path):
    root, model, files = case
    ended = report(f"--data={root}", "--out", "r.html", "--batch_size=4", "--worst=5", "--json")
    assert ended.status == 1, "an image could not be read"
    assert "\\udcff.png" in ended.err or "\\xff.png" in ended.err
    told = json.loads((tmp_path / "r.json").read_text())
    label = np.array(list(files.values()))
    heads = [np.float64(h) for h in model.heads(deit_jax.preprocess(model, list(files)))]
    logits = sum(heads) / 2
    likely = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    predicted = logits.argmax(1)
    assert told["num_examples"] == json.loads(ended.out)["num_examples"] == 13
    assert told["top1"] == pytest.approx(100 * (predicted == label).mean())
    assert told["top1_dist"] == pytest.approx(100 * (heads[1].argmax(1) == label).mean())
    assert told["loss"] == pytest.approx(-np.log(likely[range(13), label]).mean(), rel=1e-4)
    dense = np.zeros((5, 5), int)
    np.add.at(dense, (label, predicted), 1)
    assert {(a, b): n for a, b, n in told["confusion"]} == {
        (a, b): dense[a, b] for a, b in np.argwhere(dense).tolist()
    }
    sure = likely.max(1) - likely[range(13), label]
    order = [i for i in np.argsort(-sure) if predicted[i] != label[i]][:5]
    assert [one["example"] for one in told["mistakes"]] == [list(files)[i] for i in order]
    assert len(told["left_out"]) == 1
    assert report("--data=nowhere", "--out", "r.html").err.count("is not a folder"), "not refused"
    assert 4 in predicted, "choose weights that predict the name without a folder"

    text = (tmp_path / "r.html").read_text()
    page = _Page()
    page.feed(text)
    assert "Content-Security-Policy" in text
    assert page.tags.count("figure") == 5
    seen = " ".join(page.text)
    for name in (
        "<script>",
        "onerror=alert(1)>",
        " onclick=alert(1) ",
        "\\u202egnp.b",
        "&lt;b&gt;",
    ):
        assert name in seen
    assert "\u202e" not in text


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (["--data={root}", "--out=r.pdf"], "ends in .html"),
        (["--out=r.html"], "name the data: --data=ROOT or --config=RECIPE"),
        (["--data={root}", "--config=digits", "--out=r.html"], "not by both"),
        (["--config=digits", "--out=r.html"], "10 of its 10 classes are none of the model's 5"),
        (["--data=nowhere", "--out=r.html"], "config.dataset.root is 'nowhere'"),
    ],
)
def test_one_line_says_what_is_wrong(case, report, tmp_path, flags, answer):
    ended = report(*(flag.format(root=case[0]) for flag in flags))
    assert ended.status == 2
    (line,) = ended.err.splitlines()
    assert answer in line
    assert not list(tmp_path.glob("r.*"))


@pytest.mark.parametrize("text", ['{"model": {"name": "m"}, "data": {}}', "[1]", "{"])
def test_no_json_of_others_is_overwritten(report, tmp_path, text):
    """Such as the run's config.json, by --out RUN/config.html."""
    (tmp_path / "config.json").write_text(text)
    ended = report("--data=nowhere", "--out=config.html")
    assert ended.status == 2
    assert f"would overwrite {tmp_path / 'config.json'}, which is no report" in ended.err
    assert (tmp_path / "config.json").read_text() == text


@pytest.mark.parametrize("classes", [report_page.MOST_CELLS, 40, report_page.MOST_PIXELS + 1])
def test_many_classes_are_a_picture(classes):
    label = np.arange(classes).repeat(2)
    logits = np.eye(classes)[np.where(np.arange(len(label)) % 2, label, 0)]
    outcomes = quality.Outcomes.of(logits, label)
    text = report_page.page(
        {
            "model": {"name": "m", "from": "f"},
            "data": {"description": "d", "split": "eval"},
            **quality.totals(outcomes),
            "left_out": {},
            "class_names": [f"class {number}" for number in range(classes)],
            "confusion": quality.confusion(outcomes),
            "calibration": quality.calibration(outcomes),
            "mistakes": [],
        },
        [],
    )
    _Page().feed(text)
    pictures = re.findall(r"data:image/png;base64,([^\"]*)", text)
    assert len(pictures) == (classes == 40)
    if pictures:
        grey = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[0]))).convert("L"))
        expected = np.full((40, 40), 255)
        expected[:, 0] = expected[range(40), range(40)] = round(255 * (1 - 0.5**0.5))
        expected[0, 0] = 0
        np.testing.assert_array_equal(grey, expected)
    assert ("<td style=" in text) == (classes == report_page.MOST_CELLS)
