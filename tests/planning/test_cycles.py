"""The TPU compiler's estimates, read from a program in the form in which it prints them."""

import pytest

from deit_jax.planning import chips, cycles, forecast, report

STEP = 'metadata={op_name="jit(train_step)'
TEXT = f"""HloModule jit_train_step, is_scheduled=true

%fused (p: f32[8,64]) -> f32[8,64] {{
  ROOT %inside = f32[8,64]{{1,0}} add(%p, %p), backend_config={{"estimated_cycles":"9999"}}
}}

%known.body (p: (s32[], f32[64,64])) -> (s32[], f32[64,64]) {{
  %noise = f32[64,64] fusion(%p), calls=%fused, {STEP}/augment/x"}}, c={{"estimated_cycles":"10"}}
}}

%known.condition (p: (s32[], f32[64,64])) -> pred[] {{
  %three = s32[]{{:T(128)}} constant(3)
  ROOT %less = pred[] compare(%i, %three), direction=LT
}}

%open.body (p: f32[4]) -> f32[4] {{
  %trial = f32[4] fusion(%p), calls=%fused, {STEP}/augment/y"}}, c={{"estimated_cycles":"7"}}
}}

%open.condition (p: f32[4]) -> pred[] {{
  ROOT %any = pred[] fusion(%p), calls=%fused
}}

%left (p: f32[2]) -> f32[2] {{
  %last = f32[2] fusion(%p), calls=%fused, {STEP}/optimizer/z"}}, c={{"estimated_cycles":"5"}}
}}

ENTRY %main.9 (a: bf16[8,64], b: f32[64,64]) -> f32[2] {{
  %a = bf16[8,64]{{1,0:T(8,128)(2,1)}} parameter(0)
  %q = (f32[8]{{0:T(128)}}, f32[8,64]{{1,0:T(8,128)S(1)}}) fusion(%a), kind=kOutput, calls=%fused, {STEP}/jvp(student)/blocks/0/attn/qkv/dot"}}, c={{"estimated_cycles":"100"}}
  %n = f32[8,64] fusion(%q), calls=%fused, {STEP}/transpose(jvp(student))/blocks/0/norm1/sub"}}, c={{"estimated_cycles":"40"}}
  %t = f32[8,64] fusion(%q), calls=%fused, {STEP}/teacher/s1/conv"}}, c={{"estimated_cycles":"30"}}
  %c1 = f32[64,64] copy(%b), {STEP}/jvp(student)/blocks/0/mlp/fc1/t"}}, c={{"estimated_cycles":"20"}}
  %c2 = f32[64,64] copy(%t), {STEP}/teacher/s1/t"}}, c={{"estimated_cycles":"2"}}
  %s = (f32[64,64]{{1,0}}, f32[64,64]{{1,0:S(1)}}, u32[]{{:S(2)}}) copy-start(%b)
  %d = f32[64,64]{{1,0}} copy-done(%s)
  %i = s32[] add(%x, %y)
  %j = f32[64,64] custom-call(%d), custom_call_target="ConcatBitcast"
  %attend_forward.12 = bf16[8,1024] custom-call(%q), custom_call_target="tpu_custom_call", {STEP}/jvp(student)/blocks/0/attn/k"}}
  %w1 = (s32[], f32[64,64]) while(%t1), condition=%known.condition, body=%known.body
  %w2 = f32[4] while(%t2), condition=%open.condition, body=%open.body
  ROOT %r = f32[2] conditional(%i, %b, %b), branch_computations={{%left, %left}}
}}
"""  # noqa: E501


def test_cycles_of_each_part_of_a_step():
    """Loops as often as they run; what has no estimate is named."""
    operations, loops = cycles.read(TEXT)
    rows = {row.pop("part"): tuple(row.values()) for row in cycles.table(operations)}
    assert rows == {
        "attention": (100, 0),
        "norms": (0, 40),
        "augmentation": (3 * 10 + 7, 0),
        "teacher": (30 + 2, 0),
        "moving data": (20, 0),
        "optimiser, EMA, guard": (2 * 5, 0),
    }
    assert loops == ["w2"]
    measured, _ = cycles.read(TEXT, {"attend_forward": 60})
    assert cycles.table(measured)[0] == {"part": "attention", "forward": 160, "backward": 0}
    assert len(cycles.uncounted(measured)) == 1
    assert cycles.uncounted(operations) == [
        {"kind": "copy, asynchronous", "count": 1, "bytes": 4 * 64 * 64},
        {"kind": "kernel attend_forward", "count": 1, "bytes": 2 * 8 * 1024},
    ]


def test_the_estimate_of_a_step():
    chip = chips.Chip(tflops=1, clock=1e-9)  # a cycle a second
    found = forecast.estimate(chip, TEXT, 119.5e12, {})
    assert (found["seconds"], found["mfu"]) == (239, pytest.approx(0.5))
    lines = "\n".join(report.estimate_lines({"estimate": found, "batch": 478, "devices": 2}))
    assert "239000.0 ms, 1 images/s per device, 50.0 % of the chip's FLOP/s" in lines
    assert "| norms | 0.00 | 40000.00 | 17 % |" in lines
    assert "1 × kernel attend_forward (0 MB); all but the first round of 1 loops" in lines
    assert forecast.estimate(None, TEXT, None, {}) == {}
    assert forecast.estimate(chips.find("TPU v2"), TEXT, None, {}) == {}  # its clock is not known
