"""TPU kernels are tried before a run trusts them."""

import jax.numpy as jnp
import pytest

from configs import digits, digits_teacher
from deit_jax.errors import InputError
from deit_jax.models import attention, attention_cudnn, attention_tpu
from deit_jax.training import kernels, setup, summary


@pytest.fixture
def wanted(monkeypatch):
    """As on a TPU, where "auto" means the kernels; here they are interpreted."""
    choose = lambda kind, *_: "xla" if kind == "xla" else "pallas"  # noqa: E731
    monkeypatch.setattr(attention, "choose", choose)


@pytest.fixture
def run(tmp_path):
    config = digits.get_config()
    config.train.dtype = "bfloat16"
    return setup.check(config, str(tmp_path))


def said(run):
    lines = summary.describe_run(run, "from scratch").splitlines()
    return [line.strip() for line in lines if line.split()[0] in ("attention", "note")]


@pytest.mark.usefixtures("wanted")
def test_kernels_that_compute_as_xla_does_are_used(run):
    assert kernels.implementation(run) == "pallas"
    assert said(run) == ["attention kernels for TPUs (Pallas)"]


def _refuse(*_, **__):
    raise RuntimeError("Mosaic failed to compile TPU kernel: not implemented\nand so on")


def _lose_a_head(*args, **options):
    out, log_total = forward(*args, **options)
    return out.at[..., :32].set(0), log_total


def _nan(*args, **options):
    grad, sums = backward(*args, **options)
    return grad, sums * jnp.nan


forward, backward = attention_tpu.forward, attention_tpu.backward


@pytest.mark.slow
@pytest.mark.usefixtures("wanted")
@pytest.mark.parametrize(
    ("name", "function", "words"),
    [
        ("forward", _refuse, "they fail: Mosaic failed to compile TPU kernel: not implemented"),
        ("forward", _lose_a_head, "they differ from XLA: 0."),
        ("backward", _nan, "they differ from XLA: 0.00"),
    ],
)
def test_others_are_not(monkeypatch, tmp_path, name, function, words):
    monkeypatch.setattr(attention_tpu, name, function)
    config = digits.get_config()
    config.train.dtype = "bfloat16"
    run = setup.check(config, str(tmp_path))
    assert kernels.implementation(run) == "xla"
    how, note = said(run)
    assert how == "attention XLA"
    assert note.startswith(f"note      attention by XLA, without the kernels for TPUs: {words}")
    assert run.config.model.attention == "auto"  # another start tries again


@pytest.mark.slow
@pytest.mark.usefixtures("wanted")
@pytest.mark.parametrize(
    ("name", "words"),
    [("parallel_testing", "kernels for TPUs (Pallas)"), ("cait_testing", "XLA")],  # talking heads
)
def test_other_blocks_say_how_they_attend(tmp_path, name, words):
    config = digits.get_config()
    config.model.name, config.train.dtype = name, "bfloat16"
    assert said(setup.check(config, str(tmp_path))) == [f"attention {words}"]


@pytest.mark.parametrize(("kernels_of", "platform"), [("pallas", "gpu"), ("cudnn", "tpu")])
def test_kernels_for_other_devices_are_refused(kernels_of, platform):
    config = digits.get_config()
    config.model.attention = kernels_of
    with pytest.raises(InputError, match=f"'{kernels_of}', whose kernels are for .PUs"):
        setup.check_model(config, platform)


@pytest.mark.parametrize("fault", [0.0, 1.0, None])
def test_cudnn_is_tried_and_no_run_goes_on_without_it(monkeypatch, tmp_path, fault):
    """By the formulas of the package, with a fault; None: by cuDNN, which is not here."""
    config = digits.get_config()
    config.train.dtype = "bfloat16"
    config.model.attention = "cudnn"
    monkeypatch.setattr(setup, "check_model", lambda *_: None)

    def attend(num_heads, qkv, absent):
        out = attention.attend(num_heads, qkv[:, : qkv.shape[1] - absent]) * (1 + fault)
        return jnp.pad(out, ((0, 0), (0, absent), (0, 0)))

    if fault is not None:
        monkeypatch.setattr(attention_cudnn, "attend", attend)
    if fault == 0.0:
        assert said(setup.check(config, str(tmp_path))) == ["attention cuDNN"]
        return
    answer = "they fail: cuDNN is not detected" if fault is None else "they differ from XLA: 1.0.*"
    message = f"^config.model.attention is 'cudnn': {answer}; set it to auto$"
    with pytest.raises(InputError, match=message):
        setup.check(config, str(tmp_path))


def test_a_model_without_attention_says_nothing_of_it(tmp_path):
    assert said(setup.check(digits_teacher.get_config(), str(tmp_path))) == []
