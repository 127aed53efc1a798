"""What is read out of compiled programs, against what was put in."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from distill_jax.plan.program import read_work

CONVOLUTION = """
HloModule small

ENTRY %main (a: f32[4,6,5], b: f32[2,5,7]) -> f32[4,5,7] {
  %a = f32[4,6,5]{2,1,0} parameter(0)
  %b = f32[2,5,7]{2,1,0} parameter(1)
  ROOT %c = f32[4,5,7]{2,1,0} convolution(%a, %b), window={size=2}, dim_labels=b0f_0io->b0f
}
"""

LOOP = """
HloModule loop

%body (at: (u32[], bf16[8,4], bf16[16,8,4])) -> (u32[], bf16[8,4], bf16[16,8,4]) {
  %at = (u32[], bf16[8,4]{1,0:T(8,128)(2,1)S(1)}, bf16[16,8,4]) parameter(0)
  %step = u32[] get-tuple-element(%at), index=0
  %two = u32[] constant(2)
  %next = u32[] add(%step, %two)
  %x = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%at), index=1
  %stack = bf16[16,8,4] get-tuple-element(%at), index=2
  %sent = (bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[]) collective-permute-start(%x), PAIRS
  %got = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} collective-permute-done(%sent)
  %part = bf16[1,8,4]{2,1,0:S(1)} fusion(%stack, %step), kind=kLoop, calls=%take
  ROOT %out = (u32[], bf16[8,4], bf16[16,8,4]) tuple(%next, %got, %stack)
}

%take (stack: bf16[16,8,4], step: u32[]) -> bf16[1,8,4] {
  %stack = bf16[16,8,4]{2,1,0} parameter(0)
  %step = u32[] parameter(1)
  %zero = u32[] constant(0)
  ROOT %slice = bf16[1,8,4]{2,1,0} dynamic-slice(%stack, %step, %zero, %zero)
}

%condition (at: (u32[], bf16[8,4], bf16[16,8,4])) -> pred[] {
  %at = (u32[], bf16[8,4], bf16[16,8,4]) parameter(0)
  %step = u32[] get-tuple-element(%at), index=0
  %limit = u32[] constant(9)
  ROOT %more = pred[] compare(%step, %limit), direction=LT
}

ENTRY %main (x: (u32[], bf16[8,4], bf16[16,8,4])) -> (u32[], bf16[8,4], bf16[16,8,4]) {
  %x = (u32[], bf16[8,4], bf16[16,8,4]) parameter(0)
  ROOT %end = (u32[], bf16[8,4], bf16[16,8,4]) while(%x), condition=%condition, body=%body
}
""".replace("PAIRS", "channel_id=7, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}")


@pytest.mark.parametrize(
    ("window", "out", "sums"),
    [
        ("{size=2}", 5, 5 * 2),
        ("{size=2 pad=1_1 rhs_reversal=1}", 7, 7 * 2 - 2),  # the outer ones see padding
        ("{size=2 stride=2}", 3, 3 * 2),
        ("{size=2 rhs_dilate=3}", 3, 3 * 2),
        ("{size=2 pad=1_0 lhs_dilate=2}", 11, 11),  # every second place is a hole
    ],
)
def test_convolutions_count_what_is_really_multiplied(window: str, out: int, sums: int):
    text = CONVOLUTION.replace("{size=2}", window).replace("[4,5,7]", f"[4,{out},7]")
    assert read_work(text).flops == 2 * 4 * 7 * 5 * sums


def test_loops_count_as_often_as_they_run():
    work = read_work(LOOP)
    (sent,) = work.collectives
    assert (sent.kind, sent.group, sent.times) == ("collective-permute", (0, 1), 5)  # 0 2 4 6 8
    assert sent.bytes == 8 * 4 * 2
    # Each time one layer of the stack and the counter are read, what is received is written, and
    # two counters make one; the rest lies near.
    assert work.bytes == 5 * ((8 * 4 * 2 + 4) + 8 * 4 * 2 + 3 * 4)


def test_a_program_of_many_devices_sends_what_its_layout_asks_for():
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def local(left: jax.Array, right: jax.Array) -> jax.Array:
        def layer(state: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
            whole = jax.lax.all_gather(weight, "y", tiled=True)
            return jax.lax.psum(state @ whole, "x"), None

        return jax.lax.scan(layer, left, right)[0]

    spread = jax.shard_map(
        local, mesh=mesh, in_specs=(P("x"), P(None, "y")), out_specs=P(), check_vma=False
    )
    left, right = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((24, 16), (5, 16, 16)))
    work = read_work(jax.jit(spread).lower(left, right).compile().as_text() or "")
    assert work.flops == 5 * 2 * 12 * 16 * 16
    found = {each.kind: (each.times, each.bytes, each.group) for each in work.collectives}
    assert found["all-gather"] == (5, 16 * 16 * 4 * 3 / 4, (0, 1, 2, 3))
    assert found["all-reduce"] == (5, 2 * 12 * 16 * 4 / 2, (0, 4))
