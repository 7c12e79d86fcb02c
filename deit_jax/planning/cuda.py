"""Describes GPUs that are not here: XLA's compiler needs the facts of one, not the card."""

import re
from importlib.metadata import version
from importlib.util import find_spec

import jax
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

from deit_jax.errors import InputError, brief
from deit_jax.planning import chips
from deit_jax.planning.report import GIB, Report

_CARDS = {"H100": "NVIDIA H100 80GB HBM3", "H200": "NVIDIA H200"}  # as JAX names them
_TAKEN = 0.75  # of a GPU's memory, by JAX's default
_CUDNN = 92101  # 9.21.1, as below
_SHAPE = re.compile(r"cuda:(\w+?)x([1-8])")

# What CUDA says of a Hopper card in SXM form, as the protocol buffer in text that XLA asks for.
_HOPPER = """
gpu_device_info {{
  name: "{name}"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  device_memory_size: {memory}
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_core: 233472 shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.21.1"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 21 patch: 1 }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""


def devices(topology: str) -> list[jax.Device]:
    """Returns the GPUs of one host, as XLA describes them.

    Args:
      topology: "cuda:CARDxN", such as "cuda:H200x8".

    Raises:
      InputError: the card is unknown, or the compiler is not installed.
    """
    match = _SHAPE.fullmatch(topology)
    if match is None or match[1] not in _CARDS:
        known = " or ".join(f"cuda:{card}xN" for card in _CARDS)
        raise InputError(
            f"--topology {topology}: expected {known}, N the GPUs of one host, from 1 to 8"
        )
    if find_spec("jax_cuda13_plugin") is None:
        raise InputError(
            f"--topology {topology} needs XLA's compiler for GPUs, which is not installed: "
            f"pip install 'jax[cuda13-local]=={version('jax')}'"
        )
    name = _CARDS[match[1]]
    chip = chips.find(name)
    target = _HOPPER.format(
        name=name, memory=int(chip.memory * GIB), bandwidth=int(chip.bandwidth * 1e9)
    )
    # No GPU of this machine is looked for, and no cuDNN, of which JAX asks the version.
    jax.config.update("jax_platforms", "cpu")
    fused_attention_stablehlo.check_cudnn_version = lambda: _CUDNN
    try:
        return topologies.get_topology_desc(
            "", platform="cuda", topology=f"1x1x{match[2]}", target_config=target
        ).devices
    except Exception as error:  # jaxlib and the plug-in document no type
        raise InputError(
            f"--topology {topology}: XLA's compiler for GPUs did not start ({brief(error)}); it "
            f"must be of JAX's version: pip install 'jax[cuda13-local]=={version('jax')}'"
        ) from error


def memory_note(found: Report) -> str:
    """Returns a line where a step fits the card, but not the part of it that JAX takes, else ""."""
    if not found["fits"] or found["memory"]["total"] <= _TAKEN * found["limit"]:
        return ""
    return (
        f"JAX takes {100 * _TAKEN:.0f} % of a GPU's memory, which is less: run with "
        "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95."
    )
