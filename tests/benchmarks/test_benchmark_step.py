"""tools/benchmark.py train, infer and teacher: what they run, count and need."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import jax_step, torch_step, turns
from benchmarks import step as benchmark_step
from benchmarks.jax_step import Work
from benchmarks.turns import Turn
from deit_jax.training import mixing
from tests.test_without_tensorflow import block

TRAIN = Work("train", "deit_testing_distilled", 4, "float32", "regnety_testing", True)


@pytest.mark.slow
def test_every_part_runs_without_tensorflow_and_torch(run_python, tmp_path):
    program = """
        import json
        from benchmarks import benchmark
        from deit_jax.models import registry
        from tests import small_main

        registry._MODELS = small_main.models()
        if __name__ == "__main__":
            for argv in json.loads(sys.argv[1]):
                assert benchmark.main(argv) == 0
    """
    runs = [
        "train --model=deit_testing_distilled --distill=hard --teacher=regnety_testing --ema",
        "teacher --model=regnety_testing --dtype=float32",
    ]
    runs = [[*run.split(), "--batch=4", "--rounds=2", "--json"] for run in runs]
    blocked = ("tensorflow", "tensorflow_datasets", "torch", "timm")
    script = tmp_path / "program.py"  # the processes of the programs run it, too
    script.write_text(block(program, blocked))
    finished = run_python(script, json.dumps(runs))
    assert finished.returncode == 0, finished.stderr[-3000:]
    reports = [line for line in finished.stdout.splitlines() if line != "done"]
    for argv, report in zip(runs, map(json.loads, reports), strict=True):
        assert report["part"] == argv[0]
        for name in ("images_per_second", "step_ms", "cpu_ms", "compile_s", "peak_memory_bytes"):
            assert report[name] > 0, name
        assert report["mfu"] is None
        assert report["versions"].keys() >= {"python", "jax", "flax", "optax"}
        assert "core" in report["device"]


@pytest.mark.slow
def test_the_launcher_and_a_profile(run_python, tmp_path):
    flags = ["--model=deit_testing", "--batch=4", "--rounds=1", f"--profile={tmp_path}", "--json"]
    finished = run_python("tools/benchmark.py", "infer", *flags)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert json.loads(finished.stdout)["images_per_second"] > 0
    assert list(tmp_path.rglob("*.xplane.pb"))


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "regnety_002"])
def test_flops_are_those_that_torch_counts(name):
    """XLA also counts what is element-wise, and leaves out what falls on padding."""
    with torch.device("meta"):
        model = torch_step.timm_model(name).eval()
        for module in model.modules():
            module.fused_attn = False  # torch counts no matmuls in the fused kernel of CPUs
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(torch.zeros(2, 3, 224, 224))
    found = jax_step.forward_flops(Work("infer", name, 2, "float32"), name)
    assert found == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_both_sides_get_the_same_pixels():
    images, chosen = TRAIN.examples()["image"], TRAIN.recipe().input
    theirs = torch_step.normalise(torch.from_numpy(images).permute(0, 3, 1, 2))
    ours = mixing.normalize(images, chosen.mean, chosen.std)
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "rate"), [("deit_testing", 0.1), ("resmlp_testing", 0.1), ("regnety_testing", 0.0)]
)
def test_only_regnets_lack_the_stochastic_depth_of_the_recipe(name, rate):
    assert TRAIN._replace(model=name, teacher="").recipe().model.drop_path_rate == rate


@pytest.mark.parametrize("name", ["deit_testing_distilled", "resmlp_testing"])  # two heads, one
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_step_of_pytorch_trains_every_parameter(name, dtype):
    torch.manual_seed(0)
    work = TRAIN._replace(model=name, dtype=dtype)
    student, step = torch_step.train(work, torch.device("cpu"), compiled=False)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    for _ in range(2):  # a dropped block gets no gradient
        step()
    still = [name for name, p in student.named_parameters() if torch.equal(p, before[name])]
    assert not still


def test_turns_go_to_and_fro():
    log = []

    def runner(name):
        return SimpleNamespace(turn=lambda count: log.append(name) or len(log))

    found = turns.take_turns({name: runner(name) for name in "ab"}, rounds=3, count=1)
    assert "".join(log) == "abbaabbaab"
    assert found == {"a": [5, 8, 9], "b": [6, 7, 10]}


def test_the_report():
    """Medians, and ratios by rounds, from times we set."""

    def taken(*milliseconds):
        return [Turn(2 * ms / 1e3, ms / 1e3, peak_memory=ms) for ms in milliseconds]

    ours, theirs = taken(10, 20, 60), taken(20, 80, 60)
    rows = [benchmark_step.figures(x, ours, 2, 8, on_cpu=True) for x in (ours, theirs)]
    assert (rows[0]["step_ms"], rows[0]["cpu_ms"], rows[1]["step_ms"]) == (20, 10, 60)
    assert rows[0]["images_per_second"] == pytest.approx(400)
    assert rows[0]["peak_memory_bytes"] == 60
    assert rows[1]["ours_over_theirs"] == pytest.approx(0.5)  # of 0.5, 0.25 and 1
    compare = {"torch eager": rows[1], "torch compile": {"error": "no compiler"}}
    report = rows[0] | TRAIN._asdict() | {"versions": {}, "mfu": 0.1, "compare": compare}
    report |= dict.fromkeys(("date", "device", "compile_s", "rounds", "steps_per_round"), 0)
    text = "\n".join(benchmark_step.markdown(report, "the command"))
    for words in ("| torch eager | 133.3 | 60.0 | 30 | 0.50 |", "MFU 10%", "no compiler"):
        assert words in text
