"""How the processes of a run are found, connected, compared and ended together."""

import numpy as np
import pytest
import sklearn.datasets

from deit_jax.parallel import cluster, hosts
from deit_jax.training import checks
from tests import several

pytestmark = pytest.mark.multihost

DIGITS = ["--config=configs/digits.py"]
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "127.0.0.1",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    ("environment", "libtpu", "kind"),
    [
        ({}, False, None),
        (SLURM, False, "Slurm"),
        # sbatch without srun, a shell by srun --pty or salloc in an allocation of more tasks
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, False, None),
        (SLURM | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, False, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, False, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False, None),
        ({"OMPI_COMM_WORLD_SIZE": "", "SLURM_STEP_NUM_TASKS": "", "PMI_SIZE": "3"}, False, "MPI"),
        ({"PMI_SIZE": "4", "PMI_RANK": "1"}, False, "MPI"),
        (POD, False, None),  # a notebook
        (POD | {"JOB_COMPLETION_INDEX": "3"}, False, "Kubernetes"),
        ({}, True, "Cloud TPU"),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, None),  # no chips here
        ({"JAX_PLATFORMS": "cpu"}, True, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_SKIP_MDS_QUERY": "1"}, True, "Cloud TPU"),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True, "Cloud TPU"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False, None),
    ],
)
def test_a_cluster_is_one_that_started_several_processes(monkeypatch, environment, libtpu, kind):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda _: libtpu or None)
    assert cluster.detect(environment) == kind


@pytest.mark.parametrize(
    ("environment", "alone"),
    [
        ({}, False),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, True),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, False),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2),2"}, False),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, False),
    ],
)
def test_one_process_a_host_has_all_its_devices(environment, alone):
    assert cluster.alone_on_its_host(environment) == alone


def _error(process, status=2):
    """The one error line of a process that refused to run."""
    assert process.returncode == status, (process.returncode, process.stdout, process.stderr)
    (line,) = [line for line in process.stderr.splitlines() if "error: " in line]
    assert "Traceback" not in process.stderr
    return line


def test_a_cluster_whose_processes_jax_cannot_find(tmp_path):
    """Each process alone on one workdir would be worse than an error."""
    flags = [*DIGITS, f"--workdir={tmp_path / 'run'}"]
    (process,) = several.run(flags, processes=1, own_env={0: {"PMI_SIZE": "4"}})
    line = _error(process)
    assert line.startswith("error: MPI started several processes")
    assert "--config.distributed.auto=False" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"own_flags": {1: ["--config.train.seed=1"]}, "detected": True},
            "process 1 of 2 has config.train.seed 1, but process 0 has 0",
        ),
        # One that trains would wait in vain for one that evaluates.
        ({"own_flags": {1: ["--mode=eval"]}}, "--mode 'eval', but process 0 has 'train'"),
        ({"devices": [1, 3]}, "local devices 3, but process 0 has 1"),
        ({"own_flags": {1: ["--workdir={}"]}}, "process 1 of 2 does not find in --workdir="),
    ],
)
def test_processes_that_differ_end_with_one_line(tmp_path, options, words):
    """Before long work; by Slurm's environment or by fields."""
    given = options.pop("own_flags", {1: []})[1]
    options["own_flags"] = {1: [flag.format(tmp_path / "other") for flag in given]}
    if "detected" in options:
        shared = SLURM | {"JAX_COORDINATOR_PORT": str(several.free_port())}
        own = ({"SLURM_PROCID": number, "SLURM_LOCALID": number} for number in "01")
        options["own_env"] = {number: shared | mine for number, mine in enumerate(own)}
    for process in several.run([*DIGITS, f"--workdir={tmp_path / 'run'}"], processes=2, **options):
        assert words in _error(process)
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.slow
def test_copies_of_the_data_that_differ(tmp_path):
    """Two images of the digits have each other's labels on the host of process 1."""
    changed = tmp_path / "modules" / "sklearn"
    changed.mkdir(parents=True)
    digits = sklearn.datasets.load_digits()
    first, second = 3, int(np.flatnonzero(digits.target != digits.target[3])[0])
    digits.target[[first, second]] = digits.target[[second, first]]
    np.savez(tmp_path / "digits.npz", target=digits.target, images=digits.images)
    (changed / "__init__.py").touch()
    (changed / "datasets.py").write_text(
        "import types, numpy\n"
        f"load_digits = lambda: types.SimpleNamespace(**numpy.load('{tmp_path / 'digits.npz'}'))"
    )
    path = {"PYTHONPATH": f"{tmp_path / 'modules'}:{several.ROOT}"}
    flags = [*DIGITS, f"--workdir={tmp_path / 'run'}"]
    for process in several.run(flags, processes=2, own_env={1: path}):
        assert "process 1 of 2 has training data with digest '" in _error(process)
    assert not list((tmp_path / "run").iterdir())


def test_weights_that_differ(monkeypatch):
    """Each host may have a copy of a teacher of its own."""
    told = []
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(hosts, "compare", lambda what, facts, **_: told.append(facts))
    weights = {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.zeros(3)}
    for change in (0, 0, 1e-6):
        weights["bias"][1] += change
        checks.check_weights("teacher", weights)
    assert told[0] == told[1] != told[2]


# What each process of the next tests does, in the place of a training.
FAILING = """
import sys, time
from deit_jax.cli.main import main
from deit_jax.config.fields import default_config
from deit_jax.errors import InputError
from deit_jax.parallel import hosts
from deit_jax.training import loop
from jax.experimental import multihost_utils

def train(config, workdir):
    assert hosts.index() != 1 or not workdir.endswith("crash"), "process 1 has a bug"
    if workdir.endswith("missing"):
        hosts._patience = 2
        time.sleep(100 * (hosts.index() == 2))
        hosts.gather("the meeting", "here")
    for step in range(1000):
        if step == 3 and hosts.index() == 1:
            raise InputError("image 7 cannot be used")
        multihost_utils.process_allgather(step)
        print("step", step, flush=True)

loop.train = train
sys.exit(main(by_mode=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "processes", "status", "words"),
    [
        # With its own status, which tells whether a retry can help.
        ("error", 2, 2, "image 7 cannot be used"),
        ("crash", 2, 1, "it crashed; see its traceback"),
        ("missing", 3, 1, "process 2 of 3 did not come to the meeting in time"),
    ],
)
def test_one_process_that_fails_ends_every_one(tmp_path, how, processes, status, words):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    flags = [*DIGITS, f"--workdir={tmp_path / how}"]
    ended = several.run(flags, processes=processes, script=script)
    if how == "crash":
        crashed = ended.pop(1)
        assert crashed.returncode == status
        assert "AssertionError: process 1 has a bug" in crashed.stderr
    lines = [_error(process, status) for process in ended]
    assert all(words in line for line in lines)
    if how == "error":
        assert ended[1].stdout.count("step") == 3
        assert lines[1] == f"process 1 of 2: error: {words}"
    if how != "missing":
        assert f"process 0 of 2: error: process 1 of 2 failed: {words}" in lines[0]


def test_a_process_that_does_not_come(tmp_path):
    """A mistake of one process alone, before it connects, does not leave the other one waiting."""
    flags = [*DIGITS, f"--workdir={tmp_path / 'run'}", "--config.distributed.start_timeout=4"]
    own = {1: ["--config.train.batch_size=0"]}
    first, second = several.run(flags, processes=2, own_flags=own)
    assert _error(second).startswith("error: config.train.batch_size is 0")
    line = _error(first, status=1)  # the other may come yet
    assert line.startswith("process 0 of 2: error: not all processes connected to 127.0.0.1:")
    assert "within 4 s (config.distributed.start_timeout)" in line
