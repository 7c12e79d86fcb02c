"""The command `deit-jax`: finds the sub-command, parses its flags, runs it, and returns its status.

A sub-command is a module with a docstring for --help (summary, examples, notes), RECIPE (whether it
takes --config: "required", "optional" or ""), `add_arguments(parser)`, and `run(arguments, emit)`,
which returns an exit status or None and gives what --json prints to `emit`. Its heavy imports are
within `run`: neither --help nor a mistake in the flags waits for JAX or TensorFlow.
"""

import atexit
import contextlib
import gc
import importlib
import json
import re
import shlex
import sys
import types
from argparse import Namespace

import deit_jax
from deit_jax.cli import startup
from deit_jax.cli.arguments import Parser
from deit_jax.cli.status import exit_status
from deit_jax.console import log_error
from deit_jax.errors import InputError, did_you_mean

COMMANDS = {  # their modules, and their lines of --help
    "train": ("run", "train a recipe, or go on with a run"),
    "eval": ("run", "evaluate a run, or a model folder on a recipe's data"),
    "plan": ("run", "compile a run's training step and report what it needs"),
    "predict": ("predict", "name what is in pictures"),
    "report": ("report", "report accuracy, confusion, calibration and mistakes"),
    "attention": ("attention", "draw what a model attends to in pictures"),
    "convert": ("convert", "make a model folder of PyTorch weights"),
    "export": ("export", "make a StableHLO or ONNX program of a model"),
    "export-torch": ("export_torch", "make a PyTorch file of a model folder"),
    "push": ("push", "share a model on the Hugging Face hub"),
    "check-data": ("check_data", "decode every image of a data set once"),
    "plot": ("plot", "draw the curves of runs"),
    "show-batch": ("show_batch", "draw what a training step sees"),
    "compile-for": ("compile_for", "plan for TPUs or GPUs that are not here"),
    "list-models": ("list_models", "list the models' names and sizes"),
}
BY_MODE = ("train", "eval", "plan")  # what main.py's --mode chooses from


def main(argv: list[str] | None = None, *, by_mode: bool = False) -> int:
    """Runs a command and returns the exit status.

    Args:
      argv: the command's name and its flags; by default those of the process.
      by_mode: the name is given by a flag instead, as main.py takes it: --mode=train|eval|plan.
    """
    # Imports and tracing make a million objects that stay. To look through them for garbage after
    # every 700 new ones, as Python does, is a tenth of the start, and at the end a second.
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)
    startup.quieten()
    argv = sys.argv[1:] if argv is None else argv
    return exit_status(lambda: _run(_named_by_mode(argv) if by_mode else argv))


def _named_by_mode(argv: list[str]) -> list[str]:
    parser = Parser("", add_help=False)
    parser.add_argument("--mode", choices=BY_MODE, default="train")
    arguments, rest = parser.parse_known_args(argv)
    return [arguments.mode, *rest]


def _run(argv: list[str]) -> int | None:
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print("usage: deit-jax COMMAND [flags]; each has its own --help, with examples\n")
        print("\n".join(f"  {name:14}{line}" for name, (_, line) in COMMANDS.items()))
        return 0
    if name == "--version":
        print(f"deit-jax {deit_jax.__version__}")
        return 0
    if name not in COMMANDS:
        near = did_you_mean(name.replace("_", "-"), COMMANDS)
        raise InputError(f"unknown command {name!r}{near}; deit-jax --help lists all")
    return run_command(importlib.import_module(f"deit_jax.cli.{COMMANDS[name][0]}"), name, rest)


def run_command(
    module: types.ModuleType, name: str, argv: list[str], *, prog: str = "deit-jax"
) -> int | None:
    """Parses the flags of a command and runs it; the commands may also live outside of deit_jax.

    Args:
      module: the command, as above.
      name: its name, `arguments.command`.
      argv: its flags; the whole command line is `arguments.command_line`, for reports.
      prog: the program that it is a command of.
    """
    arguments = _parse(name, module, argv, prog)
    if hasattr(sys.stdout, "reconfigure"):  # not where it is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no text
    stdout = sys.stdout

    def emit(document: object) -> None:
        if arguments.json:
            strict = json.loads(json.dumps(document), parse_constant=lambda _: None)  # no NaN
            text = json.dumps(strict, ensure_ascii=False)
            # JSON itself lets through what some terminals obey.
            text = re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text)
            print(text, file=stdout, flush=True)

    with contextlib.redirect_stdout(sys.stderr if arguments.json else stdout):
        return module.run(arguments, emit)


def _parse(name: str, module: types.ModuleType, argv: list[str], prog: str) -> Namespace:
    parser = Parser(module.__doc__, prog=f"{prog} {name}")
    module.add_arguments(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the result as JSON, alone on stdout; all else goes to stderr",
    )
    parser.set_defaults(command=name, command_line=f"{parser.prog} {shlex.join(argv)}")
    if not module.RECIPE:
        return parser.parse_args(argv)
    if not argv or not {"-h", "--help"}.isdisjoint(argv):
        from deit_jax.config.files import describe_recipes

        known = "".join(f"\n  {name:26}{line}" for name, line in describe_recipes().items())
        parser.epilog += f"\nrecipes:{known}\n"
    parser.add_argument(
        "--config",
        metavar="RECIPE",
        help="file, NAME or NAME:RUN; --config.GROUP.FIELD=VALUE changes a field",
    )
    from deit_jax.config.flags import parse

    try:
        arguments = parse(parser, argv)
    except InputError:
        if not argv:  # asked for nothing: who starts sees an example
            log_error(parser.format_help())
        raise
    if arguments.config is None and module.RECIPE == "required":
        raise InputError("--config is missing; name a recipe, such as --config=digits")
    return arguments
