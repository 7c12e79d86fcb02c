"""Every family against PyTorch through the converter; the tool itself does the whole zoo."""

import contextlib

import numpy as np
import pytest

from experiments import verify_parity


@pytest.fixture
def pictures(sample_images):
    return verify_parity._pictures(sample_images)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "deit3_tiny_patch16_224",
        "cait_xxs24_224",
        "resmlp_12_224",
        "regnety_002",
    ],
)
def test_small_models(name, pictures):
    row = verify_parity.compare(name, pictures[:1], num_random=1)
    assert row.logits <= row.limit == 2e-5
    assert row.features <= row.limit


@pytest.mark.slow
def test_a_difference_is_seen(monkeypatch, capsys, sample_images):
    """With one bias off by a thousandth the tool ends with 1 and names the model."""
    read = verify_parity.from_torch.from_tensors

    def spoilt(tensors, **more):
        bias = tensors["head.bias"] + np.float32(1e-3)
        return read({**tensors, "head.bias": bias}, **more)

    monkeypatch.setattr(verify_parity.from_torch, "from_tensors", spoilt)
    status = verify_parity.main(["deit_tiny_patch16_224", "--images", str(sample_images)])
    assert status == 1
    assert "beyond the limits: deit_tiny_patch16_224" in capsys.readouterr().out


def test_what_was_compared_is_not_compared_again(monkeypatch, tmp_path, sample_images, capsys):
    compared = []

    def compare(name, pictures):
        compared.append(name)
        if name == "deit3_tiny_patch16_224" and len(compared) == 2:
            raise OSError("the machine is gone")
        return verify_parity.Row(name, 5, 1e-7 * len(compared), 2e-7, 2e-5)

    monkeypatch.setattr(verify_parity, "compare", compare)
    names = ["deit3_tiny_patch16_224", "regnety_002"]
    flags = [*names, "--images", str(sample_images), "--keep", str(tmp_path / "rows")]
    with contextlib.suppress(OSError):
        verify_parity.main(flags)
    assert verify_parity.main(flags) == 0
    assert compared == ["regnety_002", "deit3_tiny_patch16_224", "deit3_tiny_patch16_224"]
    table = capsys.readouterr().out.split("| model")[-1]
    assert table.index("| deit3_tiny_patch16_224 | 5 | 3.0e-07 |") < table.index(
        "| regnety_002 | 5 | 1.0e-07 | 2.0e-07 | 2e-05 |"
    )
