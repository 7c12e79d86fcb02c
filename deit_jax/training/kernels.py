"""How a run computes attention; kernels are tried on the device before they are trusted.

Ours for TPUs were written without one: the compiler of another version may refuse them, or a device
may compute something else than their interpretation on a CPU. cuDNN finds no plan for some shapes.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from deit_jax.errors import InputError, brief
from deit_jax.models import attention, attention_cudnn, attention_tpu
from deit_jax.models.network import join_model, split_model
from deit_jax.models.vit import VisionTransformer
from deit_jax.parallel import devices, hosts
from deit_jax.training.run import Run, build_model, dtype_of

_IMAGES = 8  # the most that a program of the TPU kernels takes
_MAX_ERROR = 0.03  # relative; both round to bfloat16 at the same places and differ by about 0.006


def implementation(run: Run) -> str:
    """Returns how the run computes attention, as `attention.choose` says; "" without any."""
    model = join_model(run.network, run.abstract)
    if not isinstance(model, VisionTransformer):
        return ""
    with devices.of(run.mesh):
        return attention.choose(*_facts(model), dtype_of(run.config))


def tried(run: Run) -> Run:
    """Compares the kernels with XLA on random numbers, on one device of each process; a second.

    Returns:
      The run as it is; without the kernels, and with a note, where those for TPUs fail on any
      process.

    Raises:
      InputError: cuDNN, which only the config can ask for, fails on any process.
    """
    chosen = implementation(run)
    if chosen not in ("pallas", "cudnn"):
        return run
    _, *shape = _facts(join_model(run.network, run.abstract))
    problems = hosts.gather("the trial of the kernels for attention", _problem(chosen, *shape))
    problem = next(filter(None, problems), None)
    if problem is None:
        return run
    if chosen == "cudnn":
        raise InputError(f"config.model.attention is 'cudnn': {problem}; set it to auto")
    config = run.config.copy_and_resolve_references()  # the run's own stays: another start tries
    config.model.attention = "xla"
    network, _ = split_model(build_model(config, run.plan))
    note = f"attention by XLA, without the kernels for TPUs: {problem}"
    return dataclasses.replace(run, network=network, notes=(*run.notes, note))


def _facts(model: VisionTransformer) -> tuple[str, int, int, int]:
    first = model.blocks[0].attn
    return first.implementation, model.num_tokens, first.num_heads, first.head_dim


def _problem(chosen: str, tokens: int, num_heads: int, head_dim: int) -> str:
    """Returns what is wrong with the kernels on this process's first device, or ""."""
    here, absent = num_heads * head_dim, attention.absent_rows(chosen, tokens)
    rows = tokens + absent
    width = attention_tpu.padded(num_heads, head_dim) if chosen == "pallas" else here
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (_IMAGES, rows, 3, width), (3, width), (_IMAGES, rows, width)
    real = jnp.arange(width) < here  # the kernels want zeros where there is no head
    projected, bias, grad = (
        jnp.where(real, jax.random.normal(key, shape), 0.0)
        for key, shape in zip(keys, shapes, strict=True)
    )
    projected, bias = projected.reshape(_IMAGES * rows, -1), bias.reshape(-1)
    grad = grad.at[:, tokens:].set(0.0)

    def with_bias(attend: Callable, projected: jax.Array, bias: jax.Array) -> jax.Array:
        qkv = (projected + bias[None]).astype(jnp.bfloat16).reshape(_IMAGES, rows, -1)
        return attend(width // head_dim, qkv, absent)

    @functools.partial(jax.jit, static_argnums=0)
    def run(function: Callable, grad: jax.Array) -> tuple[jax.Array, ...]:
        out, gradient = jax.vjp(function, projected, bias)
        grads = gradient(grad.astype(out.dtype).reshape(out.shape))
        return out.reshape(_IMAGES, rows, -1)[:, :tokens], *grads

    xla = functools.partial(with_bias, attention.attend)
    if chosen == "cudnn":
        kernel = functools.partial(with_bias, attention_cudnn.attend)
    else:
        sequences = attention.Sequences(num_heads, head_dim, rows, absent)
        interpret = jax.default_backend() != "tpu"
        kernel = functools.partial(attention.attend_in_vmem, sequences, interpret)
    try:
        pairs = zip(run(kernel, grad), run(xla, grad), strict=True)
        errors = [float(_relative(found, want)) for found, want in pairs]
    except Exception as error:  # whatever a compiler or a device raises
        cause = error.__cause__ if isinstance(error, InputError) else error  # no advice twice
        return f"they fail: {brief(cause).rstrip('.')}"
    if all(error <= _MAX_ERROR for error in errors):  # NaN is no number below
        return ""
    return f"they differ from XLA: {', '.join(f'{error:.3f}' for error in errors)}"


def _relative(found: jax.Array, want: jax.Array) -> jax.Array:
    found, want = found.astype(jnp.float32), want.astype(jnp.float32)
    return jnp.linalg.norm(jnp.ravel(found - want)) / jnp.linalg.norm(jnp.ravel(want))
