"""Products of float8 numbers against the same mathematics in float64 with ml_dtypes, and against bf16 in training."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lmx.core.weights import Narrow, linear, quantised

RNG = np.random.default_rng(0)
LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def rounded(a: np.ndarray, kind: str) -> np.ndarray:
    """An array as float8 numbers times one power of two holds it, in float64."""
    a = np.asarray(a, np.float64)
    ratio = np.abs(a).max() / LARGEST[kind]
    scale = 2.0 ** (np.floor(np.log2(ratio)) + 1)
    return (a / scale).astype(np.float32).astype(getattr(ml_dtypes, kind)).astype(np.float64) * scale


@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
@pytest.mark.parametrize("kind", LARGEST)
def test_a_tensor_is_scaled_by_a_power_of_two_that_makes_its_largest_fit(kind, size):
    a = (size * RNG.normal(size=(16, 16))).astype(np.float32)
    numbers, scale = quantised(a, jnp.dtype(kind))
    assert np.log2(float(scale)) % 1 == 0
    assert LARGEST[kind] / 4 <= np.abs(np.asarray(numbers, np.float64)).max() <= LARGEST[kind]
    assert np.array_equal(np.asarray(numbers, np.float64) * float(scale), rounded(a, kind))


def test_nothing_stays_nothing_and_what_is_not_finite_is_seen():
    numbers, scale = quantised(jnp.zeros((2, 2)), jnp.float8_e4m3fn)
    assert (float(scale), np.asarray(numbers, np.float32).any()) == (1.0, False)
    for bad in (np.inf, np.nan):
        y = linear(jnp.array([[1.0, bad]]), Narrow(jnp.ones((2, 2))))
        assert not np.isfinite(np.asarray(y)).any()


@pytest.mark.parametrize(("x_shape", "w_shape", "inputs"), [((3, 5, 16), (16, 4, 6), 1), ((3, 5, 4, 6), (4, 6, 16), 2)])
def test_values_and_gradients_are_those_of_the_rounded_numbers_in_float64(x_shape, w_shape, inputs):
    x, w = RNG.normal(size=x_shape).astype(np.float32), 0.05 * RNG.normal(size=w_shape).astype(np.float32)
    bias = RNG.normal(size=w_shape[inputs:]).astype(np.float32)
    y, pullback = jax.vjp(lambda x, w, b: linear(x, Narrow(w), b, inputs=inputs), x, w, bias)
    g = 1e-3 * RNG.normal(size=y.shape).astype(np.float32)
    dx, dw, db = pullback(g)

    flat, columns = (-1, int(np.prod(w_shape[:inputs]))), int(np.prod(w_shape[inputs:]))
    xs, ws, gs = rounded(x, "float8_e4m3fn").reshape(flat), rounded(w, "float8_e4m3fn").reshape(-1, columns), rounded(g, "float8_e5m2")
    gs = gs.reshape(-1, columns)
    for found, expected in ((y, (xs @ ws).reshape(y.shape) + bias), (dx, gs @ ws.T), (dw, xs.T @ gs)):
        expected = expected.reshape(found.shape)
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(db, g.reshape(-1, columns).sum(0).reshape(bias.shape), rtol=1e-5, atol=1e-7)


def test_types_are_those_of_a_bf16_product():
    x, w = jnp.ones((2, 4), jnp.bfloat16), jnp.ones((4, 3))
    y, pullback = jax.vjp(lambda x, w: linear(x, Narrow(w)), x, w)
    dx, dw = pullback(y)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    assert float(y[0, 0]) == 4.0
