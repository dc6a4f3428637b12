"""The weight door: layers multiply by anything that can multiply, through these functions and no other way.

A weight's contracted dimensions come first: a query projection is `[embed, heads, head_dim]` with one input, the output
projection `[heads, head_dim, embed]` with two. Weights are kept in the master type and multiply in their operand's; their
gradients come in the master type, without being rounded to the operand's on the way.

The backward passes are written out because XLA:CPU is particular about how a product is put (measured in
`experiments/bench/README.md`); they are the same mathematics, and no slower elsewhere.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

PRODUCT = "product"
"""What a rematerialisation policy calls the result of a product with a weight."""
NARROW = 256
"""Up to this width of its output, a weight's gradient is computed transposed."""


def linear(x: Array, weight: Array, bias: Array | None = None, *, inputs: int = 1) -> Array:
    """`x W + b`, contracting the last `inputs` dimensions of x with the first `inputs` of the weight.

    Shapes: x `[..., *in]`, weight `[*in, *out]`, bias `[*out]`; gives `[..., *out]` in x's type, accumulated in fp32.
    """
    lead, out = x.shape[: x.ndim - inputs], weight.shape[inputs:]
    size = math.prod(weight.shape[:inputs])
    flat_bias = None if bias is None else bias.reshape(-1)
    return checkpoint_name(_linear(x.reshape(-1, size), weight.reshape(size, -1), flat_bias).reshape(*lead, *out), PRODUCT)


def lookup(tokens: Array, weight: Array, dtype) -> Array:
    """Rows of an embedding table: tokens int `[...]`, weight `[vocab, embed]`; gives `[..., embed]` in `dtype`."""
    return jnp.take(weight, tokens, axis=0, mode="clip").astype(dtype)


def attend(x: Array, weight: Array) -> Array:
    """Logits of a tied head: x `[..., embed]` against each row of weight `[vocab, embed]`; fp32 `[..., vocab]`."""
    return dot(x, weight.astype(x.dtype), x.ndim - 1, 1, jnp.float32)


def dot(a: Array, b: Array, i: int, j: int, dtype=None) -> Array:
    """The product of two arrays over dimension i of one and j of the other, in `dtype` (theirs when None)."""
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=dtype)


def sum_rows(g: Array, dtype) -> Array:
    """The sum over the rows of `[rows, columns]`, as a product: XLA:CPU turns the reduction into something slow."""
    return dot(jnp.ones(g.shape[0], g.dtype), g, 0, 0, dtype)


def weight_gradient(x: Array, g: Array, dtype) -> Array:
    """`x^T g` of x `[rows, in]` and g `[rows, out]`, in the form that is fastest for its shape."""
    k, m = x.shape[1], g.shape[1]
    if m < k and m <= NARROW:  # the narrow result is transposed, not the wide operand; the barrier keeps XLA from folding that back
        return jax.lax.optimization_barrier(dot(g, x, 0, 0, dtype)).T
    return dot(x, g, 0, 0, dtype)


@jax.custom_vjp
def _linear(x: Array, weight: Array, bias: Array | None) -> Array:
    y = dot(x, weight.astype(x.dtype), 1, 0)
    return y if bias is None else y + bias.astype(x.dtype)


def _linear_forward(x, weight, bias):
    return _linear(x, weight, bias), (x, weight, bias)


def _linear_backward(saved, g):
    x, weight, bias = saved
    d_bias = None if bias is None else sum_rows(g, bias.dtype)
    return dot(g, weight.astype(g.dtype), 1, 1), weight_gradient(x, g, weight.dtype), d_bias


_linear.defvjp(_linear_forward, _linear_backward)
