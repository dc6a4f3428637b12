"""Compiled programs read: collectives, their sizes, axes and how often they run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmx.parallel import hlo
from lmx.parallel.layout import Layout, make_mesh


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(Layout(data=2, tensor=4))


def read(mesh, function, *structs, out=P()):
    """(kind, axes, bytes, times) of each collective of a manual function over arguments given as (shape, spec)."""
    run = jax.shard_map(function, mesh=mesh, in_specs=tuple(spec for _, spec in structs), out_specs=out, check_vma=False)
    args = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in structs]
    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(*args).compile().as_text()
    return [(c.kind, c.axes, c.size, c.times) for c in hlo.collectives(text, mesh)]


def test_each_kind(mesh):
    x = ((16, 64), P("data", "tensor"))  # 8 x 16 numbers a device: 512 bytes
    assert read(mesh, lambda a: jax.lax.psum(a, "tensor"), x, out=P("data")) == [("all-reduce", ("tensor",), 512, 1)]
    assert read(mesh, lambda a: jax.lax.psum(a, ("data", "tensor")), x) == [("all-reduce", ("data", "tensor"), 512, 1)]
    assert read(mesh, lambda a: jax.lax.all_gather(a, "tensor", axis=1, tiled=True), x, out=P("data")) == [
        ("all-gather", ("tensor",), 2048, 1)
    ]
    scatter = read(mesh, lambda a: jax.lax.psum_scatter(a, "tensor", scatter_dimension=1, tiled=True), x, out=P("data", "tensor"))
    assert scatter == [("reduce-scatter", ("tensor",), 512, 1)]
    trade = read(mesh, lambda a: jax.lax.all_to_all(a, "tensor", 1, 0, tiled=True), x, out=P(("data", "tensor")))
    assert trade == [("all-to-all", ("tensor",), 512, 1)]
    ring = read(mesh, lambda a: jax.lax.ppermute(a, "tensor", [(i, (i + 1) % 4) for i in range(4)]), x, out=P("data", "tensor"))
    assert ring == [("collective-permute", ("tensor",), 512, 1)]


def test_loops_multiply(mesh):
    """A scan whose body gathers runs it once a trip; a scan around it multiplies."""

    def layers(w, x):
        def layer(x, w):
            return jnp.tanh(x @ jax.lax.all_gather(w, "data", axis=0, tiled=True)), None

        def again(x, _):
            return jax.lax.psum(jax.lax.scan(layer, x, w)[0], "tensor"), None

        return jax.lax.scan(again, x, None, length=3)[0]

    found = read(mesh, layers, ((5, 64, 64), P(None, "data")), ((8, 64), P("data")), out=P("data"))
    assert sorted(found) == [("all-gather", ("data",), 64 * 64 * 4, 15), ("all-reduce", ("tensor",), 4 * 64 * 4, 3)]
    assert all(c.volume == c.size * c.times for c in hlo.collectives("ENTRY %main () -> f32[] {\n}\n", mesh))


def test_a_loop_without_a_stated_count_is_read_from_its_condition(mesh):
    text = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %r = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %n = s32[] constant(7)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%condition, body=%body
}
"""
    (found,) = hlo.collectives(text, mesh)
    assert (found.axes, found.size, found.times) == (("tensor",), 32, 7)


LINE = "  %x = {result} {kind}({args}), channel_id=1, {groups}, dimensions={{0}}\n"


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("tensor",)),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("replica_groups=[2,4]<=[8]", ("tensor",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=[1,8]<=[8]", ("data", "tensor")),
        ("replica_groups={}", ("data", "tensor")),
        ("replica_groups=mesh['data'=2,'tensor'=4] {'tensor'}", ("tensor",)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", ("data",)),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", ("data",)),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", ("tensor",)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=[4,2]T(1,0) {'b'}", None),
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", None),
    ],
)
def test_groups_as_axes(mesh, groups, axes):
    line = LINE.format(result="f32[8]{0}", kind="all-gather", args="%a", groups=groups)
    (found,) = hlo.collectives(f"ENTRY %main (a: f32[8]) -> f32[8] {{\n{line}}}\n", mesh)
    assert found.axes == axes


def test_tuples_and_asynchronous_pairs(mesh):
    """Several operands in one collective add up, and a start's result lists operands before results."""
    groups = "replica_groups=[2,4]<=[8]"
    lines = [
        LINE.format(result="(bf16[8,2]{1,0}, f32[4]{0})", kind="all-gather", args="%a, %b", groups=groups),
        LINE.format(
            result="((bf16[2,2]{1,0}, f32[1]{0}), (bf16[8,2]{1,0}, f32[4]{0}))", kind="all-gather-start", args="%a, %b", groups=groups
        ),
        LINE.format(result="(f32[4]{0}, f32[4]{0}, u32[], u32[])", kind="collective-permute-start", args="%a", groups=PAIRS),
        LINE.format(result="f32[4]{0}", kind="all-reduce-start", args="%a", groups=groups),
        LINE.format(result="((f32[4]{0}), f32[4]{0})", kind="all-reduce-start", args="%a", groups=groups),
        LINE.format(result="((f32[16]{0}), f32[4]{0})", kind="reduce-scatter-start", args="%a", groups=groups),
        LINE.format(result="((f32[4]{0}), f32[16]{0})", kind="all-gather-start", args="%a", groups=groups),
        LINE.format(result="f32[4]{0}", kind="all-reduce", args="%a", groups="replica_groups=[8,1]<=[8]"),
    ]
    found = hlo.collectives(f"ENTRY %main (a: f32[8]) -> f32[8] {{\n{''.join(lines)}}}\n", mesh)
    assert [c.size for c in found] == [48, 48, 16, 16, 16, 64, 64]  # the last talks with nobody


PAIRS = "source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}"


def test_what_the_compiler_gathers_by_itself(mesh):
    """A product whose weight lies split is found with the axis that it is split over."""
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    w = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, P("tensor")))
    with jax.set_mesh(mesh):
        text = jax.jit(lambda x, w: x @ jax.lax.with_sharding_constraint(w, P())).lower(x, w).compile().as_text()
    (found,) = hlo.collectives(text, mesh)
    assert (found.kind, found.axes, found.size) == ("all-gather", ("tensor",), np.prod(w.shape) * 4)
