"""What collectives a compiled program has, how often each runs, and what it sends."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from lora_jax.plan.collectives import bytes_sent, collectives

MESH = jax.make_mesh((2, 4), ("d", "t"), axis_types=(AxisType.Auto,) * 2)
RING = [(0, 1), (1, 2), (2, 3), (3, 0)]


def nested(x, w):
    """Three rounds, each of a sum, and of two sums more within."""

    def step(c, w):
        c = lax.psum(c @ w, "t")
        return lax.fori_loop(0, 2, lambda _, c: lax.psum(jnp.sin(c), ("d", "t")), c), lax.ppermute(c, "t", RING)

    return lax.scan(step, x, w)


def others(x, n):
    def dynamic(_, c):
        return lax.psum(jnp.sin(c), "t")

    branch = lax.cond(n > 2, lambda x: lax.psum(x, "d"), lambda x: 2 * x, x)
    spread = lax.all_to_all(x, "t", 0, 0, tiled=True), lax.psum_scatter(x, "t", tiled=True)
    return lax.all_gather(x, "t"), branch, *spread, lax.fori_loop(0, n, dynamic, x)


def compiled(fun, *shapes, mesh=MESH):
    mapped = jax.shard_map(fun, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return jax.jit(mapped).lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()


def seen(found):
    return sorted((x.kind, x.operands[0].shape, x.results[0].shape, x.group, x.count) for x in found)


@pytest.mark.parametrize("devices", [range(8), (5, 1, 3, 7, 0, 2, 4, 6)], ids=["in order", "in another"])
def test_loops_multiply(devices):
    mesh = Mesh(MESH.devices.flatten()[list(devices)].reshape(2, 4), ("d", "t"))
    found = collectives(compiled(nested, ((4, 8), "float32"), ((3, 8, 8), "float32"), mesh=mesh))
    assert seen(found) == [
        ("all-reduce", (4, 8), (4, 8), 4, 3),
        ("all-reduce", (4, 8), (4, 8), 8, 6),
        ("collective-permute", (4, 8), (4, 8), 2, 3),
    ]
    size = 4 * 8 * 4
    assert bytes_sent(found) == 3 * size * 2 * 3 / 4 + 6 * size * 2 * 7 / 8 + 3 * size
    assert all("/while/body/" in x.name for x in found)


def test_every_kind_and_what_is_not_known():
    found = collectives(compiled(others, ((4, 8), "float32"), ((), "int32")))
    unknown = [x for x in found if x.count is None]
    assert [x.kind for x in unknown] == ["all-reduce"]
    with pytest.raises(ValueError, match="all-reduce at 'jit.*trip count the compiler does not know: use lax.scan"):
        bytes_sent(found)
    assert [(x.kind, x.group) for x in found if x.conditional] == [("all-reduce", 2)]
    size = 4 * 8 * 4
    sent = {x.kind: x.sent for x in found if not x.conditional}
    assert sent == {
        "all-gather": 3 * size,
        "all-to-all": 0.75 * size,
        "reduce-scatter": 0.75 * size,
        "all-reduce": 1.5 * size,
    }
    assert {x.kind: x.payload for x in found}["all-gather"] == 4 * size


class Text:
    """As compilers for accelerators write what a CPU's does not."""

    def as_text(self):
        return """HloModule jit_f, is_scheduled=true, replica_count=1, num_partitions=8

%inner (p: bf16[8,4]) -> bf16[2,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %rs = bf16[2,4]{1,0} reduce-scatter(%p), channel_id=4, replica_groups=[2,4]<=[4,2]T(1,0), \
use_global_device_ids=true
}

%true (q: f8e4m3fn[16]) -> f8e4m3fn[16] {
  %q = f8e4m3fn[16]{0} parameter(0)
  ROOT %one = f8e4m3fn[16]{0} all-reduce(%q), channel_id=5, replica_groups={{0},{1}}, use_global_device_ids=true
}

%body (v: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %v = (s32[]{:T(128)}, bf16[8,4]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%v), index=0
  %j = s32[]{:T(128)} copy(%i)
  %w = bf16[8,4]{1,0} get-tuple-element(%v), index=1
  %x = s32[]{:T(128)} constant(1)
  %y = s32[]{:T(128)} add(%j, %x)
  %z = bf16[8,4]{1,0} all-to-all(%w), channel_id=6, replica_groups={{0,1},{2,3},{4,5},{6,7}}
  ROOT %o = (s32[]{:T(128)}, bf16[8,4]{1,0}) tuple(%y, %z)
}

%condition (v: (s32[], bf16[8,4])) -> pred[] {
  %v = (s32[]{:T(128)}, bf16[8,4]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%v), index=0
  %n = s32[]{:T(128)} constant(5)
  ROOT %l = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (a: bf16[8,4], b: f8e4m3fn[16]) -> bf16[2,4] {
  %a = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} parameter(0), metadata={op_name="a"}
  %b = f8e4m3fn[16]{0} parameter(1)
  %s = (bf16[8,4]{1,0}, bf16[16,4]{1,0:T(8,128)}) all-gather-start(%a), \
channel_id=1, replica_groups=mesh['x'=4,'y'=2] {'x':(1)2}, dimensions={0}, use_global_device_ids=true
  %d = bf16[16,4]{1,0} all-gather-done(%s)
  %t = (bf16[8,4]{1,0}, bf16[8,4]{1,0}, u32[], /*index=3*/u32[]) collective-permute-start(%a), \
source_target_pairs={{0,1},{1,0}}
  %e = bf16[8,4]{1,0} collective-permute-done(%t)
  %u = (bf16[8,4]{1,0}, f8e4m3fn[16]{0}) all-reduce(%a, %b), channel_id=3, replica_groups={}, to_apply=%add
  %0 = s32[]{:T(128)} constant(0)
  %1 = s32[]{:T(128)} copy(%0)
  %2 = (s32[]{:T(128)}, bf16[8,4]{1,0}) tuple(%1, %a)
  %3 = (s32[]{:T(128)}, bf16[8,4]{1,0}) while(%2), condition=%condition, body=%body
  %4 = (s32[]{:T(128)}, bf16[8,4]{1,0}) while(%3), condition=%condition, body=%body
  %r = ((bf16[8,4]{1,0}), bf16[2,4]{1,0}) async-start(%a), calls=%inner
  %c = f8e4m3fn[16]{0} conditional(%k, %b, %b), true_computation=%true, false_computation=%true
  ROOT %f = bf16[2,4]{1,0} async-done(%r), calls=%inner
}
"""


def test_what_other_compilers_write():
    found = collectives(Text())
    loops = [x for x in found if x.kind == "all-to-all"]
    assert [(x.group, x.count) for x in loops] == [(2, 5), (2, None)]  # the second begins where the first has ended
    assert seen(x for x in found if x not in loops) == [
        ("all-gather", (8, 4), (16, 4), 2, 1),
        ("all-reduce", (8, 4), (8, 4), 8, 1),
        ("collective-permute", (8, 4), (8, 4), 2, 1),
        ("reduce-scatter", (8, 4), (2, 4), 4, 1),
    ]
    (both,) = (x for x in found if x.kind == "all-reduce")
    assert both.payload == 8 * 4 * 2 + 16
