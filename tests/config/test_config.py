"""Validation of configs, and the numbers derived from them."""

import numpy as np
import pytest

from deit_jax.config.fields import default_config
from deit_jax.config.files import load_config
from deit_jax.config.plan import check_batch, plan_run
from deit_jax.config.structure import FIELDS
from deit_jax.config.validate import CHOICES, RANGES, validate
from deit_jax.errors import InputError
from deit_jax.training import losses, optim
from tests.refusal import refusal

IMAGENET = 1_281_167


def _config(**changes):
    """The defaults with changes such as train__batch_size=8, of any type."""
    config = default_config()
    with config.ignore_type():
        config.update_from_flattened_dict({n.replace("__", "."): v for n, v in changes.items()})
    return config


def _plan(config, *, num_train=IMAGENET, num_devices=1):
    numbers = {"num_eval": 50_000, "num_classes": 1000, "class_names": ()}
    return plan_run(config, num_train=num_train, num_devices=num_devices, **numbers)


def test_every_field_is_checked_for_its_type_and_most_for_their_range():
    """A new field has to say what it may hold: nothing is parsed and then believed."""
    ranged = {*CHOICES, *(name for _, names in RANGES.values() for name in names.split())}
    assert ranged <= set(FIELDS)
    booleans = {name for name, default in FIELDS.items() if isinstance(default, bool)}
    by_hand = {name for name in FIELDS if name.startswith("dataset.")} | {
        "input.mean", "input.auto_augment", "distill.teacher", "distill.teacher_config",
        "optimizer.trainable", "train.expected_top1", "checkpoint.accept_changes",
        "init_from", "model.name", "model.options", "distributed.coordinator_address",
            "train.wandb",
    }  # fmt: skip
    assert set(FIELDS) <= ranged | booleans | by_hand
    assert CHOICES["optimizer.name"] == optim.OPTIMIZERS
    assert CHOICES["train.loss"] == tuple(losses.BASE_LOSSES)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("input.scale", (0.08,), "must be 2 numbers"),
        ("input.mean", (0.5, 0.5, "x"), "must be 3 numbers"),
        ("input.ratio", (2.0, 1.0), "low <= high"),
        ("train.batch_size", 8.0, "must be int"),
        ("train.batch_size", True, "must be int"),
        ("model.name", 3, "must be str"),
        ("model.name", "", "or config.init_from a model folder"),
        ("model", "deit_testing", "must be a group of fields"),
        ("train.learning_rate", 1.0, "did you mean config.optimizer.lr?"),
        ("input.image_size", 0, "or config.init_from a model folder"),
        ("input.auto_augment", "rand-m9-x3", "rand-m9-mstd0.5-inc1"),
        ("input.three_augment", True, "or input.auto_augment ''"),
        ("input.std", (0.0, 0.2, 0.2), "greater than 0"),
        ("mixing.prob", 1.5, "between 0 and 1"),
        ("optimizer.lr", -1.0, "0 or more"),
        ("optimizer.lr", float("nan"), "must be finite"),
        ("optimizer.lr", float("inf"), "must be finite"),
        ("input.scale", (0.1, float("inf")), "must be finite"),
        ("input.mean", (123.7, 116.3, 103.5), "from 0 to 1"),
        ("input.std", (58.4, 57.1, 57.4), "at most 1"),
        ("train.seed", 2**40, "below 2^32"),
        ("schedule.epochs", 10**9, "at most 1000000"),
        ("distributed.start_timeout", 10**9, "at most 1000000"),
        ("input.read_threads", 10**6, "at most 4096"),
        ("mixing.group_size", 2**31, "below 2^31"),
        ("checkpoint.every_steps", 10**26, "below 2^31"),
        ("input.image_size", 10**6, "at most 16384"),
        ("checkpoint.accept_changes", "lr", "names of train.batch_size"),
        ("optimizer.b1", 1.0, "in [0, 1)"),
        ("optimizer.name", "adam", "one of adamw, lamb, sgd"),
        ("optimizer.trainable", "head/.* (", "regular expressions ('(': "),
        ("distill.temperature", 0.0, "greater than 0"),
        ("distill.teacher", "some/folder", "distill.kind is 'none'"),
        ("distill.class_head", True, "where distill.kind is 'none'"),
        ("dataset.train_fraction", 0.0, "in (0, 1]"),
        ("train.loss", "bce", "mixing.smoothing is 0.1, but must be 0"),
        ("train.expected_top1", 81.8, "must be tuple"),
        ("train.expected_top1", (5, 2.0), "pairs (epoch, top-1 in percent)"),
        ("train.expected_top1", ((5, 2.0), (5, 3.0)), "epochs rising"),
        ("train.expected_top1", ((0, 2.0),), "epochs rising"),
        ("train.expected_top1", ((5, 102.0),), "in percent"),
        ("train.accumulate_steps", 0, "at least 1"),
        ("distributed.process_id", 1, "less than distributed.num_processes"),
        ("distributed.coordinator_address", "host:x", "HOST:PORT"),
    ],
)
def test_one_wrong_field_is_one_line_that_names_it(field, value, words):
    validate(default_config())
    message = refusal(validate, _config(**{field: value}))
    assert message.startswith("no field config." if "mean" in words else "config.")
    assert field in message
    assert words in message


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"train__cosub": True, "distill__kind": "hard"}, "train.cosub"),
        ({"distill__kind": "hard", "distill__alpha": 0.0}, "distill.alpha"),
        ({"distill__kind": "soft", "distill__alpha": 1.0}, "distill.alpha"),
        ({"train__cosub": True, "model__drop_path_rate": 0.0}, "train.cosub"),
        ({"parallel__backend": "pmap", "parallel__fsdp": 2}, "parallel.fsdp"),
        ({"dataset__label_file": "labels.csv", "dataset__source": "hf"}, "dataset.label_file"),
        ({"model": {"name": "deit_testing"}}, "model."),
        ({"distributed__num_processes": 2}, "distributed.coordinator_address"),
    ],
)
def test_fields_that_do_not_go_together(changes, field):
    assert refusal(validate, _config(**changes)).startswith(f"config.{field}")


def test_combinations_that_are_allowed():
    validate(_config(train__cosub=True))
    validate(_config(train__loss="bce", mixing__smoothing=0.0))
    validate(_config(input__three_augment=True, input__auto_augment=""))
    validate(_config(optimizer__lr=1, input__scale=(1, 1)))  # whole numbers do for float fields
    config = default_config()
    del config.mixing
    assert "is missing; start recipes from default_config()" in refusal(validate, config)


def test_plan_of_the_published_deit_b_run():
    """The reference's sampler and schedule, as measured on its code (1,281,167 images)."""
    plan = _plan(load_config("deit_b_distill"), num_devices=16)
    assert plan.steps_per_epoch == plan.eval_every == 1251
    assert plan.images_per_epoch == 1_281_024
    assert plan.distinct_images_per_epoch == 427_008
    assert (plan.total_steps, plan.warmup_steps) == (375_300, 5 * 1251)
    assert (plan.group_size, plan.save_every) == (64, (1251, 0))


@pytest.mark.parametrize(
    ("batch", "repeats", "images", "steps"),
    [
        (2048, 1, IMAGENET, 625), (2048, 3, IMAGENET, 625), (1024, 1, IMAGENET, 1251),
        (50, 3, 300, 5),  # as the reference: 256 // 50, not 300 // 50
        (50, 3, 255, 5),  # too small to round down
        (50, 1, 300, 6),
    ],
)  # fmt: skip
def test_repeats_round_the_epoch_down_to_256_images(batch, repeats, images, steps):
    plan = _plan(_config(train__batch_size=batch, input__repeats=repeats), num_train=images)
    assert plan.steps_per_epoch == steps
    assert plan.distinct_images_per_epoch == -(-steps * batch // repeats)


def test_a_split_smaller_than_the_batch_is_refused():
    with pytest.raises(InputError, match=r"config.train.batch_size is 1024.* only 100 images"):
        _plan(default_config(), num_train=100)


@pytest.mark.parametrize(
    ("batch", "devices", "wanted", "found"),
    [(1024, 16, 64, 64), (1024, 32, 64, 32), (96, 1, 64, 48), (1024, 4, 300, 256), (28, 2, 8, 2)],
)
def test_group_size_shrinks_to_a_divisor_of_the_batch_of_one_device(batch, devices, wanted, found):
    config = _config(train__batch_size=batch, mixing__group_size=wanted)
    assert _plan(config, num_devices=devices).group_size == found


@pytest.mark.parametrize(("batch", "devices"), [(33, 1), (8, 8), (24, 8)])
def test_images_of_a_device_must_pair_up_for_mixing(batch, devices):
    """A group of one would switch mixing off in silence, an odd one leave its middle unmixed."""
    config = _config(train__batch_size=batch)
    with pytest.raises(InputError, match=r"config\.mixing\.group_size is 64.* even"):
        _plan(config, num_train=100, num_devices=devices)
    config.mixing.prob = 0.0
    assert _plan(config, num_train=100, num_devices=devices).group_size == batch // devices


@pytest.mark.parametrize(
    ("batch", "accumulate", "fsdp", "words"),
    [
        (60, 1, 1, r"train.batch_size is 60.* 8 devices.* try 56 or 64$"),
        (6, 1, 1, r"train.batch_size is 6.* try 8$"),
        (64, 3, 1, r"train.accumulate_steps is 3.* a divisor of the 8 images"),
        (64, 1, 3, r"parallel.fsdp is 3.* \(8\)"),
    ],
)
def test_the_batch_divides_over_the_devices(batch, accumulate, fsdp, words):
    config = _config(train__batch_size=batch, train__accumulate_steps=accumulate)
    config.parallel.fsdp = fsdp
    with pytest.raises(InputError, match=words):
        check_batch(config, num_devices=8, num_processes=2)


@pytest.mark.parametrize(
    ("epochs", "warmup", "decay", "words"),
    [
        (300, 5, 0.99996, []),  # the published run
        (10, 5, 0.0, []),
        (3, 5, 0.0, ["warm-up takes 1 of 3 epochs", "config.schedule.warmup_epochs 5"]),
        (1, 5, 0.0, ["warm-up takes 0 of 1 epochs"]),
        (10, 5, 0.99, []),  # 100 steps of 125,000
        (10, 5, 0.99996, ["averages over 25,000 steps", "has 12,510", "ema_decay=0.9992"]),
    ],
)
def test_fields_that_do_not_suit_a_short_run_get_a_line(epochs, warmup, decay, words):
    config = _config(schedule__epochs=epochs, schedule__warmup_epochs=warmup)
    config.train.ema_decay = decay
    plan = _plan(config)
    assert plan.warmup_epochs == min(warmup, epochs // 2)
    assert plan.warmup_steps == plan.warmup_epochs * 1251
    assert len(plan.warnings) == bool(words)
    assert all(word in plan.warnings[0] for word in words)


@pytest.mark.parametrize(("epochs", "per_epoch"), [(1, True), (2, True), (3, True), (2, False)])
def test_a_rate_that_never_rises_gets_a_line(epochs, per_epoch):
    config = _config(schedule__epochs=epochs, schedule__warmup_epochs=5)
    config.schedule.per_epoch = per_epoch
    plan = _plan(config)
    steps = np.arange(plan.total_steps)
    arguments = {"peak_lr": 1e-3, "warmup_epochs": plan.warmup_epochs}
    rates = optim.learning_rate(
        steps, config.schedule, steps_per_epoch=plan.steps_per_epoch, **arguments
    )
    told = any("it stays at warmup_lr 1e-06 in all 2 epochs" in line for line in plan.warnings)
    assert told == (np.max(rates) < 1e-5)


@pytest.mark.parametrize(
    ("group_size", "prob", "warned"),
    [(64, 1.0, False), (128, 1.0, False), (200, 1.0, True), (200, 0.0, False)],
)
def test_groups_much_smaller_than_the_recipe_get_a_line(group_size, prob, warned):
    config = _config(mixing__group_size=group_size, train__batch_size=64, mixing__prob=prob)
    plan = _plan(config)
    assert plan.group_size == 64
    assert any("config.mixing.group_size 200" in line for line in plan.warnings) == warned
