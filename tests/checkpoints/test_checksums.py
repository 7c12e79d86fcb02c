"""Checksums: equal on host and devices, and no flipped bit on a disk passes unnoticed."""

import collections
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deit_jax.checkpoints import checksums
from deit_jax.checkpoints.model_folder import load_checkpoint, load_model, read_info, save_model
from deit_jax.errors import InputError
from tests.checkpoints.saved import abstract, assert_equal, opened, random_state, save, tiny
from tests.refusal import refusal

RNG = np.random.default_rng(0)
ARRAYS = {
    "float32": RNG.standard_normal((5, 3, 7), np.float32),
    "bfloat16": np.asarray(RNG.standard_normal((4, 9)), jnp.bfloat16),
    "float8": np.asarray(RNG.standard_normal(33), jnp.float8_e4m3fn),
    "int32": RNG.integers(-(2**31), 2**31, (3, 5)).astype(np.int32),
    "a key": np.asarray(jax.random.PRNGKey(7)),
    "bool": RNG.integers(0, 2, 19).astype(bool),
    "uint8": RNG.integers(0, 256, (2, 2, 2)).astype(np.uint8),
    "a scalar": np.float32(-0.0),
    "a step": np.int32(17),
    "empty": np.zeros((0, 4), np.float32),
    "several blocks": RNG.integers(0, 2**32, 2**16 + 5, dtype=np.uint32),
    "not contiguous": RNG.standard_normal((6, 8), np.float32).T[::2],
}


def _formula(array):
    """The definition, in Python's own integers, over the bytes of the array."""
    size, total = array.dtype.itemsize, 0
    content = array.tobytes()
    for place in range(array.size):
        x = int.from_bytes(content[size * place : size * (place + 1)], "little")
        x ^= place * 0x9E3779B9 % 2**32
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        total += x ^ x >> 16
    return f"{total % 2**32:08x}"


def test_host_and_device_follow_the_formula():
    expected = {name: _formula(array) for name, array in ARRAYS.items()}
    assert checksums.of(ARRAYS, "a test") == expected
    assert checksums.of(jax.tree.map(jnp.asarray, ARRAYS), "a test") == expected


def test_eight_bytes_are_two_words():
    wide = RNG.standard_normal((3, 4))
    found = checksums.of({"host": wide, "words": wide.view(np.uint32)}, "a test")
    with jax.enable_x64(True):
        found |= checksums.of({"device": jnp.asarray(wide)}, "a test")
    assert len(set(found.values())) == 1


@pytest.mark.parametrize("name", ["float32", "bfloat16", "bool", "uint8"])
def test_every_bit_and_every_swap_counts(name):
    """Also of values that differ in few bits, as 1.0 and -1.0 do."""
    array = ARRAYS[name].reshape(-1)[:32]
    before, size = checksums.of({"": array}, "a test"), array.dtype.itemsize
    changed = []
    for bit in range(8 * array.nbytes):
        if name != "bool" or bit % 8 == 0:
            content = bytearray(array.tobytes())
            content[bit // 8] ^= 1 << bit % 8
            changed.append(np.frombuffer(bytes(content), array.dtype))
    for _ in range(300 if size > 1 else 0):
        signs = np.where(RNG.integers(0, 2, 32), 1, -1).astype(array.dtype)
        first, second = RNG.choice(32, 2, replace=False)
        if signs[first] != signs[second]:
            swapped = signs.copy()
            swapped[[first, second]] = signs[[second, first]]
            assert checksums.of({"": swapped}, "") != checksums.of({"": signs}, "")
    assert all(checksums.of({"": other}, "a test") != before for other in changed)


# Files on a disk


def _flip(folder, rng, *, among="*"):
    """Flips a random bit of the files below a folder, large ones more often."""
    files = [path for path in sorted(folder.rglob(among)) if path.is_file()]
    sizes = np.array([path.stat().st_size for path in files])
    file = files[rng.choice(len(files), p=sizes / sizes.sum())]
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    file.write_bytes(content)


@pytest.mark.slow
def test_no_flipped_bit_of_a_model_folder_passes(tmp_path):
    model, rng, outcomes = tiny(seed=1), np.random.default_rng(1), collections.Counter()
    save_model(tmp_path / "sound", model)
    for _ in range(30):
        shutil.copytree(tmp_path / "sound", tmp_path / "model")
        _flip(tmp_path / "model", rng)
        try:
            found = load_model(tmp_path / "model")
        except InputError:
            outcomes["refused"] += 1
        else:
            assert_equal(found, model)
            assert found.info == model.info
            outcomes["harmless"] += 1
        shutil.rmtree(tmp_path / "model")
    assert outcomes["refused"] >= 15, outcomes


@pytest.mark.slow
def test_no_flipped_bit_of_a_checkpoint_passes(tmp_path, capsys):
    """It is set aside as one that cannot be read, and the one before is taken."""
    rng, outcomes = np.random.default_rng(2), collections.Counter()
    (info, first), (_, second) = random_state(seed=1), random_state(seed=2)
    with opened(tmp_path / "sound") as checkpoints:
        save(checkpoints, info, first, 1)
        save(checkpoints, info, second, 2)
    for _ in range(30):
        shutil.copytree(tmp_path / "sound", tmp_path / "run")
        _flip(tmp_path / "run" / "checkpoints" / "2", rng)
        with opened(tmp_path / "run") as checkpoints:
            found, best, step = checkpoints.restore(abstract(first))
        assert_equal(found, first if step == 1 else second)
        assert best["step"] == step
        assert (tmp_path / "run" / "checkpoints" / "2.unreadable").exists() == (step == 1)
        outcomes[step] += 1
        shutil.rmtree(tmp_path / "run")
    assert outcomes[1] >= 15, outcomes
    assert "does not agree with its checksum" in capsys.readouterr().out


@pytest.fixture
def damaged(tmp_path):
    """A run folder with a model and a checkpoint, whose arrays are not those that were saved."""
    info, state = random_state(seed=1)
    other = random_state(seed=2)[1]
    for workdir, saved in (("run", state), ("other", other)):
        with opened(tmp_path / workdir) as checkpoints:
            save(checkpoints, info, saved, 5)
    save_model(tmp_path / "run" / "model", tiny(seed=1))
    save_model(tmp_path / "other" / "model", tiny(seed=2))
    for place in ("model/weights", "checkpoints/5/state"):
        shutil.rmtree(tmp_path / "run" / place)
        shutil.copytree(tmp_path / "other" / place, tmp_path / "run" / place)
    return tmp_path / "run"


def test_what_differs_is_named(damaged):
    line = refusal(load_model, damaged)
    assert line.startswith(f"{damaged / 'model' / 'weights'} is damaged (params/blocks/0/")
    assert "does not agree with its checksum, nor do" in line
    for ema in (False, True):
        line = refusal(lambda ema=ema: load_checkpoint(damaged / "checkpoints" / "5", ema=ema))
        assert f"is damaged ({'ema' if ema else 'model'}/params/blocks/0/" in line
    with opened(damaged) as checkpoints:
        line = refusal(checkpoints.restore, abstract(random_state()[1]))
    assert "checksum" in line
    assert "no older checkpoint" in line


def test_other_fields_in_a_file_of_orbax(damaged):
    """Whatever comes of it in Orbax's own code is damage, not a mistake of ours."""
    file = damaged / "checkpoints" / "5" / "state" / "array_metadatas" / "process_0"
    file.write_text(file.read_text().replace('"array_metadata"', '"array_metadate"', 1))
    with opened(damaged) as checkpoints:
        line = refusal(checkpoints.restore, abstract(random_state()[1]))
    assert "5 cannot be read ('dict' object has no attribute 'param_name')" in line


def _without(file, *names):
    fields = {k: v for k, v in json.loads(file.read_text()).items() if k not in names}
    file.write_text(json.dumps(fields | ({"format": 1} if "format" in fields else {})))


def test_what_an_earlier_version_saved_is_read_as_before(damaged, capsys):
    _without(damaged / "model" / "model.json", "checksums", "digest")
    _without(damaged / "checkpoints" / "5" / "meta" / "metadata", "checksums", "digest")
    assert_equal(load_model(damaged), tiny(seed=2))
    with opened(damaged) as checkpoints:
        assert_equal(checkpoints.restore(abstract(random_state()[1]))[0], random_state(seed=2)[1])
    assert "note: step 5 is of an earlier version, without checksums" in capsys.readouterr().out


def test_a_description_changed_by_hand(tmp_path):
    save_model(tmp_path / "model", tiny())
    file = tmp_path / "model" / "model.json"
    file.write_text(file.read_text().replace('"crop_ratio": null', '"crop_ratio": 0.9'))
    assert 'remove "digest" from it if you have changed it' in refusal(load_model, tmp_path)
    _without(file, "digest")
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    assert load_model(tmp_path).info.crop_ratio == read_info(tmp_path).crop_ratio == 0.9


def test_a_state_may_be_donated_as_soon_as_it_is_being_saved(tmp_path):
    info, state = random_state(seed=1)
    kept = jax.tree.map(np.asarray, state)
    with opened(tmp_path) as checkpoints:
        save(checkpoints, info, state, 5)
        jax.jit(lambda x: jax.tree.map(lambda y: y * 0, x), donate_argnums=0)(state)
    with opened(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore(abstract(kept))[0], kept)
