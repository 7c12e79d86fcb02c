"""tools/benchmark.py: its bookkeeping against work of known cost, and that it compares equals."""

import contextlib
import functools
import importlib.util
import itertools
import json
import multiprocessing
import queue
import threading
import time

import numpy as np
import pytest
from PIL import Image, ImageOps

from benchmarks import benchmark, pipelines, turns
from benchmarks import input as benchmark_input
from deit_jax.config.fields import default_config
from deit_jax.errors import InputError

CONFIG = "--config=configs/deit_b.py"


def _picture(seed, height, width):
    """Smooth colours with some noise; not the one of tests.data, which brings TensorFlow along."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(40, 216, (4, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), int)
    noisy = smooth + rng.integers(-30, 31, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of a few JPEGs of different sizes."""
    root = tmp_path_factory.mktemp("images")
    for number, place in enumerate(("train/a", "train/a", "train/b", "val/a", "val/b", "val/b")):
        (root / place).mkdir(parents=True, exist_ok=True)
        image = _picture(number, 60 + 9 * number, 95 - 8 * number)
        image.save(root / place / f"{number}.JPEG")
    return root


def _burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def steady(seconds):
    """Batches that cost so much CPU time each."""
    while True:
        _burn(seconds)
        yield None


def _produce(seconds, made):
    while True:
        _burn(seconds)
        made.put(None)


def prefetching(seconds):
    """Three batches are always being prepared in a thread."""
    made = queue.Queue(3)
    threading.Thread(target=_produce, args=(seconds, made), daemon=True).start()
    return iter(made.get, "never")


def with_worker(seconds):
    """The same in a process."""
    made = multiprocessing.get_context("fork").Queue(3)
    context = multiprocessing.get_context("fork")
    context.Process(target=_produce, args=(seconds, made), daemon=True).start()
    return iter(made.get, "never")


def test_a_turn_costs_what_its_batches_cost():
    build = {"steady": steady, "prefetching": prefetching, "with_worker": with_worker}
    builders = {name: functools.partial(f, 0.03) for name, f in build.items()}
    costs = turns.measure(builders, cores=1, turns=1, batches=6)
    for name, cost in costs.items():
        assert cost.turns == pytest.approx([0.18], abs=0.04), name
        assert 0.03 <= cost.first < 5
        assert cost.first_wall >= 0.03
        assert 5e6 < cost.peak < 2e9
    assert costs["with_worker"].peak > costs["steady"].peak * 1.3


def broken(error):
    """Fails at the second batch."""
    yield None
    raise error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (InputError("no such image"), "odd: no such image"),
        (RuntimeError("bug"), "odd: its process"),
    ],
)
def test_an_iterator_that_fails(error, words, capfd):
    with pytest.raises(InputError, match=words):
        turns.measure({"odd": functools.partial(broken, error)}, cores=1, turns=1, batches=1)
    assert ("RuntimeError: bug" in capfd.readouterr().err) == isinstance(error, RuntimeError)


def test_input(folder, repo_root, tmp_path, monkeypatch, capsys):
    def fewer(*args, **options):  # each takes seconds to start
        return {k: v for k, v in compared(*args, **options).items() if k != "timm"}

    compared = benchmark_input.compared
    monkeypatch.setattr(benchmark_input, "compared", fewer)
    monkeypatch.chdir(repo_root)
    file = tmp_path / "numbers.md"
    file.write_text("# Numbers\n\n## Input pipeline, 1 core\n\nold\n\n## Other\n\nkept\n")
    flags = ["--only=eval", "--compare=timm", "--cores=1", "--rounds=1", "--images=8", "--batch=4"]
    size = "--config.input.image_size=64"
    argv = ["input", CONFIG, size, "--data", str(folder), *flags, "--json", "--write", str(file)]
    status = benchmark.main(argv)
    out, err = capsys.readouterr()
    assert status == 0, err

    report = json.loads(out)
    assert report["files"] == {"val": 3}
    assert set(report["kinds"]) == {"eval"}
    found = report["kinds"]["eval"]["pipelines"]
    assert set(found) == {"ours", "timm_uint8"}
    ours = found["ours"]
    assert ours["ours_is_faster"] == 1
    for one in found.values():
        assert 0.01 < one["cpu_ms"] < 1000
        assert one["cpu_ms_rounds"] == [one["cpu_ms"]]
        assert one["images_per_cpu_second"] == pytest.approx(1e3 / one["cpu_ms"])
        assert one["ours_is_faster"] == pytest.approx(one["cpu_ms"] / ours["cpu_ms"])
        assert one["first_batch_cpu_s"] > 0.5
        assert 1e8 < one["peak_memory_bytes"] < 3e9

    text = file.read_text()
    assert text.startswith(
        "# Numbers\n\n## Input pipeline, 1 core\n\n`python tools/benchmark.py input --c"
    )
    assert f"| timm, uint8 | {found['timm_uint8']['cpu_ms']:.2f} ms |" in text
    assert "old" not in text
    assert text.endswith("|\n\n## Other\n\nkept\n")


@pytest.fixture
def setup(folder):
    """For pipelines of this folder, at 64 pixels."""
    import torch

    threads = torch.get_num_threads()
    config = default_config()
    config.dataset.update(source="folder", root=str(folder), eval_split="val")
    config.input.update(image_size=64, repeats=3)
    config.train.batch_size = 3
    yield pipelines.Setup(config, cores=1)
    torch.set_num_threads(threads)


def test_evaluation_is_the_same_work(setup):
    """timm's pixels are ours; in float32 they are normalised."""
    ours = next(pipelines.ours_eval(setup))["image"]
    pixels = next(pipelines.timm_eval_uint8(setup))[0].numpy()
    np.testing.assert_array_equal(pixels.transpose(0, 2, 3, 1), ours)
    normalised = next(pipelines.timm_eval(setup))[0].numpy().transpose(0, 2, 3, 1)
    restored = 255 * (normalised * setup.config.input.std + setup.config.input.mean)
    np.testing.assert_allclose(restored, ours, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("timm_train", "float32"),
        ("timm_train_uint8", "uint8"),
        ("reference_train", "float32"),
        ("reference_train_uint8", "uint8"),
    ],
)
def test_pytorchs_training_batches(setup, name, kind):
    """Batches without end, in which every image has all its views."""
    setup.config.input.color_jitter = 0.3 if "reference" in name else 0.0
    batches = getattr(pipelines, name)(setup)
    for images, labels in itertools.islice(batches, 4):
        assert images.shape == (3, 3, 64, 64)
        assert str(images.dtype) == f"torch.{kind}"
        assert len(set(labels.tolist())) == 1


def test_the_reference_draws_one_of_three(setup):
    config = setup.config.input
    config.update(hflip=0.0, scale=(1.0, 1.0), ratio=(1.0, 1.0), color_jitter=0.0)
    pipelines._prepare_torch(setup)
    chain = pipelines.three_augment_chain(config, in_uint8=True)
    image = _picture(3, 64, 64)
    grey = np.asarray(image.convert("L"))[None].repeat(3, 0)
    solarised = np.asarray(ImageOps.solarize(image)).transpose(2, 0, 1)
    original = np.asarray(image, int).transpose(2, 0, 1)
    counts = dict.fromkeys(("grey", "solarised", "blurred"), 0)
    for _ in range(60):
        result = chain(image).numpy().astype(int)
        if np.array_equal(result, grey):
            counts["grey"] += 1
        elif np.array_equal(result, solarised):
            counts["solarised"] += 1
        else:
            assert np.std(np.diff(result)) <= np.std(np.diff(original))
            assert np.abs(result.mean((1, 2)) - original.mean((1, 2))).max() < 2
            counts["blurred"] += 1
    assert min(counts.values()) > 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the part to measure is missing, expected one of input"),
        (["train"], "--model"),
        (["output"], "the part to measure is 'output'"),
        (["input", CONFIG], "--data"),
        (["input", "--data=."], "--config is missing"),
        (["input", CONFIG, "--data=nowhere"], "no JPEG files in nowhere/train"),
        (["input", CONFIG, "--data=.", "--cores=1000"], "--cores is 1000, expected 1 to"),
        (["input", CONFIG, "--data=.", "--rounds=0"], "--rounds is 0"),
        (["input", CONFIG, "--data=.", "--images=100"], "--images is 100, expected a multiple"),
        (["input", CONFIG, "--data=.", "--compare=dali"], "--compare"),
        (["input", CONFIG, "--data=.", "--config.input.repeat=2"], "no such config field"),
        (["input", CONFIG, "--data=.", "--write=no/such.md"], "--write no/such.md"),
        (
            ["input", "--config=configs/digits.py", "--data={}", "--compare=timm"],
            "with train_crop 'small'",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments, words, folder, repo_root, monkeypatch, capsys):
    monkeypatch.chdir(repo_root)
    assert benchmark.main([argument.format(folder) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1


def test_timm_is_missing(monkeypatch, repo_root, capsys):
    monkeypatch.chdir(repo_root)
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n: None if n == "timm" else find(n))
    assert benchmark.main(["input", CONFIG, "--data=.", "--compare=timm"]) == 2
    assert "--compare timm needs timm; install it" in capsys.readouterr().err


def test_help(capsys):
    assert benchmark.main(["--help"]) == 0
    with contextlib.suppress(SystemExit):
        benchmark.main(["input", "--help"])
    out = capsys.readouterr().out
    assert "Parts: `input`, the" in out
    assert "input --config=FILE" in out
