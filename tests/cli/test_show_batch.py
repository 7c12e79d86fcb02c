"""show-batch draws what a train step computes, and what PIL makes of RandAugment."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image, ImageEnhance, ImageOps

from deit_jax import data, drawing
from deit_jax.cli import show_batch
from deit_jax.config.files import load_config
from deit_jax.config.plan import plan_run
from deit_jax.config.randaugment_policy import OPERATIONS
from deit_jax.models.network import Variables
from deit_jax.training import mixing
from deit_jax.training.run import Run
from deit_jax.training.state import new_state
from deit_jax.training.step import make_train_step

SEED, STEP, BATCH, GROUP, CLASSES = 3, 7, 16, 4, 10
FLAGS = {
    "train.seed": SEED,
    "train.batch_size": BATCH,
    "mixing.group_size": GROUP,
    "mixing.cutmix_alpha": 1.0,
    "mixing.prob": 0.7,
    "mixing.random_erasing": 0.5,
}


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn last, besides the drawing: tiles, captions, title and columns."""
    calls, draw = {}, show_batch.draw

    def recorded(tiles, captions, **how):
        calls.update(how, tiles=tiles, captions=captions)
        return draw(tiles, captions, **how)

    monkeypatch.setattr(show_batch, "draw", recorded)
    return calls


class _Camera:
    """Stands for a network: keeps the images in its statistics, and its logits are parameters.

    With logits of zero the gradient of the mean cross-entropy is (1/K - targets) / B.
    """

    info = None

    def __call__(self, variables, images, key=None):
        return (variables.params["logits"],), {"images": images}


def _seen_in_training(repo_root):
    """Images, targets and labels of STEP, taken out of a train step that the loop would run."""
    config = load_config(str(repo_root / "configs" / "digits.py"))
    config.update_from_flattened_dict(FLAGS)
    source = data.open_source(config.dataset, "train")
    known = {"num_classes": source.num_classes, "class_names": source.class_names}
    plan = plan_run(config, num_train=source.num_examples, num_eval=0, num_devices=1, **known)
    input_plan = Run.input_plan(SimpleNamespace(config=config, plan=plan))
    batch = next(data.train_batches(source, input_plan, start_step=STEP))
    keep = optax.GradientTransformation(
        lambda _: jnp.zeros((BATCH, CLASSES)), lambda gradient, *_: (gradient, gradient["logits"])
    )
    train_step = jax.jit(make_train_step(config, plan, _Camera(), keep))
    blank = jnp.zeros((BATCH, 32, 32, 3))
    model = Variables({"logits": jnp.zeros((BATCH, CLASSES))}, {"images": blank})
    state = new_state(model, keep, ema=False).replace(step=jnp.int32(STEP))
    state, metrics = train_step(state, None, batch)
    assert np.isfinite(metrics["loss"])
    targets = 1 / CLASSES - BATCH * np.asarray(state.opt_state, np.float64)
    return np.asarray(state.model.batch_stats["images"], np.float64), targets, batch["label"]


@pytest.fixture
def show(deit_jax_command, tmp_path):
    """Draws tmp_path/"out.png"."""

    def run(*flags):
        ended = deit_jax_command("show-batch", "--out", tmp_path / "out.png", *flags)
        assert ended.status == 0, ended.err
        assert ended.out.startswith(f"{tmp_path / 'out.png'}: ")
        return Image.open(tmp_path / "out.png")

    return run


RECIPE = ["--config=digits", *(f"--config.{name}={value}" for name, value in FLAGS.items())]


@pytest.mark.slow
def test_the_drawn_batch_is_that_of_the_train_step(show, drawn, repo_root):
    show(*RECIPE, f"--step={STEP}", "--count=99")
    images, targets, labels = _seen_in_training(repo_root)

    exact = 255 * (images * 0.5 + 0.5)  # the recipe's mean and deviation
    tiles = np.stack(drawn["tiles"])
    assert tiles.shape == (BATCH, 32, 32, 3)
    assert tiles.dtype == np.uint8
    assert np.abs(tiles - exact.clip(0, 255)).max() < 0.501
    assert (exact > 256).any(), "the noise of erasing is among them"

    # The draws, from the keys as the step derives them.
    key = jax.random.fold_in(jax.random.key(SEED), STEP)
    mix_key = jax.random.split(jax.random.split(key)[0])[1]
    alphas = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}
    draw = mixing.draw_mix(mix_key, BATCH // GROUP, (32, 32), **alphas, prob=0.7, switch_prob=0.5)
    kinds = set()
    for row, caption in enumerate(drawn["captions"]):
        classes, (group, mixed) = (line.split(" · ") for line in caption.split("\n"))
        number, place = divmod(row, GROUP)
        lam, own = float(draw.lam[number]), labels[row]
        partner = labels[number * GROUP + GROUP - 1 - place]
        kind = "cutmix" if draw.use_cutmix[number] else "mixup"
        kinds.add(kind if lam < 1 else "")
        assert group == f"group {number}"
        assert mixed == (f"{kind} {lam:.2f}" if lam < 1 else "not mixed")
        shares = [text.split() for text in classes]
        weights = {int(name): float(share) for name, share in shares}
        want = {own: 1.0} if own == partner or lam == 1 else {own: lam, partner: 1 - lam}
        assert weights == pytest.approx(want, abs=0.0051)
        assert next(iter(weights)) == own
        assert sum(weights.values()) == pytest.approx(1)
        smooth = sum(share * np.eye(CLASSES)[name] for name, share in want.items())
        np.testing.assert_allclose(targets[row], 0.9 * smooth + 0.1 / CLASSES, atol=1e-6)
    assert kinds == {"", "mixup", "cutmix"}, "choose a step that has all of them"
    title = f"digits · step {STEP} · seed {SEED} · {BATCH} of 16 images · 32 pixels · groups of 4"
    assert drawn["title"].startswith(title)
    captions = drawn["captions"]
    show(*RECIPE, f"--step={STEP}", "--count=5")  # the first rows of the same batch
    np.testing.assert_array_equal(drawn["tiles"], tiles[:5])
    assert drawn["captions"] == captions[:5]


@pytest.mark.slow
def test_the_sheet_is_pils(show, drawn, sample_images):
    """Cells of several operations at their place, of a photograph and in timm's arithmetic."""
    file = min(sample_images.glob("train/*/*.JPEG"))
    show("--config=digits", "--randaugment", "rand-m9-inc1", file)
    assert drawn["columns"] == 9
    starts = range(0, 9 * len(OPERATIONS), 9)
    rows, captions = (
        {name: drawn[what][i : i + 9] for name, i in zip(OPERATIONS, starts, strict=True)}
        for what in ("tiles", "captions")
    )
    picture = Image.open(file).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)

    def shear(level):
        how = {"resample": Image.Resampling.BICUBIC, "fillcolor": (128, 128, 128)}
        matrix = (1, 0.3 * level / 10, 0, 0, 1, 0)
        return picture.transform(picture.size, Image.Transform.AFFINE, matrix, **how)

    signed = (-10, -7.5, -5, -2.5, 0, 2.5, 5, 7.5, 10)
    for level, color, sheared in zip(signed, rows["Color"], rows["ShearX"], strict=True):
        enhanced = ImageEnhance.Color(picture).enhance(max(0.1, 1 + 0.9 * level / 10))
        np.testing.assert_array_equal(color, enhanced)
        difference = np.abs(np.int32(sheared) - np.asarray(shear(level), int))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3
    assert captions["ShearX"] == [f"ShearX {level:g}" for level in signed]
    # Without sign or level there are gaps.
    for level, posterized in zip(signed[4:8], rows["Posterize"][4:8], strict=True):
        bits = 4 - int(level * 0.4)
        np.testing.assert_array_equal(posterized, ImageOps.posterize(picture, bits))
    assert rows["Posterize"][:4] == [None] * 4
    np.testing.assert_array_equal(rows["Invert"][4], ImageOps.invert(picture))
    assert [cell is None for cell in rows["Invert"]] == [place != 4 for place in range(9)]
    assert captions["Invert"][4] == "Invert"


def test_the_sheets_own_picture(show, monkeypatch, tmp_path):
    """By default the first training image; without a recipe 224 pixels and ImageNet's mean."""
    seen, cell = [], np.zeros((32, 32, 3), np.uint8)
    monkeypatch.setattr(show_batch, "operations", lambda *a: seen.append(a) or ([cell], ["one"]))
    Image.new("RGB", (300, 260), (9, 200, 30)).save(tmp_path / "plain.png")
    show("--config=digits", "--randaugment", "rand-m9")
    show("--randaugment", "rand-m9", tmp_path / "plain.png")
    (first, *_), (image, policy, how) = seen
    source = data.open_source(load_config("digits").dataset, "train")
    digit = Image.fromarray(source.fetch(0)[0].numpy())
    np.testing.assert_array_equal(first, digit.resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(image, np.full((224, 224, 3), (9, 200, 30)))
    assert (policy.increasing, how.mean) == (False, (0.485, 0.456, 0.406))


def test_tiles_are_enlarged_and_nothing_is_written_over_them():
    rng = np.random.default_rng(0)
    tiles = [rng.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(5)]
    tiles[1] = None
    captions = ["a name " * 9 + "b 0.5\ngroup 1 · mixup 0.5"] * 5
    title = " · ".join(f"piece {number}" for number in range(20))
    sheet = np.asarray(drawing.draw(tiles, captions, title=title, columns=2))
    side, gap = 192, drawing.MARGIN
    assert sheet.shape[1] == gap + 2 * (side + gap)
    tops = {}
    for number in (0, 2, 3, 4):
        large = tiles[number].repeat(3, 0).repeat(3, 1)
        x = gap + number % 2 * (side + gap)
        column = sheet[:, x : x + side]
        (tops[number],) = [
            y for y in range(len(sheet)) if np.array_equal(column[y : y + side], large)
        ]
    assert tops[2] == tops[3]
    assert tops[4] - tops[2] == tops[2] - tops[0] > side + 3 * 14
    below = sheet[tops[4] + side : tops[4] + side + 60]
    assert (below[:, : gap + side] < 100).any(), "there is a caption"
    assert (below[:, gap + side :] == 255).all(), "which stays below its image"
    assert (sheet[tops[0] : tops[2], gap + side + 1 :] == 255).all(), "a gap is empty"


@pytest.fixture
def fonts(monkeypatch):
    """DejaVu's, in the order given: the one of equal widths has no Hebrew; neither has Chinese."""
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setattr(drawing.shutil, "which", lambda name: None)  # as where no font has more

    def chosen(*names):
        folder = f"{matplotlib.get_data_path()}/fonts/ttf"
        monkeypatch.setattr(drawing, "_FONTS", [f"{folder}/{name}.ttf" for name in names])
        for function in (drawing._fonts, drawing._has, drawing._by_fontconfig, drawing._note):
            function.cache_clear()

    yield chosen
    chosen()


def test_the_font_has_the_letters(fonts, capsys):
    fonts("DejaVuSansMono", "DejaVuSans")
    assert drawing._font("a cat, 0.5 · Bär", 14).getname()[0] == "DejaVu Sans Mono"
    assert drawing._font("a \u05d7\u05ea\u05d5\u05dc", 14).getname()[0] == "DejaVu Sans"
    assert capsys.readouterr().err == ""
    for _ in range(2):  # said once
        assert drawing._font("\u05d7 \u732b", 14).getname()[0] == "DejaVu Sans"
    assert capsys.readouterr().err.count("no font here has the letters \u732b,") == 1


def test_wide_letters_stay_within_the_picture():
    lines = drawing._text("\u732b" * 40, 14, 160).height // 18
    assert lines == 4  # of 11 letters


def test_fontconfig_is_asked_for_other_scripts(fonts, monkeypatch, tmp_path):
    """It names a file for the letters, which stands here for a Chinese font."""
    fonts("DejaVuSansMono")
    wanted = drawing._FONTS[0].replace("Mono", "")
    script = tmp_path / "fc-match"
    script.write_text(f'#!/bin/sh\n[ "$2" = ":charset=5d7" ] && printf %s "{wanted}"\n')
    script.chmod(0o755)
    monkeypatch.setattr(drawing.shutil, "which", lambda name: str(script))
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert drawing._font("a \u05d7", 14).getname()[0] == "DejaVu Sans"
