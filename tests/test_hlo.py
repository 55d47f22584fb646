"""The reader of optimised HLO, on a module small enough to check by hand."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from jaxgrpo import hlo

TEXT = """\
HloModule jit_f, is_scheduled=true

%fused_slice (p0: f32[4,8], p1: s32[]) -> f32[1,8] {
  %p0 = f32[4,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %below = pred[] compare(%p1, %zero), direction=LT
  ROOT %cut = f32[1,8]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,8}
}

%fused_add (p0: f32[1,8]) -> (f32[1,8], bf16[8]) {
  %p0 = f32[1,8]{1,0} parameter(0)
  %sum = f32[1,8]{1,0} add(%p0, %p0)
  %bits = bf16[8]{0} convert(%sum)
  ROOT %both = (f32[1,8]{1,0}, bf16[8]{0}) tuple(%sum, %bits)
}

%inner_body (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %s = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%s), index=1
  %slice = f32[1,8]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused_slice
  %add = (f32[1,8]{1,0}, /*index=1*/bf16[8]{0}) fusion(%slice), kind=kLoop, calls=%fused_add
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%i, %x)
}

%inner_condition (s: (s32[], f32[4,8])) -> pred[] {
  %s = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

%outer_body (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %s = (s32[], f32[4,8]{1,0}) parameter(0)
  %copy = f32[4,8]{0,1} copy(%s)
  %all = (f32[2,8]{1,0}, f32[4,8]{1,0}) all-gather-start(%half), dimensions={0}
  ROOT %w = (s32[], f32[4,8]{1,0}) while(%s), condition=%inner_condition, body=%inner_body, \
backend_config={"known_trip_count":{"n":"3"}}
}

%outer_condition (s: (s32[], f32[4,8])) -> pred[] {
  %s = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (x: f32[4,8]) -> (s32[], f32[4,8]) {
  %x = f32[4,8]{1,0} parameter(0)
  ROOT %w = (s32[], f32[4,8]{1,0}) while(%x), condition=%outer_condition, body=%outer_body
}
"""


def test_what_a_loop_writes_counts_by_its_trips_and_the_inside_of_fusions_does_not():
    program = hlo.parse(TEXT)
    assert hlo.open_loops(program) == ["outer_body"]
    written = Counter()
    moved = Counter()
    for instruction, times in hlo.written(program, "outer_body"):
        name = " ".join(map(str, instruction.results))
        written[name] += times
        moved[name] += times * hlo.moves_only(program, instruction)
    assert written == {"f32[4,8]": 1, "f32[2,8] f32[4,8]": 1, "f32[1,8]": 3, "f32[1,8] bf16[8]": 3}
    assert +moved == {"f32[4,8]": 1, "f32[1,8]": 3}
    found = (hlo.traffic(i, 4, 2) for i, _ in hlo.written(program, program.entry))
    # Three quarters of 128 bytes; of the half that is on the other node the neighbour gets half.
    assert [traffic for traffic in found if traffic] == [("all-gather", 96, 32)]


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("{{0,2},{1,3}}", (0, 2)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("[4,2]<=[2,2,2]T(2,1,0)", (0, 4)),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", (0, 2, 4, 6)),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", (0, 1)),
        ("mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}", (0, 1, 4, 5)),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", (0, 1, 2, 3)),
        ("mesh['axis_0'=8] {'axis_0':(1)2}", (0, 4)),
        ("{}", ()),
    ],
)
def test_groups_in_each_of_their_spellings(text, group):
    line = f"  ROOT %a = f32[8]{{0}} all-reduce(%x), replica_groups={text}, to_apply=%add"
    (instruction,) = hlo.parse(f"ENTRY %m (x: f32[]) -> f32[] {{\n{line}\n}}").computations["m"]
    assert instruction.group == group


@pytest.mark.parametrize(
    ("op", "received", "between"),
    [  # of 64 bytes in groups of 4, two of each node
        ("all-gather", 48, 16),
        ("all-reduce", 96, 32),
        ("reduce-scatter", 192, 64),
        ("all-to-all", 48, 16),
        ("collective-permute", 64, 64),
        ("copy", None, None),
    ],
)
def test_what_a_device_receives(op, received, between):
    line = f"  ROOT %a = f32[16]{{0}} {op}(%x), replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}"
    (instruction,) = hlo.parse(f"ENTRY %m (x: f32[]) -> f32[] {{\n{line}\n}}").computations["m"]
    traffic = hlo.traffic(instruction, 8, 2)
    assert traffic == (None if received is None else (op, received, between))


@pytest.mark.parametrize(
    ("dtype", "size"), [("f32", 128), ("bf16", 64), ("pred", 32), ("s4", 32), ("f8e4m3fn", 32)]
)
def test_bytes_of_a_shape(dtype, size):
    (shape,) = (
        hlo.parse(f"ENTRY %m (x: f32[]) -> f32[] {{\n  ROOT %a = {dtype}[4,8]{{1,0}} copy(%x)\n}}")
        .computations["m"][0]
        .results
    )
    assert str(shape) == f"{dtype}[4,8]"
    assert shape.nbytes == size


def test_a_vocabulary_is_found_whole_and_in_blocks():
    assert hlo.spans((2, 48), 48)
    assert hlo.spans((2, 16, 3), 48)
    assert not hlo.spans((2, 3, 16, 2), 32 * 5)


def test_matmul_flops_goes_into_loops():
    def looped(x, w):
        def body(x, w):
            return x @ w, None

        x, _ = jax.lax.scan(body, x, w)
        return jax.lax.while_loop(lambda x: x.sum() < 1e9, lambda x: x @ w[0], x)

    x, w = jnp.ones((3, 8)), jnp.ones((5, 8, 8))
    text = jax.jit(looped).lower(x, w).compile().as_text()
    one = 2 * 3 * 8 * 8
    program = hlo.parse(text)
    assert hlo.matmul_flops(program) == 6 * one
    assert hlo.matmul_flops(program, open_trips=7) == 12 * one
