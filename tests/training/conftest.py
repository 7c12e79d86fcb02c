"""Programs over several CPU devices."""

import json
from collections.abc import Iterator

import pytest

from deit_jax.models import registry
from tests import small_main


@pytest.fixture(scope="module")
def small_models() -> Iterator[None]:
    """The digits' models with two blocks: tests compile more than they train."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_MODELS", small_main.models())
        yield


@pytest.fixture(scope="session")
def run_on_devices(run_python):
    """Runs Python over some CPU devices; it must end well. Returns its output."""

    def run(*arguments, devices=8, **env):
        done = run_python(*arguments, env={"JAX_NUM_CPU_DEVICES": str(devices)} | env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def run_device_check(run_on_devices):
    """Runs tests/device_check.py over some CPU devices; returns what it prints."""

    def run(*arguments, **options):
        output = run_on_devices("tests/device_check.py", *arguments, **options)
        return json.loads(output.splitlines()[-1])

    return run
