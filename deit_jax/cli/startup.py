"""Prepares the process of a run: quiet libraries, and compiled programs that the next start finds.

For the command line alone: it changes what the whole process does, and writes outside of the run.
"""

import contextlib
import errno
import hashlib
import importlib.util
import os
import platform
from pathlib import Path

from deit_jax import couplings
from deit_jax.errors import brief

_CACHE = "JAX_COMPILATION_CACHE_DIR"
_CPU = ("flags", "Features", "model name", "cpu family", "model", "CPU implementer", "CPU part")


def quieten() -> None:
    """Keeps what XLA and libtpu say besides errors off the console; call it before importing JAX.

    Variables that the user has set stay.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "2")


def quieten_absent_tpu() -> None:
    """Answers what libtpu would complain of where it is installed and there is no TPU."""
    if importlib.util.find_spec("libtpu") and not couplings.count_tpus():
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")


def use_compilation_cache() -> str | None:
    """Switches on JAX's persistent compilation cache; the user's own, or none, stays.

    Processes may share it: a program is written once, and one that cannot be read is compiled anew.

    Returns:
      Why it cannot be used, or None.
    """
    import jax

    config = jax.config
    asked = _CACHE in os.environ or config.jax_compilation_cache_dir
    if asked or not config.jax_enable_compilation_cache:
        return None
    try:
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except (OSError, RuntimeError) as error:  # the latter where there is no home
        return f"compiled programs are not kept ({brief(error)}); name a folder in {_CACHE}"
    config.update("jax_compilation_cache_dir", str(folder))
    return None


def _folder() -> Path:
    """Returns a folder for processors like this one: XLA's code for another may end a process."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return base / "deit_jax" / "compilation" / f"{platform.machine()}-{_processor()}"


def _processor() -> str:
    facts = {platform.processor()}
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        pairs = (line.partition(":") for line in first.splitlines())
        facts |= {f"{key.strip()}:{value}" for key, _, value in pairs if key.strip() in _CPU}
    return hashlib.sha256("\n".join(sorted(facts)).encode()).hexdigest()[:12]
