"""tools/benchmark.py device: what it begins, what it switches, and what is left when it ends."""

import functools
import json
import math
import multiprocessing
import os
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import benchmark, device, device_attention, device_group, device_parity, switches
from benchmarks.device_plan import START_S, Budget, groups
from benchmarks.jax_step import Work
from benchmarks.turns import Program, Runner, Turn
from deit_jax.errors import InputError
from deit_jax.models import registry, vit

FOUND = {"platform": "cpu", "device": "a device", "count": 1}


def test_what_does_not_fit_is_refused_by_what_its_kind_took():
    now = SimpleNamespace(time=100.0)
    budget = Budget(120, lambda: now.time)
    assert budget.deadline == 220
    assert not budget.refusal("ours")
    assert not budget.refusal("ours", after=120 - START_S["ours"])
    assert "takes about 121 s, 120 s are left" in budget.refusal("ours", 121 - START_S["ours"])
    for pace in (3, 0.5, 3):  # the median counts
        budget.took("ours", pace * START_S["ours"])
    assert budget.expected("ours") == 3 * START_S["ours"]
    assert budget.expected("torch eager") == START_S["torch eager"]
    assert "no time" in budget.refusal("ours")
    now.time += 110
    assert "10 s are left" in budget.refusal("torch eager")
    budget.stop()
    assert budget.left() == 0


@pytest.mark.parametrize("tiny", [False, True])
def test_everything_is_planned_once(tiny):
    found = groups(256, tiny=tiny)
    names = [group.name for group in found]
    assert len(set(names)) == len(names)
    used = set()
    for group in found:
        assert registry.model_options(group.work.model)
        assert group.entries
        programs = [entry.name for entry in group.entries]
        assert len(set(programs)) == len(programs)
        assert {entry.kind for entry in group.entries} <= START_S.keys()
        used |= {entry.switch for entry in group.entries}
        if group.kind == "step":
            assert programs[0] == "ours"
            assert group.work.batch == 256
            distilled = registry.is_distilled(group.work.model)
            assert bool(group.work.teacher) == distilled
    assert used == {"", *switches.SWITCHES}
    compiled = {entry.name for group in found for entry in group.entries} & {"torch compile"}
    assert bool(compiled) == (not tiny)
    sizes = {group.work.model for group in found if group.kind == "step"}
    assert len(sizes) == (2 if tiny else 6)


def lowered_for_cuda():
    """A training step of two blocks, as JAX hands it to the compiler."""
    small = {"depth": 2, "num_classes": 4, "dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
    graphdef, state = nnx.split(registry.create_model("deit_testing", **small))

    def loss(state, images):
        return nnx.merge(graphdef, state)(images).sum()

    traced = jax.jit(jax.grad(loss)).trace(state, jnp.zeros((2, 32, 32, 3)))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("switch", "word", "before", "after"),
    [
        ("layout off", "@LayoutConstraint", True, False),
        ("in 2D", "tensor<130x192xbf16>", False, True),  # 2 images of 65 tokens, of q, k and v
    ],
)
def test_a_switch_changes_the_program(switch, word, before, after):
    assert (word in lowered_for_cuda()) == before
    with switches.on(switch):
        assert (word in lowered_for_cuda()) == after
    assert (word in lowered_for_cuda()) == before


def test_the_teachers_layout_is_a_flag_of_xla(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_something=1")
    with switches.on("teacher in NCHW"):
        assert os.environ["XLA_FLAGS"] == "--xla_something=1 --xla_gpu_force_conv_nchw=true"
    assert os.environ["XLA_FLAGS"] == "--xla_something=1"


def test_a_switch_that_finds_nothing_to_replace(monkeypatch):
    monkeypatch.delattr(vit, "row_major")
    with pytest.raises(InputError, match=r"layout off.*row_major"), switches.on("layout off"):
        pass


def _sleep():
    time.sleep(600)


def _short(count):
    if count > 1:
        raise MemoryError("no room")


def _program(build):
    return Program(_short, {}, lambda: 1)


@pytest.mark.slow
def test_the_deadline_kills():
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        Runner("sleeper", _sleep, deadline=begin + 4)
    assert time.monotonic() - begin < 30
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_program_that_fails_in_a_turn_fails_alone():
    with Runner("short", functools.partial(_program, None)) as runner:
        one = device_group._Lasting(runner)
        assert one.turn(1).peak_memory == 1
        assert math.isnan(one.turn(2).wall)
        assert one.error == "no room"
        assert math.isnan(one.turn(1).wall)


def test_rows_of_steps(monkeypatch):
    """Figures, ratios, a failure and what had no time, of runners with times we set."""
    walls = {"ours": 2.0, "torch eager": 3.0}

    class Fake:
        def __init__(self, name, build, deadline):
            self.name = name.partition(": ")[2]
            self.facts = {"first_s": 50.0}
            if self.name == "ours, attention in cuDNN":
                raise RuntimeError("XlaRuntimeError: no plans")
            if self.name == "ours":
                self.facts |= {"flops": 4e12, "peak_flops": 8e12, "compile_s": 9.0}

        def turn(self, count):
            return Turn(count * walls[self.name], count, 7)

        def shutdown(self):
            pass

    def refusal(self, kind, after=0.0):
        return "no time" if kind == "torch compile" else ""

    monkeypatch.setattr(device_group, "Runner", Fake)
    monkeypatch.setattr(Budget, "refusal", refusal)
    group = next(one for one in groups(8) if one.name == "base plain")
    place = device_group.Place("gpu", "", rounds=2, turn_s=8.0)
    budget = Budget(600)
    rows = list(device_group.measure(group, budget, place))
    assert [budget.kind(group.work, entry) for entry in group.entries] == [
        *("ours again", "ours", "torch eager", "torch compile")
    ]
    by_name = {row["program"]: row for row in rows}
    assert by_name["ours, attention in cuDNN"]["error"] == "XlaRuntimeError: no plans"
    assert by_name["torch compile"]["skipped"] == "no time"
    ours, eager = by_name["ours"], by_name["torch eager"]
    assert (ours["step_ms"], ours["mfu"], ours["images_per_second"]) == (2000, 0.25, 4)
    assert ours["steps_per_round"] == 4
    assert (eager["step_ms"], eager["mfu"]) == (3000, pytest.approx(1 / 6))
    assert eager["ours_over_theirs"] == pytest.approx(2 / 3)
    assert {row["model"] for row in rows} == {"deit_base_patch16_224"}
    report = {"rows": rows, "device": "H", "command": "c", "date": "d", "versions": {}}
    report |= {"minutes": 1.0, "batch": 8, "only": [], "not_reached": ["attention"]}
    text = "\n".join(device.markdown(report))
    for words in (
        "| torch eager | 3 | 3000.00 | 16.7% | 0.00 | 0.67 | 50 |",
        "Failed:\n\n- base plain: ours, attention in cuDNN: XlaRuntimeError: no plans",
        "Not measured:\n\n- base plain: torch compile: no time",
        "Ended before, or within: attention.",
    ):
        assert words in text


def test_parity_is_judged_against_the_cpus_own_rounding():
    def fact(*gradient):
        return {"loss": 1.0, "gradient": np.array(gradient)}

    cpu = {"float32": fact(3.0, 4.0), "bfloat16": fact(3.1, 4.0)}
    good = {"float32": fact(3.0001, 4.0), "bfloat16": fact(3.0, 4.14)}
    rows = device_parity.compare(good, cpu)
    assert [row["holds"] for row in rows] == [True, True]
    assert rows[0]["difference"] == pytest.approx(2e-5)
    assert rows[1]["limit"] == pytest.approx(1.5 * 0.02)
    bad = {"float32": fact(3.001, 4.0), "bfloat16": fact(3.0, 4.16)}
    assert not any(row["holds"] for row in device_parity.compare(bad, cpu))
    assert not device_parity.compare(good | {"float32": fact(math.nan, 4.0)}, cpu)[0]["holds"]


@pytest.mark.parametrize("library", ["jax", "torch"])
def test_attention_alone_is_attention(library):
    """Every way agrees with float32 but for rounding; what does not run is named."""
    work = Work("train", "deit_testing", 2, "bfloat16")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # in jax.nn
        rows = device_attention.build(work, library, "cpu").facts["cases"]
    assert {row["tokens"] for row in rows} == {65, 66}
    for row in rows:
        if "cuDNN" in row["program"]:
            assert row["error"]
            continue
        assert 0 < row["forward_ms"] < row["both_ms"]
        assert row["output_error"] < 0.01
        assert row["gradient_error"] < 0.02


def test_attention_alone_has_the_tokens_of_its_model(monkeypatch):
    """Also of one whose patches have the default's size, as DeiT-B's."""
    shapes = []
    cases = lambda heads, qkv, grad: shapes.append((heads, qkv.shape)) or {}  # noqa: E731
    monkeypatch.setattr(device_attention, "_jax_cases", cases)
    device_attention.build(Work("train", "deit_base_patch16_224", 1, "bfloat16"), "jax", "cpu")
    assert shapes == [(12, (1, 197, 3 * 768)), (12, (1, 198, 3 * 768))]


@pytest.fixture
def run_on(monkeypatch, tmp_path, capsys):
    """Runs the command where JAX finds these devices; returns status and output."""

    def run(*flags, found=FOUND, measure=None):
        class Probe:
            facts = found

            def __init__(self, *arguments, **options):
                pass

            def __enter__(self):
                return self

            def __exit__(self, *error):
                pass

        monkeypatch.setattr("benchmarks.turns.Runner", Probe)
        if measure is not None:
            monkeypatch.setattr(device_group, "measure", measure)
        status = benchmark.main(["device", f"--out={tmp_path / 'rows.jsonl'}", *flags])
        return status, *capsys.readouterr()

    return run


def test_an_interrupted_run_keeps_its_rows(run_on, tmp_path):
    def measure(group, budget, place):
        yield {"kind": "parity", "group": group.name, "program": "x", "skipped": "no time"}
        raise KeyboardInterrupt

    for _ in range(2):  # the second appends
        status, out, _ = run_on("--tiny", "--batch=4", measure=measure)
        assert status == 130
        assert "Not measured:\n\n- parity: x: no time" in out
        assert "Ended before, or within: parity, base plain," in out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["run", "parity"] * 2
    assert rows[0]["device"] == "a device"


@pytest.mark.parametrize(
    ("flags", "found", "word"),
    [
        (["--tiny"], {"count": 2}, "CUDA_VISIBLE_DEVICES"),
        ([], {}, "no GPU here"),
        (["--tiny"], {"platform": "tpu"}, "no GPU here"),
        (["--only=bse*"], {}, "'base plain'"),
        (["--minutes=0"], {}, "--minutes: 0"),
        (["--tiny", "--batch=3"], {}, "--batch is 3"),
        (["--out=gs://bucket/rows.jsonl"], {}, "in a bucket"),
    ],
)
def test_a_mistake_is_one_line(run_on, flags, found, word):
    status, out, err = run_on(*flags, found=FOUND | found)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert word in err.splitlines()[-1]


def test_a_missing_package_is_named(run_on, monkeypatch):
    monkeypatch.setattr(device, "find_spec", lambda name: name != "ml_collections" or None)
    status, _, err = run_on()
    assert status == 2
    assert "ml-collections missing: pip install ml-collections;" in err


@pytest.mark.slow
def test_a_run_with_tiny_models(run_python, tmp_path):
    out, file, asked = tmp_path / "rows.jsonl", tmp_path / "tables.md", ("parity", "base plain")
    flags = ["--tiny", "--batch=4", f"--out={out}", f"--write={file}", "--json"]
    flags += [f"--only={group}" for group in asked]
    finished = run_python("tools/benchmark.py", "device", *flags)
    assert finished.returncode == 0, finished.stderr[-3000:]
    first, *rows = (json.loads(line) for line in out.read_text().splitlines())
    assert first["versions"]["jax"]
    report = json.loads(finished.stdout)
    assert (report["rows"], report["not_reached"]) == (rows, [])
    failed = [row["program"] for row in rows if "error" in row or "skipped" in row]
    assert failed == ["ours, attention in cuDNN"]
    programs = {row["program"] for row in rows if "error" not in row}
    assert programs == {"float32", "bfloat16", "ours", "torch eager"}
    assert all(row["holds"] for row in rows if row["kind"] == "parity")
    steps = [row for row in rows if "step_ms" in row]
    assert all(row["step_ms"] > 0 and row["built_s"] > 0 for row in steps)
    assert "| deit_testing |  | torch eager |" in file.read_text()
