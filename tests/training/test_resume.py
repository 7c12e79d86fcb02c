"""A killed run ends as one that was left in peace, and a finished one repeats its figures."""

import json

import pytest

from deit_jax.config.files import load_config
from deit_jax.training import loop
from tests import kill_and_resume, small_main

pytestmark = pytest.mark.slow

SHORT = [
    "--config=configs/digits_distill.py",
    "--config.dataset.train_fraction=0.125",
    "--config.train.batch_size=16",
    "--config.schedule.epochs=2",
    "--config.schedule.warmup_epochs=1",
    "--config.checkpoint.every_steps=5",
    "--config.train.eval_every_epochs=1",
    "--config.mixing.random_erasing=0.25",
    "--config.model.drop_path_rate=0.1",
]
TEACHER = """
from configs import digits_teacher

def get_config():
    config = digits_teacher.get_config()
    config.dataset.train_fraction = 0.125
    config.train.batch_size = 16
    config.schedule.epochs = 1
    config.schedule.warmup_epochs = 0
    return config
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The workdir of an undisturbed run and of one that was killed twice."""
    workdir = tmp_path_factory.mktemp("runs")
    recipe = workdir / "recipes" / "quick_teacher.py"
    recipe.parent.mkdir()
    recipe.write_text(TEACHER)
    flags = [*SHORT, f"--config.distill.teacher_config={recipe}"]
    problems, resumed = kill_and_resume.run(1, 8, workdir, flags, small_main.SCRIPT)
    return workdir, flags, problems, resumed


def test_kills_change_no_bit(runs):
    """Weights, EMA, optimiser state and final report, after one of the teacher's and a late one."""
    workdir, _, problems, resumed = runs
    assert not problems
    assert resumed[-1] >= 10, "the last start did not go on from a late checkpoint"
    arrays = kill_and_resume.final_arrays(workdir / "killed")
    for part in ("model/params/", "ema/params/", "opt_state/"):
        assert any(name.startswith(part) for name in arrays), f"{part} was not compared"
    assert int(arrays["step"]) == 22


def test_the_comparison_sees_a_difference(runs):
    """The teacher's run is not the student's: the check can fail."""
    workdir = runs[0]
    problems = kill_and_resume.compare(workdir / "undisturbed", workdir / "killed" / "teacher")
    assert any("only in one run" in problem for problem in problems)


def test_metrics_hold_every_step_once(runs):
    """Lines of steps that a kill undid are written once, by the run that resumed."""
    lines = kill_and_resume.metrics(runs[0] / "killed")
    assert [x["step"] for x in lines if x["split"] == "train"] == [*range(3, 22, 3), 22]
    assert [x["step"] for x in lines if x["split"] == "eval"] == [11, 22]


def test_a_finished_run_repeats_its_figures(runs, run_python, small_models, capsys):
    """--mode=eval, and the same command again, report what the run did, to the last digit.

    And nothing else: no library has anything to say on stderr.
    """
    workdir, flags, _, _ = runs
    peace = workdir / "undisturbed"
    before = kill_and_resume.final_report(peace)
    report = {name: before[name] for name in before if name not in ("step", "split", "epoch")}
    env = {"TF_CPP_MIN_LOG_LEVEL": "1"}  # as importing JAX sets it; the tests' own is quieter
    flags = (*flags, f"--workdir={peace}", "--mode=eval")
    finished = run_python(small_main.SCRIPT, *flags, env=env)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert json.loads(finished.stdout[finished.stdout.index("{") :]) == report
    assert "Already finished" not in finished.stdout
    assert loop.train(load_config(peace), str(peace)) == report
    assert "Already finished" in capsys.readouterr().out
    assert kill_and_resume.final_report(peace) == before
