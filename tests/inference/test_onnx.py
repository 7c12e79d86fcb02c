"""ONNX programs in onnxruntime against their models, and what is refused."""

import json
import logging
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from jax.extend.core import Primitive

import deit_jax
from deit_jax.cli.main import main
from deit_jax.inference import onnx_program, primitives
from deit_jax.inference.onnx_program import export_onnx
from tests.inference.test_export import NAMES, assert_outputs, full_effect, logits_of, pixels

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jax2onnx's imports


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_onnxruntime_computes_what_the_model_does(name, tmp_path):
    model = full_effect(name)
    heads = ["logits_class"] + ["logits_distillation"] * ("distilled" in name)
    outputs, error = export_onnx(tmp_path, model, features=True)
    assert outputs == sorted(["features", *heads, "probabilities"])
    assert error < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (asked,) = session.get_inputs()
    assert (asked.name, asked.type, asked.shape[1:]) == ("images", "tensor(uint8)", [32, 32, 3])
    assert isinstance(asked.shape[0], str)  # any number
    assert [output.name for output in session.get_outputs()] == outputs
    for count in (1, 3, 32):
        values = session.run(outputs, {"images": pixels(count)})
        got = dict(zip(outputs, values, strict=True))
        assert_outputs(got, heads, model, pixels(count))
    about = json.loads((tmp_path / "about.json").read_text())
    assert (about["outputs"], about["class_names"]) == (outputs, list("abcdefghij"))
    assert about["mean"] == [0.3, 0.4, 0.5]


@pytest.mark.slow
def test_the_command_writes_what_is_right_or_nothing(tmp_path, repo_root, capsys, monkeypatch):
    model = full_effect("resmlp_testing")
    deit_jax.save_model(tmp_path / "model", model)
    command = ["export", "--model", f"{tmp_path}/model", "--out", f"{tmp_path}/out"]
    command += ["--format", "onnx"]
    unknown = Primitive("unknown")
    unknown.def_abstract_eval(lambda x: x)
    for change, flags, words in (
        (
            {"erf": lambda x, **_: jax.lax.tanh(x)},
            [],
            "onnxruntime computes resmlp_testing otherwise",
        ),
        (
            {"erf": lambda x, **_: unknown.bind(x)},
            [],
            "jax2onnx cannot convert resmlp_te",
        ),
        ({}, ["--platforms", "cpu"], "--platforms is for StableHLO"),
        ({}, ["--dtype", "bfloat16"], "an ONNX program computes in float32"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(primitives, "_INSTEAD", primitives._INSTEAD | change)
            assert main([*command, *flags]) == 2
        line = capsys.readouterr().err
        assert words in line
        assert line.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "jax2onnx", None)
        assert main(command) == 2
        assert "pip install 'deit-jax[onnx]'" in capsys.readouterr().err
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "resmlp_testing for ONNX, in onnxruntime equal within" in out
    assert err == ""
    _, lines = re.findall(r"```python\n(.*?)```", (repo_root / "docs/export.md").read_text(), re.S)
    scope = {"onnxruntime": onnxruntime, "np": np, "image": pixels(1)[0]}
    exec(lines.replace("digits_onnx", f"{tmp_path}/out"), scope)
    (logits,) = logits_of(model, pixels(1))
    assert scope["probabilities"].argmax() == logits.argmax()
    assert logging.getLogger("jax2onnx").level != logging.ERROR
    monkeypatch.setattr(onnx_program, "_MOST_BYTES", 1000)
    with pytest.raises(deit_jax.InputError, match="more than an ONNX file may hold"):
        export_onnx(tmp_path / "large", model)
    bfloat16 = deit_jax.load_model(tmp_path / "model", dtype=jnp.bfloat16)
    with pytest.raises(deit_jax.InputError, match="computes in bfloat16"):
        export_onnx(tmp_path / "half", bfloat16)
