"""The cycles that the TPU compiler expects of our Pallas kernels, of which a program says nothing.

The compiler writes them into files where a flag asks for it, and then aborts the process: they are
compiled once more, alone, in a process of their own.

python -m deit_jax.planning.tpu_kernels forward|backward TOPOLOGY IMAGES TOKENS HEADS HEAD_DIM
"""

import contextlib
import functools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike

from deit_jax.models import attention_tpu, registry
from deit_jax.models.info import ModelInfo
from deit_jax.planning import tpu

_SECONDS = 600
_CYCLES = re.compile(r'hlo_op_name: "(attention_\w+)[^"]*"\s+estimated_cycles: (\d+)')
_OPERAND = re.compile(r"%attention_forward\S* = .*operand_layout_constraints=\{bf16\[(\d+),(\d+),")


def measure(topology: str, info: ModelInfo, text: str) -> dict[str, int]:
    """Returns the cycles of each kernel of a program by its name, {} without kernels.

    Args:
      topology: as for `tpu.devices`.
      info: of the model.
      text: of the compiled program.
    """
    found = _OPERAND.search(text)
    if found is None:
        return {}
    options = registry.options(info)
    num_heads, head_dim = options["num_heads"], options["embed_dim"] // options["num_heads"]
    shape = [*found.groups(), str(num_heads), str(head_dim)]
    profiles = [_profile(which, topology, *shape) for which in ("forward", "backward")]
    return {name: int(cycles) for text in profiles for name, cycles in _CYCLES.findall(text)}


def _profile(*arguments: str) -> str:
    """Returns what the compiler writes about a kernel, "" where it writes nothing."""
    with tempfile.TemporaryDirectory() as folder:
        flag = f"--xla_jf_dump_static_llo_profile_to={folder}"
        flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flag}"
        with contextlib.suppress(subprocess.TimeoutExpired):  # the report names it as not counted
            subprocess.run(
                [sys.executable, "-m", __name__, *arguments],
                # Its log, hundreds of megabytes with this flag, goes with the folder.
                env=os.environ | {"LIBTPU_INIT_ARGS": flags.strip(), "TPU_LOG_DIR": folder},
                capture_output=True,
                timeout=_SECONDS,
                check=False,
            )
        return "".join(path.read_text() for path in Path(folder).glob("attention_*"))


def _compile(
    which: str, topology: str, batch: int, tokens: int, num_heads: int, head_dim: int
) -> None:
    width = attention_tpu.padded(num_heads, head_dim)
    here = SingleDeviceSharding(tpu.devices(topology)[0])
    heads = {"num_heads": num_heads, "head_dim": head_dim}

    def array(width: int, dtype: DTypeLike = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, tokens, width), dtype, sharding=here)

    kernel = functools.partial(getattr(attention_tpu, which), **heads)
    operands = [array(3 * width)]
    if which == "backward":
        operands += [array(width), array(width // head_dim, jnp.float32), array(width)]
    jax.config.update("jax_enable_compilation_cache", False)
    jax.jit(kernel).lower(*operands).compile()


if __name__ == "__main__":
    _compile(*sys.argv[1:3], *map(int, sys.argv[3:]))
