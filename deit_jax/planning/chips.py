"""What the makers state about their accelerators, for estimates before a run."""

from typing import NamedTuple


class Chip(NamedTuple):
    """Figures of one device as JAX counts them; 0 where they are not in this table.

    Attributes:
      tflops: dense bfloat16 matmuls, 10^12 FLOP/s.
      memory: GiB of device memory.
      bandwidth: of that memory, 10^9 bytes/s.
      clock: of a TPU's core, 10^9 cycles/s.
      products: 10^12 FLOP/s that large bfloat16 matmuls are taken to reach on a GPU: no maker's
        figure, but an assumption of our estimates.
      ring: 10^9 bytes/s that a device sends in both directions of a ring of devices: on a TPU over
        the links of one axis of the torus, on a GPU over NVLink within a host.
    """

    tflops: float
    memory: float = 0
    bandwidth: float = 0
    ring: float = 0
    clock: float = 0
    products: float = 0


# By a part of the name that JAX gives the device; the first match counts. A device of TPU v2 and
# v3 is a core, half a chip: half of the chip's 46 and 123 TFLOP/s, 16 and 32 GiB.
CHIPS = {
    "H100 PCIe": Chip(756), "H100 NVL": Chip(835), "A100": Chip(312),
    "H100": Chip(989, 79.11, 3350, 450, products=700), "B200": Chip(2250, 180, 8000, 900),
    "H200": Chip(989, 141, 4800, 450, products=700),
    "TPU v2": Chip(23, 8, 350, 62), "TPU v3": Chip(61.5, 16, 450, 82, 0.94),
    "TPU v4": Chip(275, 32, 1228, 90, 1.05), "TPU v5 lite": Chip(197, 16, 819, 100, 1.5),
    "TPU v5": Chip(459, 95, 2765, 200, 1.75), "TPU v6 lite": Chip(918, 32, 1640, 200, 1.75),
}  # fmt: skip


def find(device_kind: str) -> Chip | None:
    """Returns the chip that JAX calls `device_kind`, None where the table has none."""
    return next((chip for part, chip in CHIPS.items() if part in device_kind), None)
