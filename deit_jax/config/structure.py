"""Which fields a config must have, of which types, and what a wrong name probably means."""

import difflib
from typing import NoReturn

from ml_collections import ConfigDict

from deit_jax.config.fields import default_config
from deit_jax.errors import InputError

# What other programs call a field, or people guess: "field: names". Names of fields in other groups
# need no entry.
_ALIASES = """
optimizer.name: opt optim optimiser
optimizer.lr: learning_rate base_lr peak_lr max_lr blr
optimizer.weight_decay: wd decay
optimizer.clip_norm: clip clip_grad grad_clip max_norm max_grad_norm
schedule.epochs: num_epochs n_epochs max_epochs steps num_steps max_steps
schedule.warmup_epochs: warmup warmup_steps
train.batch_size: batch bs global_batch_size train_batch_size
train.accumulate_steps: accum_iter accum_steps grad_accum gradient_accumulation_steps
train.dtype: precision amp bf16 fp16 mixed_precision
train.ema_decay: ema model_ema use_ema model_ema_decay
input.image_size: img_size input_size resolution size res
input.auto_augment: aa randaugment rand_augment augment
mixing.mixup_alpha: mixup
mixing.cutmix_alpha: cutmix
mixing.smoothing: label_smoothing
mixing.random_erasing: reprob erasing
model.name: arch architecture model_name backbone
model.drop_path_rate: drop_path stochastic_depth dropout drop_rate drop
model.attention: attn attention_impl attn_implementation flash_attention fused_attn
model.remat: checkpointing grad_checkpointing gradient_checkpointing
dataset.num_classes: classes n_classes nb_classes num_labels
dataset.root: data data_dir data_path data_root root_dir path
distill.kind: distillation distillation_type
distill.teacher: teacher_model teacher_path
init_from: pretrained finetune weights checkpoint_path
"""
# Answers to names of what is no field here: "answer: names".
_ANSWERS = """
images are decoded on all cores of the host: workers num_workers n_workers n_jobs threads
a run takes all devices it sees, of which CUDA_VISIBLE_DEVICES hides GPUs: devices device gpus num_gpus
the folder of a run is --workdir=DIR: workdir output_dir out_dir output log_dir save_dir
a run whose --workdir holds a checkpoint goes on by itself: resume auto_resume
"""  # noqa: E501


def _by_name(table: str) -> dict[str, str]:
    rows = (line.split(": ") for line in table.strip().splitlines())
    return {name: meaning for meaning, names in rows for name in names.split()}


_FIELD_OF, _ANSWER_OF = _by_name(_ALIASES), _by_name(_ANSWERS)


def flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    """Returns the fields of nested dicts by name, GROUP.FIELD."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


FIELDS = flatten(default_config().to_dict())  # name: default
GROUPS = sorted({name.partition(".")[0] for name in FIELDS if "." in name})


def refuse_name(name: str, prefix: str = "--config.") -> NoReturn:
    """Raises InputError: there is no field `name` (GROUP.FIELD), and which one may be meant."""
    group, _, last = name.rpartition(".")
    if last in _ANSWER_OF:
        raise InputError(f"no field config.{name}: {_ANSWER_OF[last]}")
    if meant := _meant(name):
        raise InputError(f"no field config.{name}; did you mean {_any_of(meant, prefix)}?")
    own = [field for field in FIELDS if group and field.startswith(f"{group}.")]
    has = f"config.{group} has" if own else "the groups of fields are"
    names = [field.partition(".")[2] for field in own] or GROUPS
    raise InputError(f"no field config.{name}; {has} {', '.join(names)}")


def suggest_field(flag: str, near: str) -> str:
    """Returns ", did you mean --config.GROUP.FIELD?" for a flag that is none, or "".

    Args:
      flag: its name, without dashes before it.
      near: what to return unless a field has this very name, "" where no flag is similar.
    """
    fields = _named(flag) or ([] if near else _meant(flag))
    return f", did you mean {_any_of(fields, '--config.')}?" if fields else near


def _any_of(fields: list[str], prefix: str) -> str:
    *others, last = [prefix + field for field in fields]
    return " or ".join(filter(None, (", ".join(others), last)))


def _named(last: str) -> list[str]:
    """The fields whose last name is this one, or one that others give them."""
    same = [field for field in FIELDS if field.rpartition(".")[2] == last]
    named = [_FIELD_OF[last]] if last in _FIELD_OF else []
    return same or named or [field for field in FIELDS if field == f"{last}.name"]


def _meant(name: str) -> list[str]:
    """The fields that `name` may mean, the likeliest first."""
    last = name.rpartition(".")[2]
    if named := _named(last):
        return named
    full = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.75)
    if "." in name and full:
        return full
    known = dict(_FIELD_OF) | {field.rpartition(".")[2]: field for field in FIELDS}
    close = difflib.get_close_matches(last, known, n=2, cutoff=0.7)
    return list(dict.fromkeys(known[other] for other in close)) or full


def check_structure(config: ConfigDict) -> None:
    """Raises InputError unless a config has exactly the fields of `default_config`, each typed."""
    found = flatten(config.to_dict())
    for name in found:
        if name in GROUPS:
            raise InputError(f"config.{name} is {found[name]!r}, but must be a group of fields")
        if name not in FIELDS:
            refuse_name(name, "config.")
    for name, default in FIELDS.items():
        if name not in found:
            raise InputError(
                f"config.{name} is missing; start recipes from default_config() of "
                "deit_jax.config.fields"
            )
        if not _same_type(found[name], default):
            kind = type(default).__name__
            if default and isinstance(default, tuple):
                kind = f"{len(default)} numbers"
            raise InputError(
                f"config.{name} is {found[name]!r}, but must be {kind}, such as {default!r}"
            )


def _same_type(found: object, expected: object) -> bool:
    if isinstance(expected, float):
        return isinstance(found, (int, float)) and not isinstance(found, bool)
    if isinstance(expected, tuple) and expected and isinstance(found, tuple):
        return len(found) == len(expected) and all(map(_same_type, found, expected))
    return type(found) is type(expected)
