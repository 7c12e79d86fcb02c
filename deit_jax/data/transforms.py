"""What training and evaluation do to a picture on the host, in uint8.

Pixels are those of the PyTorch reference, which works on PIL images: EXIF orientation is ignored
and an alpha channel is dropped. Every random operation takes a seed (int64 [2]) and is a pure
function of its arguments. `data` is either the bytes of an image file (scalar string) or pixels
(uint8 [h, w, 3]).
"""

from collections.abc import Callable

import tensorflow as tf
from ml_collections import ConfigDict

from deit_jax.config.randaugment_policy import parse_policy
from deit_jax.data import crop, randaugment, three_augment
from deit_jax.data.decode import decode, open_image
from deit_jax.data.draws import fold, uniform
from deit_jax.data.pillow.resize import resize
from deit_jax.data.xla import compiled

# What a seed is folded with, one number per random operation.
_CROP, _FLIP, _AUGMENT, _JITTER = range(4)


def train_transform(
    input_config: ConfigDict, *, image_size: int
) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """Builds the training augmentation.

    Args:
      input_config: the `input` group of the config.
      image_size: side S of the result, in pixels.

    Returns:
      (data, seeds int64 [n, 2]) → uint8 [n, S, S, 3], a view of the image for each seed.
    """
    augment = _augmentation(input_config)

    def transform(data: tf.Tensor, seeds: tf.Tensor) -> tf.Tensor:
        cropped = _crops(data, tf.shape(seeds)[0], input_config, image_size)

        def view(seed: tf.Tensor) -> tf.Tensor:
            image = tf.ensure_shape(cropped(fold(seed, _CROP)), (image_size, image_size, 3))
            return augment(image, seed)

        views = tf.TensorSpec((image_size, image_size, 3), tf.uint8)
        return tf.map_fn(view, seeds, parallel_iterations=1, fn_output_signature=views)

    return transform


def short_side(input_config: ConfigDict, split: str, *, image_size: int) -> int | None:
    """Returns what the short side of a split's images is resized to; None where it is not.

    Of images resized by it, those that are nearly lines are refused (`crop.without_lines`).

    Args:
      input_config: the `input` group of the config.
      split: "train" or "eval".
      image_size: side of what is cut out, in pixels.
    """
    if input_config.train_crop == "small":
        return None
    if split == "eval":
        return int(image_size / input_config.crop_ratio)
    return image_size if input_config.train_crop == "simple_random" else None


def _crops(
    data: tf.Tensor, views: tf.Tensor, config: ConfigDict, size: int
) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns seed → uint8 [size, size, 3], a crop of the image, of which so many will be made.

    Of a JPEG with a single view only the crop is decoded, unless broken images are to be skipped:
    whether one is broken must not depend on the crop.
    """
    how = {"interpolation": config.interpolation}
    if config.train_crop == "small":
        image = crop.resize_whole(decode(data), size=size, **how)
        return lambda seed: crop.pad_and_crop(image, seed, pad=config.pad)
    if config.train_crop == "simple_random":
        image, how = decode(data), how | {"size": size, "pad": config.pad}

        def simple_crop(seed: tf.Tensor) -> tf.Tensor:
            shape = crop.without_lines(tf.shape(image)[:2], size)
            offset = crop.draw_offset(seed, shape, size=size, pad=config.pad)
            return crop.simple_random_crop(image, offset, **how)

        return simple_crop

    shape, cut = open_image(data, whole=config.on_bad_image == "skip" or views > 1)
    height, width, _ = tf.unstack(shape)

    def resized_crop(seed: tf.Tensor) -> tf.Tensor:
        box = crop.draw_box(height, width, seed, scale=config.scale, ratio=config.ratio)
        return resize(cut(box), (size, size), **how)

    return resized_crop


def _augmentation(config: ConfigDict) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """Returns (uint8 [S, S, 3], seed) → the same, flipped and with other colours and geometry."""
    policy = parse_policy(config.auto_augment) if config.auto_augment else None
    how = {"interpolation": config.interpolation, "fill": fill_colour(config)}

    def augment(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        image = random_flip(image, fold(seed, _FLIP), probability=config.hflip)
        if policy is not None:
            draws = randaugment.draw(fold(seed, _AUGMENT), policy)
            image = randaugment.apply(image, draws, policy=policy, **how)
        if config.three_augment:
            draw = three_augment.draw_three(fold(seed, _AUGMENT))
            image = three_augment.apply_three(image, draw)
        if config.color_jitter:
            draw = three_augment.draw_jitter(fold(seed, _JITTER), config.color_jitter)
            image = three_augment.apply_jitter(image, draw)
        return image

    return augment


def fill_colour(input_config: ConfigDict) -> tuple[int, int, int]:
    """Returns what RandAugment's geometry fills with: the mean colour, as in timm."""
    return tuple(max(0, min(255, round(255 * mean))) for mean in input_config.mean)


@compiled
def random_flip(image: tf.Tensor, seed: tf.Tensor, *, probability: float) -> tf.Tensor:
    """Mirrors the image left to right with the given probability."""
    return tf.where(uniform(seed) < probability, tf.reverse(image, (1,)), image)


def eval_transform(
    input_config: ConfigDict, *, image_size: int
) -> Callable[[tf.Tensor], tf.Tensor]:
    """Builds the evaluation preprocessing: data → uint8 [S, S, 3]; arguments as `train_transform`.

    Small images (`train_crop` "small") are resized whole, as the reference neither resizes nor
    crops them; others have their short side resized and the centre cut out.
    """
    how = {"size": image_size, "interpolation": input_config.interpolation}

    def transform(data: tf.Tensor) -> tf.Tensor:
        if input_config.train_crop == "small":
            return crop.resize_whole(decode(data), **how)
        return crop.centre_crop(data, crop_ratio=input_config.crop_ratio, **how)

    return transform
