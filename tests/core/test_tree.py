"""Names of leaves, and how two trees agree."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.tree import disagreement, map_named, name_of, named_leaves, size


@flax.struct.dataclass
class Pair:
    first: object
    second: object


TREE = {"layers": ({"0": {"query": np.zeros((2, 3))}},), "pair": Pair(np.ones(4), None), "list": [np.float32(1), {"x": np.zeros(())}]}


def test_a_leafs_name_is_its_path_whatever_the_containers():
    assert list(named_leaves(TREE)) == ["layers/0/0/query", "list/0", "list/1/x", "pair/first"]
    path, _ = jax.tree_util.tree_leaves_with_path(TREE)[0]
    assert name_of(path) == "layers/0/0/query"
    assert name_of(()) == ""


def test_a_function_is_given_the_name_and_every_trees_leaf():
    found = map_named(lambda name, a, b: (name, float(a.sum() + b)), {"a": np.ones(2), "b": {"c": np.ones(3)}}, {"a": 10, "b": {"c": 20}})
    assert found == {"a": ("a", 12.0), "b": {"c": ("b/c", 23.0)}}


def test_size_counts_the_numbers_of_arrays_and_of_abstract_arrays():
    assert size(TREE) == 6 + 4 + 1 + 1
    assert size(jax.eval_shape(lambda: {"a": jnp.zeros((3, 5)), "b": jnp.zeros(())})) == 16
    assert size({}) == 0


def test_disagreement_is_relative_to_the_largest_number_of_the_leaf():
    far = disagreement({"a": np.array([1.0, 4.1]), "b": np.array([0.5])}, {"a": np.array([1.0, 4.0]), "b": np.array([0.5])})
    assert far == {"a": pytest.approx(0.1 / 4.0), "b": 0.0}


def test_a_leaf_of_rounding_errors_is_held_to_a_thousandth_of_the_largest():
    far = disagreement({"a": np.array([100.0]), "bias": np.array([2e-9])}, {"a": np.array([100.0]), "bias": np.array([-1e-9])})
    assert far["bias"] == pytest.approx(3e-9 / 0.1)
    assert disagreement({"a": np.zeros(2)}, {"a": np.zeros(2)}) == {"a": 0.0}
    assert disagreement({"a": np.zeros((0, 2))}, {"a": np.zeros((0, 2))}) == {"a": 0.0}


def test_narrow_types_are_compared_in_float64():
    far = disagreement({"a": jnp.bfloat16(1.0)}, {"a": np.float64(1.001)})
    assert far["a"] == pytest.approx(0.001 / 1.001)


@pytest.mark.parametrize(("ours", "theirs"), [(np.nan, 1.0), (1.0, np.nan), (np.inf, 1.0), (np.inf, np.inf)])
def test_what_is_not_finite_never_agrees(ours, theirs):
    far = disagreement({"a": np.ones(2), "b": np.array([1.0, ours])}, {"a": np.ones(2), "b": np.array([1.0, theirs])})
    # The usual assertion must fail, in whatever order the leaves come.
    assert not max(far.values()) <= 1e-3
    assert not all(value <= 1e-3 for value in far.values())


def test_trees_that_cannot_be_compared_are_refused_by_name():
    with pytest.raises(ValueError, match=r"differ in their leaves: \['b', 'c'\]"):
        disagreement({"a": np.ones(1), "b": np.ones(1)}, {"a": np.ones(1), "c": np.ones(1)})
    with pytest.raises(ValueError, match=r"a has shape \(2,\), the reference \(1, 2\)"):
        disagreement({"a": np.ones(2)}, {"a": np.ones((1, 2))})
