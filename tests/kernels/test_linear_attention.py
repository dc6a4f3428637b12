"""Linear attention in chunks against its recurrence in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.kernels.linear_attention import CHUNK, linear_attention

BATCH, LENGTH, HEADS, KEYS, VALUES = 2, 2 * CHUNK + 5, 2, 4, 3


def recurrence(r, k, v, decay, bonus, real, fresh, state):
    """Token by token, as the paper has it (section 3.1.2), in float64."""
    r, k, v, decay, bonus, state = (np.asarray(a, np.float64) for a in (r, k, v, decay, bonus, state))
    decay = np.broadcast_to(decay, k.shape)
    y, state = np.zeros(v.shape), state.copy()
    for b, t, h in np.ndindex(*v.shape[:3]):
        if fresh[b, t]:
            state[b, h] = 0
        outer = np.outer(k[b, t, h], v[b, t, h])
        y[b, t, h] = r[b, t, h] @ (state[b, h] + bonus[h][:, None] * outer)
        if real[b, t]:
            state[b, h] = np.exp(decay[b, t, h])[:, None] * state[b, h] + outer
    return y, state


def inputs(strength: float, seed: int = 0, fixed: bool = False):
    """Arrays of random numbers; decays of about e^-strength, some of them none at all."""
    rng = np.random.default_rng(seed)
    r, k = rng.normal(size=(2, BATCH, LENGTH, HEADS, KEYS)).astype(np.float32)
    v = rng.normal(size=(BATCH, LENGTH, HEADS, VALUES)).astype(np.float32)
    decay = (-strength * rng.exponential(size=(1, 1, HEADS, KEYS) if fixed else k.shape)).astype(np.float32)
    decay = np.where(rng.random(decay.shape) < 0.3, -1e-3, decay).astype(np.float32)
    bonus = rng.normal(size=(HEADS, KEYS)).astype(np.float32)
    return r, k, v, decay, bonus


ALL, NONE = np.ones((BATCH, LENGTH), bool), np.zeros((BATCH, LENGTH), bool)


def far(found, expected) -> float:
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("strength", [0.01, 30.0, 3000.0])
def test_chunks_are_the_recurrence_however_strong_decays_are(strength, fixed):
    given, state = inputs(strength, fixed=fixed), np.random.default_rng(1).normal(size=(BATCH, HEADS, KEYS, VALUES)).astype(np.float32)
    y, after = linear_attention(*given, ALL, NONE, state)
    expected, expected_after = recurrence(*given, ALL, NONE, state)
    assert far(y, expected) < 2e-6
    assert far(after, expected_after) < 2e-6


def test_texts_are_apart_and_padding_is_passed_over():
    rng, given = np.random.default_rng(2), inputs(1.0)
    fresh, real = rng.random((BATCH, LENGTH)) < 0.15, rng.random((BATCH, LENGTH)) < 0.8
    fresh &= real
    state = rng.normal(size=(BATCH, HEADS, KEYS, VALUES)).astype(np.float32)
    y, after = linear_attention(*given, real, fresh, state)
    expected, expected_after = recurrence(*given, real, fresh, state)
    assert far(y, expected) < 2e-6
    assert far(after, expected_after) < 2e-6


@pytest.mark.parametrize("cuts", [range(1, LENGTH + 1), (1, CHUNK, CHUNK + 1, LENGTH)], ids=["one by one", "in uneven parts"])
def test_parts_one_after_another_are_the_whole(cuts):
    *given, bonus = inputs(1.0)
    whole, last = linear_attention(*given, bonus, ALL, NONE)
    step, state, found, begin = jax.jit(linear_attention), jnp.zeros((BATCH, HEADS, KEYS, VALUES)), [], 0
    for end in cuts:
        part = slice(begin, end)
        y, state = step(*(a[:, part] for a in given), bonus, ALL[:, part], NONE[:, part], state)
        begin = end
        found.append(y)
    assert far(jnp.concatenate(found, 1), whole) < 2e-6
    assert far(state, last) < 2e-6


@pytest.mark.parametrize("strength", [0.3, 100.0])
def test_gradients_are_how_the_recurrence_changes(strength):
    rng, given = np.random.default_rng(3), inputs(strength)
    fresh = rng.random((BATCH, LENGTH)) < 0.1
    state, along = rng.normal(size=(BATCH, HEADS, KEYS, VALUES)).astype(np.float32), rng.normal(size=(BATCH, LENGTH, HEADS, VALUES))

    def loss(*arrays):
        y, after = linear_attention(*arrays[:5], ALL, fresh, arrays[5])
        return (y * along).sum() + (after**2).sum()

    def exact(*arrays) -> float:
        y, after = recurrence(*arrays[:5], ALL, fresh, arrays[5])
        return (y * along).sum() + (after**2).sum()

    arrays = (*given, state)
    for i, gradient in enumerate(jax.jit(jax.grad(loss, range(6)))(*arrays)):
        assert np.isfinite(gradient).all()
        way = np.asarray(gradient, np.float64) + rng.normal(size=gradient.shape) * np.abs(gradient).mean()
        moved = [exact(*(a + by * way if i == j else a for j, a in enumerate(arrays))) for by in (1e-5, -1e-5)]
        assert np.vdot(gradient, way) == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-4)
