"""The cells of an experiment: each trains once and keeps its config, its log and its report."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from deit_jax import storage
from deit_jax.config.files import changed_fields
from deit_jax.console import log_error
from deit_jax.errors import InputError


def report(config: ConfigDict, workdir: Path, measure: Callable[[], Any]) -> Any:
    """Returns what `measure` reports of a run: kept from an earlier start, or measured now.

    Args:
      config: of the run.
      workdir: keeps config.json (by the run), log.txt and report.json.
      measure: trains `config` in `workdir`, where a run that was cut short goes on.

    Raises:
      InputError: the folder holds a run with other fields.
    """
    if changed := changed_fields(config, str(workdir)):
        raise InputError(f"{workdir} holds another run ({changed[0]}); choose another --workdir")
    kept = workdir / "report.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    log_error(f"training {workdir}")
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / "log.txt").open("a") as log, contextlib.redirect_stdout(log):
        found = measure()
    storage.replace_text(kept, json.dumps(found) + "\n")
    return found
