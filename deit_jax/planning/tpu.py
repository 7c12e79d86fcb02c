"""The TPU compiler, which needs no TPU: the devices of a slice as it describes them."""

import os
from importlib.metadata import version
from importlib.util import find_spec

import jax
from jax.experimental import topologies

from deit_jax.errors import InputError, brief


def devices(topology: str) -> list[jax.Device]:
    """Returns the devices of a slice.

    Args:
      topology: "KIND:SHAPE", such as "v5e:4x4".

    Raises:
      InputError: there is no such slice, or the compiler is not installed.
    """
    if find_spec("libtpu") is None:
        raise InputError(
            f"--topology {topology} needs the TPU compiler, which is not installed: "
            f"pip install 'jax[tpu]=={version('jax')}'"
        )
    # Only the compiler is used: no TPU of this machine, no metadata of a cloud, no lock against
    # other processes.
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # jaxlib and libtpu document no type
        raise InputError(
            f"--topology {topology}: the TPU compiler knows no such slice ({brief(error)}); "
            "expected KIND:SHAPE, such as v5e:4x4, v6e:4x4, v4:2x2x4 or cuda:H200x8"
        ) from error
