"""A killed run ends as one that was left in peace, and a finished one repeats its figures."""

import json

import pytest

from tests import kill_and_resume

SHORT = [
    "--config=configs/digits_distill.py",
    "--config.schedule.epochs=3",
    "--config.schedule.warmup_epochs=1",
    "--config.checkpoint.every_steps=7",
    "--config.train.eval_every_epochs=2",
    "--config.mixing.random_erasing=0.25",
    "--config.model.drop_path_rate=0.1",
]
TEACHER = """
from configs import digits_teacher

def get_config():
    config = digits_teacher.get_config()
    config.schedule.epochs = 2
    config.schedule.warmup_epochs = 1
    return config
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The workdir of an undisturbed run and of one that was killed three times."""
    workdir = tmp_path_factory.mktemp("runs")
    recipe = workdir / "recipes" / "quick_teacher.py"
    recipe.parent.mkdir()
    recipe.write_text(TEACHER)
    flags = [*SHORT, f"--config.distill.teacher_config={recipe}"]
    problems = kill_and_resume.run(3, 0, workdir, flags)
    return workdir, flags, problems


def test_three_kills_change_no_bit(runs):
    """Weights, EMA, optimiser state and final report after SIGKILL at three random steps."""
    workdir, _, problems = runs
    assert not problems
    arrays = kill_and_resume.final_arrays(workdir / "killed")
    for part in ("model/params/", "ema/params/", "opt_state/"):
        assert any(name.startswith(part) for name in arrays), f"{part} was not compared"
    assert int(arrays["step"]) == 66


def test_metrics_hold_every_step_once(runs):
    """Lines of steps that a kill undid are written once, by the run that resumed."""
    workdir, _, _ = runs
    lines = [json.loads(x) for x in (workdir / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if x["split"] == "train"] == list(range(1, 67))
    assert [x["step"] for x in lines if x["split"] == "eval"] == [44, 66]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_finished_run_repeats_its_figures(runs, run_main, mode):
    """--mode=eval, and the same command again, print the run's final report to the last digit."""
    workdir, flags, _ = runs
    peace = workdir / "undisturbed"
    before = kill_and_resume.final_report(peace)
    finished = run_main(
        *flags,
        f"--workdir={peace}",
        f"--config.distill.teacher={workdir / 'teacher'}",
        f"--mode={mode}",
    )
    assert finished.returncode == 0, finished.stderr
    assert kill_and_resume.final_report(peace) == before
    report = json.loads(finished.stdout[finished.stdout.index("{") :])
    assert report == {name: before[name] for name in before if name not in ("step", "split")}
    assert ("Already finished" in finished.stdout) == (mode == "train")
