"""Shares a model on the Hugging Face hub, for timm or transformers, with a model card.

deit-jax push --model runs/digits --to OWNER/NAME
deit-jax push --model runs/digits --to OWNER/NAME --layout hf --license apache-2.0 --private
deit-jax push --model runs/digits --dry_run digits-hub

Writes model.safetensors, config.json and README.md, the card: use, preprocessing, the evaluation of
each head, data and recipe, as far as model.json and the run say it. Without --license the card has
a placeholder to fill in. --dry_run writes the same files into a folder, which timm
("local-dir:DIR") or transformers loads, and asks nothing of the network.
"""

import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

from deit_jax import storage
from deit_jax.cli.arguments import a_path
from deit_jax.console import log
from deit_jax.errors import InputError, brief

RECIPE = ""


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the flags."""
    add = parser.add_argument
    add("--model", required=True, type=a_path, metavar="DIR", help="model folder, or run folder")
    add("--to", default="", metavar="OWNER/NAME", help="the repository; created where missing")
    add("--dry_run", type=a_path, metavar="DIR", help="write a folder instead of uploading")
    add("--layout", choices=("timm", "hf"), default="timm", help="who loads it; hf: transformers")
    add("--license", default="", metavar="ID", help="of the weights, as the hub has it: mit, ...")
    add("--private", action="store_true", help="create the repository as a private one")
    add("--overwrite", action="store_true", help="add a commit to a repository that holds files")


def run(arguments: Namespace, emit: Callable[[object], None]) -> None:
    """Writes the folder, and uploads it."""
    from deit_jax.convert import hub

    repo, out = arguments.to, arguments.dry_run
    if repo:
        hub.check_repository(repo)
    elif out is None:
        raise InputError("name the repository, --to OWNER/NAME, or a folder, --dry_run DIR")
    if out is not None and (arguments.private or arguments.overwrite):
        raise InputError("--private and --overwrite are for uploads; drop them or --dry_run")
    if out is None:
        hub.library()
    elif storage.exists(out):
        raise InputError(f"--dry_run {out} exists; choose another path, or remove it")
    shown = repo or f"OWNER/{out.name}"
    options = {"layout": arguments.layout, "repo": shown, "licence": arguments.license}
    try:
        if out is not None:
            with storage.new_folder(out) as fresh:
                info = hub.write_folder(arguments.model, fresh, **options)
            where = str(out)
        else:
            with tempfile.TemporaryDirectory() as folder:
                info = hub.write_folder(arguments.model, Path(folder, "new"), **options)
                where = hub.upload(
                    Path(folder, "new"),
                    repo,
                    private=arguments.private,
                    overwrite=arguments.overwrite,
                )
    except OSError as error:
        raise InputError(f"the files cannot be written ({brief(error)})") from error
    library = {"timm": "timm", "hf": "transformers"}[arguments.layout]
    log(f"{where}: {info.name}, {info.num_classes} classes, for {library}")
    if not arguments.license:
        log("note: the card's licence is a placeholder: fill it in, or pass --license")
    emit({"out": where, "name": info.name, "layout": arguments.layout})
