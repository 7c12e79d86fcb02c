"""Parses the config of a command line: --config=RECIPE --config.GROUP.FIELD=VALUE."""

import argparse
import ast
import os
import re

from ml_collections import ConfigDict

from deit_jax import storage
from deit_jax.config.fields import PRETRAINED
from deit_jax.config.files import CONFIG_FILE, find_recipe, load_config, tuples, upgrade
from deit_jax.config.structure import FIELDS, GROUPS, check_structure, refuse_name
from deit_jax.config.validate import CHOICES
from deit_jax.console import log_error
from deit_jax.errors import InputError

_FLAG = re.compile(r"--?(no)?config((?:\.[^=]*)?)(?:=(.*))?", re.DOTALL)
_BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parses --config and its fields, and with `parser` all other flags.

    Without --config, a parser with --workdir takes the config of the run in that folder.

    Returns:
      The arguments of `parser`, with the config as `config` (a locked ConfigDict, overrides
      applied) and its name, as the user wrote it, as `config_file`; both None without a config,
      which a parser with --workdir never returns.

    Raises:
      InputError: a flag, a field or a file is wrong.
    """
    recipe, overrides, rest = _split(argv)
    arguments = parser.parse_args(rest)
    workdir = getattr(arguments, "workdir", None)
    arguments.config, arguments.config_file = None, recipe
    if recipe is not None:
        arguments.config = load_config(recipe)
    elif workdir and storage.path_of(workdir, CONFIG_FILE).is_file():
        arguments.config_file = os.path.join(workdir, CONFIG_FILE)
        arguments.config = load_config(arguments.config_file)
    elif workdir or overrides:
        where = f", and --workdir={workdir} holds no {CONFIG_FILE} of a run" if workdir else ""
        raise InputError(
            f"--config is missing{where}; name a recipe, as in --config=deit_b or --config=FILE.py"
        )
    if arguments.config is not None:
        _override(arguments.config, overrides)
        if not (arguments.config.model.name and arguments.config.input.image_size):
            check_init_from(arguments.config)
        arguments.config.lock()
    return arguments


def check_init_from(config: ConfigDict) -> None:
    """Raises InputError where a recipe leaves `init_from` to the command line, and that is silent.

    For what reads the weights, or takes from them what the config leaves open.
    """
    if config.init_from == PRETRAINED:
        raise InputError("the recipe needs --config.init_from=FOLDER, a converted model or a run")


def _split(argv: list[str]) -> tuple[str | None, list[tuple[str, str]], list[str]]:
    """Splits a command line into the recipe, the overrides (GROUP.FIELD, text) and the rest."""
    recipe, overrides, rest = None, [], []
    tokens = iter(argv)
    for token in tokens:
        match = _FLAG.fullmatch(token)
        if match is None:
            rest.append(token)
            continue
        no, name, text = match[1], match[2].removeprefix(".").replace("-", "_"), match[3]
        if text is None and isinstance(FIELDS.get(name), bool):
            text = str(not no)
        elif no:
            raise InputError(f"{token}: only a field that is True or False can be switched off so")
        if text is None:
            text = next(tokens, "--")
            if text.startswith("--"):
                raise InputError(f"{token} lacks its value; write {token}=VALUE")
        if name:
            overrides.append((name, text))
        else:
            recipe = text
    return recipe, overrides, rest


def _override(config: ConfigDict, overrides: list[tuple[str, str]]) -> None:
    check_structure(config)
    for name, text in overrides:
        if name == "model" and not text.lstrip().startswith("{"):
            log_error(f"note: --config.model={text} is taken as --config.model.name={text}")
            name = "model.name"
        if name in GROUPS:
            own = [field for field in FIELDS if field.startswith(f"{name}.")]
            fits = [field for field in own if text in CHOICES.get(field, ())]
            fits += [field for field in own if field.endswith(".name") and text.isidentifier()]
            meant = f"did you mean --config.{fits[0]}={text}?" if fits else f"set {', '.join(own)}"
            raise InputError(f"config.{name} is a group of fields, not {text!r}; {meant}")
        if name not in FIELDS:
            refuse_name(name)
        value = _parse_value(name, text)
        if name == "distill.teacher_config" and value:
            value = find_recipe(value, ".")
        with config.ignore_type():  # numbers of a tuple may be int for float
            config.update_from_flattened_dict({name: value})
    upgrade(config)


def _parse_value(name: str, text: str) -> object:
    """Reads a field's value as its type; how long a tuple must be, `validate` checks."""
    default = FIELDS[name]
    try:
        if isinstance(default, bool):
            return _BOOLEANS[text.lower()]
        if isinstance(default, tuple):
            return tuples(ast.literal_eval(text))
        return type(default)(text)
    except (KeyError, ValueError, TypeError, SyntaxError):
        kinds = {bool: "True or False", int: "a whole number", float: "a number"}
        kind = kinds.get(type(default), "numbers in brackets")
        such = f", such as {default!r}" if default != () else ""
        raise InputError(f"config.{name} is {text!r}, but must be {kind}{such}") from None
