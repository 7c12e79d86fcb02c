"""What images and dimensions a transformer takes."""

import jax
import jax.numpy as jnp

from deit_jax.errors import InputError


def size_of(image_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Returns (height, width); raises InputError where they hold no patch."""
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if min(size) < patch_size:
        raise InputError(f"image_size {size} is smaller than one patch of {patch_size} pixels")
    return size


def check_mlp(embed_dim: int, mlp_ratio: float) -> None:
    """Raises InputError for an MLP without a hidden unit."""
    if int(embed_dim * mlp_ratio) < 1:
        raise InputError(f"mlp_ratio {mlp_ratio} of embed_dim {embed_dim} leaves no hidden unit")


def check_scale(layer_scale_init: float | None) -> None:
    """Raises InputError without LayerScale, for a family that is not published so."""
    if layer_scale_init is None:
        raise InputError(
            "layer_scale_init is None, but all models of this family have LayerScale; set it to a "
            "number, as 1e-5"
        )


def check_images(images: jax.Array, size: tuple[int, int]) -> None:
    """Raises InputError unless the images are floats of (height, width) `size`."""
    if images.ndim != 4 or images.shape[1:] != (*size, 3):
        raise InputError(
            f"images have shape {images.shape}, expected [batch, {size[0]}, {size[1]}, 3]: "
            "resize them, create the model with their image_size, or set a transformer's "
            "dynamic_image_size"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(
            f"images have dtype {images.dtype}, expected normalised floating-point pixels"
        )
