"""How the processes of a run are found, connected, checked and ended together."""

import subprocess
import sys

import numpy as np
import pytest
import sklearn.datasets

from deit_jax.config.fields import default_config
from deit_jax.errors import InputError
from deit_jax.parallel import cluster, hosts
from deit_jax.training import checks
from tests import several

DIGITS = ["--config=configs/digits.py"]
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "127.0.0.1",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


@pytest.mark.parametrize(
    ("environment", "packages", "kind"),
    [
        ({}, (), None),
        (SLURM, (), "Slurm"),
        # sbatch without srun, a shell by srun --pty or salloc in an allocation of more tasks
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, (), None),
        (SLURM | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, (), None),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, (), None),
        (OPEN_MPI, (), "Open MPI"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, (), None),
        (POD, ("kubernetes",), None),  # a notebook
        (POD | {"JOB_COMPLETION_INDEX": "3"}, ("kubernetes",), "Kubernetes"),
        ({}, ("libtpu",), "Cloud TPU"),
        ({"TPU_SKIP_MDS_QUERY": "1"}, ("libtpu",), None),  # no chips here
        ({"JAX_PLATFORMS": "cpu"}, ("libtpu",), None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ("libtpu",), None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_SKIP_MDS_QUERY": "1"}, ("libtpu",), "Cloud TPU"),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, ("libtpu",), "Cloud TPU"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, (), None),
    ],
)
def test_a_cluster_is_one_that_started_several_processes(monkeypatch, environment, packages, kind):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name in packages or None)
    assert cluster.detect(environment) == kind


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI started 2 processes"),
        ({"PMI_SIZE": "4", "PMI_RANK": "1"}, r"started 4 processes \(PMI_SIZE\)"),  # MPICH
        (POD | {"JOB_COMPLETION_INDEX": "0"}, "pip install kubernetes"),
    ],
)
def test_a_cluster_whose_coordinator_cannot_be_found(monkeypatch, environment, words):
    """Each process alone on one workdir would be worse than an error."""
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=words) as caught:
        cluster.detect(environment)
    assert "--config.distributed.auto=False" in str(caught.value)


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


@pytest.mark.parametrize(
    ("environment", "label"),
    [
        ({}, ""),
        (SLURM | {"SLURM_PROCID": "1"}, "process 1 of 2: "),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, ""),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "1"}, "process 1 of 2: "),
        ({"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "a,b,c,d"}, "process 2 of 4: "),
        ({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, ""),
    ],
)
def test_errors_before_the_processes_are_connected_name_them(monkeypatch, environment, label):
    distributed = default_config().distributed
    with monkeypatch.context() as patch:
        for name in (*SLURM, *OPEN_MPI, "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES"):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        assert hosts.label(distributed) == label
        distributed.auto = False
        assert hosts.label(distributed) == ""


def _error(process, status=2):
    """The one error line of a process that refused to run."""
    assert process.returncode == status, (process.returncode, process.stdout, process.stderr)
    (line,) = [line for line in process.stderr.splitlines() if "error: " in line]
    assert "Traceback" not in process.stderr
    return line


def test_a_config_that_differs_in_processes_that_slurm_started(tmp_path):
    """No field says what the processes are; both of them end with one line, before long work."""
    port = {"JAX_COORDINATOR_PORT": str(several.free_port())}
    env = {i: SLURM | port | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in (0, 1)}
    flags = [*DIGITS, f"--workdir={tmp_path / 'run'}"]
    own = {1: ["--config.train.seed=1"]}
    for number, process in enumerate(
        several.run(flags, processes=2, own_flags=own, own_env=env, detected=True)
    ):
        assert _error(process) == (
            f"process {number} of 2: error: process 1 of 2 has config.train.seed 1, but process 0 "
            "has 0; they must be the same on every process"
        )
    assert not (tmp_path / "run").exists()


def test_processes_that_do_not_do_the_same(tmp_path):
    """One that trains would wait in vain for one that evaluates."""
    flags = [*DIGITS, f"--workdir={tmp_path / 'run'}"]
    for process in several.run(flags, processes=2, own_flags={1: ["--mode=eval"]}):
        assert "error: process 1 of 2 has --mode 'eval', but process 0 has 'train'" in _error(
            process
        )
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_is_not_shared(tmp_path):
    own = {1: [f"--workdir={tmp_path / 'other'}"]}
    flags = [*DIGITS, f"--workdir={tmp_path / 'run'}"]
    for process in several.run(flags, processes=2, own_flags=own):
        assert "error: process 1 of 2 does not find in --workdir=" in _error(process)
        assert "No such file or directory" in _error(process)
    assert list((tmp_path / "run").iterdir()) == []


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
        line = _error(process)
        assert "error: process 1 of 2 has training data with digest '" in line
        assert line.endswith("; they must be the same on every process")
    assert not list((tmp_path / "run").iterdir())


def test_weights_that_differ(monkeypatch):
    """Each host may have a copy of a teacher of its own."""
    told = []
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(hosts, "count", lambda: 2)
    monkeypatch.setattr(hosts, "agree", lambda what, mine, judge, **_: told.append(mine))
    weights = {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.zeros(3)}
    for change in (0, 0, 1e-6):
        weights["bias"][1] += change
        checks.check_weights("teacher", weights)
    assert checks._differing_fact(told[:2]) is None
    problem = checks._differing_fact(told[1:])
    assert problem.startswith("process 1 of 2 has weights in teacher with digest '")


# A process that is there, but is asked for something that it never says.
MISSING = """
import sys, time
from deit_jax import processes
from deit_jax.errors import InputError
from deit_jax.fields import default_config

distributed = default_config().distributed
distributed.coordinator_address, index = sys.argv[1], int(sys.argv[2])
distributed.num_processes, distributed.process_id = 3, index
processes.start(distributed)
processes._patience = 2
if index == 2:
    time.sleep(100)
try:
    processes.agree("the meeting", "here", lambda told: None)
except InputError as error:
    print(error, file=sys.stderr)
    processes.fail(str(error), status=error.exit_status)
"""


def test_who_did_not_come_is_named_on_every_process():
    address = f"127.0.0.1:{several.free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", MISSING, address, str(number)],
            cwd=several.ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    try:
        said = [process.communicate(timeout=60)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    reason = "process 2 of 3 did not come to the meeting in time; see what it printed"
    for number, text in enumerate(said):
        failed = f"process {number} of 3: error: process 0 of 3 failed: " if number else ""
        assert failed + reason in text.splitlines()
    assert [process.returncode for process in started] == [1, 1, 1]


def test_different_numbers_of_devices(tmp_path):
    flags = [*DIGITS, f"--workdir={tmp_path / 'run'}"]
    for process in several.run(flags, processes=2, devices=[1, 3]):
        assert "error: process 1 of 2 has local devices 3, but process 0 has 1" in _error(process)
    assert not (tmp_path / "run").exists()


def test_a_process_that_does_not_come(tmp_path):
    """A mistake of one process alone, before it connects, does not leave the other one waiting."""
    flags = [*DIGITS, f"--workdir={tmp_path / 'run'}", "--config.distributed.start_timeout=4"]
    first, second = several.run(
        flags, processes=2, own_flags={1: ["--config.train.batch_size=0"]}, seconds=60
    )
    assert _error(second).startswith("process 1 of 2: error: config.train.batch_size is 0")
    line = _error(first, status=1)  # the other may come yet
    assert line.startswith("process 0 of 2: error: not all processes connected to 127.0.0.1:")
    assert "within 4 s (config.distributed.start_timeout)" in line


def test_a_process_that_crashes_ends_the_other(tmp_path):
    """Process 1 has a broken scikit-learn; process 0 ends too, and says which one failed."""
    broken = tmp_path / "modules" / "sklearn" / "__init__.py"
    broken.parent.mkdir(parents=True)
    broken.write_text("raise RuntimeError('broken scikit-learn')")
    path = {"PYTHONPATH": f"{tmp_path / 'modules'}:{several.ROOT}"}
    flags = [*DIGITS, f"--workdir={tmp_path / 'run'}"]
    first, second = several.run(flags, processes=2, own_env={1: path}, seconds=100)
    assert (first.returncode, second.returncode) == (1, 1)
    assert "RuntimeError: broken scikit-learn" in second.stderr
    expected = "process 0 of 2: error: process 1 of 2 failed: it crashed; see its traceback"
    assert expected in first.stderr.splitlines()
    assert "Traceback" not in first.stderr


# main.py, with a training that only exchanges something in every step.
ERROR_IN_TRAINING = """
import sys
from deit_jax.cli.main import main
from deit_jax.training import loop
from deit_jax import processes
from deit_jax.errors import InputError
from jax.experimental import multihost_utils

def train(config, workdir):
    processes.start(config.distributed)
    for step in range(1000):
        if step == 3 and processes.index() == 1:
            raise InputError("image 7 cannot be used")
        multihost_utils.process_allgather(step)
        print("step", step, flush=True)

loop.train = train
sys.exit(main(by_mode=True))
"""


def test_an_error_of_one_process_in_training_ends_the_others(tmp_path):
    """With its own status, which tells whether a repetition would mend it."""
    script = tmp_path / "failing.py"
    script.write_text(ERROR_IN_TRAINING)
    first, second = several.run(
        [*DIGITS, "--workdir=unused"], processes=2, script=script, seconds=60
    )
    assert second.stdout.count("step") == 3
    assert _error(second) == "process 1 of 2: error: image 7 cannot be used"
    failed = "process 0 of 2: error: process 1 of 2 failed: image 7 cannot be used"
    assert _error(first) == failed
