"""The weight door."""

import jax
import jax.numpy as jnp
import numpy as np

from lmx.core.weights import attend, linear, lookup

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def test_linear_contracts_the_last_dimensions_with_the_first():
    x, weight, bias = normal(2, 3, 4), normal(4, 5, 6), normal(5, 6)
    found = linear(x, weight, bias)
    expected = np.einsum("bld,dhk->blhk", x.astype(np.float64), weight.astype(np.float64)) + bias
    np.testing.assert_allclose(found, expected, atol=1e-5)
    x, weight = normal(2, 3, 5, 6), normal(5, 6, 4)
    expected = np.einsum("blhk,hkd->bld", x.astype(np.float64), weight.astype(np.float64))
    np.testing.assert_allclose(linear(x, weight, inputs=2), expected, atol=1e-5)


def test_weights_multiply_in_their_operands_type_and_get_gradients_in_their_own():
    x, weight, bias = jnp.asarray(normal(3, 4), jnp.bfloat16), normal(4, 5), normal(5)
    assert linear(x, weight, bias).dtype == jnp.bfloat16
    gradient = jax.grad(lambda w: linear(x, w, bias).astype(jnp.float32).sum())(weight)
    assert gradient.dtype == jnp.float32


def test_narrow_products_are_accumulated_in_float32():
    # Adding ones in bfloat16 stops at 256, in float16 at 2048.
    for dtype in (jnp.bfloat16, jnp.float16):
        assert float(linear(jnp.ones((1, 8192), dtype), jnp.ones((8192, 1)))[0, 0]) == 8192.0


def test_lookup_gives_rows_in_the_type_asked_for():
    table, tokens = normal(7, 4), np.array([[0, 6], [3, 3]])
    found = lookup(tokens, table, jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    assert np.array_equal(found, np.asarray(jnp.asarray(table[tokens], jnp.bfloat16)))
    assert np.array_equal(lookup(tokens, table, jnp.float32), table[tokens])


def test_a_row_read_twice_gets_both_gradients():
    gradient = jax.grad(lambda t: lookup(np.array([2, 2, 1]), t, jnp.float32).sum())(normal(4, 3))
    assert gradient.tolist() == [[0] * 3, [1] * 3, [2] * 3, [0] * 3]


def test_logits_of_a_tied_head_are_float32_whatever_its_operands():
    x, table = normal(2, 3, 64), normal(9, 64)
    expected = np.einsum("bld,vd->blv", x.astype(np.float64), table.astype(np.float64))
    np.testing.assert_allclose(attend(x, table), expected, atol=1e-5)
    narrow = jnp.asarray(x, jnp.bfloat16)
    found = attend(narrow, table)
    assert found.dtype == jnp.float32
    rounded = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in (x, table)]
    # Rounded once, on the way in: bfloat16 logits would be off by 2^-9 of themselves.
    np.testing.assert_allclose(found, np.einsum("bld,vd->blv", *rounded), atol=1e-5)
