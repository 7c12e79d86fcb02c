"""Validation of configs, and the numbers derived from them."""

import pytest

from deit_jax.config.fields import default_config
from deit_jax.config.files import load_config
from deit_jax.config.plan import check_batch, plan_run
from deit_jax.config.structure import FIELDS
from deit_jax.config.validate import CHOICES, RANGES, validate
from deit_jax.errors import InputError
from deit_jax.training import losses, optim

IMAGENET = 1_281_167


def _plan(config, *, num_train=IMAGENET, num_devices=1):
    return plan_run(
        config,
        num_train=num_train,
        num_eval=50_000,
        num_classes=1000,
        class_names=(),
        num_devices=num_devices,
    )


def _set(config, field, value):
    group, _, name = field.partition(".")
    config[group][name] = value
    return config


def _error(config):
    with pytest.raises(InputError) as caught:
        validate(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_are_valid():
    validate(default_config())


def test_every_field_is_checked_for_its_type_and_most_for_their_range():
    """A new field has to say what it may hold: nothing is parsed and then believed."""
    free_text = {"init_from", "model.name", "distributed.coordinator_address"}
    ranged = {*CHOICES, *(name for _, names in RANGES.values() for name in names.split())}
    assert ranged <= set(FIELDS)
    by_hand = {
        "input.mean", "input.auto_augment", "distill.teacher", "distill.teacher_config",
        "optimizer.trainable", "train.expected_top1",
    }  # fmt: skip
    unchecked = {
        name
        for name in set(FIELDS) - ranged - by_hand - free_text
        if not isinstance(FIELDS[name], bool) and not name.startswith("dataset.")
    }
    assert unchecked == set()


@pytest.mark.parametrize("policy", ["rand-m9-x3", "augmix-m3", "rand-m", " "])
def test_policies_that_are_none_are_refused(policy):
    config = _set(default_config(), "input.auto_augment", policy)
    message = _error(config)
    assert message.startswith(f"config.input.auto_augment: policy {policy!r} ")
    assert "rand-m9-mstd0.5-inc1" in message


def test_three_augment_takes_the_place_of_a_policy():
    config = _set(default_config(), "input.three_augment", True)
    message = _error(config)
    config.input.auto_augment = ""
    validate(config)
    assert message.startswith("config.input.three_augment is True, but config.input.auto_augment")


def test_plan_of_the_published_deit_b_run():
    """The reference's sampler and schedule, as measured on its code (1,281,167 images)."""
    plan = _plan(load_config("deit_b_distill"), num_devices=16)
    assert plan.steps_per_epoch == 1251
    assert plan.images_per_epoch == 1_281_024
    assert plan.distinct_images_per_epoch == 427_008
    assert plan.total_steps == 375_300
    assert plan.warmup_steps == 5 * 1251
    assert plan.group_size == 64
    assert plan.eval_every == 1251
    assert plan.save_every == (1251, 0)


def test_plan_of_larger_batches_and_without_repeats():
    config = default_config()
    config.train.batch_size = 2048
    for repeats in (1, 3):
        config.input.repeats = repeats
        assert _plan(config).steps_per_epoch == 625
    config.train.batch_size, config.input.repeats = 1024, 1
    plan = _plan(config)
    assert (plan.steps_per_epoch, plan.distinct_images_per_epoch) == (1251, 1251 * 1024)


def test_repeats_round_the_epoch_down_to_256_images_as_the_reference():
    config = default_config()
    config.train.batch_size, config.input.repeats = 50, 3
    assert _plan(config, num_train=300).steps_per_epoch == 5  # 256 // 50, not 300 // 50
    assert _plan(config, num_train=255).steps_per_epoch == 5  # too small to round down
    config.input.repeats = 1
    assert _plan(config, num_train=300).steps_per_epoch == 6


def test_a_split_smaller_than_the_batch_is_refused():
    with pytest.raises(InputError, match=r"config.train.batch_size is 1024.* only 100 images"):
        _plan(default_config(), num_train=100)


@pytest.mark.parametrize(
    ("batch", "devices", "wanted", "found"),
    [(1024, 16, 64, 64), (1024, 32, 64, 32), (96, 1, 64, 48), (1024, 4, 300, 256), (28, 2, 8, 2)],
)
def test_group_size_shrinks_to_a_divisor_of_the_batch_of_one_device(batch, devices, wanted, found):
    config = default_config()
    config.train.batch_size, config.mixing.group_size = batch, wanted
    assert _plan(config, num_devices=devices).group_size == found


def test_check_batch_names_the_nearest_batches():
    config = default_config()
    check_batch(config, num_devices=8, num_processes=2)
    config.train.batch_size = 60
    with pytest.raises(InputError, match=r"train.batch_size is 60.* 8 devices.* try 56 or 64$"):
        check_batch(config, num_devices=8, num_processes=2)
    config.train.batch_size = 6
    with pytest.raises(InputError, match=r"config.train.batch_size is 6.* try 8$"):
        check_batch(config, num_devices=8, num_processes=2)
    config.train.batch_size, config.train.accumulate_steps = 64, 4
    check_batch(config, num_devices=8, num_processes=2)
    config.train.accumulate_steps = 3
    with pytest.raises(
        InputError, match=r"config.train.accumulate_steps is 3.* a divisor of the 8 images"
    ):
        check_batch(config, num_devices=8, num_processes=2)
    config.train.batch_size, config.parallel.fsdp = 64, 3
    with pytest.raises(InputError, match=r"config.parallel.fsdp is 3.* \(8\)"):
        check_batch(config, num_devices=8, num_processes=2)


def test_structure_that_is_not_that_of_the_defaults():
    """What ml_collections lets through in Python."""
    config = default_config()
    config.model = {"name": "deit_testing"}
    message = _error(config)
    assert message.startswith("config.model.")
    assert "is missing; start recipes from default_config()" in message
    config = default_config()
    with config.ignore_type():
        config.model = "deit_testing"
    assert "config.model is 'deit_testing', but must be a group of fields" in _error(config)
    config = default_config()
    config.train.learning_rate = 1.0
    assert "no field config.train.learning_rate; did you mean config.opt" in _error(config)
    config = default_config()
    del config.mixing
    assert _error(config).startswith("config.mixing.")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("input.scale", (0.08,), "must be 2 numbers"),
        ("input.mean", (0.5, 0.5, "x"), "must be 3 numbers"),
        ("input.ratio", (2.0, 1.0), "low <= high"),
        ("train.batch_size", 8.0, "must be int"),
        ("train.batch_size", True, "must be int"),
        ("optimizer.lr", "fast", "must be float"),
        ("train.tensorboard", 1, "must be bool"),
        ("model.name", 3, "must be str"),
        ("distill.kind", "warm", "one of none, hard, soft"),
        ("input.train_crop", "resize", "one of random_resized, simple_random, small"),
        ("input.on_bad_image", "ignore", "one of error, skip"),
        ("input.color_jitter", -0.3, "0 or more"),
        ("mixing.prob", 1.5, "between 0 and 1"),
        ("optimizer.lr", -1.0, "0 or more"),
        ("optimizer.lr", float("nan"), "0 or more"),
        ("distill.temperature", 0.0, "greater than 0"),
        ("dataset.train_fraction", 0.0, "in (0, 1]"),
        ("train.expected_top1", 81.8, "must be tuple"),
        ("train.expected_top1", (5, 2.0), "pairs (epoch, top-1 in percent)"),
        ("train.expected_top1", ((5, 2.0), (5, 3.0)), "epochs rising"),
        ("train.expected_top1", ((0, 2.0),), "epochs rising"),
        ("train.expected_top1", ((5, 102.0),), "in percent"),
        ("parallel.fsdp", 0, "at least 1"),
        ("parallel.backend", "shmap", "one of jit, pmap"),
        ("train.accumulate_steps", 0, "at least 1"),
        ("model.name", "", "or config.init_from a model folder"),
        ("input.image_size", 0, "or config.init_from a model folder"),
        ("distributed.process_id", 1, "less than distributed.num_processes"),
        ("distributed.coordinator_address", "host:x", "HOST:PORT"),
        ("distributed.start_timeout", 0, "at least 1"),
        ("distill.teacher", "some/folder", "distill.kind is 'none'"),
        ("input.std", (0.0, 0.2, 0.2), "greater than 0"),
        ("optimizer.b1", 1.0, "in [0, 1)"),
        ("optimizer.b2", 1.0, "in [0, 1)"),
        ("optimizer.momentum", 1.0, "in [0, 1)"),
        ("optimizer.name", "adam", "one of adamw, lamb, sgd"),
        ("optimizer.trainable", "head/.* (", "regular expressions ('(': "),
        ("train.loss", "softmax", "one of cross_entropy, bce"),
    ],
)
def test_one_wrong_field_is_one_line_that_names_it(field, value, words):
    config = default_config()
    if field == "distributed.coordinator_address":
        config.distributed.num_processes = 2
    with config.ignore_type():
        _set(config, field, value)
    message = _error(config)
    assert f"config.{field}" in message
    assert words in message


@pytest.mark.parametrize(("batch", "devices"), [(33, 1), (8, 8), (24, 8)])
def test_images_of_a_device_must_pair_up_for_mixing(batch, devices):
    """A group of one would switch mixing off in silence, an odd one leave its middle unmixed."""
    config = default_config()
    config.train.batch_size = batch
    numbers = {"num_train": 100, "num_eval": 1, "num_classes": 2, "class_names": ()}
    with pytest.raises(InputError, match=r"config\.mixing\.group_size is 64.* even"):
        plan_run(config, **numbers, num_devices=devices)
    config.mixing.prob = 0.0
    assert plan_run(config, **numbers, num_devices=devices).group_size == batch // devices


def test_smoothing_and_the_loss_that_counts_every_target_above_zero():
    config = _set(default_config(), "train.loss", "bce")
    assert _error(config).startswith("config.mixing.smoothing is 0.1, but must be 0 where")
    config.mixing.smoothing = 0.0
    validate(config)


def test_cosub_needs_two_submodels_and_no_teacher():
    config = _set(default_config(), "train.cosub", True)
    validate(config)
    config.distill.kind = "hard"
    assert "config.train.cosub is True, but must be False where distill.kind" in _error(config)
    config.distill.kind, config.model.drop_path_rate = "none", 0.0
    assert "config.train.cosub is True, but must be False where model.drop" in _error(config)


def test_choices_are_what_the_code_can_do():
    assert CHOICES["optimizer.name"] == optim.OPTIMIZERS
    assert CHOICES["train.loss"] == tuple(losses.BASE_LOSSES)


def test_whole_numbers_do_for_float_fields():
    config = default_config()
    with config.ignore_type():
        config.optimizer.lr = 1
        config.input.scale = (1, 1)
    validate(config)


@pytest.mark.parametrize(
    ("epochs", "warmup", "decay", "words"),
    [
        (300, 5, 0.99996, []),  # the published run
        (10, 5, 0.0, []),
        (2, 5, 0.0, ["warm-up takes 1 of 2 epochs", "config.schedule.warmup_epochs 5"]),
        (1, 5, 0.0, ["warm-up takes 0 of 1 epochs"]),
        (10, 5, 0.99, []),  # 100 steps of 125,000
        (10, 5, 0.99996, ["averages over 25,000 steps", "has 12,510", "ema_decay=0.9992"]),
    ],
)
def test_fields_that_do_not_suit_a_short_run_get_a_line(epochs, warmup, decay, words):
    config = default_config()
    config.schedule.epochs, config.schedule.warmup_epochs = epochs, warmup
    config.train.ema_decay = decay
    validate(config)
    plan = _plan(config)
    assert plan.warmup_epochs == min(warmup, epochs // 2)
    assert plan.warmup_steps == plan.warmup_epochs * 1251
    assert len(plan.warnings) == bool(words)
    assert all(word in plan.warnings[0] for word in words)
