"""Programs over several CPU devices."""

import json

import pytest


@pytest.fixture(scope="session")
def run_device_check(run_python):
    """Runs tests/device_check.py over some CPU devices; returns what it prints."""

    def run(*arguments, devices=8, **env):
        env = {"JAX_NUM_CPU_DEVICES": str(devices)} | env
        done = run_python("tests/device_check.py", *arguments, env=env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture
def check_on_devices(run_python):
    """Runs a program's text over some CPU devices; it must end well. Returns its output."""

    def run(program, devices=8):
        done = run_python("-c", program, env={"JAX_NUM_CPU_DEVICES": str(devices)})
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
