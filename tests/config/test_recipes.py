"""Every recipe: the published facts, start-up without data, and two real steps."""

import importlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import common
from deit_jax import trees
from deit_jax.checkpoints import model_folder
from deit_jax.config.files import load_config, packaged_recipes
from deit_jax.config.plan import plan_run
from deit_jax.errors import InputError
from deit_jax.models import registry
from deit_jax.models.network import Variables, split_model
from deit_jax.training import optim, summary
from deit_jax.training.setup import check, check_start
from deit_jax.training.state import new_state
from deit_jax.training.step import make_loss, make_train_step
from deit_jax.training.teacher import teacher_config
from tests.oracles import torch_training

RECIPES = sorted(packaged_recipes())
ALIASES = {"deit_b": "deit:b", "deit_b_distill": "deit_distill:b"}
OURS = {"digits", "digits_distill", "digits_teacher", "folder", "folder_teacher"}


def module(recipe: str) -> types.ModuleType:
    return importlib.import_module(f"configs.{recipe}")


def runs_of(recipe: str) -> list[str]:
    """The recipe with every argument that it takes; without one, if it takes none."""
    runs = getattr(module(recipe), "RUNS", None)
    return [f"{recipe}:{run}" for run in runs] if runs else [recipe]


ALL_RUNS = [run for recipe in RECIPES for run in runs_of(recipe)]


def test_the_batch_is_that_of_the_published_hardware():
    """The cards name the GPUs of the published runs: their images make the batch and groups."""
    hardware, checked = re.compile(r"(\d+) GPUs, (\d+) images each"), 0
    for run in ALL_RUNS:
        recipe, _, name = run.partition(":")
        card = module(recipe).__doc__
        row = re.search(rf"^\| (?:.*, )?{name}(?:,.*)? \|.*$", card, re.MULTILINE)
        common_to_all = hardware.search(card.partition("|")[0])
        if found := (row and hardware.search(row[0])) or common_to_all:
            config = load_config(run)
            gpus, images = map(int, found.groups())
            assert config.train.batch_size == gpus * images
            assert config.mixing.group_size == images
            checked += 1
    assert checked == 45


@pytest.mark.parametrize(
    ("run", "rate", "scaled"),
    [("deit:ti", 5e-4, 1e-3), ("deit_distill:b_1000", 5e-4, 1e-3), ("folder:plain", 5e-4, 2.5e-4),
     ("finetune_deit_384:b", 5e-6, 5e-6), ("finetune_transfer:inat19", 5e-5, 7.5e-5)],
)  # fmt: skip
def test_rates_follow_the_reference_which_scales_by_the_batch(run, rate, scaled):
    config = load_config(run)
    assert config.optimizer.lr == pytest.approx(scaled)
    assert config.optimizer.lr == pytest.approx(rate * config.train.batch_size / 512)


@pytest.mark.parametrize("run", ALL_RUNS)
def test_rates_are_those_of_the_reference_at_every_epoch(run):
    config = load_config(run)
    schedule = config.schedule
    rates = optim.learning_rate(
        np.arange(schedule.epochs) * 3,
        schedule,
        peak_lr=config.optimizer.lr,
        warmup_epochs=schedule.warmup_epochs,
        steps_per_epoch=3,
    )
    want = torch_training.rates(config.optimizer.lr, schedule)
    if not schedule.per_epoch:  # without the lag, which doubles the first value
        rates, want = rates[:-1], want[1:]
    # float32 alone is off by more than 1e-9 where the peak is 0.01.
    tolerance = max(1e-9, 2**-22 * config.optimizer.lr)
    np.testing.assert_allclose(rates, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_without_an_argument_is_one_of_the_runs_and_the_card_says_how(recipe):
    configs = [load_config(run) for run in runs_of(recipe)]
    assert load_config(recipe).to_json() in [config.to_json() for config in configs]
    if recipe in ALIASES:
        assert configs[0].to_json() == load_config(ALIASES[recipe]).to_json()
    card = " ".join(module(recipe).__doc__.split())
    assert f"deit-jax train --config={recipe}" in card
    assert ("--config.init_from=" in card) == any(config.init_from for config in configs)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A model folder that ImageNet's students may learn from."""
    network, like = split_model(registry.abstract_model("regnety_testing"))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    folder = tmp_path_factory.mktemp("teacher") / "model"
    model_folder.write_model(folder, zeros, network.info)
    return str(folder)


@pytest.fixture
def no_data(monkeypatch):
    """Splits as large as ImageNet's, of which nobody reads an example."""

    def open_source(dataset, split):
        return types.SimpleNamespace(
            description=dataset.name or dataset.source,
            num_examples={"train": 1_281_167, "eval": 50_000}[split],
            num_classes=10 if dataset.source == "digits" else 1000,
            class_names=(),
            notes=(),
        )

    monkeypatch.setattr("deit_jax.data.open_source", open_source)


@pytest.mark.slow
@pytest.mark.parametrize("run", ALL_RUNS)
def test_a_run_starts_and_says_what_it_will_do(run, teacher, no_data, tmp_path):
    """All of start-up but data and weights: validation, plan, shapes, optimiser, teacher."""
    config = load_config(run)
    if config.distill.kind != "none" and not config.distill.teacher_config:
        with pytest.raises(InputError, match=r"config\.distill\.teacher: no model folder"):
            check(config, str(tmp_path))
        config.distill.teacher = teacher
    if "finetune" in run:  # without weights to start from it stops
        missing = f"--config.init_from={common.PRETRAINED}: .*not a model folder"
        with pytest.raises(InputError, match=missing):
            check_start(check(config, str(tmp_path)), training=True)
        config.init_from = teacher
        if not config.model.name:  # as in init_from
            config.model.name, config.input.image_size = "deit_tiny_patch16_224", 224
    setup = check(config, str(tmp_path))
    info, size = setup.network.info, config.input.image_size
    assert (info.name, info.image_size) == (config.model.name, size)
    said = summary.describe_run(setup, "from scratch")
    for words in (
        f"{config.model.name}, ",
        f" {size}×{size}",
        f"{config.schedule.epochs} epochs",
        f"peak rate {config.optimizer.lr:g}",
        f"{config.train.batch_size} images",
        config.optimizer.name,
        config.input.auto_augment,
    ):
        assert words in said
    assert ("drop path" in said) == (config.model.drop_path_rate > 0)
    assert ("clipped at 1" in said) == (config.optimizer.clip_norm == 1)
    assert ("views of each" in said) == (config.input.repeats > 1)
    assert "warning" not in said


def test_a_teacher_is_trained_as_its_student():
    """On the images that it will see; saved as often, for the same spot machines."""
    config = load_config("digits_distill")
    config.input.image_size, config.input.mean = 64, (0.1, 0.2, 0.3)
    config.checkpoint.every_steps, config.train.seed = 7, 5
    own, teacher = load_config("digits_teacher"), teacher_config(config)
    assert (teacher.input.image_size, teacher.input.mean) == (64, (0.1, 0.2, 0.3))
    assert (teacher.checkpoint.every_steps, teacher.train.seed) == (7, 5)
    assert teacher.model.name == own.model.name
    assert teacher.schedule.epochs == own.schedule.epochs


def smallest_relative(name: str) -> str:
    """The testing model of the same family."""
    if registry.is_distilled(name):
        return "deit_testing_distilled"
    family = name.partition("_")[0]
    return {"vit": "vit_testing_rope_mixed_ape"}.get(family, f"{family}_testing")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - set(ALIASES) - OURS))
def test_two_steps_with_a_small_model(recipe):
    """Loss, gradients and update of the recipe itself: finite, and no parameter stays.

    The other recipes train on their data in test_loop.py, test_resume.py and test_finetune.py.
    """
    config = load_config(recipe)
    config.train.batch_size, config.mixing.group_size = 8, 4
    plan = plan_run(config, num_train=8, num_eval=8, num_classes=5, class_names=(), num_devices=1)

    def small(name, **options):
        options |= {"num_classes": 5, "image_size": 16, "rngs": nnx.Rngs(0)}
        return split_model(registry.create_model(name, **options))

    name, options = smallest_relative(config.model.name), {"depth": 2}
    if name == "cait_testing":  # the published 1e-5 hides steps of so small rates behind rounding
        options["layer_scale_init"] = 0.1
    network, variables = small(name, drop_path_rate=config.model.drop_path_rate, **options)
    distilled = config.distill.kind != "none"
    teacher, teacher_variables = small("regnety_testing", depth=4) if distilled else (None, None)
    optimizer = optim.make_optimizer(variables.params, config.optimizer)
    step = jax.jit(make_train_step(config, plan, network, optimizer, teacher=teacher))
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (8, 16, 16, 3), np.uint8),
        "label": rng.integers(0, 5, 8).astype(np.int32),
    }
    state = new_state(variables, optimizer, ema=config.train.ema_decay > 0)
    state = state.replace(step=jnp.int32(8))  # an epoch is a step here: behind the warm-up
    for _ in range(2):
        state, metrics = step(state, teacher_variables, batch)
        assert np.isfinite(float(metrics["loss"]))
        assert float(metrics["grad_norm"]) > 0
    before, after = trees.flat(variables.params), trees.flat(state.model.params)
    assert [name for name in before if np.array_equal(before[name], after[name])] == []


LABELS_ALONE = [("cross_entropy", False), ("bce", False), ("bce", True)]


def losses_of_recipes():
    """What decides which parameters a loss reaches, of all recipes and of what a user may add."""
    found = {("deit_testing_distilled", "none", loss, cosub) for loss, cosub in LABELS_ALONE}
    for run in ALL_RUNS:
        config = load_config(run)
        name = smallest_relative(config.model.name or "deit_testing")
        found.add((name, config.distill.kind, config.train.loss, config.train.cosub))
        assert config.optimizer.trainable == ""  # the only field that freezes anything
    return sorted(found)


@pytest.mark.slow
@pytest.mark.parametrize("case", losses_of_recipes(), ids=lambda case: "-".join(map(str, case)))
def test_no_parameter_is_without_gradient(case):
    """Weight decay would move it all the same, as torch does not."""
    name, kind, base, cosub = case
    config = load_config("digits_distill")
    config.distill.kind, config.train.loss, config.train.cosub = kind, base, cosub
    rng = np.random.default_rng(0)

    def drawn(name):  # a new RegNetY has zeros that hide whole branches
        options = {"num_classes": 5, "image_size": 32, "depth": 6 if "regnet" in name else 2}
        network, like = split_model(registry.abstract_model(name, **options))
        scale = lambda shape: max(np.prod(shape[:-1]), 4) ** -0.5  # noqa: E731
        normal = lambda x: np.float32(rng.normal(size=x.shape) * scale(x.shape))  # noqa: E731
        positive = lambda x: np.abs(normal(x))  # noqa: E731
        stats = jax.tree.map(positive, like.batch_stats)
        return network, Variables(jax.tree.map(normal, like.params), stats)

    network, variables = drawn(name)
    teacher, teacher_variables = drawn("regnety_testing") if kind != "none" else (None, None)
    images = rng.normal(size=(4, 32, 32, 3)).astype(np.float32)
    loss = make_loss(config, network, teacher)

    @jax.jit
    def gradient(params):
        inputs = (variables.batch_stats, images, np.eye(5, dtype=np.float32)[:4])
        return jax.grad(
            lambda params: loss(teacher_variables, params, *inputs, jax.random.key(0))[0]
        )(params)

    grads = trees.flat(gradient(variables.params))
    assert [name for name, grad in grads.items() if not np.any(grad)] == []
