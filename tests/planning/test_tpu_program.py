"""What a training step must not contain once the TPU compiler has had its way with it."""

import dataclasses
import importlib.util
import re

import pytest

from configs import deit
from deit_jax.config.plan import plan_run
from deit_jax.models import registry
from deit_jax.parallel.mesh import make_mesh
from deit_jax.planning import collectives, cycles, forecast, hlo, topology, tpu
from deit_jax.training.setup import assemble

IMAGES, ROWS, WIDTH, HEADS = 128, 200, 384, 6  # of a chip; 197 tokens and a tile's rest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler (libtpu)"
)


@pytest.fixture
def two_blocks(monkeypatch):
    """DeiT-S as it is, but for its depth."""
    name = "deit_small_patch16_224"
    entry = registry._MODELS[name]
    short = dataclasses.replace(entry, options=entry.options | {"depth": 2})
    monkeypatch.setattr(registry, "_MODELS", registry._MODELS | {name: short})


@pytest.mark.slow
@pytest.mark.usefixtures("two_blocks")
def test_a_step_of_two_blocks():
    """On four chips: kernels, no scores or wide hidden units in HBM, the stream by channels."""
    devices = tpu.devices("v5e:2x2")
    config = deit.get_config("s")
    config.train.batch_size = IMAGES * len(devices)
    # What is compiled sooner: the blocks are looked at.
    config.mixing.update(random_erasing=0.0, mixup_alpha=0.0, cutmix_alpha=0.0)
    plan = plan_run(config, num_train=10_000, num_classes=1000, num_devices=len(devices))
    step, arguments = forecast.abstract_step(
        assemble(config, "", plan, make_mesh(devices=devices)), None, None
    )
    with topology.without_cache():
        text = step.lower(*arguments).compile().as_text()
    operations, _ = cycles.read(text)
    kernels = [one.kind for one in operations if one.kind.startswith("kernel")]
    assert sorted(kernels) == ["kernel attention_backward"] * 2 + ["kernel attention_forward"] * 2
    assert f"[{IMAGES},{HEADS},{ROWS},{ROWS}]" not in text
    rows = rf"{IMAGES},{ROWS}|{IMAGES * ROWS}"
    stream = rf"f32\[(?:{rows}),{WIDTH}\]"
    assert set(re.findall(stream + r"\{(\d)", text)) == {"2", "1"}  # the channels are contiguous
    bodies, entry = hlo.computations(text)
    hidden = rf"= f32\[(?:{rows}),{4 * WIDTH}\]"
    assert not [x for x in bodies[entry] if re.search(hidden, x)]
    qkv = rf"= (bf16|f32)\[(?:{rows}),{3 * WIDTH}\]\S* (copy|transpose)\("
    assert not [x for x in bodies[entry] if re.search(qkv, x)]
    crossing = collectives.read(text, len(devices))
    assert {one.kind for one in crossing} == {"all-reduce"}
    assert len(crossing) <= 3
