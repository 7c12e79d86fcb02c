"""Only deit_jax/data needs TensorFlow; torch and timm are for tests and converters alone."""

import ast
import textwrap

import pytest

_BLOCK = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in NAMES:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""
_TENSORFLOW = ("tensorflow", "tensorflow_datasets", "sklearn")


def block(program, names=_TENSORFLOW):
    """The program, for which it is as if some packages were not installed.

    Libraries that only ask whether one is there have to hear that it is not.
    """
    return f"NAMES = {names!r}{_BLOCK}{textwrap.dedent(program)}\nprint('done')"


@pytest.fixture
def run_blocked(run_python):
    """Runs a program in which TensorFlow cannot be imported; it must print "done" and succeed."""

    def run(program, *arguments):
        finished = run_python("-c", block(program), *arguments)
        assert finished.returncode == 0, finished.stderr[-3000:]
        assert finished.stdout.splitlines()[-1] == "done"

    return run


def test_the_block_works(run_blocked):
    run_blocked(
        """
        for name in ("tensorflow", "tensorflow_datasets", "deit_jax.data"):
            try:
                __import__(name)
            except ModuleNotFoundError as error:
                assert error.name.startswith("tensorflow"), error
            else:
                raise AssertionError(name)
        """
    )


def test_every_module_but_the_data_pipeline_imports(run_blocked):
    run_blocked(
        """
        import importlib, pkgutil
        import deit_jax

        assert set(sys.modules).isdisjoint({"jax", "flax"}), "importing deit_jax must be cheap"
        names = [
            module.name
            for module in pkgutil.walk_packages(
                deit_jax.__path__, "deit_jax.", onerror=lambda name: None
            )
            if not module.name.startswith("deit_jax.data")
        ]
        assert len(names) >= 18, names
        for name in names:
            importlib.import_module(name)
        importlib.import_module("main")
        for name in deit_jax.__all__:
            getattr(deit_jax, name)
        assert set(sys.modules).isdisjoint({"torch", "timm", "torchvision", "transformers"})
        """
    )


@pytest.mark.slow
def test_training_saving_and_predicting(run_blocked, tmp_path):
    """A whole distilled step, a model folder, TensorBoard events and a prediction."""
    run_blocked(
        """
        import jax
        import jax.numpy as jnp
        import numpy as np

        import deit_jax
        from deit_jax.config.fields import default_config
        from deit_jax.models.network import join_model
        from deit_jax.training.metrics import MetricWriter
        from tests.training import steps

        config = default_config()
        config.distill.kind = "hard"
        config.train.batch_size = 4
        config.mixing.random_erasing = config.mixing.prob = 0.0
        config.schedule.warmup_lr = 0.1
        small = {"depth": 1, "embed_dim": 8, "patch_size": 16}
        student, weights = steps.new_model("deit_testing_distilled", **small)
        teacher, teacher_weights = steps.new_model("regnety_testing", depth=4)
        step, state = steps.build(config, student, weights, teacher=teacher)
        batch = steps.new_batch(4, np.random.default_rng(0))
        state, metrics = jax.jit(step)(state, teacher_weights, batch)
        assert np.isfinite(metrics["loss"]) and int(state.step) == 1
        before, after = (w.params["head_dist"]["bias"] for w in (weights, state.model))
        assert (before != after).any(), "the step must have trained"

        folder = sys.argv[1]
        deit_jax.save_model(folder + "/model", join_model(student, state.model))
        loaded = deit_jax.load_model(folder + "/model")
        logits = loaded(jnp.asarray(deit_jax.preprocess(loaded, batch["image"][0])))
        assert logits.shape == (1, 10) and bool(jnp.isfinite(logits).all())

        writer = MetricWriter(folder, tensorboard=True)
        writer.write(1, "train", {"loss": float(metrics["loss"])})
        writer.close()
        """,
        tmp_path,
    )
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def test_no_file_imports_what_it_must_not(repo_root):
    """Anywhere in it, also within functions."""
    package = repo_root / "deit_jax"
    files = [repo_root / "main.py", *package.rglob("*.py"), *(repo_root / "configs").glob("*.py")]
    assert len(files) > 20
    forbidden = {"torch", "torchvision", "timm", "transformers", "clu", "tests"}
    for path in files:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        named = [
            alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
        ]
        named += [n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level]
        found = {name.partition(".")[0] for name in named}
        assert not found & forbidden, path
        if path.relative_to(repo_root).parts[:2] != ("deit_jax", "data"):
            assert not found & {"tensorflow", "tensorflow_datasets", "sklearn"}, path
        assert path == package / "training" / "loggers.py" or "tensorboard" not in found, path
