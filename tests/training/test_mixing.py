"""On-device augmentation against timm, scipy and NumPy float64."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats

from deit_jax.errors import InputError
from deit_jax.training import mixing
from tests.oracles.torchvision_ops import import_torchvision

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COUNT = 20_000  # one number of draws for all: a new shape costs seconds of compilation
BOTH = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 1.0, "switch_prob": 0.5}


def random_batch(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, height, width, 3)).astype(np.float32)


def draw_of(lam, cut, box) -> mixing.MixDraw:
    return mixing.MixDraw(jnp.array(lam, jnp.float32), jnp.array(cut), jnp.array(box, jnp.int32))


def box_of_timm_032(lam: float, y: int, x: int, size: tuple[int, int]) -> list[int]:
    """The cutmix box of timm 0.3.2 in float64: half the cut on both sides, rounded down."""
    box = []
    for centre, side in zip((y, x), size, strict=True):
        half = int(side * np.sqrt(1 - lam)) // 2
        box += [int(np.clip(centre - half, 0, side)), int(np.clip(centre + half, 0, side))]
    return box


def draws_of_timm(count: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """λ, of cutmix what the box leaves, and whether it is cutmix."""
    import_torchvision()
    from timm.data import mixup

    np.random.seed(0)  # noqa: NPY002
    draw = mixup.Mixup(**BOTH)._params_per_batch
    lam, cut = map(np.array, zip(*(draw() for _ in range(count)), strict=True))
    for i in np.flatnonzero(cut):
        lam[i] = mixup.cutmix_bbox_and_lam((1, 3, *size), lam[i])[1]
    return lam, cut


def test_normalize_equals_torchvision_for_every_value():
    transforms = import_torchvision().transforms
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, -1)
    chain = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    got = jax.jit(lambda x: mixing.normalize(x, MEAN, STD))(image[None])[0]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, chain(image).permute(1, 2, 0).numpy(), atol=1e-6)


def test_erasing_boxes_have_the_distribution_of_timm():
    import_torchvision()
    from timm.data.random_erasing import RandomErasing

    height, width, count = 40, 64, 3000  # not square: swapped axes would show
    random.seed(0)  # which timm draws boxes from
    erase = RandomErasing(probability=1.0, mode="const", device="cpu")
    theirs = []
    for _ in range(count):
        image = torch.ones(1, height, width)
        erase(image)
        rows, columns = (image[0] == 0).nonzero(as_tuple=True)
        theirs.append([rows.min(), rows.max() + 1, columns.min(), columns.max() + 1])
    theirs = np.array(theirs, np.float64)
    draw = mixing.draw_erasing(jax.random.key(0), COUNT, (height, width), prob=1.0)
    ours = np.asarray(draw.box, np.float64)

    def facts(box):
        h, w = box[:, 1] - box[:, 0], box[:, 3] - box[:, 2]
        spare = np.maximum(height - h, 1), np.maximum(width - w, 1)
        return h * w, h / w, box[:, 0] / spare[0], box[:, 2] / spare[1], h, w

    for mine, reference in zip(facts(ours), facts(theirs), strict=True):
        assert stats.ks_2samp(mine, reference).pvalue > 1e-3
    h, w = facts(ours)[4:]
    assert h.min() > 0
    assert h.max() < height
    assert w.max() < width
    assert (ours[:, 1] == height).any()  # the last row is reachable


def test_erasing_frequency_tries_and_empty_boxes():
    draw = mixing.draw_erasing(jax.random.key(1), COUNT, (224, 224), prob=0.25)
    erased = np.asarray(draw.box[:, 1] > 0)
    assert erased.mean() == pytest.approx(0.25, abs=0.012)
    assert not np.any(np.asarray(draw.box)[~erased])
    assert len(np.unique(jax.random.key_data(draw.noise_key), axis=0)) == COUNT
    # Boxes of the whole image never fit, so nothing is erased; with more tries fewer are missed.
    whole = {"prob": 1.0, "area": (0.999, 1.0), "aspect": 0.999}
    assert not np.any(mixing.draw_erasing(jax.random.key(2), COUNT, (32, 32), **whole).box)
    large = {"prob": 1.0, "area": (0.3, 0.9)}
    hits = [
        np.mean(mixing.draw_erasing(jax.random.key(3), COUNT, (32, 32), **large, tries=n).box > 0)
        for n in (1, 10)
    ]
    assert hits[0] < 0.8 * hits[1]


def test_erasing_fills_with_normal_noise_inside_the_box_only():
    images = jnp.full((4, 64, 48, 3), 7.0)
    box = jnp.array([[0, 64, 0, 48], [3, 40, 5, 6], [0, 0, 0, 0], [0, 64, 0, 48]], jnp.int32)
    draw = mixing.ErasingDraw(box, jax.random.split(jax.random.key(0), 4))
    got = np.asarray(mixing.apply_erasing(images, draw))
    mask = np.zeros((4, 64, 48), bool)
    mask[0] = mask[3] = True
    mask[1, 3:40, 5:6] = True
    np.testing.assert_array_equal(got[~mask], 7.0)
    assert not np.any(got[mask] == 7.0)
    assert stats.kstest(got[0].ravel(), "norm").pvalue > 1e-3
    assert len(np.unique(got[[0, 3]])) > 0.99 * got[0].size * 2  # per pixel, channel and image
    identity = mixing.random_erasing(jax.random.key(0), images, prob=0.0)
    np.testing.assert_array_equal(identity, images)
    erased = mixing.random_erasing(jax.random.key(0), images, prob=1.0)
    assert all(np.any(x != 7.0) and np.any(x == 7.0) for x in np.asarray(erased))


def test_cutmix_box_equals_the_reference_formula():
    rng = np.random.default_rng(0)
    for size in ((224, 224), (32, 48)):
        lam = rng.uniform(size=500)
        y, x = (rng.integers(0, side, 500) for side in size)
        boxes, kept = mixing.cutmix_box(*(jnp.asarray(v) for v in (lam, y, x)), size)
        # λ the way the float32 program sees it: its neighbour in float64 may floor differently.
        want = [
            box_of_timm_032(float(np.float32(v)), *at, size)
            for v, *at in zip(lam, y, x, strict=True)
        ]
        np.testing.assert_array_equal(boxes, want)
        areas = [(b[1] - b[0]) * (b[3] - b[2]) for b in want]
        np.testing.assert_allclose(kept, 1 - np.array(areas) / np.prod(size), atol=1e-6)


def test_apply_mix_equals_timm_with_the_same_draws(monkeypatch):
    import_torchvision()
    from timm.data import mixup

    size, group, classes = (8, 12), 4, 7
    lam = [0.3, 0.9, 1.0]
    cut = [False, True, False]
    box = [[0, 0, 0, 0], [2, 7, 0, 5], [0, 0, 0, 0]]
    lam[1] = 1 - 5 * 5 / (8 * 12)
    images, labels = random_batch(12, *size), np.arange(12) % classes
    targets = mixing.one_hot_smooth(jnp.asarray(labels), classes, 0.1)
    mixed, mixed_targets = mixing.apply_mix(jnp.asarray(images), targets, draw_of(lam, cut, box))

    reference = mixup.Mixup(label_smoothing=0.1, num_classes=classes)
    for g in range(3):
        rows = slice(g * group, (g + 1) * group)
        draw = (0.5 if cut[g] else lam[g], cut[g])  # timm corrects λ from the box itself
        monkeypatch.setattr(reference, "_params_per_batch", lambda draw=draw: draw)
        monkeypatch.setattr(mixup, "rand_bbox", lambda *_, g=g, **__: box[g])
        x, t = reference(
            torch.tensor(images[rows]).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels[rows])
        )
        np.testing.assert_allclose(mixed[rows], x.permute(0, 2, 3, 1).numpy(), atol=2e-7)
        np.testing.assert_allclose(mixed_targets[rows], t.numpy(), atol=1e-7)


def test_draw_statistics():
    draw = mixing.draw_mix(jax.random.key(0), COUNT, (224, 224), **BOTH)
    lam, cut, box = (np.asarray(v) for v in draw)
    assert cut.mean() == pytest.approx(0.5, abs=0.015)
    assert not np.any(box[~cut])
    rng = np.random.default_rng(1)
    boxes = np.array(
        [box_of_timm_032(v, *rng.integers(0, 224, 2), (224, 224)) for v in rng.beta(1.0, 1.0, 5000)]
    )
    for i in range(4):
        assert stats.ks_2samp(boxes[:, i], box[cut][:, i]).pvalue > 1e-3

    their_lam, their_cut = draws_of_timm(COUNT, (224, 224))
    assert cut.mean() == pytest.approx(their_cut.mean(), abs=0.02)
    for kind in (False, True):
        assert stats.ks_2samp(lam[cut == kind], their_lam[their_cut == kind]).pvalue > 1e-3

    def draw_with(**changes):
        return mixing.draw_mix(jax.random.key(1), COUNT, (16, 16), **BOTH | changes)

    assert np.mean(draw_with(prob=0.3).lam == 1.0) == pytest.approx(0.7, abs=0.02)
    assert np.all(draw_with(mixup_alpha=0.0).use_cutmix)
    assert not np.any(draw_with(cutmix_alpha=0.0).use_cutmix)
    assert np.mean(draw_with(switch_prob=0.9).use_cutmix) == pytest.approx(0.9, abs=0.01)


def test_mix_is_the_identity_when_off_and_checks_the_group_size():
    images, labels = jnp.asarray(random_batch(6, 4, 4)), jnp.array([0, 1, 2, 0, 1, 2])
    options = {"num_classes": 3, "group_size": 2, "smoothing": 0.1}
    for off in ({"prob": 0.0}, {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}):
        mixed, targets, _ = mixing.mix(jax.random.key(0), images, labels, **options, **BOTH | off)
        np.testing.assert_array_equal(mixed, images)
        np.testing.assert_allclose(targets, 0.9 * np.eye(3)[labels] + 0.1 / 3, atol=1e-7)
        draw = mixing.draw_mix(jax.random.key(0), 3, (4, 4), **BOTH | off)
        np.testing.assert_array_equal(mixing.apply_mix(images, targets, draw)[0], images)
    with pytest.raises(InputError, match=r"mixing\.group_size is 4, .* batch of 6"):
        mixing.mix(jax.random.key(0), images, labels, **options | {"group_size": 4}, **BOTH)


def test_groups_are_drawn_independently_and_stay_apart():
    images, labels = jnp.asarray(random_batch(8, 32, 32)), jnp.arange(8)
    options = {"num_classes": 8, "group_size": 4, "smoothing": 0.0}
    cutmix = BOTH | {"mixup_alpha": 0.0}
    mix = jax.jit(lambda x: mixing.mix(jax.random.key(5), x, labels, **options, **cutmix))
    mixed, targets, draw = mix(images)
    np.testing.assert_allclose(targets[jnp.arange(8), labels], draw.lam.repeat(4), rtol=1e-6)
    assert not np.any(np.asarray(targets)[:4, 4:])
    assert not np.any(np.asarray(targets)[4:, :4])
    assert targets[0, 0] != targets[4, 4]
    assert np.any(mixed[0] != images[0])
    # The other group's images do not matter.
    np.testing.assert_array_equal(mix(images.at[4:].set(0.0))[0][:4], mixed[:4])
