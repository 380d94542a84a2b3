"""Costs read from compiled programs: counted by hand, and against XLA's own where it counts right."""
# ruff: noqa: E501, since a compiler writes long lines

import jax
import jax.numpy as jnp
import pytest

from gpt_jax.costs.counts import read_costs

N = 64
SQUARE = 4 * N * N  # bytes


def costs_of(function, *arguments):
    compiled = jax.jit(function).lower(*arguments).compile()
    return read_costs(compiled.as_text()), compiled.cost_analysis()


def test_a_loop_counts_as_often_as_it_runs():
    """XLA's own analysis counts its body once."""

    def run(x, weights):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

    costs, own = costs_of(run, jnp.ones((N, N)), jnp.ones((5, N, N)))
    assert own["bytes accessed"] < 2 * 8 * SQUARE
    # Five products of two matrices into a third; cutting out the weights moves two, copies a few more.
    assert 5 * 5 * SQUARE <= costs.bytes_moved < 5 * 8 * SQUARE


def test_a_loop_of_unknown_length_counts_once():
    def run(x, n):
        return jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)

    costs, _ = costs_of(run, jnp.ones((N, N)), jnp.int32(3))
    # A product, and copies; three products alone would move nine.
    assert 3 * SQUARE <= costs.bytes_moved < 9 * SQUARE


def test_without_loops_it_agrees_with_the_compiler():
    def run(x, y):
        return jnp.tanh(x @ y) @ jnp.exp(y)

    costs, own = costs_of(run, jnp.ones((N, 2 * N)), jnp.ones((2 * N, 2 * N)))
    assert costs.bytes_moved == pytest.approx(own["bytes accessed"], rel=0.3)


# As libtpu writes them, shortened: a ring loop that takes two steps at a time, a product of two batch axes as a
# convolution, arrays in the memory on the chip (S(1)), and a slice that is written in place.
TPU = """HloModule m, is_scheduled=true

%update (p0: f32[8,64], p1: f32[1,64], p2: s32[]) -> f32[8,64] {
  %p0 = f32[8,64]{1,0:T(8,128)} parameter(0)
  %p1 = f32[1,64]{1,0:T(1,128)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  ROOT %dus = f32[8,64]{1,0:T(8,128)} dynamic-update-slice(%p0, %p1, %p2, %p2)
}

%condition (c: (s32[], f32[8,64], f32[1,64])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)}, f32[1,64]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), control-predecessors={%c}, index=0
  %n = s32[]{:T(128)} constant(6)
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (b: (s32[], f32[8,64], f32[1,64])) -> (s32[], f32[8,64], f32[1,64]) {
  %b = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)}, f32[1,64]{1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%b), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%j, %two)
  %all = f32[8,64]{1,0:T(8,128)} get-tuple-element(%b), index=1
  %one = f32[1,64]{1,0} get-tuple-element(%b), index=2
  %sent = (f32[1,64]{1,0}, f32[1,64]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%one), source_target_pairs={{0,1}}
  %got = f32[1,64]{1,0} collective-permute-done(%sent)
  %new = f32[8,64]{1,0:T(8,128)} fusion(%all, %got, %j), kind=kLoop, calls=%update, backend_config={"estimated_cycles":"70"}
  ROOT %out = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)}, f32[1,64]{1,0}) tuple(%next, %new, %got)
}

ENTRY %main (q: bf16[8,6,256,64], k: bf16[8,6,256,64], x: f32[8,64], y: f32[1,64]) -> f32[8,64] {
  %q = bf16[8,6,256,64]{2,3,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[8,6,256,64]{2,3,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %x = f32[8,64]{1,0:T(8,128)} parameter(2)
  %y = f32[1,64]{1,0} parameter(3)
  %scores = f32[8,6,256,256]{2,3,1,0:T(8,128)S(1)} convolution(%q, %k), window={size=8x6 stride=7x5 lhs_dilate=8x6}, dim_labels=01bf_01oi->01bf
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)}, /*index=2*/f32[1,64]{1,0}) tuple(%zero, %x, %y)
  %loop = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)}, f32[1,64]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[8,64]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_a_program_of_a_tpu_is_read():
    costs = read_costs(TPU)
    assert costs.collectives == {("collective-permute", "f32[1,64]"): 3 * 256}
    queries = 2 * 8 * 6 * 256 * 64  # keys and scores stay on the chip
    # In each of the three rounds: sent and received, then read, and written into its place; and the counter.
    assert costs.bytes_moved == queries + 3 * (2 * 256 + 256 + 256 + 4) + 3 * (12 + 9)
    assert costs.cycles == 3 * 70
    assert read_costs(TPU, n_units=3).collectives == {("collective-permute", "f32[1,64]"): 256}
