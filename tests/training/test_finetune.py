"""Fine-tuning, end to end: another resolution with a teacher, a new token, other classes."""

import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from configs import digits
from deit_jax import trees
from deit_jax.checkpoints import model_folder
from deit_jax.config.files import load_config
from deit_jax.config.plan import plan_run
from deit_jax.errors import InputError
from deit_jax.models import info as descriptions
from deit_jax.models import registry
from deit_jax.models.network import split_model
from deit_jax.training import loop
from deit_jax.training.complete import complete
from deit_jax.training.run import build_model
from tests import kill_and_resume

CLASSES = (5, 6, 7, 8, 9)

pytestmark = pytest.mark.usefixtures("small_models")


def recipe(epochs):
    """The recipe of the digits without its noise, which so few epochs would only suffer from."""
    config = digits.get_config()
    config.model.drop_path_rate = 0.0
    config.mixing.random_erasing = config.mixing.prob = config.mixing.smoothing = 0.0
    config.train.ema_decay = 0.0
    config.schedule.epochs = epochs
    config.schedule.warmup_epochs = 1
    config.train.log_every_steps = 1
    config.train.eval_every_epochs = 0
    config.checkpoint.every_epochs = 0
    return config


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A plain DeiT of digits at 32 pixels: its run folder and its final report."""
    workdir = tmp_path_factory.mktemp("base")
    return workdir, loop.train(recipe(epochs=14), str(workdir))


@pytest.fixture(scope="module")
def five_classes(tmp_path_factory):
    """Some digits from 5 to 9 as files."""
    root = tmp_path_factory.mktemp("five")
    images, labels = load_digits(return_X_y=True)
    for label in CLASSES:
        own = images[labels == label].reshape(-1, 8, 8)[:60]
        for split, part in (("train", own[:48]), ("val", own[48:])):
            (root / split / str(label)).mkdir(parents=True)
            for number, grey in enumerate(part):
                file = root / split / str(label) / f"{number}.png"
                Image.fromarray(np.uint8(grey * (255 / 16))).convert("RGB").save(file)
    return root


def lines(workdir, split):
    return [line for line in kill_and_resume.metrics(workdir) if line["split"] == split]


def assert_learns(workdir):
    losses = [line["loss"] for line in lines(workdir, "train")]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def weights(workdir):
    _, like = model_folder.read_network(workdir)
    return trees.flat(model_folder.read_variables(workdir, like).params)


@pytest.mark.slow
def test_the_given_weights_are_the_start_unless_there_is_a_checkpoint(base, tmp_path, capsys):
    folder, report = base
    config = recipe(epochs=14)
    config.init_from = str(folder)
    assert loop.evaluate(config, str(tmp_path))["loss"] == report["loss"]
    config.init_from = "gone"
    assert loop.train(config, str(folder)) == report
    assert "(so init_from gone is not read)" in capsys.readouterr().out


@pytest.mark.slow
def test_twice_the_resolution_with_a_token_and_a_teacher(base, tmp_path, capsys):
    """What the reference refuses: distillation while fine-tuning, here from a plain model.

    The teacher is a transformer of the old resolution, which the step resizes the images to.
    """
    folder, report = base
    config = recipe(epochs=4)
    config.init_from = config.distill.teacher = str(folder)
    config.model.name = "deit_testing_distilled"
    config.input.image_size = 64
    config.distill.kind = "hard"
    config.optimizer.lr = 1e-3
    config.train.log_attention = True
    config.train.expected_top1 = ((4, 100.0),)
    final = loop.train(config, str(tmp_path / "run"))
    printed = capsys.readouterr().out
    assert "pos_embed resized from 4×4 to 8×8" in printed
    assert "dist_token newly" in printed
    assert "it sees the images resized to 32×32" in printed
    assert_learns(tmp_path / "run")
    assert final["teacher_top1"] == report["top1"]  # with its own pixels, as on its own
    assert final["top1"] > report["top1"] > 50  # better than the model it began from
    assert final["top1_dist"] > 50
    train = lines(tmp_path / "run", "train")
    assert train[-1]["teacher_agreement"] > 0.6 > train[0]["teacher_agreement"]
    assert all(0 < line["attention_max"] < 100 for line in train)
    (evaluation,) = lines(tmp_path / "run", "eval")
    assert evaluation["expected_top1"] == 100.0
    assert ("warning: top-1 is" in printed) == (final["top1"] < 98)


@pytest.mark.slow
def test_other_classes_by_attention_alone(base, five_classes, tmp_path, capsys):
    """Five classes and a new head; all but attention, head and positions stays to the bit."""
    folder, _ = base
    config = recipe(epochs=12)
    config.init_from = str(folder)
    config.dataset.source = "folder"
    config.dataset.root = str(five_classes)
    config.dataset.eval_split = "val"
    config.optimizer.trainable = ".*/attn/.* head/.* pos_embed"
    config.train.batch_size = 40
    config.train.accumulate_steps = 2
    final = loop.train(config, str(tmp_path / "run"))
    printed = capsys.readouterr().out
    before, after = weights(folder), weights(tmp_path / "run")
    same = {name for name in after if np.array_equal(before[name], after[name])}
    trains = {name for name in after if "/attn/" in name or "head" in name or name == "pos_embed"}
    assert same == set(after) - trains
    count = sum(after[name].size for name in trains)
    assert f"({count:,} of them train)" in printed
    assert "40 images over all devices in 2 micro-batches" in printed
    assert "head newly" in printed
    assert_learns(tmp_path / "run")
    assert final["top1"] > 60  # chance is 20
    assert model_folder.read_info(tmp_path / "run").class_names == tuple(map(str, CLASSES))


@pytest.mark.slow
def test_the_folder_recipe_starts_from_any_model(base, five_classes, tmp_path, capsys):
    """Name, patches and image size are those of `init_from`, the classes those of the data."""
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(base[0] / "model", model)
    config = load_config("folder:finetune")
    config.init_from, config.dataset.root = str(model), str(five_classes)
    config.schedule.epochs, config.train.batch_size = 8, 20
    config.optimizer.lr = 2e-3  # a model so small learns at larger rates
    config.input.hflip, config.input.scale = 0.0, (0.7, 1.0)  # digits are not symmetric
    final = loop.train(config, str(run))
    printed = capsys.readouterr().out
    for words in ("deit_testing, ", " 32×32, 5 classes", "head newly initialised", "4 of 8 epochs"):
        assert words in printed
    for name in ("mean", "std"):
        assert f"note      training with input.{name} (0.5, 0.5, 0.5), as the model was" in printed
    assert "its images had crop_ratio None, this run's have 0.875" in printed
    assert model_folder.read_info(run).mean == (0.5, 0.5, 0.5)
    assert load_config(run).input.std == (0.5, 0.5, 0.5)
    assert final["top1"] > 50  # chance is 20
    shutil.rmtree(model)
    again = load_config(run)  # all that it takes to go on
    assert (again.model.name, again.model.patch_size) == ("deit_testing", 8)
    assert loop.evaluate(again, str(run)) == loop.evaluate(config, str(run)) == final
    with pytest.raises(InputError, match=f"--config.init_from={model}: .*not a model folder"):
        complete(config)


def test_a_model_is_what_init_from_holds_unless_it_is_named(tmp_path):
    options = {"image_size": 48, "patch_size": 8, "norm": "rms", "num_registers": 4}
    network, like = split_model(registry.abstract_model("deit_testing_distilled", **options))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    model_folder.write_model(tmp_path / "model", zeros, network.info)
    config = load_config("folder:finetune")
    config.init_from = str(tmp_path / "model")
    alone = complete(config)
    assert (alone.model.name, alone.input.image_size) == ("deit_testing_distilled", 48)
    plan = plan_run(alone, num_train=512, num_classes=1000, num_devices=1)
    info = build_model(alone, plan).info
    assert (info.name, info.overrides) == (network.info.name, network.info.overrides)
    assert (config.model.name, config.input.image_size) == ("", 0)
    config.model.name, config.input.image_size = "deit_testing", 64
    named = complete(config)
    assert (named.model.name, named.input.image_size) == ("deit_testing", 64)
    assert named.model.options == ""


def test_options_of_every_type_survive_a_config(monkeypatch):
    pair = descriptions.Check(lambda value: value == (1, 2.5), "a pair")
    monkeypatch.setitem(descriptions._OPTIONS, "a_pair", pair)
    options = {"rope": "mixed", "num_registers": 4, "layer_scale_init": None, "mlp_ratio": 1e-06}
    options |= {"qk_norm": True, "qkv_bias": False, "a_pair": (1, 2.5)}
    text = descriptions.format_options(options)
    assert descriptions.parse_options(text) == options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("rope", "'rope' is not NAME=VALUE"),
        ("rope=2d", "rope is '2d', expected"),
        ("registers=4", "'registers' is not a structural option, only .*num_registers"),
        ("patch_size=8", "patch_size is config.model.patch_size"),
        ("num_registers=4 wm=2.0", 'model deit_testing has no option "wm"'),
    ],
)
def test_options_that_no_model_has_are_named(options, message):
    config = load_config("digits")
    config.model.name, config.model.options = "deit_testing", options
    plan = plan_run(config, num_train=512, num_classes=10, num_devices=1)
    with pytest.raises(InputError, match=message):
        build_model(config, plan)
