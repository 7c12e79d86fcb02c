"""Makes steps on the CPU reuse their memory."""

import ctypes

import jax

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_memory() -> None:
    """Lets steps on the CPU reuse each other's memory; on an accelerator nothing changes.

    A compiled step takes all its temporaries as one block, gigabytes at DeiT's sizes, which glibc
    would return to the kernel after the step; the kernel would then clear every page for the next
    one. Call it before anything that starts JAX's backends.
    """
    # Run by the calling thread, steps allocate in glibc's main arena; a thread of the runtime has
    # an arena that cannot hold such a block.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and jax.default_backend() == "cpu":
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)
