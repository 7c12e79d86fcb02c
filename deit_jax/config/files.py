"""Recipes and configs as files: finding, reading, writing and comparing them."""

import ast
import difflib
import importlib.util
import inspect
import itertools
import os
import re
import sys
import traceback
import types
from pathlib import Path

from ml_collections import ConfigDict

from deit_jax import storage
from deit_jax.config.fields import default_config
from deit_jax.config.structure import FIELDS, flatten
from deit_jax.console import log_error
from deit_jax.errors import InputError

CONFIG_FILE = "config.json"  # of a run folder
_FILE_AND_RUN = re.compile(r"(.+\.py)(?::(.*))?", re.DOTALL)
_LOADED = itertools.count()


def load_config(recipe: str | os.PathLike) -> ConfigDict:
    """Returns the config of a recipe or of a run.

    Args:
      recipe: "FILE.py" or "FILE.py:RUN"; a packaged recipe with or without its run, such as
        "deit_b_distill" or "deit3:l_400"; a run's config.json; or a run folder that holds one. A
        packaged name wins over a folder of that name, which is then written as ./NAME.

    Raises:
      InputError: there is no such recipe, run or file, or it is damaged.
    """
    if not os.fspath(recipe):
        raise InputError("the name of the recipe is empty; name one, as in --config=deit_b")
    text = find_recipe(os.fspath(recipe), ".")
    match = _FILE_AND_RUN.fullmatch(text)
    name, colon, run = text.partition(":")
    if name in packaged_recipes():
        return _run_recipe(packaged_recipes()[name], text, run if colon else None)
    if match is not None and os.path.isfile(match[1]):
        return _run_recipe(Path(match[1]), text, match[2])
    path = storage.path_of(text)
    if path.suffix == ".json":
        return _read_config(path)
    if path.is_dir():
        if (path / CONFIG_FILE).is_file():
            return _read_config(path / CONFIG_FILE)
        raise InputError(f"{recipe} is not a run folder: it holds no {CONFIG_FILE}")
    names = sorted(packaged_recipes())
    if path.exists():
        raise InputError(
            f"{recipe} is not a recipe; expected a FILE.py that defines get_config(), the "
            f"{CONFIG_FILE} of a run, or one of {', '.join(names)}"
        )
    close = difflib.get_close_matches(Path(match[1]).stem if match else name, names)
    meant = f" (did you mean {', '.join(close)}?)" if close else ""
    raise InputError(
        f"there is no recipe {recipe}{meant}; the packaged ones are {', '.join(names)}; name one "
        f"of them, FILE.py, a run folder or its {CONFIG_FILE}"
    )


def packaged_recipes() -> dict[str, Path]:
    """Returns the files of the recipes that come with deit-jax, by name.

    An installed package has them in its folder configs/, a clone beside the package.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if files := sorted(folder.glob("*.py")):
            return {file.stem: file for file in files if file.stem != "common"}
    return {}


def describe_recipes() -> dict[str, str]:
    """Returns the first line of each packaged recipe's docstring, by name."""
    return {
        name: (ast.get_docstring(ast.parse(file.read_bytes())) or "").partition("\n")[0]
        for name, file in packaged_recipes().items()
    }


def find_recipe(recipe: str, folder: str | os.PathLike) -> str:
    """Returns a name of the recipe that holds in every working folder.

    Args:
      recipe: as for `load_config`.
      folder: what its path is relative to: the folder of the recipe that names this one, or the
        working folder.

    Returns:
      NAME or NAME:RUN of a packaged recipe, which NAME.py and configs/NAME.py also are where
      `folder` has no such file; else the absolute path, with its run.
    """
    packaged = packaged_recipes()
    if recipe.partition(":")[0] in packaged:
        return recipe
    match = _FILE_AND_RUN.fullmatch(recipe)
    path, run = (match[1], match[2]) if match else (recipe, None)
    file = Path(os.path.abspath(Path(folder, path)))
    ours = packaged.get(file.stem) if match else None
    by_name = not file.exists() and Path(path).parent in (Path("."), Path("configs"))
    if ours is not None and (by_name or file.resolve() == ours):
        path = file.stem
    elif match or file.exists():
        path = str(file)
    return path if run is None else f"{path}:{run}"


def _run_recipe(file: Path, recipe: str, run: str | None) -> ConfigDict:
    """Returns what a recipe's `get_config()` or `get_config(run)` does.

    `from . import NAME` in a recipe finds NAME.py beside it, else the packaged recipe. Every call
    reads the files anew.
    """
    package = types.ModuleType(f"_deit_jax_recipes_{next(_LOADED)}")
    folders = [file.absolute().parent, *(path.parent for path in packaged_recipes().values())]
    package.__path__ = list(dict.fromkeys(map(str, folders)))
    sys.modules[package.__name__] = package
    try:
        spec = importlib.util.spec_from_file_location(f"{package.__name__}.{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            raise InputError(f"recipe {recipe} defines no get_config()")
        if run is not None and not inspect.signature(get_config).parameters:
            raise InputError(f"recipe {recipe} has one run only, not {run!r}; leave out ':{run}'")
        config = get_config() if run is None else get_config(run)
        if not isinstance(config, ConfigDict):
            raise InputError(f"recipe {recipe}: get_config() returns {config!r}, no ConfigDict")
        if config.distill.teacher_config:
            named = config.distill.teacher_config
            config.distill.teacher_config = find_recipe(named, file.absolute().parent)
        return upgrade(config)
    except InputError:
        raise
    except Exception as error:  # a recipe is a program, which may fail in any way
        at = traceback.extract_tb(error.__traceback__)[-1]
        ours, place = Path(__file__).resolve().parents[1], Path(at.filename)
        if place.is_relative_to(ours) and not place.is_relative_to(ours / "configs"):
            raise  # a bug of ours, and no mistake in the recipe
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"recipe {recipe} fails at {at.filename}:{at.lineno}: {reason}") from error
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == package.__name__]:
            del sys.modules[name]


def _read_config(file: storage.Path) -> ConfigDict:
    """Reads a run's config.json; prints which fields it lacks, as another version wrote it."""
    try:
        tree = upgrade(storage.parse_json(file.read_bytes()))
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is damaged ({error}); start from a recipe again") from error
    found = flatten(tree)
    if unknown := sorted(found.keys() - FIELDS.keys()):
        raise InputError(
            f"{file} has fields that this version of deit-jax does not know: {', '.join(unknown)}; "
            "use the version that wrote it, or remove them if the run does without"
        )
    config = default_config()
    with config.ignore_type():  # a wrong one is found by `validate`
        config.update_from_flattened_dict({name: tuples(found[name]) for name in found})
    if missing := [f"{name} = {FIELDS[name]!r}" for name in FIELDS if name not in found]:
        log_error(f"note: {file} lacks fields, which get their defaults: {', '.join(missing)}")
    return config


def tuples(value: object) -> object:
    """Returns the value with tuples in place of its lists."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def upgrade(config: ConfigDict | dict) -> ConfigDict | dict:
    """Renames values of earlier versions in place, and returns the config."""
    if config.get("parallel", {}).get("backend") == "mesh":
        config["parallel"]["backend"] = "jit"
    return config


def write_config(config: ConfigDict, workdir: str) -> None:
    """Writes WORKDIR/config.json in one atomic step."""
    text = config.to_json(indent=2, sort_keys=True) + "\n"
    storage.replace_text(storage.path_of(workdir, CONFIG_FILE), text)


def changed_fields(config: ConfigDict, workdir: str) -> list[str]:
    """Returns lines "field: old → new" for what differs from the config of WORKDIR's last start."""
    old, new = recorded_fields(workdir), recipe_fields(config)
    names = sorted(old.keys() | new.keys()) if old else []
    return [f"{n}: {old.get(n)} → {new.get(n)}" for n in names if old.get(n) != new.get(n)]


def recorded_fields(workdir: str) -> dict[str, object]:
    """Returns the `recipe_fields` of WORKDIR's last start, nothing without its config.json.

    A damaged one is nothing, too: it is a record, which no run needs.
    """
    try:
        return _recipe(storage.path_of(workdir, CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def recipe_fields(config: ConfigDict) -> dict[str, object]:
    """Returns the fields by name, GROUP.FIELD, with their values as JSON has them.

    Without `distributed`, which says what the processes are and not what they do.
    """
    return _recipe(config.to_json())


def _recipe(text: str) -> dict[str, object]:
    tree = upgrade(storage.parse_json(text))
    tree.pop("distributed", None)
    return flatten(tree)
