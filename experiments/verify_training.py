"""Compares our training with the reference's, restated in PyTorch, step by step, in float32.

python tools/verify_training.py --write docs/training_parity.md
python tools/verify_training.py --image-size 224 --deit3 deit3_base_patch16_224

Four recipes of configs/ on made-up images of 10 classes: DeiT, distilled hard and soft, DeiT III.
Both sides start from the weights of one PyTorch module, every tensor large enough to matter, and
get equal batches and equal draws of erasing, mixup and cutmix; stochastic depth is off. The rates
are such that the weights move: warm-up and cosine within the few steps. Needs the extra `test`
(torch, timm). Exits with 1 if a difference exceeds its limit.
"""

import argparse
import datetime
import os
import platform
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from deit_jax import trees  # noqa: E402
from deit_jax.cli.status import exit_status  # noqa: E402
from deit_jax.config.files import load_config  # noqa: E402
from deit_jax.config.plan import RunPlan, plan_run  # noqa: E402
from deit_jax.config.validate import validate  # noqa: E402
from deit_jax.convert import mapping, to_torch  # noqa: E402
from deit_jax.errors import InputError  # noqa: E402
from deit_jax.models import registry  # noqa: E402
from deit_jax.models.network import Variables, split_model  # noqa: E402
from deit_jax.training import mixing, optim  # noqa: E402
from deit_jax.training.state import new_state, step_keys  # noqa: E402
from deit_jax.training.step import make_augment, make_train_step  # noqa: E402
from tests.oracles import timm_models, torch_training  # noqa: E402

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "timm", "numpy")
_CLASSES, _EPOCHS = 10, 10
# Limits of relative differences: of the first loss, of the last, of all weights as one vector, and
# of the same without the biases of keys.
FIRST_LOSS, LAST_LOSS, WEIGHTS, EFFECTIVE = 1e-5, 1e-3, 1e-3, 1e-4


class Case(NamedTuple):
    """A recipe, which model of the command line it trains, its teacher's part and its peak rate."""

    recipe: str
    student: str
    distill: str
    peak: float


CASES = {
    "DeiT": Case("deit.py:ti", "deit", "none", 1e-3),
    "DeiT, hard distillation": Case("deit_distill.py:ti", "distilled", "hard", 1e-3),
    "DeiT, soft distillation": Case("deit_distill.py:ti", "distilled", "soft", 1e-3),
    "DeiT III": Case("deit3.py:ti", "deit3", "none", 4e-3),
}


class Row(NamedTuple):
    """Relative differences of a run, and how far its weights went from their start."""

    case: str
    model: str
    losses: np.ndarray  # PyTorch's, one a step
    loss_errors: np.ndarray  # relative to it
    rate_error: float  # the largest absolute one
    moved: float
    weights: float
    effective: float  # of the weights but the biases of keys, on which no output depends
    ema: float

    @property
    def within_limits(self) -> bool:
        """Whether the run is the reference's; a NaN is not."""
        return bool(
            self.loss_errors[0] <= FIRST_LOSS
            and self.loss_errors[-1] <= LAST_LOSS
            and self.rate_error <= 1e-9
            and self.weights <= WEIGHTS
            and self.effective <= EFFECTIVE
            and self.ema <= WEIGHTS
        )

    def __str__(self) -> str:
        first, last, worst = self.loss_errors[0], self.loss_errors[-1], self.loss_errors.max()
        return (
            f"| {self.case} | {self.model} | {self.losses[0]:.4f} → {self.losses[-1]:.4f} | "
            f"{first:.1e} | {last:.1e} | {worst:.1e} | {self.moved:.2f} | {self.weights:.1e} | "
            f"{self.effective:.1e} | {self.ema:.1e} |"
        )


def recipe(case: str, *, image_size: int, batch_size: int) -> ConfigDict:
    """The recipe of a case, its schedule squeezed into 10 epochs, without stochastic depth."""
    chosen = CASES[case]
    config = load_config(str(ROOT / "configs" / chosen.recipe))
    config.distill.kind = chosen.distill
    config.model.drop_path_rate = 0.0
    config.input.image_size = image_size
    config.input.repeats = 1
    config.mixing.group_size = batch_size // 2
    config.optimizer.lr = chosen.peak
    config.schedule.epochs = _EPOCHS
    config.schedule.warmup_epochs = 3
    config.schedule.warmup_lr = chosen.peak / 10  # of the first two epochs
    config.train.batch_size = batch_size
    config.train.dtype = "float32"
    config.train.ema_decay = 0.9  # in so few steps the published one would hide every mistake
    validate(config)
    return config


def compare(
    case: str,
    name: str,
    teacher: str,
    *,
    num_steps: int,
    image_size: int,
    batch_size: int,
    **options: object,
) -> Row:
    """Trains both models.

    Args:
      case: a key of CASES.
      name: registered student.
      teacher: registered RegNetY, for the cases that distil.
      num_steps: a multiple of 10, the number of epochs.
      image_size: side in pixels.
      batch_size: images a step, in two groups for mixing.
      **options: of the student, such as depth, in place of the registered ones.
    """
    config = recipe(case, image_size=image_size, batch_size=batch_size)
    num_train = num_steps // _EPOCHS * batch_size
    counts = {"num_train": num_train, "num_eval": 0, "num_classes": _CLASSES}
    plan = plan_run(config, **counts, class_names=(), num_devices=1)
    student = Twins(name, image_size, seed=0, **options)
    batches = _batches(plan, image_size, batch_size)
    teachers = None
    if config.distill.kind != "none":
        teachers = Twins(teacher, image_size, seed=1)
        _make_undecided(teachers.module, np.concatenate([batch["image"] for batch in batches]))
    reference = torch_training.Training(
        student.module,
        config,
        num_classes=_CLASSES,
        steps_per_epoch=plan.steps_per_epoch,
        teacher=teachers and teachers.module,
    )
    start = student.variables()
    optimizer = optim.make_optimizer(start.params, config.optimizer)
    step = make_train_step(
        config, plan, student.network, optimizer, teacher=teachers and teachers.network
    )
    step, draw = jax.jit(step, donate_argnums=0), jax.jit(_make_draw(config, plan))
    state = jax.jit(lambda variables: new_state(variables, optimizer, ema=True))(start)
    teacher_variables = teachers and teachers.variables()

    found, expected = [], []
    for number in range(num_steps):
        batch = batches[number % len(batches)]
        draws = torch_training.Draws(*jax.device_get(draw(number, batch)))
        state, metrics = step(state, teacher_variables, batch)
        found.append((float(metrics["loss"]), float(metrics["learning_rate"])))
        expected.append(reference.step(batch["image"], batch["label"], draws))

    losses = np.array(expected)[:, 0]
    loss_errors, rate_errors = np.abs(np.array(found) - np.array(expected)).T
    end = student.variables().params
    return Row(
        case=case,
        model=name,
        losses=losses,
        loss_errors=loss_errors / losses,
        rate_error=float(rate_errors.max()),
        moved=distance(start.params, end),
        weights=distance(state.model.params, end),
        effective=distance(_effective(state.model.params), _effective(end)),
        ema=distance(state.ema.params, student.variables(reference.ema.module).params),
    )


def _effective(params: dict) -> dict:
    """The parameters without the biases of keys.

    Such a bias adds one number to all of a query's logits, which the softmax takes out again. Its
    gradient is rounding noise, and Adam makes full steps of that.
    """

    def keep(path: tuple, leaf: np.ndarray) -> np.ndarray:
        if jax.tree_util.keystr(path[-2:], simple=True, separator="/") != "qkv/bias":
            return leaf
        return np.delete(leaf, np.s_[len(leaf) // 3 : 2 * len(leaf) // 3])

    return jax.tree_util.tree_map_with_path(keep, params)


class Twins:
    """A registered model as timm's module, every tensor large enough to matter, and as ours."""

    def __init__(self, name: str, image_size: int, *, seed: int, **options: object):
        self.name = name
        ours = registry.abstract_model(name, num_classes=_CLASSES, image_size=image_size, **options)
        self.network, self._like = split_model(ours)
        options = registry.model_options(name) | {"image_size": image_size} | options
        options.pop("drop_path_mode", None)
        build = timm_models.vit
        if "w0" in options:
            del options["image_size"]
            build = timm_models.regnety
        self.module = build(seed=seed, num_classes=_CLASSES, **options)

    def variables(self, module: torch.nn.Module | None = None) -> Variables:
        """The weights of the module, or of a copy of it, as they are now, through the converter."""
        state = (module or self.module).state_dict()
        tensors = {key: tensor.detach().numpy().copy() for key, tensor in state.items()}
        layout = to_torch.layout(self.network.info, "timm")
        return mapping.to_variables(tensors, self._like, layout, what=self.name)[0]


def distance(tree: dict, other: dict) -> float:
    """‖tree - other‖ / ‖other‖ over all elements, in float64."""
    left, right = trees.flat(tree), trees.flat(other)
    squares = [
        [np.square(np.float64(left[k]) - v).sum(), np.square(np.float64(v)).sum()]
        for k, v in right.items()
    ]
    difference, norm = np.sum(squares, axis=0)
    return float(np.sqrt(difference / norm))


def _batches(plan: RunPlan, image_size: int, batch_size: int) -> list[dict]:
    """One epoch: noise around a colour pattern for each class, so that there is what to learn."""
    rng = np.random.default_rng(0)
    patterns = rng.uniform(50, 206, (_CLASSES, 4, 4, 3))
    index = np.arange(image_size) * 4 // image_size
    batches = []
    for _ in range(plan.steps_per_epoch):
        labels = rng.integers(0, _CLASSES, batch_size).astype(np.int32)
        images = patterns[labels][:, index][:, :, index]
        images = images + rng.normal(0, 30, images.shape)
        batches.append({"image": images.clip(0, 255).astype(np.uint8), "label": labels})
    return batches


def _make_undecided(teacher: torch.nn.Module, images: np.ndarray) -> None:
    """Gives a RegNetY logits of mean 0 and deviation 1 over uint8 images [B,H,W,3].

    Left alone, random weights decide for one class whatever the image.
    """
    with torch.no_grad():
        logits, head = teacher(torch_training.normalise(images)), teacher.head.fc
        head.bias.sub_(logits.mean(0)).div_(logits.std(0))
        head.weight.div_(logits.std(0)[:, None])


def _make_draw(config: ConfigDict, plan: RunPlan) -> object:
    """The draws that the train step makes at step `number`, from the same keys."""
    augment = make_augment(config, plan)
    size = (config.input.image_size,) * 2

    def draw(number: jax.Array, batch: dict) -> tuple:
        key, _ = step_keys(config.train.seed, number)
        _, _, mix = augment(key, batch)
        erase_key, _ = jax.random.split(key)  # as make_augment does
        prob = config.mixing.random_erasing
        erasing = mixing.draw_erasing(erase_key, len(batch["image"]), size, prob=prob)
        everywhere = erasing._replace(box=jax.numpy.array([[0, size[0], 0, size[1]]]))
        noise = mixing.apply_erasing(jax.numpy.zeros(batch["image"].shape), everywhere)
        return erasing.box, noise, *mix

    return draw


def _report(rows: list[Row], arguments: argparse.Namespace) -> Iterator[str]:
    versions = ", ".join(f"{package} {version(package)}" for package in _PACKAGES)
    yield "# Parity of training with PyTorch"
    yield ""
    yield "Our training step beside the reference's, restated with torch and timm: recipes of"
    yield "`configs/`, float32, equal weights at the start (every tensor large enough to matter),"
    yield "equal batches, and equal draws of random erasing, mixup and cutmix; stochastic depth is"
    yield f"off. {arguments.steps} steps, warm-up and cosine within them, of {arguments.batch_size}"
    yield f"images of {arguments.image_size} pixels; the teacher is `{arguments.teacher}`."
    yield ""
    yield "Differences are relative to PyTorch's value: of the loss at the first, the last and the"
    yield "worst step, and of the weights at the end; those of the weights and of their moving"
    yield "average are the L2 norm over all elements together, and `moved` is how far training took"
    yield "the weights from their start. `effective` leaves out the biases of keys: the softmax"
    yield "cancels them, so that their gradient is rounding noise, of which Adam makes full steps."
    yield f"Limits: {FIRST_LOSS:.0e} for the first loss, {LAST_LOSS:.0e} for the last,"
    yield f"{WEIGHTS:.0e} for weights and average, {EFFECTIVE:.0e} for effective weights, and 1e-9"
    yield "for the learning rate of every step."
    yield ""
    yield "`python tools/verify_training.py --write docs/training_parity.md`"
    yield ""
    machine = f"{os.cpu_count()} cores, {platform.machine()}"
    yield f"{datetime.date.today()}, {machine}, Python {platform.python_version()};"
    yield f"{versions}."
    yield ""
    yield (
        "| recipe | model | loss | at first | at last | at worst "
        "| moved | weights | effective | average |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    yield from map(str, rows)


def run(arguments: argparse.Namespace) -> int:
    """Compares the four recipes and prints a table row for each."""
    if arguments.steps < _EPOCHS or arguments.steps % _EPOCHS:
        raise InputError(f"--steps is {arguments.steps}, expected a multiple of {_EPOCHS}")
    for name in (arguments.deit, arguments.distilled, arguments.deit3, arguments.teacher):
        registry.model_options(name)
    if arguments.write:  # a place that cannot be written shows now, not after the runs
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        arguments.write.touch()
    jax.config.update("jax_default_matmul_precision", "float32")  # accelerators would take less
    rows = []
    for case, (_, student, _, _) in CASES.items():
        start = time.monotonic()
        rows.append(
            compare(
                case,
                getattr(arguments, student),
                arguments.teacher,
                num_steps=arguments.steps,
                image_size=arguments.image_size,
                batch_size=arguments.batch_size,
            )
        )
        print(f"{rows[-1]} {time.monotonic() - start:.0f} s", flush=True)
    if arguments.write:
        arguments.write.write_text("\n".join(_report(rows, arguments)) + "\n", encoding="utf-8")
    bad = [row.case for row in rows if not row.within_limits]
    print(f"beyond the limits: {', '.join(bad)}" if bad else f"all {len(rows)} within the limits")
    return 1 if bad else 0


def main(argv: list[str] | None = None) -> int:
    """Compares; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deit", default="deit_tiny_patch16_224")
    parser.add_argument("--distilled", default="deit_tiny_distilled_patch16_224")
    parser.add_argument("--deit3", default="deit3_tiny_patch16_224")
    parser.add_argument("--teacher", default="regnety_002")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--write", type=Path, help="Markdown file for the table")
    arguments = parser.parse_args(argv)
    return exit_status(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
