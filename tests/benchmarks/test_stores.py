"""tools/benchmark.py input --latency-ms: the same images in every store, and a read that waits."""

import types

import numpy as np
import pytest

from benchmarks import stores, turns
from deit_jax.config.fields import default_config


@pytest.mark.slow
def test_every_store_holds_the_same(sample_images, tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(stores, "time", types.SimpleNamespace(sleep=slept.append))
    size = stores.store(sample_images / "train", tmp_path, 24)
    assert sum(file.stat().st_size for file in tmp_path.glob("folder/train/*/*")) == size
    recipe = default_config()
    recipe.input.update(image_size=32, auto_augment="")
    found = {}
    for name, (source, latency) in stores.stores(70).items():
        config = stores.configured(recipe, str(tmp_path), source, 8)
        batches, before = stores.batches(config, latency), len(slept)
        found[name] = [next(batches) for _ in range(3)]
        assert (len(slept) > before) == (name == "70 ms a read")
    assert set(slept) == {0.07}
    assert list(found) == ["folder", "tfrecord", "array_record", "70 ms a read"]
    for batches in found.values():
        for batch, wanted in zip(batches, found["folder"], strict=True):
            np.testing.assert_array_equal(batch["image"], wanted["image"])
            np.testing.assert_array_equal(batch["label"], wanted["label"])


def test_figures():
    """Half the CPU time, and twice the time by the clock, of which the wait at the end is none."""
    folder = [turns.Turn(turns.QUIET + wall, 2 * wall, 1) for wall in (1, 2, 3)]
    other = [turns.Turn(turns.QUIET + 2 * wall, wall, 7) for wall in (1, 2, 3)]
    found = stores._figures(other, folder, images=80)
    assert (found["images_per_cpu_second"], found["images_per_second"]) == (40, 20)
    assert (found["of_folder"], found["clock_of_folder"]) == (2, 0.5)
    assert found["peak_memory_bytes"] == 7
