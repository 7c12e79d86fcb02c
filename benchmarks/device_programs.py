"""What a process of the benchmark of a GPU builds, from the name of a program."""

import functools
import os
import traceback
from collections.abc import Callable

import jax

from benchmarks import jax_step, switches
from benchmarks.device_plan import Entry, Group, Place
from benchmarks.turns import Program
from deit_jax.errors import InputError, brief


def build(group: Group, entry: Entry, place: Place) -> Program:
    """Builds a program, in a process of its own.

    Args:
      group: that it belongs to.
      entry: the program.
      place: where it is measured.

    Raises:
      InputError: what cannot run here.
      RuntimeError: one line about anything else; the traceback is on stderr.
    """
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # PyTorch and others are beside it
    jax.config.update("jax_compilation_cache_dir", place.cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    device = {"gpu": "cuda", "cpu": "cpu"}[place.platform]
    builders = {
        "ours": functools.partial(_ours, group, entry),
        "parity": functools.partial(_parity, group, entry),
        "attention": functools.partial(_attention, group, entry, device),
    }
    torch = functools.partial(_torch, group, entry, device)
    try:
        program = builders.get(entry.kind, torch)()
    except Exception as error:
        _fail(error)
    return program._replace(run=functools.partial(_run, program.run))


def probe() -> Program:
    """Finds out what devices there are, in a process that takes none of their memory for long."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    first = jax.devices()[0]
    facts = {"platform": first.platform, "device": first.device_kind, "count": jax.device_count()}
    return Program(lambda count: None, facts, lambda: None)


def _ours(group: Group, entry: Entry) -> Program:
    work = group.work._replace(attention=entry.attention)
    with switches.on(entry.switch):
        return jax_step.build(work, None)  # compiled: what it was built of no longer matters


def _torch(group: Group, entry: Entry, device: str) -> Program:
    from benchmarks import torch_step  # PyTorch: imported by its own processes alone

    return torch_step.build(group.work, device, entry.kind == "torch compile")


def _parity(group: Group, entry: Entry) -> Program:
    from benchmarks import device_parity

    return device_parity.build(group.work, on_cpu=entry.name == "cpu")


def _attention(group: Group, entry: Entry, device: str) -> Program:
    from benchmarks import device_attention

    return device_attention.build(group.work, entry.name, device)


def _run(run: Callable[[int], None], count: int) -> None:
    try:
        run(count)
    except Exception as error:
        _fail(error)


def _fail(error: Exception) -> None:
    """Raises what the other process can read: it lacks the libraries that raised this."""
    if isinstance(error, InputError):
        raise error
    traceback.print_exception(error)
    raise RuntimeError(f"{type(error).__name__}: {brief(error)}") from None
