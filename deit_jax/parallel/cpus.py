"""How many processors this process may use."""

import os


def available() -> int:
    """Returns the size of the process's affinity, which `taskset` and containers narrow."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
