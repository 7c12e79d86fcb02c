"""Measuring a stop: what is counted, and one stop of a real run."""

import random

import pytest

from experiments import measure_stop

NOTED = [
    (1.0, "start"), (2.0, "step"), (2.5, "save"), (3.0, "saved"), (3.1, "evaluate"),
    (4.0, "batch"), (5.0, "batch"), (5.5, "evaluated"), (6.0, "close"), (8.0, "closed"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("aimed", "begin", "moment", "saving", "steps", "batches"),
    [
        ("set-up", 1.5, "set-up", 2.5, 1, 2),
        ("set-up", 2.1, "a training step", 2.5, 0, 2),  # it came later than it was meant to
        ("a save", 2.75, "a save", 2.25, 0, 2),
        ("the last evaluation", 4.5, "the last evaluation", 2.0, 0, 1),
        ("the final models", 4.5, "an evaluation", 2.0, 0, 1),
        ("an evaluation", 5.7, "a training step", 2.0, 0, 0),
    ],
)
def test_what_counts(aimed, begin, moment, saving, steps, batches):
    stop = measure_stop.measured(aimed, NOTED, begin, 10.0, 75)
    assert stop == measure_stop.Stop(moment, 75, 10.0 - begin, saving, 2.0, steps, batches)


def test_table():
    stops = [
        measure_stop.measured("an evaluation", NOTED, begin, 10.0, status)
        for begin, status in ((3.5, 75), (4.5, 75), (5.2, 0))
    ]
    assert (
        "| an evaluation | 0 × 1, 75 × 2 | 5.5; 6.5 | 2.0; 2.0 | 2.0; 2.0 | 0; 0 | 1; 2 |"
        in list(measure_stop.report(stops))
    )


@pytest.mark.slow
def test_a_long_evaluation_is_left_after_a_batch(tmp_path):
    """And the step that was not due for a save is saved."""
    stop = measure_stop.stop(tmp_path / "stop", "an evaluation", random.Random(0))
    assert (stop.moment, stop.status) == ("an evaluation", 75)
    assert stop.batches <= 2  # one may end just then
    assert stop.steps == 0
    assert (tmp_path / "stop" / "run" / "checkpoints" / "45").is_dir()
