"""Logical axes to mesh axes, and batches onto devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lmx.parallel.feed import batch_sharding, local_rows, place
from lmx.parallel.layout import Layout, check, make_mesh
from lmx.parallel.rules import constrain, partition, rules

RULES = rules(Layout(), split=True)

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


def test_each_mesh_axis_is_used_once_and_only_where_it_divides():
    assert partition(("embed", "heads", "head_dim"), (8, 4, 16), RULES, SIZES) == P("fsdp", "tensor", None)
    assert partition(("vocab", "embed"), (10, 8), RULES, SIZES) == P("tensor", "fsdp")
    assert partition(("batch", None, "vocab"), (8, 3, 10), RULES, SIZES) == P(("data", "fsdp"), None, "tensor")
    assert partition(("heads", "mlp"), (4, 4), RULES, SIZES) == P("tensor", None), "an axis is used once"
    assert partition(("kv_heads", "head_dim"), (1, 16), RULES, SIZES) == P(None, None), "one key head is replicated"
    assert partition(("embed", "heads"), (8, 4), RULES, {"data": 8, "fsdp": 1, "tensor": 1}) == P(None, None)


def test_without_a_mesh_or_rules_nothing_is_constrained():
    x = jnp.ones((4, 4))
    assert constrain(x, ("batch", None), RULES) is x
    with jax.set_mesh(make_mesh(Layout(data=2))):
        assert constrain(x, ("batch", None), None) is x
        assert jax.jit(lambda x: constrain(x, ("batch", None), RULES))(x).sharding.spec == P("data")


def test_a_batch_is_placed_row_by_row_where_its_sharding_says():
    mesh = make_mesh(Layout(data=2, fsdp=2, tensor=2))
    sharding, shape = batch_sharding(mesh, microbatches=True), (2, 4)
    rows = local_rows(sharding, shape)
    assert rows.tolist() == list(range(8)), "one process holds every row"
    values = np.arange(24, dtype=np.int32).reshape(8, 3)
    placed = place({"tokens": values}, rows, shape, sharding)["tokens"]
    np.testing.assert_array_equal(placed, values.reshape(2, 4, 3))
    for shard in placed.addressable_shards:
        assert shard.data.shape == (2, 1, 3), "each device holds its quarter of the rows of every microbatch"


def test_layouts_that_do_not_fit_are_refused_by_knob():
    sizes = {"tensor": {"model.heads": 12}, "fsdp": {"model.embed": 8}}
    check(Layout(data=2, tensor=4), sizes, 8, 1, 8)
    with pytest.raises(ValueError, match=r"model\.heads=12 is not divisible by layout\.tensor=8; use 1, 2, 3, 4, 6 or 12"):
        check(Layout(tensor=8), sizes, 8, 1, 8)
    with pytest.raises(ValueError, match=r"needs 16 devices .* but 8 are here"):
        check(Layout(data=16), sizes, 16, 1, 8)
    with pytest.raises(ValueError, match=r"layout\.data=0 must be at least 1"):
        check(Layout(data=0), sizes, 8, 1, 8)
    with pytest.raises(ValueError, match=r"3 rows .* not divisible"):
        check(Layout(data=2), sizes, 3, 1, 8)
