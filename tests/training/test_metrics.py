"""What a run says about itself: metrics.jsonl, TensorBoard events, speed and durations."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deit_jax.errors import InputError
from deit_jax.training import metrics
from deit_jax.training.metrics import MetricWriter, Progress, accuracy_warning, duration, eval_line
from tests import kill_and_resume


def _lines(workdir):
    return kill_and_resume.metrics(workdir)


def test_one_json_object_a_line_and_null_for_what_json_cannot_hold(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(3, "train", {"loss": 0.5, "grad_norm": float("inf"), "rate": float("nan")})
    # Readable at once: a run that is killed must not lose what it has reported.
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert 0 <= line["seconds"] < 60
    writer.write(4, "final", {"top1": np.float64(97.5), "num_examples": 360})
    writer.close()
    assert _lines(tmp_path) == [
        {"step": 3, "split": "train", "loss": 0.5, "grad_norm": None, "rate": None},
        {"step": 4, "split": "final", "top1": 97.5, "num_examples": 360},
    ]


def test_an_evaluation_leaves_the_lines_of_a_run_that_goes_on(tmp_path):
    run = MetricWriter(tmp_path, resume_step=0)
    run.write(10, "train", {})
    evaluation = MetricWriter(tmp_path)
    run.write(20, "train", {})
    evaluation.write(5, "final", {})
    run.write(30, "train", {})
    run.close()
    evaluation.close()
    assert [line["step"] for line in _lines(tmp_path)] == [10, 20, 5, 30]


@pytest.mark.parametrize(
    ("tail", "kept"),
    [
        ('{"step": 2, "spl', [1, 3]),
        ('{"step": 2, "split": "train"}', [1, 2, 3]),
        ("\0\0\0", [1, 3]),
        ('{"step": 3, "split": "train"}\n', [1, 3]),  # whole, but the run will make it again
        # Not ours:
        ('[1]\n3\nnull\n"step"\n{"step": "2"}\n{}\n', [1, 3]),
        ("[" * 100_000 + "\n", [1, 3]),
        ('\udcff{"step": 2}\n', [1, 3]),
    ],
)
def test_a_resumed_run_drops_what_it_will_make_again_and_what_a_crash_cut_short(
    tmp_path, tail, kept
):
    text = '{"step": 1, "split": "train"}\n' + tail
    (tmp_path / "metrics.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    writer = MetricWriter(tmp_path, resume_step=2)
    writer.write(3, "train", {})
    writer.close()
    assert [line["step"] for line in _lines(tmp_path)] == kept


def test_a_writer_that_is_off_touches_nothing(tmp_path):
    writer = MetricWriter(tmp_path, on=False, tensorboard=True)
    writer.write(1, "train", {"loss": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def _scalars(workdir):
    events = EventAccumulator(str(workdir), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(point.step, point.value) for point in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_reads_what_was_written_but_not_what_a_killed_run_will_make_again(tmp_path):
    for resume_step, losses in ((0, {1: 1.0, 2: 2.0, 3: 3.0}), (2, {3: -3.0, 4: -4.0})):
        writer = MetricWriter(tmp_path, resume_step=resume_step, tensorboard=True)
        for step, loss in losses.items():
            writer.write(step, "train", {"loss": loss, "learning_rate": 0.125})
    writer.write(4, "eval", {"top1": 50})
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    events.Reload()
    assert {
        tag: [(point.step, point.value) for point in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    } == {  # flushed: no need to close first
        "train/loss": [(1, 1.0), (2, 2.0), (3, -3.0), (4, -4.0)],
        "train/learning_rate": [(step, 0.125) for step in (1, 2, 3, 4)],
        "eval/top1": [(4, 50.0)],
    }
    writer.close()
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2


def test_tensorboard_missing_is_one_line_before_any_file_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer", None)
    with pytest.raises(InputError, match=r"^config.train.tensorboard .*$"):
        MetricWriter(tmp_path, tensorboard=True)
    assert list(tmp_path.iterdir()) == []


def test_progress_leaves_out_the_first_step_and_pauses(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock.now)
    progress = Progress(batch_size=32, total_steps=100)
    assert progress.report(0) == {}
    progress.waited(5.0)  # before the first step: start-up, not the pipeline's fault
    clock.now += 60
    progress.step_done()
    assert progress.report(1) == {}  # the first step compiles: nothing to tell yet
    for _ in range(4):
        clock.now += 0.5
        progress.waited(0.125)
        progress.step_done()
    clock.now += 7
    progress.pause(7)
    assert progress.report(5) == {
        "images_per_second": 4 * 32 / 2.0,
        "input_wait": 4 * 0.125 / 2.0,
        "eta_seconds": 95 * 0.5,
    }
    assert progress.report(5) == {}  # nothing since
    clock.now += 1.0
    progress.step_done()
    assert progress.report(6) == {
        "images_per_second": 32.0,
        "input_wait": 0.0,
        "eta_seconds": 94.0,
    }


def test_duration():
    texts = {
        0.4: "0s",
        59.6: "1m00s",
        725: "12m05s",
        3599.7: "1h00m",
        3 * 3600 + 7 * 60 + 59: "3h07m",
        50 * 3600: "50h00m",
    }
    assert {seconds: duration(seconds) for seconds in texts} == texts


@pytest.mark.parametrize(
    ("top1", "expected", "low"),
    [
        (79.3, 81.4, True),
        (79.5, 81.4, False),
        (0.9, 2.0, True),  # 2 points below would be nothing at all
        (1.1, 2.0, False),
    ],
)
def test_an_evaluation_well_below_the_published_curve_says_so(top1, expected, low):
    results = {"top1": top1, "loss": 1.0, "num_examples": 10}
    assert accuracy_warning(results) == ""
    results["expected_top1"] = expected
    warning = accuracy_warning(results)
    assert warning == "" or f"{top1:.2f} where the published run had {expected:.2f}" in warning
    assert bool(warning) == low
    assert f"expected_top1 {expected:.2f}" in eval_line(results)
