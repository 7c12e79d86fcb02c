"""tools/benchmark.py train, infer and teacher: what they run, count and need."""

import json
import math

import jax
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import programs, torch_step
from benchmarks import step as benchmark_step
from benchmarks.programs import Turn, Work
from deit_jax.cli.arguments import Parser
from deit_jax.config.fields import default_config
from deit_jax.errors import InputError
from deit_jax.models import registry
from deit_jax.models.network import split_model
from tests.test_without_tensorflow import block

TRAIN = Work("train", "deit_testing_distilled", 4, "float32", "regnety_testing", True, 0.1)
SMALL = ["--batch=4", "--rounds=2", "--json"]


def parse(part, *flags):
    parser = Parser(benchmark_step.__doc__)
    benchmark_step.add_arguments(parser)
    parser.set_defaults(part=part)
    return parser.parse_args(flags)


def test_every_part_runs_where_nothing_but_jax_is_installed(run_python):
    program = """
        import json
        from benchmarks import benchmark

        for argv in json.loads(sys.argv[1]):
            assert benchmark.main(argv) == 0
    """
    distill = ["--distill=hard", "--teacher=regnety_testing", "--ema"]
    runs = [
        ["train", "--model=deit_testing_distilled", *distill, *SMALL],
        ["infer", "--model=deit_testing", *SMALL],
        ["teacher", "--model=regnety_testing", "--dtype=float32", *SMALL],
    ]
    blocked = ("tensorflow", "tensorflow_datasets", "ml_collections", "torch", "timm")
    fast = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiles in a third of the time
    finished = run_python("-c", block(program, blocked), json.dumps(runs), env=fast)
    assert finished.returncode == 0, finished.stderr[-3000:]
    text = finished.stdout
    for argv in runs:
        report, end = json.JSONDecoder().raw_decode(text)
        text = text[end:].lstrip()
        assert report["part"] == argv[0]
        for name in ("images_per_second", "step_ms", "cpu_ms", "compile_s", "peak_memory_bytes"):
            assert report[name] > 0, name
        assert report["mfu"] is None
        assert report["versions"].keys() >= {"python", "jax", "flax", "optax"}
        assert "cores" in report["device"]


def test_the_stand_in_for_the_config_is_the_default_recipe():
    theirs = default_config()
    for group, fields in vars(TRAIN._replace(teacher="").recipe()).items():
        for name, value in vars(fields).items():
            assert theirs[group][name] == value, (group, name)
    assert TRAIN.recipe().distill.kind == "hard"


@pytest.mark.parametrize("name", ["deit_testing_distilled", "regnety_testing"])
def test_products_are_counted_as_torch_counts_them(name):
    model = torch_step.timm_model(name).eval()
    for module in model.modules():
        module.fused_attn = False  # torch counts no products in the fused kernel of CPUs
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(2, 3, 32, 32))
    network, variables = split_model(registry.abstract_model(name))
    work = Work("infer", name, 2, "float32")
    assert programs.forward_flops(network, variables, work) == counter.get_total_flops()


@pytest.mark.parametrize("name", registry.list_models("*testing*"))
def test_timm_gets_the_same_architecture(name):
    _, variables = split_model(registry.abstract_model(name))
    ours = sorted(math.prod(x.shape) for x in jax.tree.leaves(variables.params))
    assert ours == sorted(p.numel() for p in torch_step.timm_model(name).parameters())


def test_both_sides_get_the_same_pixels():
    images = TRAIN.examples()["image"]
    theirs = torch_step.normalise(torch.from_numpy(images).permute(0, 3, 1, 2))
    ours = programs.mixing.normalize(images, *vars(TRAIN.recipe().input).values())
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_step_of_pytorch_trains_every_parameter(dtype):
    torch.manual_seed(0)
    work = TRAIN._replace(dtype=dtype)
    student, step = torch_step.train(work, torch.device("cpu"), compiled=False)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    for _ in range(2):  # a dropped block gets no gradient
        step()
    still = [name for name, p in student.named_parameters() if torch.equal(p, before[name])]
    assert not still


def test_a_process_with_pytorch_takes_its_turns_and_says_what_is_wrong():
    work = Work("teacher", "regnety_testing", 2, "bfloat16")
    other = torch_step.Opponent(work, "cpu", compiled=False)
    try:
        turn = other.turn(2)
        assert turn.cpu > 0
        assert 0 < turn.wall < other.first_s
        assert other.peak_memory() is None
    finally:
        other.close()


class Fake:
    """A contestant whose turns take the given milliseconds."""

    def __init__(self, log, name, milliseconds):
        self.name, self.log, self.times = name, log, iter([9e9, 9e9, *milliseconds])
        self.compile_s, self.flops, self.first_s = 5.0, 4_000_000_000, 7.0
        self.peak_memory, self.close = lambda: 123, lambda: log.append("closed")

    def turn(self, count):
        self.log.append(self.name)
        seconds = next(self.times) / 1e3
        return Turn(wall=2 * seconds, cpu=seconds)


def test_the_report(monkeypatch):
    """Medians, ratios by rounds, MFU and turns to and fro, from times we set."""
    log = []
    monkeypatch.setattr(programs, "build", lambda work: Fake(log, "ours", [10, 20, 60]))
    others = [
        ("torch_eager", Fake(log, "eager", [20, 80, 60])),
        ("torch_compile", InputError("PyTorch: no compiler")),
    ]
    monkeypatch.setattr(torch_step, "opponents", lambda work, device, with_compile: others)
    monkeypatch.setattr(programs, "peak_flops", lambda: 1e12)
    flags = ["--model=deit_testing", "--batch=8", "--rounds=3", "--compare=torch"]
    report = benchmark_step.run(parse("infer", *flags))
    assert (report["step_ms"], report["cpu_ms"]) == (40, 20)
    assert report["images_per_second"] == pytest.approx(200)
    assert report["mfu"] == pytest.approx(4e9 / 0.040 / 1e12)
    eager = report["compare"]["torch_eager"]
    assert (eager["step_ms"], eager["cpu_ms"]) == (120, 60)
    assert eager["ours_over_theirs"] == pytest.approx(0.5)  # of 0.5, 0.25 and 1
    assert report["compare"]["torch_compile"] == {"error": "PyTorch: no compiler"}
    assert log == [*["ours", "eager", "eager", "ours"] * 2, "ours", "eager", "closed"]
    json.dumps(report)
    text = "\n".join(benchmark_step.markdown(report, "the command"))
    assert "| timm, torch eager | 66.7 | 120.0 | 60 | 0.50 |" in text
    assert "MFU 10%" in text
    assert "no compiler" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model=deit_testing", "--batch=3"], "--batch is 3"),
        (["--model=deit_testing", "--distill=hard"], "--distill"),
        (["--model=deit_testing", "--rounds=0"], "--rounds is 0"),
        (["--model=deit_testing", "--steps=0"], "--steps is 0"),
        (["--model=deit_tseting"], "deit_testing"),
        (["--model=regnety_testing"], "drop_path_rate"),
    ],
)
def test_wrong_flags_are_named(flags, words):
    with pytest.raises(InputError, match=words):
        benchmark_step.run(parse("train", *flags))


def test_a_profile_lists_operations(run_python, tmp_path):
    flags = ["infer", "--model=deit_testing", "--batch=2", "--steps=1", f"--out={tmp_path}"]
    finished = run_python("benchmarks/profile_step.py", *flags)
    assert finished.returncode == 0, finished.stderr[-3000:]
    lines = finished.stdout.splitlines()
    assert lines[0].startswith("compiled in")
    assert any("ms a step" in line and "fusion" in line for line in lines)
    assert list(tmp_path.rglob("*.xplane.pb"))
