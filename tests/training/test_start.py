"""What a run starts from: keys of its own for the initialisation, and heads that will learn."""

import jax
import numpy as np
import pytest
from flax import nnx

from configs import digits
from deit_jax import trees
from deit_jax.checkpoints import model_folder
from deit_jax.checkpoints.training import TrainCheckpoints
from deit_jax.errors import InputError
from deit_jax.models import registry
from deit_jax.models.network import split_model
from deit_jax.training.loop import open_checkpoints
from deit_jax.training.run import build_model
from deit_jax.training.setup import check, initial_state
from deit_jax.training.state import init_key, step_keys
from deit_jax.training.summary import describe_run

SEED = 3


def bits(keys):
    return {tuple(map(int, row)) for row in jax.random.key_data(keys).reshape(-1, 2)}


def test_no_key_of_the_initialisation_leads_to_a_step():
    """Neither a step's key nor one that it is derived from: draws would repeat each other."""
    rngs = nnx.Rngs(params=init_key(SEED))
    drawn = bits(jax.numpy.stack([init_key(SEED), *(rngs.params() for _ in range(500))]))
    root = jax.random.key(SEED)
    steps = np.r_[:5000, 2**31 - 5000 : 2**31].astype(np.int32)  # a step is an int32
    parents = jax.vmap(lambda step: jax.random.fold_in(root, step))(steps)
    both = [bits(keys) for keys in jax.vmap(lambda step: step_keys(SEED, step))(steps)]
    assert len(both[0] | both[1]) == 2 * len(steps)
    assert drawn.isdisjoint(bits(root) | bits(parents) | both[0] | both[1])


def config_of(name="deit_testing_distilled", **fields):
    config = digits.get_config()
    config.model.name = name
    config.train.seed = SEED
    config.update_from_flattened_dict(fields)
    return config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A function that writes a folder with a model of zeros, and returns it."""

    def write(name, **options):
        folder = tmp_path_factory.mktemp("model")
        options |= {"patch_size": 8}
        network, like = split_model(registry.abstract_model(name, **options))
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        model_folder.write_model(folder / "model", zeros, network.info)
        return str(folder / "model")

    return write


@pytest.mark.slow
def test_a_run_draws_its_parameters_with_that_key(tmp_path):
    run = check(config_of(), str(tmp_path))
    state, *_ = initial_state(run, TrainCheckpoints(str(tmp_path), keep=1))
    rngs = nnx.Rngs(params=init_key(SEED))
    _, want = split_model(build_model(run.config, run.plan, rngs=rngs))
    for name, x in trees.flat(want).items():
        np.testing.assert_allclose(trees.flat(state.model)[name], x, atol=1e-6)
    loss = next(line for line in describe_run(run, "").splitlines() if "loss" in line)
    assert loss.split(None, 1)[1] == (
        "cross-entropy of the mean of both heads: without a teacher both learn from labels"
    )


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("deit_tiny_patch16_224", 100, " (4 pixels at the right and the bottom in no patch)"),
        ("deit3_small_patch16_224", 100, " (4 pixels at the right and the bottom in no patch)"),
        ("deit_tiny_patch16_224", 96, ""),
        ("regnety_testing", 100, ""),
    ],
)
def test_pixels_in_no_patch_are_said(tmp_path, name, size, words):
    fields = {"input.image_size": size, "model.drop_path_rate": 0.0, "model.patch_size": 0}
    config = config_of(name, **fields)
    summary = describe_run(check(config, str(tmp_path)), "from scratch")
    assert f", {size}×{size}{words}, 10 classes" in summary


@pytest.mark.parametrize(
    ("source", "classes", "trainable", "left"),
    [
        ("", 10, "head/.*", "head_dist"),
        ("", 10, "head_dist/.* .*/attn/.*", "head"),
        ("deit_testing", 10, ".*/attn/.* head/.* pos_embed", "head_dist"),
        ("deit_testing_distilled", 7, ".*/attn/.* head/.* pos_embed", "head_dist"),
        ("deit_testing_distilled", 7, ".*/attn/.*", "head"),
        ("deit_testing_distilled", 10, ".*/attn/.*", None),  # both heads are trained already
        ("deit_testing_distilled", 7, "head.*", None),
    ],
)
def test_no_head_stays_as_it_is_drawn(tmp_path, model, source, classes, trainable, left):
    config = config_of(**{"optimizer.trainable": trainable})
    config.init_from = model(source, num_classes=classes) if source else ""

    def start():
        open_checkpoints(check(config, str(tmp_path)), training=True)

    if left is None:
        start()
    else:
        with pytest.raises(
            InputError, match=f"leaves {left} as it is drawn.* add '{left}/"
        ) as error:
            start()
        assert "\n" not in str(error.value)
