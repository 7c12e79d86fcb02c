"""Attention alone, forward, and forward and backward, in ways of JAX and of PyTorch.

From the fused projection's output, [B, N, 3D], to [B, N, D], so that what moves the heads counts.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.jax_step import Work
from benchmarks.turns import Program
from deit_jax.errors import brief
from deit_jax.models import registry

ROUNDS, CALLS = 5, 10

Case = tuple[Callable[[], Any], Callable[[Any], None]]  # runs once; waits for what a run returned


def build(work: Work, library: str, device: str) -> Program:
    """Measures in turns; the fact `cases` holds a row for each way and number of tokens."""
    options = registry.options(registry.model_info(work.model))
    heads, width = options["num_heads"], options["embed_dim"]
    patches = (options["image_size"] // options["patch_size"]) ** 2
    make = {"jax": _jax_cases, "torch": functools.partial(_torch_cases, device)}[library]
    rows = []
    for tokens in (patches + 1, patches + 2):
        rng = np.random.default_rng(0)
        qkv = rng.standard_normal((work.batch, tokens, 3 * width), np.float32)
        grad = rng.standard_normal((work.batch, tokens, width), np.float32)
        # Two matmuls of the forward pass, and four of the backward pass: none is counted twice.
        flops = 4 * work.batch * tokens**2 * width
        for name, case in make(heads, qkv, grad).items():
            rows.append({"program": name, "tokens": tokens} | _measured(case, flops))
    return Program(lambda count: None, {"cases": rows}, lambda: None)


def _measured(prepare: Callable[[], tuple[dict[str, Case], dict]], flops: float) -> dict:
    """The medians of a way, or why it does not run."""
    try:
        cases, row = prepare()
        times = {part: [] for part in cases}
        for number in range(ROUNDS + 1):
            for part, (run, wait) in cases.items():
                begin = time.perf_counter()
                for _ in range(CALLS):
                    result = run()
                wait(result)
                if number:  # the first compiles
                    times[part].append((time.perf_counter() - begin) / CALLS)
    except Exception as error:  # cuDNN without plans, or no memory: the others go on
        return {"error": f"{type(error).__name__}: {brief(error)}"}
    for part, taken in times.items():
        row[f"{part}_ms"] = 1e3 * statistics.median(taken)
    row["tflops_per_second"] = 3 * flops / row["both_ms"] / 1e9
    return row


def _jax_cases(heads: int, qkv: np.ndarray, grad: np.ndarray) -> dict[str, Callable]:
    import jax
    import jax.numpy as jnp

    from deit_jax.models import attention

    def library(implementation: str, even: bool, qkv: jax.Array) -> jax.Array:
        batch, tokens, width = qkv.shape
        # Its training wants an even number of tokens.
        more, lengths = (tokens % 2 if even else 0), None
        if more:
            qkv = jnp.pad(qkv, ((0, 0), (0, more), (0, 0)))
            lengths = jnp.full((batch,), tokens, jnp.int32)
        q, k, v = jnp.moveaxis(qkv.reshape(batch, tokens + more, 3, heads, -1), 2, 0)
        out = jax.nn.dot_product_attention(
            q,
            k,
            v,
            implementation=implementation,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
        )
        return out[:, :tokens].reshape(batch, tokens, width // 3)

    ours = functools.partial(attention.attend, heads)

    def both(function: Callable, qkv: jax.Array, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, pull = jax.vjp(function, qkv)
        return out, pull(grad)[0]

    exact = functools.cache(lambda: jax.jit(functools.partial(both, ours))(qkv, grad))

    def prepare(function: Callable) -> tuple[dict[str, Case], dict]:
        arguments = [jnp.asarray(x, jnp.bfloat16) for x in (qkv, grad)]
        forward, backward = jax.jit(function), jax.jit(functools.partial(both, function))
        cases = {
            "forward": (lambda: forward(arguments[0]), jax.block_until_ready),
            "both": (lambda: backward(*arguments), jax.block_until_ready),
        }
        found = [np.asarray(x, np.float32) for x in backward(*arguments)]
        return cases, _errors(found, [np.asarray(x) for x in exact()])

    functions = {
        "ours in XLA": ours,
        "jax.nn in XLA": functools.partial(library, "xla", False),
        "jax.nn in cuDNN": functools.partial(library, "cudnn", True),
    }
    return {name: functools.partial(prepare, function) for name, function in functions.items()}


def _torch_cases(device: str, heads: int, qkv: np.ndarray, grad: np.ndarray) -> dict[str, Callable]:
    import torch

    def attend(qkv: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = qkv.shape
        q, k, v = qkv.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).reshape(batch, tokens, width // 3)

    def both(qkv: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = attend(qkv)
        return out.detach(), torch.autograd.grad(out, qkv, grad)[0]

    def wait(result: object) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def prepare() -> tuple[dict[str, Case], dict]:
        exact = [torch.from_numpy(x).to(device) for x in (qkv, grad)]
        arguments = [x.bfloat16() for x in exact]
        for one in (exact[0], arguments[0]):
            one.requires_grad_()
        found, wanted = ([x.float().cpu().numpy() for x in both(*y)] for y in (arguments, exact))

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return attend(arguments[0])

        cases = {"forward": (forward, wait), "both": (lambda: both(*arguments), wait)}
        return cases, _errors(found, wanted)

    return {"torch's scaled_dot_product_attention": prepare}


def _errors(found: list[np.ndarray], exact: list[np.ndarray]) -> dict[str, float]:
    """How far output and gradient are from those in float32, relative to these."""
    names = ("output_error", "gradient_error")
    return {
        name: float(np.linalg.norm(x - y) / np.linalg.norm(y))
        for name, x, y in zip(names, found, exact, strict=True)
    }
