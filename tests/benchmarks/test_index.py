"""tools/benchmark.py index: the data set that it makes, and what it reports of one."""

import json

import numpy as np
import pytest
import tensorflow as tf

from benchmarks import benchmark, index
from deit_jax.config.fields import default_config
from deit_jax.data import open_source


def test_the_data_set(tmp_path):
    """1,003 records in 4 files: class n % 1000 is at n, in one colour a class."""
    size = index.write_data_set(tmp_path / "tiny" / "1.0.0", 1003, 4)
    files = sorted((tmp_path / "tiny" / "1.0.0").glob("*.tfrecord-*"))
    assert sum(file.stat().st_size for file in files) == size
    assert len(files) == 4
    config = default_config().dataset
    config.update(source="tfds", root=str(tmp_path), name="tiny")
    source = open_source(config, "train")
    examples = tf.data.Dataset.range(source.num_examples).map(source.fetch).as_numpy_iterator()
    images, labels = zip(*examples, strict=True)
    np.testing.assert_array_equal(labels, np.arange(1003) % 1000)
    assert images[:3] == images[1000:]
    assert tf.io.decode_jpeg(images[7]).shape == (16, 16, 3)
    assert len(set(images)) > 990


@pytest.mark.slow
def test_the_report(tmp_path, capsys):
    file = tmp_path / "numbers.md"
    argv = f"index --records=1003 --shards=4 --batch=8 --write={file} --json"
    status = benchmark.main(argv.split())
    out, err = capsys.readouterr()
    assert status == 0, err
    report = json.loads(out)
    for start in index.STARTS:
        one = report["starts"][start]
        # An offset of 8 bytes a record and one more a file; the first record of each file, 8.
        assert one["index_bytes"] > 8 * (1003 + 4 + 4)
        assert one["index_bytes"] < 8 * (1003 + 4 + 4) + 4 * 300
        assert 0 < one["open_s"] < 60
        assert 1e8 < one["resident_before_bytes"] <= one["resident_after_bytes"] < 3e9
        assert list(one["batch_s"]) == ["0", "10000000"]
        assert f"| {start} | {one['open_s']:.2f} s" in file.read_text()


def test_fewer_records_than_files(capsys):
    assert benchmark.main(["index", "--records=1000", "--shards=1001"]) == 2
    assert "--shards" in capsys.readouterr().err
