"""Shares a model: a repository's files in a folder, and their upload to the Hugging Face hub."""

import json
import os
import re
import textwrap
from pathlib import Path

from deit_jax import trees
from deit_jax.checkpoints import model_folder
from deit_jax.convert import card, huggingface, mapping, timm_folder, to_torch, torch_files
from deit_jax.errors import InputError, TransientError, brief, is_bug
from deit_jax.models.info import ModelInfo

LAYOUTS = ("timm", "hf")
_CARD = "README.md"
_OURS = (_CARD, *huggingface.CONFIGS, huggingface.WEIGHTS[0])
_OF_THE_HUB = (".gitattributes",)  # what it puts into every new repository


def check_repository(repo: str) -> None:
    """Raises InputError unless `repo` is OWNER/NAME as the hub has them."""
    part = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
    if not re.fullmatch(f"{part}/{part}", repo) or re.search(r"--|\.\.", repo) or len(repo) > 96:
        raise InputError(f"--to {repo!r}: expected OWNER/NAME, as in me/deit-digits")


def write_folder(
    source: str | os.PathLike, folder: Path, *, layout: str, repo: str, licence: str = ""
) -> ModelInfo:
    """Writes weights, configuration and model card of a repository into a new local folder.

    Args:
      source: a model folder, or the run folder that holds one.
      folder: to be created.
      layout: "timm", or "hf" for transformers.
      repo: OWNER/NAME, for the card.
      licence: of the weights, as the hub names licences; "" leaves a placeholder in the card.

    Returns:
      The model's description.

    Raises:
      InputError: not a model folder, a layout that does not know the model, a value that is not
        finite, or a damaged report of the run.
    """
    network, like = model_folder.read_network(source)
    info, model = network.info, model_folder.find_model(source)
    parameters = trees.param_count(like.params)
    to_torch.layout(info, layout)  # all that can be refused, before the weights are read
    config = timm_folder.config(info) if layout == "timm" else None
    text = card.text(model, info, parameters, layout, repo, licence)
    state = to_torch.tensors(model_folder.read_variables(source, like), info, layout)
    mapping.check_finite(state, str(source), allow=False)
    if config is None:
        huggingface.write_folder(folder, state, info)
    else:
        torch_files.write(folder / huggingface.WEIGHTS[0], state, info=info)
        content = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / huggingface.CONFIGS[0]).write_text(content, encoding="utf-8")
    (folder / _CARD).write_text(text, encoding="utf-8")
    return info


def upload(folder: Path, repo: str, *, private: bool = False, overwrite: bool = False) -> str:
    """Uploads a folder that `write_folder` wrote, in one commit; the token is huggingface_hub's.

    Args:
      folder: what to upload.
      repo: OWNER/NAME; created where it does not exist.
      private: as which it is created; one that exists must be private.
      overwrite: adds a commit to a repository that holds files; what it held stays in its history.

    Returns:
      The address of the commit.

    Raises:
      InputError: huggingface_hub or the token is missing, the hub refuses, the repository is public
        against `private`, or it holds files and `overwrite` is False.
      TransientError: no answer.
    """
    hub = library()
    if hub.get_token() is None:
        raise InputError("no token of the hub: run `hf auth login`, or set HF_TOKEN")
    api = hub.HfApi()
    try:
        if not api.repo_exists(repo):
            api.create_repo(repo, private=private)
        about = api.model_info(repo)
        if private and not about.private:
            raise InputError(
                f"{repo} is public, and --private only says how a new repository is created; make "
                "it private in its settings, or choose another name"
            )
        held = [file.rfilename for file in about.siblings or ()]
        held = [name for name in held if name not in _OF_THE_HUB]
        if held and not overwrite:
            listed = textwrap.shorten(", ".join(sorted(held)), 120, placeholder=" ...")
            raise InputError(
                f"{repo} holds {len(held)} files already ({listed}); choose another name, or add "
                "--overwrite: what is there stays in the repository's history"
            )
        names = [file.name for file in folder.iterdir()]
        stale = [name for name in held if name in _OURS and name not in names]
        commit = api.create_commit(
            repo,
            [
                *(hub.CommitOperationAdd(name, folder / name) for name in sorted(names)),
                *(hub.CommitOperationDelete(name) for name in stale),  # of the other layout
            ],
            commit_message="Upload a model of deit-jax",
            parent_commit=about.sha,  # nothing that somebody else uploads meanwhile is replaced
        )
    except InputError:
        raise
    except Exception as error:  # of httpx, requests or its own, as the version of the hub has it
        if is_bug(error):
            raise
        cause = _with_response(error)
        status = getattr(getattr(cause, "response", None), "status_code", 500)
        if status < 500:
            raise InputError(
                f"{repo}: refused by the hub ({brief(cause)}); check the name, and that the token "
                "of `hf auth whoami` may write there"
            ) from error
        raise TransientError(
            f"{repo}: no answer from the hub ({brief(cause)}); run again"
        ) from error
    return str(commit.commit_url)


def library() -> object:
    """Returns huggingface_hub. Raises InputError where it is missing."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(
            "an upload needs huggingface_hub; pip install 'deit-jax[hub]', or write the files by "
            "--dry_run DIR"
        ) from error
    return huggingface_hub


def _with_response(error: BaseException) -> BaseException:
    """Returns the error of a chain that has the hub's answer, or the first one."""
    while getattr(error, "response", None) is None and error.__context__ is not None:
        error = error.__context__
    return error
