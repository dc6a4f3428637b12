"""Precision policies by name, and the automaton of dynamic loss scaling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core import precision
from lmx.core.precision import LARGEST_SCALE, POLICIES, Precision, all_finite, initial_loss_scale, update_loss_scale


def after(state, *steps: bool):
    for finite in steps:
        state = update_loss_scale(state, jnp.bool_(finite))
    return state


def numbers(state) -> tuple[float, int, int]:
    return float(state.scale), int(state.clean), int(state.skipped)


def test_policies_hold_what_their_names_say():
    assert {
        "fp32": Precision("float32", "float32", False),
        "tf32": Precision("float32", "float32", False, "tensorfloat32"),
        "bf16": Precision("float32", "bfloat16", False),
        "bf16_pure": Precision("bfloat16", "bfloat16", False),
        "fp16": Precision("float32", "float16", True),
        "fp8": Precision("float32", "bfloat16", False, fp8=True),
        "fp64": Precision("float64", "float64", False),
    } == POLICIES


def test_an_overflow_halves_the_scale_and_is_counted():
    state = after(initial_loss_scale(1024.0), True, True, False)
    assert numbers(state) == (512.0, 0, 1)
    assert numbers(after(state, False, True)) == (256.0, 1, 2)


def test_the_scale_doubles_after_that_many_clean_steps_in_a_row(monkeypatch):
    monkeypatch.setattr(precision, "GROWTH_INTERVAL", 3)
    state = initial_loss_scale(8.0)
    seen = []
    for finite in (True, True, False, True, True, True, True, True, True, True):
        state = after(state, finite)
        seen.append(numbers(state))
    assert seen == [
        (8.0, 1, 0),
        (8.0, 2, 0),
        (4.0, 0, 1),
        (4.0, 1, 1),
        (4.0, 2, 1),
        (8.0, 0, 1),
        (8.0, 1, 1),
        (8.0, 2, 1),
        (16.0, 0, 1),
        (16.0, 1, 1),
    ]


def test_the_interval_is_two_thousand_steps():
    state = initial_loss_scale(2.0).replace(clean=jnp.int32(1998))
    assert numbers(after(state, True)) == (2.0, 1999, 0)
    assert numbers(after(state, True, True)) == (4.0, 0, 0)


def test_the_scale_stays_between_one_and_the_largest():
    assert numbers(after(initial_loss_scale(2.0), False, False, False)) == (1.0, 0, 3)
    state = initial_loss_scale(LARGEST_SCALE).replace(clean=jnp.int32(1999))
    assert numbers(after(state, True)) == (LARGEST_SCALE, 0, 0)


def test_the_state_keeps_its_types_under_jit():
    state = initial_loss_scale()
    assert float(state.scale) == 2.0**15
    moved = jax.jit(update_loss_scale)(state, jnp.bool_(False))
    assert jax.tree.map(lambda a: (a.dtype, a.shape), moved) == jax.tree.map(lambda a: (a.dtype, a.shape), state)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_found(bad):
    tree = {"a": jnp.zeros((3, 2)), "b": (jnp.zeros(4, jnp.float16), jnp.int32(3))}
    assert bool(all_finite(tree))
    assert not bool(all_finite({**tree, "a": tree["a"].at[1, 1].set(bad)}))
    assert not bool(all_finite({**tree, "b": (tree["b"][0].at[3].set(bad), tree["b"][1])}))
