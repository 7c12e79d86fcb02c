"""Predicts what is in many pictures: reads them in threads and computes them in batches."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deit_jax.errors import InputError
from deit_jax.inference.preprocess import preprocess
from deit_jax.models import imagenet
from deit_jax.models.info import ModelInfo
from deit_jax.models.network import split_model
from deit_jax.parallel import cpus

HEADS = ("class", "distillation")  # in the order of `model.heads`

Result = dict[str, Any]


def predict(
    model: Any, files: list[Path], *, topk: int = 5, batch_size: int = 16
) -> Iterator[Result | InputError]:
    """Yields each file's prediction in order, or the error that says why it has none.

    Args:
      model: any model that carries its ModelInfo as `info`.
      files: images.
      topk: classes to name, at most all.
      batch_size: images computed at once.

    Returns:
      Dicts of `file`, `predictions` (likeliest first: class, name, index and probability 0..1) and,
      with a distillation head, `heads`: the same for each head alone. The prediction of both is
      that of the mean of their logits, as in the model itself.

    Raises:
      InputError: the model cannot predict.
    """
    info = model.info
    if not info.num_classes:
        raise InputError(f"this {info.name} has no classes to predict, only features")
    # A description that no image can be prepared with fails here, not once for each image.
    blank = preprocess(info, np.zeros((1, 1, 3), np.uint8))[0]
    network, variables = split_model(model)
    forward = jax.jit(lambda variables, images: network(variables, images)[0])

    batch_size = min(batch_size, len(files))
    chunks = [files[i : i + batch_size] for i in range(0, len(files), batch_size)]
    with ThreadPoolExecutor(cpus.available()) as pool:
        # One batch ahead and no more: images wait in memory until they are computed.
        ahead = pool.map(lambda file: _read(info, file), chunks[0])
        for chunk, following in zip(chunks, [*chunks[1:], []], strict=True):
            read, ahead = list(ahead), pool.map(lambda file: _read(info, file), following)
            images = [blank if isinstance(image, InputError) else image for image in read]
            images += [blank] * (batch_size - len(chunk))  # one shape, one compilation
            heads = [np.asarray(head, np.float32) for head in forward(variables, np.stack(images))]
            for row, (file, image) in enumerate(zip(chunk, read, strict=True)):
                if isinstance(image, InputError):
                    yield image
                else:
                    yield _result(info, file, [head[row] for head in heads], topk)


def _read(info: ModelInfo, file: Path) -> np.ndarray | InputError:
    """The model's input [S,S,3]."""
    try:
        return preprocess(info, file)[0]
    except InputError as error:
        return error


def _result(info: ModelInfo, file: Path, heads: list[np.ndarray], topk: int) -> Result:
    """`heads` are the logits [K] of each."""
    if not np.isfinite(heads).all():
        raise InputError(f"{file}: the logits are not finite; have these weights diverged?")
    result = {"file": str(file), "predictions": _top(info, sum(heads) / len(heads), topk)}
    if len(heads) > 1:
        each = zip(HEADS, heads, strict=True)
        result["heads"] = {name: _top(info, logits, topk) for name, logits in each}
    return result


def _top(info: ModelInfo, logits: np.ndarray, topk: int) -> list[dict[str, Any]]:
    classes = info.class_names or [f"class {i}" for i in range(info.num_classes)]
    exponents = np.exp(logits - logits.max())
    probabilities = exponents / exponents.sum()
    return [
        {
            "class": classes[i],
            "name": imagenet.readable(classes[i]),
            "index": int(i),
            "probability": float(f"{probabilities[i]:.6g}"),
        }
        for i in np.argsort(-logits, kind="stable")[:topk]
    ]
