"""RegNetY (arXiv 2003.13678, section 4), the convolutional teachers of DeiT."""

import itertools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from deit_jax.errors import InputError
from deit_jax.models.features import Backbone, Layers, chosen_of, classifier
from deit_jax.models.layers import (
    Layer,
    Linear,
    normal_param,
    precision_of,
    product,
)
from deit_jax.models.norms import BatchNorm
from deit_jax.parallel import devices


def stage_plan(
    w0: int, wa: float, wm: float, group_width: int, depth: int
) -> list[tuple[int, int, int]]:
    """Returns (width, groups, blocks) of every stage.

    Block j has the ideal width w0 + wa·j. It is rounded to the nearest w0·wm^e (e an integer) and
    that to a multiple of 8; blocks of equal width form a stage. Last, each stage's width is
    rounded to a multiple of its group width. All rounding is half to even.
    """
    ideal = w0 + wa * np.arange(depth)
    exponents = np.round(np.log(ideal / w0) / np.log(wm))
    quantised = (np.round(w0 * wm**exponents / 8) * 8).astype(int)
    if quantised.min() < 1:
        raise InputError(f"w0 is {w0}, which leaves a stage without channels; expected at least 5")
    plan = []
    for width, blocks in zip(*np.unique(quantised, return_counts=True), strict=True):
        group = min(group_width, int(width))
        groups = round(int(width) / group)
        plan.append((group * groups, groups, int(blocks)))
    return plan


def conv3x3(x: jax.Array, kernel: jax.Array, *, stride: int, groups: int) -> jax.Array:
    """Convolves [B, H, W, C] with a 3×3 kernel and one pixel of zero padding on every side.

    XLA's CPU backend is slow at grouped convolutions; one dense convolution a group takes half
    the time there (RegNetY-16GF, batch 8, two cores: 0.9 s against 1.8 s). The choice is made at
    lowering, for the platform that the program is compiled for.

    XLA does not divide a grouped convolution among the devices of a mesh: left to itself, each GPU
    would gather the whole batch and compute all of it. (The TPU compiler does divide it.)
    """

    def convolve(x: jax.Array, kernel: jax.Array, groups: int) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(stride, stride),
            # "SAME" would pad (0, 1) at stride 2 on even sizes.
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
            precision=precision_of(x.dtype),
        )

    def split(x: jax.Array, kernel: jax.Array) -> jax.Array:
        parts = zip(jnp.split(x, groups, axis=-1), jnp.split(kernel, groups, axis=-1), strict=True)
        return jnp.concatenate([convolve(*part, 1) for part in parts], axis=-1)

    def grouped(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return convolve(x, kernel, groups)

    if groups == 1:
        return grouped(x, kernel)

    def own_rows(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return devices.on_each(grouped, x, kernel)

    return jax.lax.platform_dependent(x, kernel, cpu=split, cuda=own_rows, default=grouped)


class Conv(Layer):
    """1×1 or 3×3 convolution without bias; the kernel is HWIO with I the channels of one group."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        size: int,
        stride: int = 1,
        groups: int = 1,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        # The fan-out of the timm release that trained the teachers ignores the groups.
        std = math.sqrt(2.0 / (size * size * out_channels))
        self.kernel = normal_param(rngs, (size, size, in_channels // groups, out_channels), std)
        self.stride = stride
        self.groups = groups
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, I] to [B, H/stride, W/stride, O] in `dtype`."""
        x = x.astype(self.dtype)
        kernel = self.kernel[...]
        if kernel.shape[:2] == (1, 1):
            x = x[:, :: self.stride, :: self.stride]
            return product("bhwi,io->bhwo", x, kernel[0, 0]).astype(self.dtype)
        return conv3x3(x, kernel.astype(self.dtype), stride=self.stride, groups=self.groups)


class ConvNorm(Layer):
    """Convolution, batch norm and, with `relu`, ReLU; output in the convolution's dtype."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        relu: bool = True,
        scale_init: float = 1.0,
        **conv: object,
    ):
        self.conv = Conv(in_channels, out_channels, **conv)
        self.bn = BatchNorm(out_channels, scale_init=scale_init)
        self.relu = relu

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Maps [B, H, W, I] to [B, H/stride, W/stride, O]."""
        x = self.conv(x)
        y = self.bn(x, rngs)
        return (jax.nn.relu(y) if self.relu else y).astype(x.dtype)


class SqueezeExcite(Layer):
    """Scales channels by a sigmoid gate computed from their means over the image."""

    def __init__(self, channels: int, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        if hidden < 1:
            raise InputError(f"se_ratio leaves no hidden unit for {channels} channels; raise it")
        # 1×1 convolutions on a 1×1 map, initialised as such.
        kind = {"dtype": dtype, "out_dtype": jnp.float32, "rngs": rngs}
        self.fc1 = Linear(channels, hidden, std=math.sqrt(2.0 / hidden), **kind)
        self.fc2 = Linear(hidden, channels, std=math.sqrt(2.0 / channels), **kind)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to the same shape and dtype."""
        means = x.astype(jnp.float32).mean((1, 2))
        gate = jax.nn.sigmoid(self.fc2(jax.nn.relu(self.fc1(means))))
        return x * gate[:, None, None].astype(x.dtype)


class Bottleneck(Layer):
    """1×1, grouped 3×3, squeeze-and-excite, 1×1, added to the shortcut; ReLU."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        groups: int,
        stride: int,
        se_ratio: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        kind = {"dtype": dtype, "rngs": rngs}
        self.conv1 = ConvNorm(in_channels, width, size=1, **kind)
        self.conv2 = ConvNorm(width, width, size=3, stride=stride, groups=groups, **kind)
        # The squeeze is relative to the channels that enter the block, not to its width.
        self.se = SqueezeExcite(width, round(in_channels * se_ratio), **kind)
        # γ = 0: every block starts as its shortcut.
        self.conv3 = ConvNorm(width, width, size=1, relu=False, scale_init=0.0, **kind)
        self.has_downsample = stride != 1 or in_channels != width
        if self.has_downsample:
            self.downsample = ConvNorm(
                in_channels, width, size=1, stride=stride, relu=False, **kind
            )

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Maps [B, H, W, I] to [B, H/stride, W/stride, width]."""
        shortcut = self.downsample(x, rngs) if self.has_downsample else x
        x = self.conv2(self.conv1(x, rngs), rngs)
        x = self.conv3(self.se(x), rngs)
        return jax.nn.relu(x + shortcut)


class Stage(Layer):
    """Bottlenecks `b1` … `bN` of one width; the first halves the resolution."""

    def __init__(self, in_channels: int, width: int, *, blocks: int, **options: object):
        self.block_names = tuple(f"b{i + 1}" for i in range(blocks))
        for i, name in enumerate(self.block_names):
            inputs, stride = (width, 1) if i else (in_channels, 2)
            setattr(self, name, Bottleneck(inputs, width, stride=stride, **options))

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Applies the blocks in order."""
        for name in self.block_names:
            x = getattr(self, name)(x, rngs)
        return x


class Classifier(Layer):
    """Global average pooling and the last linear layer, as float32 logits."""

    def __init__(self, features: int, num_classes: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.fc = classifier(features, num_classes, dtype=dtype, std=0.01, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, K]."""
        return self.fc(x.mean((1, 2)))


class RegNetY(Backbone):
    """RegNetY from the parameters of its generator (`stage_plan`), timm's names.

    In training batch norm uses the batch's statistics and updates its running ones, which are
    `nnx.BatchStat`; there is no training noise.
    """

    def __init__(
        self,
        *,
        w0: int,
        wa: float,
        wm: float,
        group_width: int,
        depth: int,
        se_ratio: float = 0.25,
        stem_width: int = 32,
        num_classes: int = 1000,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kind = {"dtype": dtype, "rngs": rngs}
        self.stem = ConvNorm(3, stem_width, size=3, stride=2, **kind)
        plan = stage_plan(w0, wa, wm, group_width, depth)
        self.stage_names = tuple(f"s{i + 1}" for i in range(len(plan)))
        channels = stem_width
        for name, (width, groups, blocks) in zip(self.stage_names, plan, strict=True):
            options = {"blocks": blocks, "groups": groups, "se_ratio": se_ratio}
            setattr(self, name, Stage(channels, width, **options, **kind))
            channels = width
        self.num_features = channels
        self.dtype = jnp.dtype(dtype)
        self._create_heads(num_classes, rngs)

    def __call__(self, images: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Maps images [B, H, W, 3] to float32 logits [B, K].

        In training batch norm uses and records the batch's statistics. A call with `rngs`, from
        which nothing is drawn, is training, one without is evaluation; after `model.train()` every
        call is training, after `model.eval()` none.
        """
        return self.heads(images, rngs)[0]

    def heads(self, images: jax.Array, rngs: nnx.Rngs | None = None) -> tuple[jax.Array, ...]:
        """Returns (logits,), float32 [B, K]."""
        return (self.head(self.forward_features(images, rngs)),)

    def forward_features(self, images: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Returns the last feature map before pooling, float32 [B, h, w, C]."""
        *_, x = self._maps(images, rngs)
        return x.astype(jnp.float32)

    def intermediates(self, images: jax.Array, layers: Layers = None) -> list[jax.Array]:
        """Returns the maps after the stem (0) and the stages (1 to 4), float32 [B, h, w, C].

        They have no norm to apply and nothing to reshape; else as in `Backbone`.
        """
        chosen = chosen_of(layers, 1 + len(self.stage_names), "maps")
        maps = list(itertools.islice(self._maps(images), max(chosen) + 1))
        return [maps[number].astype(jnp.float32) for number in chosen]

    def _maps(self, images: jax.Array, rngs: nnx.Rngs | None = None) -> Iterator[jax.Array]:
        if images.ndim != 4 or images.shape[3] != 3:
            raise InputError(
                f"images have shape {images.shape}, expected [batch, height, width, 3]"
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise InputError(
                f"images have dtype {images.dtype}, expected normalised floating-point pixels"
            )
        x = images
        for name in ("stem", *self.stage_names):
            x = getattr(self, name)(x, rngs)
            yield x

    def _pooled(self, images: jax.Array, rngs: nnx.Rngs | None = None) -> tuple[jax.Array, ...]:
        return (self.forward_features(images, rngs).mean((1, 2)),)

    def _create_heads(self, num_classes: int, rngs: nnx.Rngs) -> None:
        self.head = Classifier(self.num_features, num_classes, dtype=self.dtype, rngs=rngs)
