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


def test_training_saving_and_predicting(run_blocked, tmp_path):
    """A whole distilled step, a model folder, TensorBoard events and a prediction."""
    run_blocked(
        """
        import jax
        import jax.numpy as jnp
        import numpy as np

        import deit_jax
        from deit_jax.config.fields import default_config
        from deit_jax.config.plan import plan_run
        from deit_jax.models.network import join_model, split_model
        from deit_jax.models.registry import abstract_model
        from deit_jax.training import optim
        from deit_jax.training.metrics import MetricWriter
        from deit_jax.training.state import new_state
        from deit_jax.training.step import make_train_step

        config = default_config()
        config.distill.kind = "hard"
        config.train.batch_size = 4
        config.mixing.update({"random_erasing": 0.0, "mixup_alpha": 0.0, "cutmix_alpha": 0.0})
        config.schedule.warmup_lr = 0.1
        plan = plan_run(
            config, num_train=8, num_eval=4, num_classes=3, class_names=(), num_devices=1
        )

        def variables(module):
            network, like = split_model(module)
            rng = np.random.default_rng(0)
            fill = lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape) ** 2, x.dtype)
            return network, jax.tree.map(fill, like)

        tiny = {"num_classes": 3, "depth": 1, "embed_dim": 8, "patch_size": 16}
        student, weights = variables(abstract_model("deit_testing_distilled", **tiny))
        teacher, teacher_weights = variables(
            abstract_model("regnety_testing", num_classes=3, depth=4)
        )
        optimizer = optim.make_optimizer(weights.params, config.optimizer)
        step = make_train_step(config, plan, student, optimizer, teacher=teacher)
        rng = np.random.default_rng(0)
        batch = {
            "image": rng.integers(0, 256, (4, 32, 32, 3), np.uint8),
            "label": rng.integers(0, 3, 4).astype(np.int32),
        }
        state = new_state(weights, optimizer, ema=True)
        state, metrics = jax.jit(step)(state, teacher_weights, batch)
        assert np.isfinite(metrics["loss"]) and int(state.step) == 1
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.model.params, weights.params)
        assert moved["head_dist"]["bias"], "the step must have trained"

        folder = sys.argv[1]
        deit_jax.save_model(folder + "/model", join_model(student, state.model))
        loaded = deit_jax.load_model(folder + "/model")
        picture = rng.integers(0, 256, (40, 60, 3), np.uint8)
        logits = loaded(jnp.asarray(deit_jax.preprocess(loaded, picture)))
        assert logits.shape == (1, 3) and bool(jnp.isfinite(logits).all())

        writer = MetricWriter(folder, tensorboard=True)
        writer.write(1, "train", {"loss": float(metrics["loss"])})
        writer.close()
        """,
        tmp_path,
    )
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def _imports(path):
    """The first names of everything a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def test_no_file_imports_what_it_must_not(repo_root):
    package = repo_root / "deit_jax"
    files = [repo_root / "main.py", *package.rglob("*.py"), *(repo_root / "configs").glob("*.py")]
    assert len(files) > 20
    forbidden = {"torch", "torchvision", "timm", "transformers", "clu", "tests"}
    for path in files:
        found = set(_imports(path))
        inside = path.relative_to(repo_root).parts[:2]
        if inside != ("deit_jax", "data"):
            found_tf = found & {"tensorflow", "tensorflow_datasets", "tensorboard", "sklearn"}
            allowed = {"tensorboard"} if path == package / "training" / "metrics.py" else set()
            assert found_tf <= allowed, path
        assert not found & forbidden, path
