"""What a run will need: --mode=plan, the reading of compiled programs, and compile_for."""

import contextlib
import importlib.util
import re
from pathlib import Path

import jax
import pytest
from flax import nnx

from configs import digits
from deit_jax.checkpoints.training import TrainCheckpoints
from deit_jax.cli.main import main
from deit_jax.errors import InputError
from deit_jax.models import registry
from deit_jax.planning import chips, collectives, forecast, markdown, report, tpu
from tests import small_main
from tests.checkpoints import saved


def bytes_of(name, fsdp, **options):
    """The float32 weights of a model on one device: arrays of 2^14 numbers and more are split."""
    model = registry.create_model(name, num_classes=10, **options, rngs=nnx.Rngs(0))
    total = 0
    for leaf in jax.tree.leaves(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        split = leaf.size >= 2**14 and any(side % fsdp == 0 for side in leaf.shape)
        total += 4 * leaf.size // (fsdp if split else 1)
    return total


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 4])
def test_plan_counts_the_bytes_of_a_device(tmp_path, run_python, monkeypatch, fsdp):
    """Eight devices, a teacher that is not trained yet; nothing is written."""
    workdir = tmp_path / "run"
    monkeypatch.setattr(registry, "_MODELS", small_main.models())
    done = run_python(
        small_main.SCRIPT,
        "--config=configs/digits_distill.py",
        f"--workdir={workdir}",
        "--mode=plan",
        f"--config.parallel.fsdp={fsdp}",
        env={"JAX_NUM_CPU_DEVICES": "8"},
    )
    assert done.returncode == 0, done.stderr
    assert not workdir.exists()
    cells = re.findall(r"^\| ([^|]+) \| [\d.]+ \| ([\d,]+) \|$", done.stdout, re.MULTILINE)
    rows = {name: int(size.replace(",", "")) for name, size in cells}
    student = bytes_of("deit_testing_distilled", fsdp, patch_size=8)
    assert rows["parameters"] == rows["EMA"] == student
    assert rows["optimizer"] == 2 * student + 4  # two moments and Adam's count
    assert rows["teacher"] == bytes_of("regnety_testing", 1)
    assert rows["batch"] == 64 // 8 * (32 * 32 * 3 + 4)
    arguments = next(size for name, size in rows.items() if "arguments**" in name)
    listed = ("parameters", "EMA", "optimizer", "teacher", "batch")
    assert arguments == pytest.approx(sum(rows[name] for name in listed), rel=0.01)
    assert "**Fits.**" in done.stdout
    assert ("| all-gather |" in done.stdout) == (fsdp > 1)
    assert "must deliver 64 / S images/s" in done.stdout


def test_plan_of_a_run_that_would_not_start(tmp_path):
    """The workdir holds another model's checkpoints, or cannot be made."""
    config = digits.get_config()
    info, state = saved.random_state()
    with contextlib.closing(TrainCheckpoints(tmp_path, keep=1)) as checkpoints:
        saved.save(checkpoints, info, state, 1)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="checkpoints/1"):
        forecast.plan(config, str(tmp_path))
    (tmp_path / "file").touch()
    for place in ("file", "file/run"):
        with pytest.raises(InputError, match=r"--workdir=.*file"):
            forecast.plan(config, str(tmp_path / place))
    (tmp_path / "file").unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_collectives_are_found_where_they_are():
    """In every form of result and groups that the compilers print."""
    Collective = collectives.Collective
    found = collectives.read(Path(__file__).with_name("collectives.hlo").read_text(), 4)
    assert found == [
        Collective("all-reduce", 404, 4),
        Collective("all-gather", 80, 4),
        Collective("all-to-all", 256, 2),
        Collective("reduce-scatter", 64, 4, "loop", 3),
        Collective("collective-permute", 8, 4, "loop, counted once"),
        Collective("reduce-scatter", 128, 2),
        Collective("all-gather", 64, 2),  # one, spread over two fusions
        Collective("all-reduce", 24, 4),  # the type names the operands, too
        Collective("reduce-scatter", 48, 4),
        Collective("collective-permute", 8, 4, "branch"),
    ]
    rows = {(row["kind"], row["where"]): row for row in collectives.table([*found, found[0]])}
    assert rows["all-reduce", "step"]["count"] == 3
    assert rows["all-reduce", "step"]["bytes"] == 832
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
    seconds = (4 * 1.5 + 2 * 0.75 + 1) / 4
    assert bounds == pytest.approx({"compute": 4.0, "memory": 0.5, "communication": seconds})
    assert forecast.roofline(chips.Chip(tflops=2), 8e12, 5e9, found) == {"compute": 4.0}


def test_every_topology_has_its_chip():
    names = {"TPU v5 lite": 16, "TPU v5": 95, "TPU v5p": 95, "TPU v6 lite": 32, "TPU v4": 32}
    assert {name: chips.find(name).memory for name in names} == names
    assert chips.find("cpu") is None


def text_of(**changes):
    """The text of a forecast as if compiled: a step of 20 GiB, half a second at least."""
    names = ("parameters", "optimizer", "ema", "teacher", "batch")
    memory = dict.fromkeys(("arguments", "outputs", "temporaries", "program"), 0)
    found = {
        "model": "m", "teacher": None, "batch": 64, "image_size": 32, "dtype": "bfloat16",
        "remat": False, "accumulate_steps": 1, "device": "TPU v5 lite", "devices": 4,
        "mesh": {"data": 4, "fsdp": 1}, "compile_s": 1.0, "state": dict.fromkeys(names, 2**30),
        "memory": memory | {"total": 20 * 2**30}, "refusal": None, "limit": 16 * 2**30,
        "fits": False, "flops": 1e12, "bytes_accessed": 1e9, "collectives": [],
        "bounds": {"compute": 0.25, "memory": 0.5}, "estimate": {}, "host": {
            "bytes_per_image": 3076, "bytes_per_step": 196864, "images_per_second": 128.0,
        },
    }  # fmt: skip
    return "\n".join(report.lines(found | changes))


def test_a_step_that_is_too_large():
    text = text_of()
    assert "Does not fit: 4.00 GiB over.** Try --config.parallel.fsdp=4 or" in text
    assert "--config.model.remat=True" in text
    assert "memory-bound: at most 128 images/s, 32 per device" in text
    assert "the hosts together must deliver 128 images/s." in text
    assert "Whether it fits is unknown" in text_of(limit=None, fits=None)


@pytest.mark.parametrize(
    ("said", "over"),
    [
        ("Ran out of memory in memory space hbm. Used 17.25G of 15.75G hbm.", 1.5),
        # The state is not among the temporaries.
        ("total memory required for HLO temporaries (16G) exceeds available HBM (15.75G).", 5.25),
        ("no figures", None),
    ],
)
def test_a_step_that_the_compiler_refuses(said, over):
    error = RuntimeError(f"RESOURCE_EXHAUSTED: {said}")
    state = dict.fromkeys("abcde", 2**30)
    text = text_of(**forecast.refused(error, state), remat=True)
    assert "Does not fit" + (f": {over:.2f} GiB over.**" if over else ".**") in text
    assert f"The compiler: {error}" in text
    assert "remat=True" not in text


def test_a_section_takes_its_own_place(tmp_path):
    file = tmp_path / "numbers.md"
    markdown.write_section(file, ["## One", "", "old"])
    markdown.write_section(file, ["## Two", "", "kept"])
    markdown.write_section(file, ["## One", "", "new"])
    assert file.read_text() == "# numbers\n\n## One\n\nnew\n\n## Two\n\nkept\n"


RECIPE = ["--config=configs/digits_distill.py", "--config.train.dtype=bfloat16", "--classes=10"]


def compile_for(capsys, *flags):
    status = main(["compile-for", *RECIPE, "--train-images=1438", *flags])
    out, err = capsys.readouterr()
    return status, out if status == 0 else err


def test_without_the_compiler(capsys, monkeypatch):
    monkeypatch.setattr(tpu, "find_spec", lambda name: None)
    status, error = compile_for(capsys, "--topology", "v5e:2x2")
    assert status == 2
    assert "pip install 'jax[tpu]==" in error


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler (libtpu)"
)


@needs_libtpu
def test_unknown_topology(capsys):
    status, error = compile_for(capsys, "--topology", "v5e:3x3")
    assert status == 2
    assert "--topology v5e:3x3" in error


@pytest.mark.slow
@needs_libtpu
def test_one_all_reduce_on_a_slice(capsys):
    """Of the gradients and metrics of hard distillation, and nothing else."""
    status, text = compile_for(capsys, "--topology", "v5e:2x2")
    assert status == 0
    assert "| all-reduce | step | 4 | 1 |" in text
    assert text.count("| step |") == 1
    weights = bytes_of("deit_testing_distilled", 1, patch_size=8)
    assert re.search(rf"^\| parameters \| [\d.]+ \| {weights:,} \|$", text, re.MULTILINE)
