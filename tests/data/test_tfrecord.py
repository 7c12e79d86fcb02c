"""TFRecord files: their index, its cache, and how much of a file a record costs."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from deit_jax.data import tfrecord
from deit_jax.data.tfrecord import Part, TfRecords


def _write(path, records):
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record)
    return path


def _contents(records):
    dataset = tf.data.Dataset.range(len(records)).map(records.read, num_parallel_calls=2)
    return list(dataset.as_numpy_iterator())


def test_parts_of_files_in_any_order_and_empty_records(tmp_path):
    a = [b"", b"one", b"two" * 50]
    b = [b"x" * 7, b"y"]
    a_file = str(_write(tmp_path / "a", a))
    b_file = str(_write(tmp_path / "b", b))
    parts = [Part(b_file, 2, 1, 1), Part(a_file, 3, 0, 2), Part(b_file, 2, 0, 0)]
    records = TfRecords([*parts, Part(a_file, 3, 1, 2)])
    assert _contents(records) == [b"y", b"", b"one", b"one", b"two" * 50]


def test_damage_within_a_record_is_noticed(tmp_path):
    path = _write(tmp_path / "a", [b"sound", b"broken"])
    path.write_bytes(path.read_bytes().replace(b"broken", b"brokeN"))
    records = TfRecords([Part(str(path), 2, 0, 2)])
    assert records.read(tf.constant(0, tf.int64)).numpy() == b"sound"
    with pytest.raises(tf.errors.DataLossError):
        records.read(tf.constant(1, tf.int64))


def test_a_record_costs_its_own_bytes_wherever_it_is(tmp_path):
    size, count = 110_000, 1251  # a shard of ImageNet: 138 MB
    path = _write(tmp_path / "shard", (bytes([k % 251]) * size for k in range(count)))
    records = TfRecords([Part(str(path), count, 0, count)])
    records.read(tf.constant(7, tf.int64))  # what is read once

    def read_so_far():
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    for index in (0, count // 2, count - 1):
        before = read_so_far()
        record = records.read(tf.constant(index, tf.int64)).numpy()
        assert read_so_far() - before <= 1.1 * size
        assert record == bytes([index % 251]) * size


def test_large_scans_are_remembered_until_a_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tfrecord, "_CACHE_FROM", 1)
    scans, scan = [], tfrecord._scan
    monkeypatch.setattr(tfrecord, "_scan", lambda *a: scans.append(a) or scan(*a))
    want = [b"one", b"two", b"three"]
    path = _write(tmp_path / "a", want)

    def scanned():
        before = len(scans)
        assert _contents(TfRecords([Part(str(path), 3, 0, 3)])) == want
        return len(scans) > before

    assert scanned()
    assert not scanned()
    (cache,) = (tmp_path / "cache").rglob("*.npy")
    whole = cache.read_bytes()
    offsets = np.load(cache)
    for damaged in (b"", whole[:-9], whole.replace(b"i8", b"f8")):
        cache.write_bytes(damaged)
        assert scanned()
        assert cache.read_bytes() == whole
    for wrong in (offsets + 1, offsets[:-1], np.roll(offsets, 1), offsets[[0, 2, 1, 3]]):
        np.save(cache, wrong)
        assert scanned()
    os.utime(path, (path.stat().st_mtime + 10,) * 2)
    assert scanned()
    assert not scanned()
