"""What layers compute on a GPU in another form than on a CPU: the same numbers, held against float64 NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.execution import Execution
from lmx.core.params import initial_values
from lmx.core.products import shifted
from lmx.models import feedforward, norms
from lmx.models.config import Transformer


@pytest.mark.parametrize("moments", [norms.in_one, norms.in_two])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_mean_and_variance_of_rows_whose_mean_is_far_from_zero(moments, offset):
    x = np.random.default_rng(0).standard_normal((5, 768)).astype(np.float32) + np.float32(offset)
    x[:, 3] += 500
    mean, square = jax.jit(moments)(x)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(mean, wide.mean(-1, keepdims=True), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(square, wide.var(-1, keepdims=True), rtol=1e-5)


def test_gelu_by_a_sigmoid_and_its_derivative_are_those_of_the_tanh():
    x = np.concatenate([np.linspace(-12, 12, 2001), [-1e4, 1e4]]).astype(np.float32)
    wide = x.astype(np.float64)
    u = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    tanh, slope = np.tanh(u), math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * wide**2)
    value, gradient = jax.vmap(jax.value_and_grad(feedforward.gelu_by_sigmoid))(x)
    np.testing.assert_allclose(value, wide * (1 + tanh) / 2, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(gradient, (1 + tanh) / 2 + wide * (1 - tanh**2) / 2 * slope, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("rest", [False, True])
def test_a_bias_that_is_added_late_gets_the_sum_of_its_rows_in_its_own_type(rest):
    r = np.random.default_rng(1)
    y, g, bias = (r.standard_normal(shape).astype(np.float32) for shape in ((3, 40, 6), (3, 40, 6), (6,)))
    out, back = jax.vjp(lambda y, bias: shifted(y, bias, rest), jnp.asarray(y, jnp.bfloat16), jnp.asarray(bias))
    d_y, d_bias = back(jnp.asarray(g, jnp.bfloat16))
    assert (out.dtype, d_y.dtype, d_bias.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(d_bias, np.asarray(jnp.asarray(g, jnp.bfloat16), np.float64).sum((0, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_a_feed_forward_layer_computes_the_same_by_either_form(gated, monkeypatch):
    config = Transformer(vocab=8, layers=1, embed=8, heads=2, activation="gelu_tanh", gated=gated, bias=True)
    params = initial_values(jax.random.key(0), feedforward.specs(config))
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), params)
    x = jax.random.normal(jax.random.key(1), (2, 5, 8))

    def both():
        def summed(x, params):
            return jnp.sum(jnp.sin(feedforward.feedforward(x, params, config, Execution())))

        return jax.value_and_grad(summed, argnums=(0, 1))(x, params)

    here = both()
    monkeypatch.setattr(feedforward.devices, "on_cpu", lambda: False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), both(), here)
