"""Draws a report of `deit-jax report` as one HTML page that needs no other file.

Names of classes and files are untrusted: each goes through `_text`. The page forbids itself scripts
and everything from elsewhere, so that a mistake here could show a wrong page, but run nothing.
"""

import base64
import html
import io
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from deit_jax.folders import printable
from deit_jax.models import imagenet

MOST_CELLS = 32  # classes of a matrix in figures; with more it is a picture
MOST_PIXELS = 1000  # classes of such a picture
MOST_PAIRS = 50  # confused classes that are listed
_LARGE = 64  # pixels of a side, above which a JPEG is much smaller and good enough

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .15em .6em; text-align: right } th { font-weight: 600 }
td.name, th.name { text-align: left; overflow-wrap: anywhere }
tr + tr td { border-top: 1px solid #8884 }
.sheet { display: grid; gap: 1em; grid-template-columns: repeat(auto-fill, minmax(11em, 1fr)) }
figure { margin: 0; overflow-wrap: anywhere; font-size: 13px }
figure img { width: 100%; image-rendering: pixelated }
.muted { color: #777 } .big { font-size: 1.4em }
"""
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
"""


def page(report: dict[str, Any], mistakes: list[np.ndarray]) -> str:
    """Returns the page.

    Args:
      report: what the command writes as JSON.
      mistakes: the pictures of its `mistakes`, uint8 [S,S,3].
    """
    names = [_text(imagenet.readable(name)) for name in report["class_names"]]
    title = f"{_text(report['model']['name'])} on {_text(report['data']['description'])}"
    parts = [
        f"<title>{title}</title><style>{_STYLE}</style></head><body><h1>{title}</h1>",
        _summary(report),
        "<h2>Classes</h2>",
        _classes(report["confusion"], names),
        "<h2>Confusion</h2>",
        _confusion(report["confusion"], names),
        "<h2>Calibration</h2>",
        _calibration(report["calibration"]),
        "<h2>Worst mistakes</h2>",
        _sheet(report["mistakes"], mistakes, names),
        "</body></html>\n",
    ]
    return _HEAD + "\n".join(parts)


def _text(name: str) -> str:
    """A foreign name as a line that HTML takes for nothing but text."""
    return html.escape(printable(name))


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of texts in HTML; the first column holds names. A text may be a whole <td>."""
    lines = [_row("th", header), *(_row("td", row) for row in rows)]
    return f"<table>{''.join(lines)}</table>"


def _row(tag: str, texts: Iterable[str]) -> str:
    first, *others = texts
    cells = [text if text.startswith("<td") else f"<{tag}>{text}</{tag}>" for text in others]
    return f'<tr><{tag} class="name">{first}</{tag}>{"".join(cells)}</tr>'


def _summary(report: dict[str, Any]) -> str:
    shown = {"top-1": "top1", "top-5": "top5"}
    shown |= {"class head": "top1_cls", "distillation head": "top1_dist"}
    figures = [f"{words} {report[key]:.2f} %" for words, key in shown.items() if key in report]
    figures += [f"loss {report['loss']:.4f}", f"ECE {report['calibration']['ece']:.2f} %"]
    lines = [
        f"{report['num_examples']:,} images of the {report['data']['split']} split",
        f"weights from {_text(report['model']['from'])}",
    ]
    if report["left_out"]:
        some = ", ".join(map(_text, list(report["left_out"])[:3]))
        lines.append(f"{len(report['left_out']):,} images could not be read, such as {some}")
    return f'<p class="big">{" · ".join(figures)}</p><p class="muted">{"<br>".join(lines)}</p>'


def _classes(pairs: list[tuple[int, int, int]], names: list[str]) -> str:
    """The classes, those with the lowest accuracy first."""
    rows = []
    for label in sorted({label for label, _, _ in pairs}):
        found = {predicted: n for of, predicted, n in pairs if of == label}
        images, right = sum(found.values()), found.pop(label, 0)
        most = max(found, key=found.get, default=None)
        taken = "" if most is None else f"{names[most]} ({found[most]:,})"
        rows.append((right / images, names[label], images, taken))
    header = ("class", "accuracy", "images", "taken most often for")
    cells = (
        [name, f"{100 * share:.1f} %", f"{n:,}", taken] for share, name, n, taken in sorted(rows)
    )
    return _table(header, cells)


def _confusion(pairs: list[tuple[int, int, int]], names: list[str]) -> str:
    """The matrix where it is small enough, and the pairs that are confused most often."""
    parts = []
    used = sorted({number for label, predicted, _ in pairs for number in (label, predicted)})
    place = {number: at for at, number in enumerate(used)}
    if len(used) <= MOST_PIXELS:
        counts = np.zeros((len(used), len(used)), int)
        for label, predicted, n in pairs:
            counts[place[label], place[predicted]] = n
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        parts.append("<p>Rows are labels, columns predictions; the darker, the more.</p>")
        if len(used) <= MOST_CELLS:
            rows = (
                [
                    names[number],
                    *(_shaded(n, s) for n, s in zip(counts[at], shares[at], strict=True)),
                ]
                for number, at in place.items()
            )
            parts.append(_table(["label", *(names[number] for number in used)], rows))
        else:
            grey = np.rint(255 * (1 - np.sqrt(shares))).astype(np.uint8)
            picture = _image(grey, "PNG")
            parts.append(f'<p><img style="width:100%;image-rendering:pixelated" {picture}></p>')
    wrong = sorted((p for p in pairs if p[0] != p[1]), key=lambda pair: -pair[2])
    rows = ([names[a], names[b], f"{n:,}"] for a, b, n in wrong[:MOST_PAIRS])
    return "\n".join([*parts, "<p></p>", _table(("label", "predicted", "images"), rows)])


def _shaded(count: int, share: float) -> str:
    return f'<td style="background:rgba(0,114,178,{0.9 * share:.2f})">{count or ""}</td>'


def _calibration(figures: dict[str, Any]) -> str:
    """A reliability diagram: where the bars end on the diagonal, confidence is what it says."""
    side = 320
    lines = [
        f'<svg width="{side + 60}" height="{side + 50}" viewBox="-45 -10 {side + 60} {side + 50}">'
    ]
    for one in figures["bins"]:
        if one["num_examples"]:
            x, width = side * one["from"], side * (one["to"] - one["from"])
            height = side * one["accuracy"]
            told = f"{one['num_examples']:,} images, {100 * one['accuracy']:.1f} % right"
            lines.append(
                f'<rect x="{x:.1f}" y="{side - height:.1f}" width="{width - 1:.1f}" '
                f'height="{height:.1f}" fill="#0072B2"><title>{told}</title></rect>'
                f'<circle cx="{side * one["confidence"]:.1f}" cy="{side - height:.1f}" r="3" '
                'fill="#D55E00"></circle>'
            )
    lines.append(
        f'<path d="M0 {side}L{side} 0M0 0V{side}H{side}" stroke="#888" fill="none"></path>'
        f'<g font-size="12" fill="#888"><text x="{side / 2 - 30}" y="{side + 32}">confidence</text>'
        f'<text x="-40" y="{side / 2}">right</text><text x="-8" y="{side + 15}">0</text>'
        f'<text x="{side - 4}" y="{side + 15}">1</text><text x="-12" y="8">1</text></g></svg>'
    )
    header = ("confidence", "images", "mean confidence", "accuracy")
    rows = (
        [
            f"{one['from']:.2f} to {one['to']:.2f}",
            f"{one['num_examples']:,}",
            f"{100 * one['confidence']:.1f} %",
            f"{100 * one['accuracy']:.1f} %",
        ]
        for one in figures["bins"]
        if one["num_examples"]
    )
    return (
        f"<p>ECE {figures['ece']:.2f} %: so far is confidence from accuracy, in the mean over all "
        f"images. Dots: mean confidence.</p>{''.join(lines)}{_table(header, rows)}"
    )


def _sheet(mistakes: list[dict[str, Any]], pictures: list[np.ndarray], names: list[str]) -> str:
    if not mistakes:
        return "<p>None.</p>"
    lines = ['<div class="sheet">']
    for one, pixels in zip(mistakes, pictures, strict=True):
        lines.append(
            f"<figure><img {_image(pixels)}><figcaption>"
            f"<b>{names[one['predicted']]}</b> {100 * one['confidence']:.1f} %<br>"
            f"label {names[one['label']]} {100 * one['probability_of_label']:.1f} %<br>"
            f'<span class="muted">{_text(one["example"])}</span></figcaption></figure>'
        )
    return "\n".join([*lines, "</div>"])


def _image(pixels: np.ndarray, kind: str = "") -> str:
    """The attributes of a picture that is within the page."""
    kind = kind or ("JPEG" if len(pixels) > _LARGE else "PNG")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, quality=90)
    code = base64.b64encode(file.getvalue()).decode()
    return f'alt="" src="data:image/{kind.lower()};base64,{code}"'
