"""Stateless image operations on uint8: what training and evaluation do to a picture.

Every random operation takes a seed (int64 [2]) and is a pure function of its arguments. `data` is
either the bytes of an image file (a scalar string) or decoded uint8 [h, w, 3]. Pixels are those of
the PyTorch reference, which works on PIL images: EXIF orientation is ignored and an alpha channel
is dropped.
"""

from collections.abc import Callable

import tensorflow as tf
from ml_collections import ConfigDict, FrozenConfigDict

from deit_jax.config.randaugment_policy import parse_policy
from deit_jax.data.crop import (
    centre_crop,
    pad_and_crop,
    random_cut,
    random_jpeg_cut,
    resize_whole,
    simple_random_crop,
)
from deit_jax.data.decode import decode
from deit_jax.data.draws import fold, uniform
from deit_jax.data.pillow.resize import resize
from deit_jax.data.pillow.tone import compiled
from deit_jax.data.randaugment import rand_augment
from deit_jax.data.three_augment import color_jitter, three_augment

# What a seed is folded with, one number per random operation.
_CROP, _FLIP, _AUGMENT, _JITTER = range(4)


def train_transform(
    input_config: ConfigDict, *, image_size: int
) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """The training augmentation: (data, seeds int64 [n, 2]) → uint8 [n, S, S, 3].

    Every seed is a view of the image. Of a JPEG with a single view only the crop is decoded, unless
    broken images are to be skipped: whether one is broken must not depend on the crop.
    """
    input_config = FrozenConfigDict(input_config)  # what is traced later must not see changes
    interpolation = input_config.interpolation
    crop = {name: input_config[name] for name in ("scale", "ratio")}
    policy = parse_policy(input_config.auto_augment) if input_config.auto_augment else None
    fill = fill_colour(input_config)
    decode_all = input_config.train_crop != "random_resized" or input_config.on_bad_image == "skip"

    def transform(data: tf.Tensor, seeds: tf.Tensor) -> tf.Tensor:
        if decode_all or data.dtype != tf.string:
            whole, image = True, decode(data)
        else:
            whole = (tf.shape(seeds)[0] > 1) | ~tf.io.is_jpeg(data)
            image = tf.cond(whole, lambda: decode(data), lambda: tf.zeros((0, 0, 3), tf.uint8))

        def draw_view(seed: tf.Tensor) -> tf.Tensor:
            crop_seed = fold(seed, _CROP)
            if input_config.train_crop == "small":
                view = resize_whole(image, size=image_size, interpolation=interpolation)
                view = pad_and_crop(view, crop_seed, pad=input_config.pad)
            elif input_config.train_crop == "simple_random":
                how = {"interpolation": interpolation, "pad": input_config.pad}
                view = simple_random_crop(image, crop_seed, size=image_size, **how)
            else:
                if whole is True:
                    view = random_cut(image, crop_seed, **crop)
                else:
                    view = tf.cond(
                        whole,
                        lambda: random_cut(image, crop_seed, **crop),
                        lambda: random_jpeg_cut(data, crop_seed, **crop),
                    )
                view = resize(view, (image_size, image_size), interpolation=interpolation)
            view = tf.ensure_shape(view, (image_size, image_size, 3))
            view = random_flip(view, fold(seed, _FLIP), probability=input_config.hflip)
            augment_seed, jitter_seed = fold(seed, _AUGMENT), fold(seed, _JITTER)
            if input_config.auto_augment:
                how = {"policy": policy, "interpolation": interpolation, "fill": fill}
                view = rand_augment(view, augment_seed, **how)
            if input_config.three_augment:
                view = three_augment(view, augment_seed)
            if input_config.color_jitter:
                view = color_jitter(view, jitter_seed, input_config.color_jitter)
            return view

        views = tf.TensorSpec((image_size, image_size, 3), tf.uint8)
        return tf.map_fn(draw_view, seeds, parallel_iterations=1, fn_output_signature=views)

    return transform


def fill_colour(input_config: ConfigDict) -> tuple[int, int, int]:
    """What RandAugment's geometry fills with: the mean colour, as timm has it."""
    return tuple(max(0, min(255, round(255 * mean))) for mean in input_config.mean)


def eval_transform(
    input_config: ConfigDict, *, image_size: int
) -> Callable[[tf.Tensor], tf.Tensor]:
    """The evaluation preprocessing: data → uint8 [image_size, image_size, 3].

    Small images (`train_crop` "small") are resized whole, as the reference neither resizes nor
    crops them; others have their short side resized and the centre cut out.
    """

    def transform(data: tf.Tensor) -> tf.Tensor:
        if input_config.train_crop == "small":
            image = decode(data)
            return resize_whole(image, size=image_size, interpolation=input_config.interpolation)
        return centre_crop(
            data,
            size=image_size,
            crop_ratio=input_config.crop_ratio,
            interpolation=input_config.interpolation,
        )

    return transform


@compiled
def random_flip(image: tf.Tensor, seed: tf.Tensor, *, probability: float) -> tf.Tensor:
    """Mirrors the image left to right with the given probability."""
    flip = uniform(seed, (), 0.0, 1.0) < probability
    return tf.where(flip, tf.reverse(image, (1,)), image)
