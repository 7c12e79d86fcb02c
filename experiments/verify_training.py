"""Compares our training with the reference's, restated in PyTorch, step by step, in float32.

python -m experiments.verify_training --write docs/training_parity.md
python -m experiments.verify_training --image_size 224 --deit3 deit3_base_patch16_224

Seven recipes of configs/ on made-up images of 10 classes: DeiT, distilled hard and soft, DeiT III,
RoPE-ViT, ViT-5, and CaiT, whose one head is distilled. Both sides start from the weights of one
PyTorch module, every tensor large enough to matter, and get equal batches and equal draws of
erasing, mixup and cutmix; stochastic depth is off. The rates are such that the weights move:
warm-up and cosine within the few steps. The modules are timm's; ViT-5's, which timm lacks, is the
one of tests/oracles. Needs the extra `test` (torch, timm). Exits with 1 if a difference exceeds its
limit.
"""

import shlex
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import torch
from ml_collections import ConfigDict

from deit_jax import trees
from deit_jax.cli.arguments import Parser, new_file, one_or_more
from deit_jax.cli.status import exit_status
from deit_jax.config.files import load_config
from deit_jax.config.plan import RunPlan, plan_run
from deit_jax.config.validate import validate
from deit_jax.convert import mapping, to_torch
from deit_jax.errors import InputError
from deit_jax.models import registry
from deit_jax.models.network import Variables, split_model
from deit_jax.training import mixing, optim
from deit_jax.training.state import new_state, step_keys
from deit_jax.training.step import make_augment, make_train_step
from experiments.verify_parity import finish
from tests.oracles import timm_models, torch_training

_CLASSES, _EPOCHS = 10, 10
# Limits of relative differences: of the first and the last loss, and of all weights as one vector,
# as they are, without the biases of keys (on which no output depends), and of their EMA. And of the
# learning rate of every step, an absolute one.
LIMITS = {
    "first": 1e-5, "last": 1e-3, "weights": 1e-3, "effective": 1e-4, "ema": 1e-3, "rate": 1e-9,
}  # fmt: skip
_COLUMNS = (
    "recipe", "model", "loss", "at first", "at last", "at worst", "moved", "weights", "effective",
    "EMA",
)  # fmt: skip


class Case(NamedTuple):
    """A recipe, which model of the command line it trains, its teacher's part and its peak rate."""

    recipe: str
    student: str
    distill: str
    peak: float


CASES = {
    "DeiT": Case("deit:ti", "deit", "none", 1e-3),
    "DeiT, hard distillation": Case("deit_distill:ti", "distilled", "hard", 1e-3),
    "DeiT, soft distillation": Case("deit_distill:ti", "distilled", "soft", 1e-3),
    "DeiT III": Case("deit3:ti", "deit3", "none", 4e-3),
    "RoPE-ViT": Case("rope_vit:s", "rope", "none", 4e-3),
    "ViT-5": Case("vit5:s", "vit5", "none", 4e-3),
    "CaiT, hard distillation": Case("cait_distill:xxs24", "cait", "hard", 1e-3),
}


class Row(NamedTuple):
    """A comparison: the differences by the names of LIMITS, and what they are relative to."""

    name: str
    model: str
    losses: np.ndarray  # PyTorch's, one a step
    worst: float  # relative difference of a loss
    moved: float  # how far the weights went from their start
    errors: dict[str, float]

    @property
    def within_limits(self) -> bool:
        """Whether the run is the reference's; a NaN is not."""
        return all(self.errors[name] <= limit for name, limit in LIMITS.items())

    def cells(self) -> list[str]:
        """Returns the text of the row."""
        error = {name: f"{value:.1e}" for name, value in self.errors.items()}
        return [
            self.name, self.model, f"{self.losses[0]:.4f} → {self.losses[-1]:.4f}", error["first"],
            error["last"], f"{self.worst:.1e}", f"{self.moved:.2f}", error["weights"],
            error["effective"], error["ema"],
        ]  # fmt: skip


def recipe(case: str, *, image_size: int, batch_size: int) -> ConfigDict:
    """Returns a case's recipe, squeezed into 10 epochs, without stochastic depth."""
    chosen = CASES[case]
    config = load_config(chosen.recipe)
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
    plan = plan_run(config, num_train=num_train, num_classes=_CLASSES, num_devices=1)
    student = Twins(name, image_size, seed=0, **options)
    batches = _batches(plan, image_size, batch_size)
    teachers = None
    if config.distill.kind != "none":
        teachers = Twins(teacher, image_size, seed=1)
        _make_undecided(teachers.module, np.concatenate([batch["image"] for batch in batches]))
    counts = {"num_classes": _CLASSES, "steps_per_epoch": plan.steps_per_epoch}
    reference = torch_training.Training(
        student.module, config, teacher=teachers and teachers.module, **counts
    )
    start = student.variables()
    optimizer = optim.make_optimizer(start.params, config.optimizer)
    network = teachers and teachers.network
    step = make_train_step(config, plan, student.network, optimizer, teacher=network)
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
    loss_errors /= losses
    end = student.variables().params
    errors = {
        "first": loss_errors[0],
        "last": loss_errors[-1],
        "weights": distance(state.model.params, end),
        "effective": distance(_effective(state.model.params), _effective(end)),
        "ema": distance(state.ema.params, student.variables(reference.ema.module).params),
        "rate": rate_errors.max(),
    }
    return Row(case, name, losses, loss_errors.max(), distance(start.params, end), errors)


def _effective(params: dict) -> dict:
    """The parameters without the biases of keys, and those of talking heads before the softmax.

    Such a bias adds one number to all of a query's logits, which the softmax takes out again. Its
    gradient is rounding noise, and Adam makes full steps of that.
    """

    def keep(path: tuple, leaf: np.ndarray) -> np.ndarray:
        name = jax.tree_util.keystr(path[-2:], simple=True, separator="/")
        if name in ("k/bias", "proj_l/bias"):
            return leaf * 0
        if name != "qkv/bias":
            return leaf
        return np.delete(leaf, np.s_[len(leaf) // 3 : 2 * len(leaf) // 3])

    return jax.tree_util.tree_map_with_path(keep, params)


class Twins:
    """A registered model as timm's module, every tensor large enough to matter, and as ours."""

    def __init__(self, name: str, image_size: int, *, seed: int, **options: object):
        self.name = name
        options |= {"num_classes": _CLASSES, "image_size": image_size}
        self.network, self._like = split_model(registry.abstract_model(name, **options))
        self.module = timm_models.randomise(timm_models.fresh(name, **options), seed)

    def variables(self, module: torch.nn.Module | None = None) -> Variables:
        """Returns the module's weights, or a copy's of it, as they are now, by the converter."""
        module = module or self.module
        constants = {key for key, _ in module.named_buffers() if key.endswith("freqs")}
        tensors = {
            key: tensor.detach().numpy().copy()
            for key, tensor in module.state_dict().items()
            if key not in constants
        }
        form = "fb" if "vit5" in self.name else "timm"  # which has no ViT-5
        layout = to_torch.layout(self.network.info, form)
        return mapping.to_variables(tensors, self._like, layout, what=self.name)[0]


def distance(tree: dict, other: dict) -> float:
    """Returns ‖tree - other‖ / ‖other‖ over all elements, in float64."""
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


def _make_draw(config: ConfigDict, plan: RunPlan) -> Callable[[int, dict], tuple]:
    """Builds what repeats the draws of the train step at step `number`, from the same keys."""
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


def _run(argv: list[str]) -> int:
    parser = Parser(__doc__)
    add, number = parser.add_argument, {"type": one_or_more, "metavar": "N"}
    add("--deit", default="deit_tiny_patch16_224")
    add("--distilled", default="deit_tiny_distilled_patch16_224")
    add("--deit3", default="deit3_tiny_patch16_224")
    add("--rope", default="vit_small_patch16_rope_mixed_224")
    add("--vit5", default="vit5_small_patch16_224")
    add("--cait", default="cait_xxs24_224")
    add("--teacher", default="regnety_002")
    add("--steps", dest="num_steps", **number, default=50)
    add("--image_size", **number, default=64)
    add("--batch_size", **number, default=16)
    add("--write", type=new_file, metavar="FILE", help="also put the table into this file")
    arguments = parser.parse_args(argv)
    if arguments.num_steps % _EPOCHS:
        raise InputError(f"--steps is {arguments.num_steps}, expected a multiple of {_EPOCHS}")
    for student in ("deit", "distilled", "deit3", "rope", "vit5", "cait", "teacher"):
        registry.model_options(getattr(arguments, student))
    sizes = {name: getattr(arguments, name) for name in ("num_steps", "image_size", "batch_size")}
    rows = []
    for case, (_, student, _, _) in CASES.items():
        start = time.monotonic()
        row = compare(case, getattr(arguments, student), arguments.teacher, **sizes)
        print(*row.cells(), f"{time.monotonic() - start:.0f} s", flush=True)
        rows.append(row)
    command = f"python -m experiments.verify_training {shlex.join(argv)}"
    steps, size, batch = sizes.values()
    what = f"{steps} steps of {batch} images of {size} pixels; teacher `{arguments.teacher}`."
    return finish(rows, _COLUMNS, command, arguments.write, what, "")


def main(argv: list[str] | None = None) -> int:
    """Compares, prints a row for each recipe, and returns the exit status."""
    return exit_status(lambda: _run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
