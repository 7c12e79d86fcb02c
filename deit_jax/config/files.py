"""Recipes and configs as files: reading, writing and comparing them."""

import importlib.util
import inspect
import json
import os
import sys
from pathlib import Path

from ml_collections import ConfigDict

from deit_jax.errors import InputError


def load_config(recipe: str) -> ConfigDict:
    """Reads a recipe, "FILE.py" or "FILE.py:RUN", and returns its `get_config()`.

    Raises:
      InputError: no such file or run, or the file defines no `get_config`.
    """
    path, colon, run = recipe.partition(":")
    file = Path(path)
    if not file.is_file():
        raise InputError(f"config file {path} does not exist; recipes live in configs/")
    root = str(file.resolve().parent.parent)  # recipes import one another as configs.NAME
    if root not in sys.path:
        sys.path.insert(0, root)
    spec = importlib.util.spec_from_file_location(f"_recipe_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise InputError(f"config file {path} defines no get_config()")
    if not colon:
        return module.get_config()
    if not inspect.signature(module.get_config).parameters:
        raise InputError(f"config file {path} has one run only, not {run!r}; leave out ':{run}'")
    return module.get_config(run)


def write_config(config: ConfigDict, workdir: str) -> None:
    """Writes WORKDIR/config.json in one atomic step."""
    file = Path(workdir) / "config.json"
    partial = file.with_suffix(".json.tmp")
    with partial.open("w", encoding="utf-8") as opened:
        opened.write(config.to_json(indent=2, sort_keys=True) + "\n")
        opened.flush()
        os.fsync(opened.fileno())  # else a crash of the machine may leave the name without content
    os.replace(partial, file)


def changed_fields(config: ConfigDict, workdir: str) -> list[str]:
    """Lines "field: old → new" for what differs from the config of WORKDIR's last start.

    None without that config, or if it is damaged: it is a record, which nothing depends on.
    """
    try:
        old = _recipe((Path(workdir) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, AttributeError):
        return []
    new = recipe_fields(config)
    names = sorted(old.keys() | new.keys())
    return [f"{n}: {old.get(n)} → {new.get(n)}" for n in names if old.get(n) != new.get(n)]


def recipe_fields(config: ConfigDict) -> dict[str, object]:
    """The fields by name, GROUP.FIELD, with their values as JSON has them.

    Without `distributed`, which says what the processes are and not what they do.
    """
    return _recipe(config.to_json())


def _recipe(text: str) -> dict[str, object]:
    tree = json.loads(text)
    tree.pop("distributed", None)
    return _flatten(tree)


def _flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
