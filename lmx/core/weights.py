"""The weight door: layers multiply by anything that can multiply, through these functions and no other way.

A weight's contracted dimensions come first: a query projection is `[embed, heads, head_dim]` with one input, the output
projection `[heads, head_dim, embed]` with two. Weights are kept in the master type and multiply in their operand's.
"""

import jax
import jax.numpy as jnp
from jax import Array


def linear(x: Array, weight: Array, bias: Array | None = None, *, inputs: int = 1) -> Array:
    """`x W + b`, contracting the last `inputs` dimensions of x with the first `inputs` of the weight.

    Shapes: x `[..., *in]`, weight `[*in, *out]`, bias `[*out]`; gives `[..., *out]` in x's type, accumulated in fp32.
    """
    contracted = (tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs)))
    y = jax.lax.dot_general(x, weight.astype(x.dtype), (contracted, ((), ())))
    return y if bias is None else y + bias.astype(x.dtype)


def lookup(tokens: Array, weight: Array, dtype) -> Array:
    """Rows of an embedding table: tokens int `[...]`, weight `[vocab, embed]`; gives `[..., embed]` in `dtype`."""
    return jnp.take(weight, tokens, axis=0, mode="clip").astype(dtype)


def attend(x: Array, weight: Array) -> Array:
    """Logits of a tied head: x `[..., embed]` against each row of weight `[vocab, embed]`; fp32 `[..., vocab]`."""
    return jax.lax.dot_general(x, weight.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
