"""tools/benchmark.py: its bookkeeping against work of known cost, and its pipelines."""

import collections
import functools
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

CONFIG = "--config=deit_b"
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's dataset


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


def prefetching(seconds, context=None):
    """Three batches are always being prepared: in a thread or, with a context, in a process."""
    made = context.Queue(3) if context else queue.Queue(3)
    worker = context.Process if context else threading.Thread
    worker(target=_produce, args=(seconds, made), daemon=True).start()
    return iter(made.get, "never")


def with_worker(seconds):
    return prefetching(seconds, multiprocessing.get_context("fork"))


def broken(seconds):
    """Fails at the second batch."""
    yield None
    raise InputError("no such image")


def runner(name, build):
    return turns.Runner(name, functools.partial(turns.deliver, functools.partial(build, 0.03)), [0])


@pytest.mark.slow
def test_a_turn_costs_what_its_batches_cost():
    peaks = {}
    for build in (steady, prefetching, with_worker):
        with runner(build.__name__, build) as one:
            taken = turns.take_turns({"one": one}, rounds=1, count=6)["one"]
        assert [turn.cpu for turn in taken] == pytest.approx([0.18], abs=0.04), build
        assert taken[0].wall >= 0.18
        assert one.facts["first_s"] >= 0.03
        assert 0.03 <= one.facts["first_cpu_s"] < 5
        peaks[build] = taken[0].peak_memory
    assert 5e6 < peaks[steady] < 2e9
    assert peaks[with_worker] > peaks[steady] * 1.3


def test_an_iterator_that_fails():
    with runner("odd", broken) as one, pytest.raises(InputError, match="no such image"):
        one.turn(1)


@pytest.mark.slow
def test_input(sample_images, tmp_path, monkeypatch, capsys):
    def fewer(*args, **options):  # each takes seconds to start
        found = compared(*args, **options)
        assert found.pop("timm, float32")
        return found

    compared = benchmark_input.compared
    monkeypatch.setattr(benchmark_input, "compared", fewer)
    file = tmp_path / "numbers.md"
    argv = (
        f"input {CONFIG} --config.input.image_size=64 --data={sample_images} --write={file} --json"
    )
    argv += " --only=eval --compare=timm --cores=1 --rounds=1 --images=8 --batch=4"
    status = benchmark.main(argv.split())
    out, err = capsys.readouterr()
    assert status == 0, err

    report = json.loads(out)
    assert report["files"] == {"val": len(list(sample_images.glob("val/*/*")))}
    found = report["kinds"]["eval"]
    assert set(found) == {"ours, uint8", "timm, uint8"}
    for one in found.values():
        assert 0.01 < one["cpu_ms"] < 1000
        assert one["cpu_ms_rounds"] == [one["cpu_ms"]]
        assert one["images_per_cpu_second"] == pytest.approx(1e3 / one["cpu_ms"])
        ratio = one["cpu_ms"] / found["ours, uint8"]["cpu_ms"]
        assert one["ours_is_faster"] == pytest.approx(ratio)
        assert one["first_batch_cpu_s"] > 0.5
        assert 1e8 < one["peak_memory_bytes"] < 3e9
    assert f"| timm, uint8 | {found['timm, uint8']['cpu_ms']:.2f} ms |" in file.read_text()


@pytest.fixture
def config(sample_images):
    """Of the sample, at 64 pixels."""
    import torch

    threads = torch.get_num_threads()
    config = default_config()
    config.dataset.update(source="folder", root=str(sample_images), eval_split="val")
    config.input.update(image_size=64, repeats=3)
    config.mixing.prob = 0.0  # which needs an even number of images
    config.train.batch_size = 3
    yield config
    torch.set_num_threads(threads)


def test_evaluation_is_the_same_work(config):
    """timm's pixels are ours; in float32 they are normalised."""
    ours = next(pipelines.ours(config, train=False))["image"]
    pixels = next(pipelines.timm(config, 1, train=False, in_uint8=True))[0].numpy()
    np.testing.assert_array_equal(pixels.transpose(0, 2, 3, 1), ours)
    normalised = next(pipelines.timm(config, 1, train=False, in_uint8=False))[0].numpy()
    restored = 255 * (normalised.transpose(0, 2, 3, 1) * config.input.std + config.input.mean)
    np.testing.assert_allclose(restored, ours, atol=1e-3)


@pytest.mark.parametrize("in_uint8", [False, True])
@pytest.mark.parametrize("jitter", [0.0, 0.3])
def test_pytorchs_training_batches(config, in_uint8, jitter):
    """Batches without end, in which every image has all its views; 3-Augment with jitter."""
    config.input.color_jitter = jitter
    build = pipelines.reference if jitter else functools.partial(pipelines.timm, train=True)
    for images, labels in itertools.islice(build(config, 1, in_uint8=in_uint8), 4):
        assert images.shape == (3, 3, 64, 64)
        assert str(images.dtype) == ("torch.uint8" if in_uint8 else "torch.float32")
        assert len(set(labels.tolist())) == 1


def test_the_reference_draws_one_of_three(config, sample_images):
    config.input.update(hflip=0.0, scale=(1.0, 1.0), ratio=(1.0, 1.0), color_jitter=0.0)
    pipelines._prepare_torch(1)
    chain = pipelines.three_augment_chain(config.input, in_uint8=True)
    image = Image.open(next(sample_images.glob("val/*/*"))).convert("RGB").resize((64, 64))
    pixels = {
        "grey": np.asarray(image.convert("L").convert("RGB")),
        "solarised": np.asarray(ImageOps.solarize(image)),
    }
    original, counts = np.asarray(image, int), collections.Counter()
    for _ in range(60):
        result = chain(image).numpy().transpose(1, 2, 0).astype(int)
        kinds = [kind for kind, wanted in pixels.items() if np.array_equal(result, wanted)]
        counts[kinds[0] if kinds else "blurred"] += 1
        if not kinds:
            assert np.std(np.diff(result, axis=1)) <= np.std(np.diff(original, axis=1))
            assert np.abs(result.mean((0, 1)) - original.mean((0, 1))).max() < 2
    assert len(counts) == 3
    assert min(counts.values()) > 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["output"], "expected one of input"),
        (["input", "--data=."], "--config"),
        (["input", CONFIG, "--data=nowhere"], "nowhere/train"),
        (["input", CONFIG, "--data=.", "--cores=1000"], "--cores"),
        (["input", CONFIG, "--data=.", "--images=100"], "--images"),
        (["input", "--config=digits", "--data={}", "--compare=timm"], "train_crop"),
        (["input", CONFIG, "--data=.", "--latency-ms=50", "--only=train"], "--only"),
        (["input", CONFIG, "--data=nowhere", "--latency-ms=50"], "nowhere/train"),
        (["train", "--model=deit_testing", "--batch=3"], "--batch"),
        (["train", "--model=deit_testing", "--distill=hard"], "distill"),
        (["train", "--model=deit_testing", "--steps=0"], "--steps"),
        (["train", "--model=deit_tseting"], "deit_testing"),
    ],
)
def test_a_mistake_is_one_line(arguments, word, sample_images, capsys):
    assert benchmark.main([argument.format(sample_images) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *_, line = err.splitlines()
    assert line.startswith("error: ")
    assert word in line


def test_timm_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_input, "find_spec", lambda name: None)
    assert benchmark.main(["input", CONFIG, "--data=.", "--compare=timm"]) == 2
    assert "pip install" in capsys.readouterr().err
