"""Paths on disks and in buckets, without a bucket; tests/test_bucket.py has one."""

import json
import os
import pathlib

import pytest

from deit_jax import storage
from deit_jax.errors import InputError


def test_paths_on_a_disk(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ann")
    assert storage.path_of("~/runs", "a") == pathlib.Path("/home/ann/runs/a")
    assert storage.path_of("runs//a/../b") == tmp_path / "runs" / "b"
    assert storage.path_of(pathlib.Path("gs:bucket")) == tmp_path / "gs:bucket"
    assert not storage.is_remote(storage.path_of("x"))


def test_paths_in_a_bucket():
    path = storage.path_of("gs://bucket/runs", "a")
    assert storage.is_remote(path)
    assert os.fspath(path) == "gs://bucket/runs/a"
    assert os.fspath(storage.path_of(path)) == "gs://bucket/runs/a"


@pytest.mark.parametrize("text", ["s3://b/x", "hf://b/x", "GS://b/x", "az://b", "https://a/b"])
def test_other_schemes_are_refused(text):
    with pytest.raises(InputError, match="is not supported, expected a path on a disk or gs://"):
        storage.path_of(text)


def test_a_missing_package_is_named(monkeypatch):
    storage._connect.cache_clear()
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'deit-jax\[gcs\]'"):
        storage.path_of("gs://bucket/run")


@pytest.mark.parametrize("text", ["", b"\xff", "[" * 100_000, "[" * 101 + "]" * 101, '{"a":' * 200])
def test_json_that_no_reader_can_follow(text):
    with pytest.raises(ValueError):
        storage.parse_json(text)


def test_json_is_read_in_text_and_bytes():
    text = "[" * 98 + '{"ü": [0, null]}' + "]" * 98
    assert storage.parse_json(text) == storage.parse_json(text.encode()) == json.loads(text)
