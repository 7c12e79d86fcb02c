"""Exports a model as an ONNX program, through jax2onnx, and compares both in onnxruntime."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deit_jax import couplings
from deit_jax.errors import InputError, brief
from deit_jax.inference import primitives
from deit_jax.inference.export import as_function, describe, size_of
from deit_jax.parallel import devices

PROGRAM = "model.onnx"
_MOST_BYTES = 2**31 - 2**24  # of one protobuf file; the graph takes a little
_MOST_ERROR = 1e-4  # relative to the largest value; 1e-6 is usual


def export_onnx(
    folder: Path, model: nnx.Module, *, features: bool = False
) -> tuple[list[str], float]:
    """Writes `model.onnx` and its description, once onnxruntime computes what the model does.

    The program takes `images`, uint8 pixels [B, H, W, 3] of the model's size, for any B, and
    returns float32: `probabilities` and the logits of each head, `logits_class` and perhaps
    `logits_distillation`, [B, K], and on request `features` [B, D].

    Args:
      folder: to be created, or empty.
      model: with its ModelInfo as `info`; it computes in float32.
      features: the pooled features, too.

    Returns:
      The names of the outputs, and the largest difference between onnxruntime's and the model's
      for two random images, relative to the largest value of each output.

    Raises:
      InputError: jax2onnx is missing or cannot convert the model, which is too large for one file,
        computes in bfloat16, or is computed otherwise by onnxruntime.
    """
    check()
    import onnxruntime
    from jax2onnx import to_onnx

    info = model.info
    if any(getattr(layer, "dtype", None) == jnp.bfloat16 for _, layer in nnx.iter_modules(model)):
        raise InputError(
            f"this {info.name} computes in bfloat16, which onnxruntime does not; load it with "
            'dtype="float32"'
        )
    program, weights = as_function(model, features=features)
    size = sum(x.nbytes for x in weights.values())
    if size > _MOST_BYTES:
        raise InputError(
            f"the weights of {info.name} take {size / 2**30:.1f} GiB, more than an ONNX file may "
            "hold; export StableHLO"
        )
    images = jax.ShapeDtypeStruct((1, *size_of(info), 3), jnp.uint8)
    with devices.anywhere():
        outputs = sorted(jax.eval_shape(program, weights, images))

    def in_order(images: jax.Array) -> list[jax.Array]:
        with devices.anywhere():
            traced = primitives.flat(
                lambda images: [program(weights, images)[name] for name in outputs],
                jax.ShapeDtypeStruct(images.shape, images.dtype),
            )
        return primitives.run(traced, images)

    spec = jax.ShapeDtypeStruct(("batch", *images.shape[1:]), jnp.uint8)
    try:
        with couplings.converting_to_onnx():
            converted = to_onnx(
                in_order, [spec], model_name=info.name, input_names=["images"], output_names=outputs
            ).SerializeToString()
    except NotImplementedError as error:
        raise InputError(
            f"jax2onnx cannot convert {info.name} ({brief(error)}); export StableHLO"
        ) from error
    pixels = np.random.default_rng(0).integers(0, 256, (2, *images.shape[1:])).astype(np.uint8)
    session = onnxruntime.InferenceSession(converted, providers=["CPUExecutionProvider"])
    got = dict(zip(outputs, session.run(outputs, {"images": pixels}), strict=True))
    want = jax.device_get(jax.jit(program)(weights, pixels))
    error = max(_difference(got[name], want[name]) for name in outputs)
    if not error <= _MOST_ERROR:
        raise InputError(
            f"onnxruntime computes {info.name} otherwise: a relative difference of {error:.1e}; "
            "export StableHLO, and please report this"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROGRAM).write_bytes(converted)
    describe(folder, info, outputs=outputs, jax=jax.__version__)
    return outputs, error


def check() -> None:
    """Raises InputError where jax2onnx or onnxruntime is missing."""
    try:
        import jax2onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"--format onnx needs jax2onnx and onnxruntime ({brief(error)}); "
            "pip install 'deit-jax[onnx]'"
        ) from error


def _difference(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30))
