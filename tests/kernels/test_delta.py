"""The delta rule in chunks against its recurrence in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.kernels.delta import delta_rule
from lmx.kernels.linear_attention import CHUNK

BATCH, LENGTH, HEADS, KEYS, VALUES = 2, 2 * CHUNK + 5, 2, 4, 3


def recurrence(r, k, v, decay, a, b, real, fresh, state):
    """Token by token, as the paper has it (section 3, equation 1, transposed), in float64."""
    r, k, v, decay, a, b, state = (np.asarray(x, np.float64) for x in (r, k, v, decay, a, b, state))
    y, state = np.zeros(v.shape), state.copy()
    for i, t, h in np.ndindex(*v.shape[:3]):
        if fresh[i, t]:
            state[i, h] = 0
        after = (np.diag(np.exp(decay[i, t, h])) + np.outer(b[i, t, h], a[i, t, h])) @ state[i, h] + np.outer(k[i, t, h], v[i, t, h])
        if real[i, t]:
            state[i, h], y[i, t, h] = after, r[i, t, h] @ after
    return y, state


def inputs(strength: float, rate: float = 1.0, seed: int = 0):
    """Arrays of random numbers, b being -a times a rate up to `rate`; decays of about e^-strength, some of them none at all."""
    rng = np.random.default_rng(seed)
    r, k, a = rng.normal(size=(3, BATCH, LENGTH, HEADS, KEYS))
    a /= np.linalg.norm(a, axis=-1, keepdims=True)
    b = -a * rng.uniform(0, rate, size=a.shape)
    decay = np.where(rng.random(a.shape) < 0.3, -1e-3, -strength * rng.exponential(size=a.shape))
    v, state = rng.normal(size=(BATCH, LENGTH, HEADS, VALUES)), rng.normal(size=(BATCH, HEADS, KEYS, VALUES))
    return tuple(x.astype(np.float32) for x in (r, k, v, decay, a, b)), state.astype(np.float32)


ALL, NONE = np.ones((BATCH, LENGTH), bool), np.zeros((BATCH, LENGTH), bool)


def far(found, expected) -> float:
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(("strength", "rate"), [(0.01, 1.0), (0.6, 1.0), (0.6, 0.0), (30.0, 1.0), (3000.0, 0.5)])
def test_chunks_are_the_recurrence_however_strong_decays_are(strength, rate):
    given, state = inputs(strength, rate)
    y, after = delta_rule(*given, ALL, NONE, state)
    expected, expected_after = recurrence(*given, ALL, NONE, state)
    assert far(y, expected) < 2e-6
    assert far(after, expected_after) < 2e-6


def test_a_place_that_is_replaced_over_and_over_holds_what_was_written_last():
    """The same place at every token, at the full rate and without decay: the state there is the last value."""
    (_, _, v, decay, a, _), state = inputs(0.0)
    a = np.broadcast_to(a[:, :1], a.shape)
    y, _ = delta_rule(a, a, v, np.zeros_like(decay), a, -a, ALL, NONE, state)
    np.testing.assert_allclose(y, v, atol=1e-5)


def test_texts_are_apart_and_padding_is_passed_over():
    rng, (given, state) = np.random.default_rng(2), inputs(0.6)
    fresh, real = rng.random((BATCH, LENGTH)) < 0.15, rng.random((BATCH, LENGTH)) < 0.8
    fresh &= real
    y, after = delta_rule(*given, real, fresh, state)
    expected, expected_after = recurrence(*given, real, fresh, state)
    assert far(np.where(real[..., None, None], y, 0), expected) < 2e-6
    assert far(after, expected_after) < 2e-6


@pytest.mark.parametrize("cuts", [range(1, LENGTH + 1), (1, CHUNK + 1, LENGTH)], ids=["one by one", "in uneven parts"])
def test_parts_one_after_another_are_the_whole(cuts):
    given, _ = inputs(0.6)
    whole, last = delta_rule(*given, ALL, NONE)
    step, state, found, begin = jax.jit(delta_rule), jnp.zeros((BATCH, HEADS, KEYS, VALUES)), [], 0
    for end in cuts:
        part = slice(begin, end)
        y, state = step(*(a[:, part] for a in given), ALL[:, part], NONE[:, part], state)
        begin = end
        found.append(y)
    assert far(jnp.concatenate(found, 1), whole) < 2e-6
    assert far(state, last) < 2e-6


def test_gradients_are_how_the_recurrence_changes():
    rng, (given, state) = np.random.default_rng(3), inputs(0.6)
    fresh, along = rng.random((BATCH, LENGTH)) < 0.1, rng.normal(size=(BATCH, LENGTH, HEADS, VALUES))

    def loss(*arrays):
        y, after = delta_rule(*arrays[:6], ALL, fresh, arrays[6])
        return (y * along).sum() + (after**2).sum()

    def exact(*arrays) -> float:
        y, after = recurrence(*arrays[:6], ALL, fresh, arrays[6])
        return (y * along).sum() + (after**2).sum()

    arrays = (*given, state)
    for i, gradient in enumerate(jax.jit(jax.grad(loss, range(7)))(*arrays)):
        way = np.asarray(gradient, np.float64) + rng.normal(size=gradient.shape) * np.abs(gradient).mean()
        moved = [exact(*(a + by * way if i == j else a for j, a in enumerate(arrays))) for by in (1e-5, -1e-5)]
        assert np.vdot(gradient, way) == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-4)
