"""On-device augmentation: normalise, random erasing, mixup and cutmix.

Everything here is pure JAX in float32 and runs inside the jitted step, so the host only sends
uint8. Each noisy operation is split into a `draw_*` (all randomness, tiny arrays) and an `apply_*`
(deterministic): the draws of a whole batch can be made anywhere, sliced for one device, or injected
by a test. `random_erasing` and `mix` are the two put together.

A box is four int32 values (top, bottom, left, right), upper ends exclusive; an empty box is zeros.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deit_jax.errors import InputError
from deit_jax.parallel import axis


class ErasingDraw(NamedTuple):
    """Holds, for each image, the box [B,4] to erase and the key [B] of its noise."""

    box: jax.Array
    noise_key: jax.Array


class MixDraw(NamedTuple):
    """Holds, for each group, the weight λ of the own image [G], the kind [G] and the box [G,4].

    `lam` is corrected for the clipped box where `use_cutmix` is true. A group that is not mixed
    has `lam` 1 and `use_cutmix` false.
    """

    lam: jax.Array
    use_cutmix: jax.Array
    box: jax.Array


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Turns uint8 images [B,H,W,C] into float32 `(x / 255 - mean) / std`, channel by channel."""
    mean, std = (jnp.asarray(v, jnp.float32)[None, None, None] for v in (mean, std))
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def draw_erasing(
    key: jax.Array,
    num_images: int,
    size: tuple[int, int],
    *,
    prob: float,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: float = 0.3,
    tries: int = 10,
) -> ErasingDraw:
    """Draws the rectangle to erase in each of `num_images` images of (height, width) `size`.

    With probability `prob` an image gets one box: area uniform in `area` (fractions of the image),
    aspect log-uniform in [aspect, 1/aspect], and the first of `tries` draws that is strictly
    smaller than the image on both axes (timm `RandomErasing`). No fitting draw: no box.
    """
    height, width = size
    use_key, area_key, aspect_key, top_key, left_key, noise_key = jax.random.split(key, 6)
    shape = (num_images, tries)
    pixels = jax.random.uniform(area_key, shape, minval=area[0], maxval=area[1]) * height * width
    limit = -math.log(aspect)
    ratio = jnp.exp(jax.random.uniform(aspect_key, shape, minval=-limit, maxval=limit))
    heights = jnp.round(jnp.sqrt(pixels * ratio)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(pixels / ratio)).astype(jnp.int32)

    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits, axis=1, keepdims=True)
    h, w = (jnp.take_along_axis(v, first, axis=1)[:, 0] for v in (heights, widths))
    erase = (jax.random.uniform(use_key, (num_images,)) < prob) & fits.any(axis=1)
    h, w = jnp.where(erase, h, 0), jnp.where(erase, w, 0)
    top = jax.random.randint(top_key, (num_images,), 0, height - h + 1)
    left = jax.random.randint(left_key, (num_images,), 0, width - w + 1)
    box = jnp.stack([top, top + h, left, left + w], axis=-1)
    # A key per image, so that the noise of a batch can be made piece by piece.
    return ErasingDraw(jnp.where(erase[:, None], box, 0), jax.random.split(noise_key, num_images))


def apply_erasing(images: jax.Array, draw: ErasingDraw) -> jax.Array:
    """Fills the drawn box of each float image [B,H,W,C] with per-pixel N(0,1) noise."""

    def channel(keys: jax.Array) -> jax.Array:
        """Draws noise [B,H,W] for one channel of every image."""
        return jax.vmap(lambda key: jax.random.normal(key, images.shape[1:3], images.dtype))(keys)

    channels = images.shape[-1]
    keys = jax.vmap(lambda key: jax.random.split(key, channels), out_axes=1)(draw.noise_key)
    # The loop materialises the noise. Mixing reads every image twice, and without the loop the
    # compiler fuses the noise into both reads (batch 32 on CPU: 250 ms of CPU time against 60).
    noise = jnp.moveaxis(jax.lax.map(channel, keys), 0, -1)
    inside = _inside(draw.box, images.shape[1:3])
    return jnp.where(inside[..., None], noise, images)


def random_erasing(key: jax.Array, images: jax.Array, *, prob: float) -> jax.Array:
    """Erases one random rectangle in a fraction `prob` of the normalised float images [B,H,W,C]."""
    if prob == 0:
        return images
    draw = draw_erasing(key, len(images) * axis.count(), images.shape[1:3], prob=prob)
    return apply_erasing(images, axis.own_rows(draw))


def one_hot_smooth(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """Returns smoothed targets [B,K] float32: 1 - ε + ε/K at the label [B], ε/K elsewhere."""
    off = smoothing / num_classes
    hit = labels[:, None] == jnp.arange(num_classes)[None]
    return jnp.where(hit, jnp.float32(1.0 - smoothing + off), jnp.float32(off))


def draw_mix(
    key: jax.Array,
    num_groups: int,
    size: tuple[int, int],
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    prob: float,
    switch_prob: float,
) -> MixDraw:
    """Draws (λ, kind, box) for `num_groups` groups of images of (height, width) `size`.

    A group is mixed with probability `prob`; where both alphas are positive it is cutmix with
    probability `switch_prob`, otherwise whichever is on. λ ~ Beta(α, α); a cutmix box has a uniform
    centre, and its λ becomes what the clipped box leaves (`cutmix_box`).
    """
    height, width = size
    if prob == 0 or (mixup_alpha == 0 and cutmix_alpha == 0):
        none = jnp.zeros((num_groups,), bool)
        return MixDraw(jnp.ones((num_groups,)), none, jnp.zeros((num_groups, 4), jnp.int32))
    use_key, kind_key, mixup_key, cutmix_key, y_key, x_key = jax.random.split(key, 6)
    mixed = jax.random.uniform(use_key, (num_groups,)) < prob
    if mixup_alpha > 0 and cutmix_alpha > 0:
        cut = jax.random.uniform(kind_key, (num_groups,)) < switch_prob
    else:
        cut = jnp.full((num_groups,), cutmix_alpha > 0)
    use_cutmix = mixed & cut
    lam = jnp.where(mixed & ~cut, _beta(mixup_key, mixup_alpha, num_groups), 1.0)

    cutmix_lam = _beta(cutmix_key, cutmix_alpha, num_groups)
    y = jax.random.randint(y_key, (num_groups,), 0, height)
    x = jax.random.randint(x_key, (num_groups,), 0, width)
    box, kept = cutmix_box(cutmix_lam, y, x, size)
    return MixDraw(
        jnp.where(use_cutmix, kept, lam), use_cutmix, jnp.where(use_cutmix[:, None], box, 0)
    )


def cutmix_box(
    lam: jax.Array, y: jax.Array, x: jax.Array, size: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Returns the cutmix boxes [G,4] around centres (y, x) [G] and the fraction they leave [G].

    A box spans `int(side * sqrt(1 - λ)) // 2` pixels on each side of the centre and is clipped to
    the image, as in timm 0.3.2, which DeiT trained with (later timm gives odd boxes one more row
    and column).
    """
    height, width = size
    ratio = jnp.sqrt(1.0 - lam)
    half_h, half_w = ((side * ratio).astype(jnp.int32) // 2 for side in (height, width))
    top, bottom = (jnp.clip(v, 0, height) for v in (y - half_h, y + half_h))
    left, right = (jnp.clip(v, 0, width) for v in (x - half_w, x + half_w))
    area = ((bottom - top) * (right - left)).astype(jnp.float32)
    return jnp.stack([top, bottom, left, right], axis=-1), 1.0 - area / (height * width)


def apply_mix(images: jax.Array, targets: jax.Array, draw: MixDraw) -> tuple[jax.Array, jax.Array]:
    """Mixes float images [B,H,W,C] and targets [B,K] within G groups of B/G consecutive rows.

    The partner of row i of a group is the i-th from its end (timm's flipped batch), so nothing
    leaves its group; the middle row of an odd group is its own partner.
    """
    groups = len(draw.lam)

    def blend(x: jax.Array, weight: jax.Array) -> jax.Array:
        folded = x.reshape(groups, -1, *x.shape[1:])
        mixed = weight * folded + (1.0 - weight) * folded[:, ::-1]
        return mixed.reshape(x.shape)

    # One weight map serves both kinds (0 or 1 for cutmix), so the batch is read and written once.
    keep = (~_inside(draw.box, images.shape[1:3])).astype(images.dtype)
    weight = jnp.where(draw.use_cutmix[:, None, None], keep, draw.lam[:, None, None])
    return blend(images, weight[:, None, :, :, None]), blend(targets, draw.lam[:, None, None])


def mix(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    num_classes: int,
    group_size: int,
    smoothing: float,
    mixup_alpha: float,
    cutmix_alpha: float,
    prob: float,
    switch_prob: float,
    replicated: jax.sharding.NamedSharding | None = None,
) -> tuple[jax.Array, jax.Array, MixDraw]:
    """Applies mixup or cutmix to each group of `group_size` consecutive rows.

    Returns the mixed float images [B,H,W,C], the targets [B,K] and the draw of the B/G groups.

    The reference draws once per GPU batch; a group stands for such a batch, whatever the number of
    devices. In a program whose batch is sharded, pass the mesh's `replicated` sharding: every
    device then makes all draws itself. Left alone, the compiler shards them, and the rejection
    loop of the beta sampler costs an all-reduce an iteration.

    Raises InputError where `group_size` does not divide the batch.
    """
    targets = one_hot_smooth(labels, num_classes, smoothing)
    if group_size < 1 or len(images) % group_size:
        raise InputError(
            f"mixing.group_size is {group_size}, which does not divide the batch of "
            f"{len(images)}: choose a divisor of the per-device batch"
        )
    draw = draw_mix(
        key,
        len(images) // group_size * axis.count(),
        images.shape[1:3],
        mixup_alpha=mixup_alpha,
        cutmix_alpha=cutmix_alpha,
        prob=prob,
        switch_prob=switch_prob,
    )
    draw = axis.own_rows(draw)
    if prob == 0 or (mixup_alpha == 0 and cutmix_alpha == 0):
        return images, targets, draw
    if replicated is not None:
        draw = jax.lax.with_sharding_constraint(draw, replicated)
    return *apply_mix(images, targets, draw), draw


def _beta(key: jax.Array, alpha: float, count: int) -> jax.Array:
    """Draws `count` values of Beta(alpha, alpha); 1 for alpha 0, which stands for "off"."""
    if alpha == 0:
        return jnp.ones((count,))
    if alpha == 1:
        return jax.random.uniform(key, (count,))
    return jax.random.beta(key, alpha, alpha, (count,), dtype=jnp.float32)


def _inside(box: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Returns boolean maps [N,H,W] of the pixels inside boxes [N,4]."""
    top, bottom, left, right = (box[:, i, None] for i in range(4))
    rows, columns = (jnp.arange(n)[None] for n in size)
    in_rows = (rows >= top) & (rows < bottom)
    in_columns = (columns >= left) & (columns < right)
    return in_rows[:, :, None] & in_columns[:, None, :]
