"""What every test shares: the compilation cache, the command line, and a small image folder."""

import contextlib
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent

# Before anything imports jax; subprocesses inherit all of it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".jax_cache"))
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # A cache for each of pytest's processes: JAX does not write its files atomically.
    os.environ["JAX_COMPILATION_CACHE_DIR"] += f"/{worker}"
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# The tests compile more than they run: without optimisations, and without the emitters of fused
# operations, which take longer to compile. Later versions have nothing else, and refuse the flag.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
# A promotion of types or ranks that nobody wrote is a mistake, here and in the libraries' calls.
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# TensorFlow then looks for a Keras that is not installed: Keras is a third of its import.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
# On busy machines torch's threads wait for one another far longer than small work takes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before anything imports TensorFlow: after it, triton's copy of LLVM crashes while it is loaded.
with contextlib.suppress(ImportError):  # only some builds of torch have it
    import triton  # noqa: F401

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

_REAL_SAMPLE = Path(
    os.environ.get("DEIT_JAX_IMAGE_SAMPLE", _ROOT.parent / "shared" / "data" / "imagenet_sample")
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first, so that none is left to one process alone at the end."""
    long = {"parallel", "training", "test_bucket.py"}
    items.sort(key=lambda item: long.isdisjoint((item.path.parent.name, item.path.name)))


def pytest_collection_finish() -> None:
    """Keeps the libraries' million objects out of every later collection of garbage."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Gives them back: nanobind reports what outlives the interpreter."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root of the repository."""
    return _ROOT


@pytest.fixture(scope="session")
def run_python(repo_root: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs Python in the repository's root: run_python(*arguments, env={...}, timeout=seconds)."""

    def run(
        *arguments: str, env: dict[str, str] | None = None, timeout: float = 600
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=repo_root,
            env=os.environ | {"PYTHONPATH": str(repo_root)} | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture(scope="session")
def run_main(run_python: Callable) -> Callable[..., subprocess.CompletedProcess]:
    """Runs `python main.py` with the given flags."""
    return lambda *flags, **options: run_python("main.py", *flags, **options)


@pytest.fixture(scope="session")
def sample_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder SPLIT/CLASS/*.JPEG of train and val: real photographs where there are any near."""
    if _REAL_SAMPLE.is_dir():
        return _REAL_SAMPLE
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, per_class in (("train", 6), ("val", 2)):
        for name in ("bird", "boat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(per_class):
                _photograph(rng).save(root / split / name / f"{number}.JPEG", quality=90)
    return root


def _photograph(rng: np.random.Generator) -> Image.Image:
    """Smooth colours with some noise, at a size of its own."""
    width, height = rng.integers(60, 500, 2)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC), int)
    noisy = smooth + rng.integers(-8, 9, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
