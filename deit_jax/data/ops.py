"""Stateless image operations on uint8: what training and evaluation do to a picture.

Every random operation takes a seed (int64 [2]) and is a pure function of its arguments. `data` is
either the bytes of an image file (a scalar string) or decoded uint8 [h, w, 3]. Pixels are those of
the PyTorch reference, which works on PIL images: EXIF orientation is ignored and an alpha channel
is dropped.
"""

from collections.abc import Callable

import tensorflow as tf
from ml_collections import ConfigDict, FrozenConfigDict

from deit_jax.data.randaugment import rand_augment
from deit_jax.data.resize import cut, plan_resize, resize
from deit_jax.data.simple_crop import simple_random_crop
from deit_jax.data.three_augment import color_jitter, three_augment
from deit_jax.data.tone import compiled
from deit_jax.policy import parse_policy

# What a seed is folded with, one number per random operation.
_CROP, _FLIP, _AUGMENT, _JITTER = range(4)
_TRIES = 10


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


def fold(seed: tf.Tensor, number: int) -> tf.Tensor:
    """A new seed that depends on `seed` and `number`."""
    return tf.random.experimental.stateless_fold_in(seed, number)


def decode(data: tf.Tensor) -> tf.Tensor:
    """Decodes a whole JPEG, PNG, BMP or GIF (its first frame) to uint8 [h, w, 3].

    Pixels are those of the reference, `PIL.Image.open(file).convert("RGB")`, for palettes, grey,
    CMYK, 16 bits and transparency too, except that
      - of a grey PNG of 16 bits the upper eight count; Pillow turns nearly all of it white,
      - transparent pixels of a GIF are black; the reference's folders hold no GIFs.

    Raises:
      tf.errors.OpError: damaged data, also a PNG that lacks nothing but its end, which Pillow
        forgives; a BMP of 1, 4 or 16 bits.
    """
    if data.dtype != tf.string:
        return data
    return tf.cond(tf.io.is_jpeg(data), lambda: _decode_jpeg(data), lambda: _decode_other(data))


def random_cut(
    image: tf.Tensor, seed: tf.Tensor, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> tf.Tensor:
    """The box of torchvision's RandomResizedCrop out of a decoded image [h, w, 3], not resized."""
    height, width, _ = tf.unstack(tf.shape(image))
    return cut(image, random_box(height, width, seed, scale=scale, ratio=ratio))


def random_jpeg_cut(
    data: tf.Tensor, seed: tf.Tensor, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> tf.Tensor:
    """`random_cut` of the bytes of a JPEG, of which only the box is decoded."""
    height, width, _ = tf.unstack(tf.io.extract_jpeg_shape(data))
    box = random_box(height, width, seed, scale=scale, ratio=ratio)
    return decode_jpeg_box(data, box, width)


@compiled
def random_box(
    height: tf.Tensor,
    width: tf.Tensor,
    seed: tf.Tensor,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tf.Tensor:
    """Draws the box (top, left, height, width) of RandomResizedCrop, int32 [4].

    The first of ten draws of area and aspect that fits is placed uniformly; if none fits, the box
    is the largest centred one whose aspect is inside `ratio`.
    """
    tall, wide = tf.cast(height, tf.float64), tf.cast(width, tf.float64)
    area = tall * wide * _uniform(fold(seed, 0), (_TRIES,), *scale)
    low, high = (tf.math.log(tf.constant(bound, tf.float64)) for bound in ratio)
    aspect = tf.exp(_uniform(fold(seed, 1), (_TRIES,), low, high))
    widths = tf.round(tf.sqrt(area * aspect))
    heights = tf.round(tf.sqrt(area / aspect))
    fits = (widths > 0) & (widths <= wide) & (heights > 0) & (heights <= tall)
    found, first = tf.reduce_any(fits), tf.argmax(tf.cast(fits, tf.int32))

    # At most one of the two minima binds, since ratio[0] <= ratio[1].
    centred_height = tf.minimum(tall, tf.round(wide / ratio[0]))
    centred_width = tf.minimum(wide, tf.round(tall * ratio[1]))
    box_height = tf.cast(tf.where(found, tf.gather(heights, first), centred_height), tf.int32)
    box_width = tf.cast(tf.where(found, tf.gather(widths, first), centred_width), tf.int32)
    room_y, room_x = height - box_height, width - box_width
    top = tf.where(found, _integer(fold(seed, 2), room_y), room_y // 2)
    left = tf.where(found, _integer(fold(seed, 3), room_x), room_x // 2)
    return tf.stack([top, left, box_height, box_width])


def decode_jpeg_box(data: tf.Tensor, box: tf.Tensor, image_width: tf.Tensor) -> tf.Tensor:
    """Decodes the box (int32 [4]: top, left, height, width) of a JPEG, as if cut out of the whole.

    Chroma is interpolated from the neighbouring columns, which libjpeg does not have at the edge of
    what it decodes; one more column on either side makes the box exact.
    """
    top, left, height, width = tf.unstack(box)
    begin = tf.maximum(left - 1, 0)
    end = tf.minimum(left + width + 1, image_width)
    image = tf.io.decode_and_crop_jpeg(
        data, (top, begin, height, end - begin), channels=3, dct_method="INTEGER_ACCURATE"
    )
    return image[:, left - begin : left - begin + width]


@compiled
def random_flip(image: tf.Tensor, seed: tf.Tensor, *, probability: float) -> tf.Tensor:
    """Mirrors the image left to right with the given probability."""
    flip = _uniform(seed, (), 0.0, 1.0) < probability
    return tf.where(flip, tf.reverse(image, (1,)), image)


def pad_and_crop(image: tf.Tensor, seed: tf.Tensor, *, pad: int) -> tf.Tensor:
    """torchvision's RandomCrop(S, padding=pad) of an S×S image: zeros around, then an S×S cut."""
    height, width, _ = tf.unstack(tf.shape(image))
    padded = tf.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    room = tf.constant(2 * pad)
    top, left = _integer(fold(seed, 0), room), _integer(fold(seed, 1), room)
    return padded[top : top + height, left : left + width]


def resize_whole(image: tf.Tensor, *, size: int, interpolation: str) -> tf.Tensor:
    """Resizes to size × size without keeping the aspect; an image of that size is unchanged."""
    shape = tf.shape(image)
    right_size = (shape[0] == size) & (shape[1] == size)
    image = tf.cond(
        right_size,
        lambda: image,
        lambda: resize(image, (size, size), interpolation=interpolation),
    )
    return tf.ensure_shape(image, (size, size, 3))


def centre_crop(data: tf.Tensor, *, size: int, crop_ratio: float, interpolation: str) -> tf.Tensor:
    """Resizes the short side to int(size / crop_ratio) and cuts out the centre size × size.

    The long side is truncated and the offsets are rounded half to even, as torchvision's Resize and
    CenterCrop do. Only what the crop depends on is computed, and of a JPEG decoded.
    """

    def plan(shape: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        resized, offsets = _resized_and_offsets(shape, size, int(size / crop_ratio))
        window = (offsets[0], offsets[1], size, size)
        return plan_resize(shape, tf.unstack(resized), interpolation=interpolation, window=window)

    def crop_jpeg() -> tf.Tensor:
        shape = tf.io.extract_jpeg_shape(data)
        box, resample = plan(shape)
        return resample(decode_jpeg_box(data, box, shape[1]))

    def crop_decoded() -> tf.Tensor:
        image = _decode_other(data) if data.dtype == tf.string else data
        box, resample = plan(tf.shape(image))
        return resample(cut(image, box))

    if data.dtype != tf.string:
        return crop_decoded()
    return tf.cond(tf.io.is_jpeg(data), crop_jpeg, crop_decoded)


@compiled
def _resized_and_offsets(shape: tf.Tensor, size: int, short: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Height and width of an image resized to the short side, and top and left of its centre."""
    sides = tf.cast(shape[:2], tf.float64)
    resized = tf.cast(short * sides / tf.reduce_min(sides), tf.int32)
    return resized, tf.cast(tf.round(tf.cast(resized - size, tf.float64) / 2.0), tf.int32)


def _decode_jpeg(data: tf.Tensor) -> tf.Tensor:
    # TensorFlow's default DCT is faster and up to 24 levels off; this one is Pillow's.
    return tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")


def _decode_other(data: tf.Tensor) -> tf.Tensor:
    image = tf.io.decode_image(data, channels=3, expand_animations=False)
    image = tf.ensure_shape(image, (None, None, 3))
    with tf.control_dependencies([image]):  # which says better what is wrong with too few bytes
        kind_and_bits = tf.strings.substr(data, 0, 2) + tf.strings.substr(data, 28, 2)
    return tf.cond(kind_and_bits == b"BM\x08\x00", lambda: _bmp_colours(image, data), lambda: image)


def _bmp_colours(image: tf.Tensor, data: tf.Tensor) -> tf.Tensor:
    """Looks the pixels of a BMP of 8 bits up in its palette; TensorFlow takes them for grey."""
    pixels, header = (
        tf.io.decode_raw(tf.strings.substr(data, offset, 4), tf.int32)[0] for offset in (10, 14)
    )
    palette = tf.strings.substr(data, 14 + header, pixels - 14 - header)
    blue_green_red_0 = tf.reshape(tf.io.decode_raw(palette, tf.uint8), (-1, 4))
    return tf.gather(blue_green_red_0[:, 2::-1], tf.cast(image[:, :, 0], tf.int32))


def _uniform(
    seed: tf.Tensor, shape: tuple[int, ...], low: float | tf.Tensor, high: float | tf.Tensor
) -> tf.Tensor:
    return tf.random.stateless_uniform(shape, seed, low, high, dtype=tf.float64)


def _integer(seed: tf.Tensor, largest: tf.Tensor) -> tf.Tensor:
    """A uniform int32 in 0 … largest, both included."""
    return tf.random.stateless_uniform((), seed, 0, largest + 1, dtype=tf.int32)
