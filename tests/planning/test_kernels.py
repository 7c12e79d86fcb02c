"""A GPU's kernels, read from programs in the form in which XLA prints them, or compiled here."""

import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from deit_jax.cli.main import main
from deit_jax.models.vit import VisionTransformer
from deit_jax.planning import chips, cuda, hlo, kernels, report, topology

needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="needs XLA's compiler for GPUs: pip install 'jax[cuda13-local]'",
)

STEP = 'metadata={op_name="jit(train_step)'
TEXT = f"""HloModule jit_train_step, is_scheduled=true

%stats (p: f32[8,64]) -> f32[8] {{
  %p.1 = f32[8,64]{{1,0}} parameter(0)
  ROOT %r.1 = f32[8]{{0}} reduce(%p.1), dimensions={{1}}, {STEP}/jvp(student)/blocks/0/norm1/sum"}}
}}

%turn (p: f32[8,64]) -> f32[64,8] {{
  %p.2 = f32[8,64]{{1,0}} parameter(0)
  ROOT %t.2 = f32[64,8]{{1,0}} transpose(%p.2), dimensions={{1,0}}
}}

%dot (p: bf16[8,64], q: bf16[64,32]) -> f32[8,32] {{
  %p.3 = bf16[8,64]{{1,0}} parameter(0)
  %q.3 = bf16[64,32]{{1,0}} parameter(1)
  ROOT %d.3 = f32[8,32]{{1,0}} dot(%p.3, %q.3), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}

%outer (p: bf16[8,64], q: bf16[64,32]) -> f32[8,32] {{
  %p.4 = bf16[8,64]{{1,0}} parameter(0)
  %q.4 = bf16[64,32]{{1,0}} parameter(1)
  ROOT %d.4 = f32[8,32]{{1,0}} fusion(%p.4, %q.4), kind=kCustom, calls=%dot
}}

%update (p: f32[3,64], q: f32[3,64], i: s32[]) -> f32[3,64] {{
  %p.5 = f32[3,64]{{1,0}} parameter(0)
  %q.5 = f32[3,64]{{1,0}} parameter(1)
  %i.5 = s32[] parameter(2)
  %q.6 = f32[3,64]{{1,0}} bitcast(%q.5)
  %s.5 = f32[1,64]{{1,0}} dynamic-slice(%q.6, %i.5), dynamic_slice_sizes={{1,64}}
  ROOT %u.5 = f32[3,64]{{1,0}} dynamic-update-slice(%p.5, %s.5, %i.5)
}}

%body (t: (s32[], f32[3,64])) -> (s32[], f32[3,64]) {{
  %b.6 = f32[3,64]{{1,0}} get-tuple-element(%t), index=1
  %i.6 = s32[] get-tuple-element(%t), index=0
  %n.6 = f32[3,64]{{1,0}} fusion(%b.6, %b.6, %i.6), kind=kLoop, calls=%update, {STEP}/augment/x"}}
}}

ENTRY %main (a: f32[8,64], b: bf16[64,32]) -> f32[8,32] {{
  %a = f32[8,64]{{1,0}} parameter(0)
  %b = bf16[64,32]{{1,0}} parameter(1)
  %mean = f32[8]{{0}} fusion(%a), kind=kInput, calls=%stats
  %turned = f32[64,8]{{1,0}} fusion(%a), kind=kInput, calls=%turn, {STEP}/transpose(jvp(student))/blocks/0/attn/t"}}
  %cast = bf16[8,64]{{1,0}} bitcast(%a)
  %fc1 = f32[8,32]{{1,0}} fusion(%cast, %b), kind=kCustom, calls=%outer, {STEP}/jvp(student)/blocks/0/mlp/fc1/dot"}}
  %w = (s32[], f32[3,64]) while(%x), condition=%c, body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}
  %gemm = (f32[8,32]{{1,0}}, s8[4096]{{0}}) custom-call(%cast, %b), custom_call_target="__cublas$lt$matmul", {STEP}/transpose(jvp(student))/blocks/0/mlp/fc1/dot"}}, backend_config={{"gemm_backend_config":{{"dot_dimension_numbers":{{"lhs_contracting_dimensions":["1"]}}}}}}
  %x8 = bf16[2,4,4,8]{{3,2,1,0}} bitcast(%a)
  %w8 = bf16[8,3,3,4]{{3,2,1,0}} bitcast(%a)
  %conv = (bf16[2,4,4,8]{{3,2,1,0}}, u8[0]{{0}}) custom-call(%x8, %w8), window={{size=3x3 pad=1_1x1_1}}, dim_labels=b01f_o01i->b01f, feature_group_count=2, custom_call_target="__cudnn$convForward", {STEP}/teacher/s1/conv"}}
  %q8 = bf16[2,6,2,8]{{3,2,1,0}} bitcast(%a)
  %fmha = (bf16[2,6,2,8]{{3,1,2,0}}, u8[512]{{0}}) custom-call(%q8, %q8, %q8), custom_call_target="__cudnn$fmhaSoftmax", {STEP}/jvp(student)/blocks/0/attn/f"}}, backend_config={{"cudnn_fmha_backend_config":{{"intermediate_tensor_shape": {{"element_type": "BF16", "dimensions": ["2", "2", "6", "6"]}}}}}}
  %sort = f32[8,64]{{1,0}} custom-call(%a), custom_call_target="__cub$DeviceRadixSort", {STEP}/loss/sort"}}
  %ars = f32[8,32]{{1,0}} all-reduce-start(%fc1), replica_groups={{{{0,1}}}}
  ROOT %ard = f32[8,32]{{1,0}} all-reduce-done(%ars)
}}
"""  # noqa: E501


def test_kernels_of_each_part_of_a_step():
    """Bytes at their edges, FLOPs of their products, loops as often as they run."""
    found, loops = kernels.read(TEXT, chips.Chip(2, 1, bandwidth=1e-9, products=1e-12))
    rows = {row.pop("part"): row for row in kernels.table(found)}
    sums = {part: (row["kernels"], row["bytes"], row["flops"]) for part, row in rows.items()}
    product = 2 * 8 * 64 * 32
    moved = 2 * 8 * 64 + 2 * 64 * 32 + 4 * 8 * 32
    convolution = 2 * (2 * 4 * 4 * 8) * 9 * 4
    assert sums == {
        "norms": (1, 4 * (8 * 64 + 8), 0),  # named within the fusion alone
        "moving data": (1, 2 * 4 * 8 * 64, 0),
        "MLP": (2, 2 * moved, 2 * product),
        "augmentation": (3, 3 * 2 * 4 * 64 + 3 * 4, 0),  # one row of three, read and written
        "teacher": (1, 2 * 2 * 2 * 4 * 4 * 8 + 2 * 8 * 9 * 4, convolution),
        "attention": (1, 4 * 2 * 2 * 6 * 2 * 8, 4 * 2 * 2 * 6 * 6 * 8),
        "heads and loss": (1, 2 * 4 * 8 * 64, 0),
    }
    # A byte and a FLOP a second: what is more of the two.
    assert rows["MLP"]["forward"] == rows["MLP"]["backward"] == max(product, moved)
    assert (rows["moving data"]["forward"], rows["moving data"]["backward"]) == (0, 4096)
    assert loops == []
    assert kernels.uncounted(found) == [
        {"kind": "__cub$DeviceRadixSort", "count": 1, "bytes": 4096}
    ]


def test_float32_is_multiplied_more_slowly():
    chip = chips.Chip(2, 1, bandwidth=1e30, products=1e-12)
    wide = TEXT.replace("bf16[", "f32[")
    exact = wide.replace(
        "lhs_contracting_dims=", "operand_precision={highest,highest}, lhs_contracting_dims="
    )
    seconds = [
        next(row for row in kernels.table(kernels.read(text, chip)[0]) if row["part"] == "MLP")
        for text in (TEXT, wide, exact)
    ]
    product = 2 * 8 * 64 * 32
    assert [row["forward"] / product for row in seconds] == pytest.approx([1, 2, 15])


def test_the_estimate_of_a_gpu():
    estimate = kernels.estimate(TEXT, chips.find("NVIDIA H200"))
    found = {"estimate": estimate, "batch": 4, "devices": 2, "collectives": [{}]}
    lines = "\n".join(report.estimate_lines(found))
    assert "the longer of its bytes at 4.8 TB/s and its products at 700 TFLOP/s" in lines
    assert "| part | kernels | GB | TFLOP | forward ms" in lines
    assert "the products of 1 × __cub$DeviceRadixSort (0 MB); the collectives above." in lines


def test_the_part_of_the_memory_that_jax_takes():
    found = {"fits": True, "memory": {"total": 80}, "limit": 100}
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" in cuda.memory_note(found)
    assert cuda.memory_note(found | {"memory": {"total": 75}}) == ""
    assert cuda.memory_note(found | {"fits": False, "memory": None}) == ""


@pytest.mark.parametrize("topology", ["cuda:H200x9", "cuda:H200x0", "cuda:B200x1", "cuda:H200"])
def test_unknown_gpus(capsys, topology):
    assert main(["compile-for", "--config=digits", "--topology", topology]) == 2
    assert f"--topology {topology}: expected cuda:H100xN or cuda:H200xN" in capsys.readouterr().err


def test_without_the_compiler(capsys, monkeypatch):
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    assert main(["compile-for", "--config=digits", "--topology=cuda:H200x1"]) == 2
    assert "pip install 'jax[cuda13-local]==" in capsys.readouterr().err


@pytest.mark.slow
@needs_plugin
def test_a_step_for_two_gpus(capsys):
    """Gradients cross once, and nothing else does: not for the teacher's grouped convolutions."""
    recipe = ["--config=digits_distill", "--config.train.dtype=bfloat16", "--classes=10"]
    status = main(["compile-for", *recipe, "--train_images=1438", "--topology=cuda:H100x2"])
    text = capsys.readouterr().out
    assert status == 0
    assert "| all-reduce | step | 2 | 1 |" in text
    assert text.count("| step |") == 1
    assert "2 × NVIDIA H100 80GB HBM3." in text
    assert "Not in these times: the collectives above" in text


@pytest.mark.slow
@needs_plugin
def test_no_residual_is_stored_batch_minor():
    """Two blocks of DeiT-B: XLA:GPU would make each LayerNorm and addition a transposing kernel."""
    batch, tokens, width = 256, 197, 768
    model = nnx.eval_shape(
        lambda: VisionTransformer(
            embed_dim=width, depth=2, num_heads=12, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
        )
    )
    graph, weights = nnx.split(model)

    def loss(weights, images, targets):
        (logits,) = nnx.merge(graph, weights).heads(images)
        return -(jax.nn.log_softmax(logits) * targets).sum()

    device = jax.sharding.SingleDeviceSharding(cuda.devices("cuda:H200x1")[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        (
            weights,
            jax.ShapeDtypeStruct((batch, 224, 224, 3), jnp.float32),
            jax.ShapeDtypeStruct((batch, 1000), jnp.float32),
        ),
    )
    with topology.without_cache():
        text = jax.jit(jax.grad(loss)).lower(*shapes).compile().as_text()
    stream, astray = 0, []
    for one in hlo.walk(*hlo.computations(text), []):
        for sides, order in re.findall(r"\[([\d,]+)\]\{([\d,]+)", one.shape):
            sides, order = ([int(x) for x in part.split(",")] for part in (sides, order))
            if len(sides) == 3 and math.prod(sides) == batch * tokens * width:
                stream += 1
                if sides[order[0]] == batch:
                    astray.append(one.name)
    assert stream > 20
    assert astray == []
