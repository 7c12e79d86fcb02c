"""Where compiled programs are kept between starts, and what the libraries say besides errors."""

import os

import jax
import pytest

from deit_jax import couplings
from deit_jax.cli import startup
from deit_jax.training import summary


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home, and a JAX that nobody has told where to keep programs."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "home"
    jax.config.update("jax_compilation_cache_dir", before)


def used():
    return jax.config.jax_compilation_cache_dir


def test_the_cache_is_in_the_home_by_processor(home, monkeypatch):
    assert startup.use_compilation_cache() is None
    (folder,) = (home / ".cache" / "deit_jax" / "compilation").iterdir()
    assert used() == str(folder)
    assert summary._compiled() == {"compiled": f"programs are kept in {folder}"}
    jax.config.update("jax_compilation_cache_dir", None)
    assert summary._compiled() == {}
    # Another processor shares the home: its code may end this one's process.
    monkeypatch.setattr(startup, "_CPU", ("model name",))
    startup.use_compilation_cache()
    assert used() != str(folder)


def test_xdg_cache_home_counts_where_it_is_absolute(home, tmp_path, monkeypatch):
    for given, base in ((str(tmp_path / "x"), tmp_path / "x"), ("relative", home / ".cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        jax.config.update("jax_compilation_cache_dir", None)
        assert startup.use_compilation_cache() is None
        assert used().startswith(f"{base}/deit_jax/compilation/")


@pytest.mark.parametrize("own", ["variable", "empty variable", "config", "switched off"])
def test_what_the_user_has_set_stays(home, tmp_path, monkeypatch, own):
    if "variable" in own:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "" if "empty" in own else "mine")
    elif own == "config":
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    else:
        monkeypatch.setattr(type(jax.config), "jax_enable_compilation_cache", False)
    before = used()
    assert startup.use_compilation_cache() is None
    assert used() == before
    assert not home.exists()


@pytest.mark.parametrize("kind", ["a file", "read-only", "no home"])
def test_a_home_that_cannot_be_written_is_a_note(home, monkeypatch, kind):
    if kind == "a file":
        home.write_text("")
    elif kind == "read-only":  # also for root
        monkeypatch.setattr(os, "access", lambda *_: False)
    else:
        monkeypatch.setattr(startup.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no")))
    note = startup.use_compilation_cache()
    assert note.startswith("compiled programs are not kept (")
    assert note.endswith("name a folder in JAX_COMPILATION_CACHE_DIR")
    assert used() is None


_RUN = """
import os, sys
from deit_jax.cli.main import main
from deit_jax.training import loop
from deit_jax.training.summary import _compiled
def work(*_):
    import jax, jax.numpy as jnp
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    print(jax.jit(lambda x: x * 3 + 1)(jnp.ones(3))[0], _compiled())
    return {}
loop.train = work
sys.exit(main(["train", "--config=digits", "--workdir=run"]))
"""


@pytest.mark.slow
def test_a_second_start_finds_the_programs_of_the_first(run_python, tmp_path):
    """And nothing is said on stderr, also where libtpu is installed and there is no TPU."""
    env = {"HOME": str(tmp_path), "JAX_PLATFORMS": ""}
    gone = ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "TF_CPP_MIN_LOG_LEVEL", "XLA_FLAGS")
    program = f"import os\nfor name in {gone!r}: os.environ.pop(name, None)\n{_RUN}"
    stamps = []
    for _ in range(2):
        ended = run_python("-c", program, env=env)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert f"4.0 {{'compiled': 'programs are kept in {tmp_path}/.cache/deit_jax" in ended.stdout
        files = (tmp_path / ".cache" / "deit_jax").rglob("*-cache")
        stamps.append({file.name: file.stat().st_mtime_ns for file in files})
    assert len(stamps[0]) >= 1
    assert stamps[0] == stamps[1]
    for file in (tmp_path / ".cache" / "deit_jax").rglob("*-cache"):  # as a kill may leave it
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    ended = run_python("-c", program, env=env)
    assert (ended.returncode, ended.stdout.split()[0]) == (0, "4.0"), ended.stderr


def test_variables_of_the_user_stay(monkeypatch):
    monkeypatch.setattr(couplings, "count_tpus", lambda: 1)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    for name in ("TPU_STDERR_LOG_LEVEL", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    startup.quieten()
    startup.quieten_absent_tpu()
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0"
    assert os.environ.pop("TPU_STDERR_LOG_LEVEL") == "2"
    assert "TPU_ACCELERATOR_TYPE" not in os.environ, "there is a TPU"
