"""The attention that is drawn is of the right token, and each weight lies on its own patch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from deit_jax.checkpoints.model_folder import save_model
from deit_jax.cli import attention
from deit_jax.cli.main import main
from deit_jax.models.registry import create_model

PLACE = (1, 3)  # row and column of the patch that is unlike the others


def new_model(name):
    """With weights of full effect, and without position embeddings."""
    model = create_model(name, num_classes=3)
    state = nnx.state(model, nnx.Param)
    wide = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, state)
    wide = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.ones_like(x) if "gamma" in str(path) else x, wide
    )
    nnx.update(model, wide)
    model.pos_embed[...] = jnp.zeros_like(model.pos_embed[...])
    return model


def picture(model):
    side, patch = model.info.side, model.patch_size
    pixels = np.full((side, side, 3), 90, np.uint8)
    row, column = (place * patch for place in PLACE)
    pixels[row : row + patch, column : column + patch] = np.arange(patch, dtype=np.uint8)[:, None]
    return pixels


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("deit_testing", 0),
        ("deit_testing_distilled", 0),
        ("deit_testing_distilled", 1),
        ("cait_testing", 0),
    ],
)
def test_each_weight_lies_on_its_patch(name, token):
    model = new_model(name)
    images = np.float32(picture(model))[None] / 255
    found = attention.maps(model, images, -1, token)
    (weights,) = model.attention_weights(images, [-1])
    assert len(found) == weights.shape[1] + 1 + model.has_rollout
    for name, share in found.items():
        assert share.shape == model.grid
        others = np.delete(share, np.ravel_multi_index(PLACE, share.shape))
        np.testing.assert_allclose(others, others[0], rtol=1e-3)
        assert abs(share[PLACE] / others[0] - 1) > 0.01, name
    heads = weights[0, :, token, model.num_prefix :]
    np.testing.assert_array_equal(found["head 1"].ravel(), heads[1])
    np.testing.assert_allclose(found["mean of heads"].ravel(), heads.mean(0), rtol=1e-6)


@pytest.fixture
def files(tmp_path):
    model = new_model("deit_testing_distilled")
    save_model(tmp_path / "model", model)
    Image.fromarray(picture(model)).save(tmp_path / "a.png")
    return tmp_path


def test_a_row_for_each_picture(files, capsys):
    sizes = []
    for images in (1, 2):
        out = files / f"{images}.png"
        words = ["--model", str(files / "model"), "--out", str(out), "--token", "distillation"]
        assert main(["attention", *words, *[str(files / "a.png")] * images]) == 0
        sizes.append(Image.open(out).size)
    assert sizes[0][0] == sizes[1][0]
    assert sizes[0][1] < sizes[1][1]
    assert "2.png:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (["--out=a.jpg"], "expected a name that ends in .png"),
        (["--block=7"], "--block is 7, but a deit_testing_distilled has blocks 0 to 3, or -4 to"),
        (["--block=-5"], "--block is -5, "),
        (["--image-of-none"], "--image-of-none"),
    ],
)
def test_one_line_says_what_is_wrong(files, capsys, flags, answer):
    words = ["--model", str(files / "model"), str(files / "a.png"), "--out", str(files / "b.png")]
    assert main(["attention", *words, *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert re.search(answer, error)


@pytest.mark.parametrize("name", ["resmlp_testing", "cait_testing"])
def test_models_without_such_attention_are_refused(name):
    model = create_model(name, num_classes=3)
    side = model.info.side
    with pytest.raises(attention.InputError, match=r"no attention|no class token"):
        attention.maps(model, np.zeros((1, side, side, 3), np.float32), 0, 0)
