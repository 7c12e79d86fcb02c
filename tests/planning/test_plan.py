"""What a run will need: --mode=plan, the reading of compiled programs, and compile_for's errors."""

import contextlib
import importlib.util
import re

import jax
import pytest
from flax import nnx

from configs import digits
from deit_jax.checkpoints.training import TrainCheckpoints
from deit_jax.cli import compile_for as command
from deit_jax.errors import InputError
from deit_jax.models import registry
from deit_jax.planning import chips, collectives, forecast
from tests.checkpoints import test_checkpoint

EIGHT = {"JAX_NUM_CPU_DEVICES": "8"}


def bytes_of(name, fsdp, **options):
    """The float32 weights of a model on one device: arrays of 2^14 numbers and more are split."""
    model = registry.create_model(name, num_classes=10, **options, rngs=nnx.Rngs(0))
    total = 0
    for leaf in jax.tree.leaves(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        split = leaf.size >= 2**14 and any(side % fsdp == 0 for side in leaf.shape)
        total += 4 * leaf.size // (fsdp if split else 1)
    return total


@pytest.mark.parametrize("fsdp", [1, 4])
def test_plan_counts_the_bytes_of_a_device(tmp_path, run_main, fsdp):
    """Eight devices, a teacher that is not trained yet; nothing is written."""
    workdir = tmp_path / "run"
    done = run_main(
        "--config=configs/digits_distill.py",
        f"--workdir={workdir}",
        "--mode=plan",
        f"--config.parallel.fsdp={fsdp}",
        env=EIGHT,
    )
    assert done.returncode == 0, done.stderr
    assert not workdir.exists()
    cells = re.findall(r"^\| ([^|]+) \| [\d.]+ \| ([\d,]+) \|$", done.stdout, re.MULTILINE)
    rows = {name: int(size.replace(",", "")) for name, size in cells}
    student = bytes_of("deit_testing_distilled", fsdp, patch_size=8)
    assert rows["parameters"] == rows["moving average"] == student
    assert rows["optimizer"] == 2 * student + 4  # two moments and Adam's count
    assert rows["teacher"] == bytes_of("regnety_testing", 1)
    assert rows["batch"] == 64 // 8 * (32 * 32 * 3 + 4)
    arguments = next(size for name, size in rows.items() if "arguments**" in name)
    listed = ("parameters", "moving average", "optimizer", "teacher", "batch")
    assert arguments == pytest.approx(sum(rows[name] for name in listed), rel=0.01)
    assert "**Fits.**" in done.stdout
    assert ("| all-gather |" in done.stdout) == (fsdp > 1)
    assert "a step of S seconds takes 64 / S images/s" in done.stdout


def test_plan_of_a_run_that_would_not_start(tmp_path):
    """The workdir holds another model's checkpoints, or cannot be made."""
    config = digits.get_config()
    info, state = test_checkpoint._state()
    with contextlib.closing(TrainCheckpoints(tmp_path, keep=1)) as checkpoints:
        test_checkpoint._save(checkpoints, info, state, 1)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"checkpoints/1 holds a model with .*, but the config"):
        forecast.plan(config, str(tmp_path))
    (tmp_path / "file").touch()
    for place in ("file", "file/run"):
        with pytest.raises(
            InputError, match=r"--workdir=.* cannot be written \(.*file is no folder"
        ):
            forecast.plan(config, str(tmp_path / place))
    (tmp_path / "file").unlink()
    assert sorted(tmp_path.rglob("*")) == before


# Every form of a collective's result and groups that the compilers print.
HLO = """HloModule jit_train_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%fused (p: bf16[8,16]) -> bf16[8,16] {
  ROOT %all-to-all.1 = bf16[8,16]{1,0:T(8,128)(2,1)} all-to-all(%p), replica_groups={{0,1},{2,3}}
}

%body.2 (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %reduce-scatter.3 = f32[4]{0} reduce-scatter(%q), replica_groups=[1,4]<=[4], to_apply=%add
}

%cond.2 (p: (s32[], f32[4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%left (p: f32[2]) -> f32[2] {
  ROOT %permuted = f32[2]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
}

%right (p: f32[2]) -> f32[2] {
  ROOT %same = f32[2]{0} copy(%p)
}

%all-reduce-scatter.4 (p: f32[8,4]) -> f32[8,2] {
  %all-reduce.5 = f32[8,4]{1,0} all-reduce(%p), channel_id=6, replica_groups={{0,1},{2,3}}
  ROOT %slice = f32[8,2] dynamic-slice(%all-reduce.5, %zero, %i)
}

%async_collective_fusion.1 (p: bf16[4,4]) -> bf16[4,8] {
  ROOT %all-gather.6 = bf16[4,8]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, dimensions={1}
}

%async_collective_fusion.2 (p: bf16[4,4]) -> bf16[4,8] {
  ROOT %all-gather.7 = bf16[4,8]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={1}
}

ENTRY %main.9 (a: f32[100], b: f32[2]) -> f32[100] {
  %ar = (f32[100]{0}, f32[]) all-reduce-start(%a, %c), replica_groups={}, to_apply=%add
  %ard = (f32[100]{0}, f32[]) all-reduce-done(%ar)
  %ag = (f32[5]{0}, f32[20]{0:S(1)}) all-gather-start(%b), replica_groups=[1,4]<=[4]
  %agd = f32[20]{0} all-gather-done(%ag)
  %f = bf16[8,16]{1,0} fusion(%d), kind=kLoop, calls=%fused
  %w = (s32[], f32[4]) while(%t), condition=%cond.2, body=%body.2, backend_config={"known_trip_count":{"n":"3"}}
  %ars = f32[8,2] fusion(%g), kind=kCustom, calls=%all-reduce-scatter.4
  %g1 = bf16[4,8] fusion(%h), kind=kCustom, calls=%async_collective_fusion.1
  %g2 = bf16[4,8] fusion(%g1), kind=kCustom, calls=%async_collective_fusion.2
  ROOT %c2 = f32[2] conditional(%i, %b, %b), branch_computations={%left, %right}
}
"""  # noqa: E501


def test_collectives_are_found_where_they_are():
    Collective = collectives.Collective
    found = collectives.read(HLO, 4)
    assert found == [
        Collective("all-reduce", 404, 4),
        Collective("all-gather", 80, 4),
        Collective("all-to-all", 256, 2),
        Collective("reduce-scatter", 64, 4, "loop", 3),
        Collective("reduce-scatter", 128, 2),
        Collective("all-gather", 64, 2),  # of two fusions, one exchange
        Collective("collective-permute", 8, 4, "branch"),
    ]
    rows = {(row["kind"], row["where"]): row for row in collectives.table([*found, found[0]])}
    assert rows["all-reduce", "step"]["count"] == 2
    assert rows["all-reduce", "step"]["bytes"] == 808
    assert rows["reduce-scatter", "loop"]["count"] == 3
    assert rows["reduce-scatter", "loop"]["bytes"] == 192


def test_roofline():
    """A device that sends 4 GB/s: rings of 4 pass 2·3/4, 3/4 and 1 of the bytes."""
    chip = chips.Chip(tflops=2, memory=1, bandwidth=10, ring=4)
    found = [
        collectives.Collective("all-reduce", 4 * 10**9, 4),
        collectives.Collective("all-gather", 10**9, 4, "loop", times=2),
        collectives.Collective("collective-permute", 10**9, 4),
    ]
    bounds = forecast.roofline(chip, 8e12, 5e9, found)
    assert bounds == pytest.approx(
        {"arithmetic": 4.0, "memory": 0.5, "exchange": (4 * 1.5 + 2 * 0.75 + 1) / 4}
    )
    assert forecast.roofline(chips.Chip(tflops=2), 8e12, 5e9, found) == {"arithmetic": 4.0}


def test_every_topology_has_its_chip():
    names = {"TPU v5 lite": 16, "TPU v5": 95, "TPU v5p": 95, "TPU v6 lite": 32, "TPU v4": 32}
    assert {name: chips.find(name).memory for name in names} == names
    assert chips.find("cpu") is None


def report(**changes):
    """A forecast as if compiled: a step of 20 GiB, half a second at least."""
    names = ("parameters", "optimizer", "moving_average", "teacher", "batch", "gradients")
    memory = dict.fromkeys(("arguments", "outputs", "aliased", "temporaries", "program"), 0)
    return {
        "model": "m", "teacher": None, "batch": 64, "image_size": 32, "dtype": "bfloat16",
        "remat": False, "accumulate_steps": 1, "device": "TPU v5 lite", "devices": 4,
        "mesh": {"data": 4, "fsdp": 1}, "compile_s": 1.0, "state": dict.fromkeys(names, 2**30),
        "memory": memory | {"total": 20 * 2**30}, "refusal": None, "limit": 16 * 2**30,
        "fits": False, "flops": 1e12, "bytes_accessed": 1e9, "collectives": [],
        "bounds": {"arithmetic": 0.25, "memory": 0.5}, "host": {
            "bytes_per_image": 3076, "bytes_per_step": 196864, "images_per_second": 128.0,
        },
    } | changes  # fmt: skip


def test_a_step_that_is_too_large():
    text = "\n".join(forecast.lines(report()))
    assert "Does not fit: 4.00 GiB over.** Try --config.parallel.fsdp=4 or" in text
    assert "--config.model.remat=True" in text
    assert "memory binds" in text
    assert "128 images/s, 32 a device" in text


@pytest.mark.parametrize(
    ("said", "over"),
    [
        ("Ran out of memory in memory space hbm. Used 17.25G of 15.75G hbm.", 1.5),
        # The arguments, five of the six parts of the state, are not among the temporaries.
        ("total memory required for HLO temporaries (16G) exceeds available HBM (15.75G).", 5.25),
        ("no figures", None),
    ],
)
def test_a_step_that_the_compiler_refuses(said, over):
    error = RuntimeError(f"RESOURCE_EXHAUSTED: {said}")
    refused = forecast._refused(error, report()["state"])
    text = "\n".join(forecast.lines(report(**refused, bounds={}, remat=True)))
    assert "Does not fit" + (f": {over:.2f} GiB over.**" if over else ".**") in text
    assert f"The compiler: {error}" in text
    assert "remat=True" not in text


RECIPE = ["--config=configs/digits_distill.py", "--config.train.dtype=bfloat16", "--classes=10"]


def compile_for(capsys, *flags):
    status = command.main([*RECIPE, "--train-images=1438", *flags])
    out, err = capsys.readouterr()
    return status, out if status == 0 else err


def test_without_the_compiler(capsys, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    status, error = compile_for(capsys, "--topology", "v5e:2x2")
    assert status == 2
    assert error.count("\n") == 1
    assert "pip install 'jax[tpu]==" in error


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler (libtpu)"
)


@needs_libtpu
def test_unknown_topology(capsys):
    status, error = compile_for(capsys, "--topology", "v5e:3x3")
    assert status == 2
    assert "--topology v5e:3x3: the TPU compiler knows no such slice" in error


@needs_libtpu
def test_one_all_reduce_on_a_slice(capsys):
    """Of the gradients and metrics of hard distillation, and nothing else."""
    status, text = compile_for(capsys, "--topology", "v5e:2x2")
    assert status == 0
    assert "| all-reduce | step | 4 | 1 |" in text
    assert text.count("| step |") == 1
    weights = bytes_of("deit_testing_distilled", 1, patch_size=8)
    assert re.search(rf"^\| parameters \| [\d.]+ \| {weights:,} \|$", text, re.MULTILINE)
