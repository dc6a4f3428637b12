"""Attention that forms every score, with its backward pass written out: fast on a CPU for the lengths at which scores fit in memory.

Against automatic differentiation of the textbook it saves transposes, keeps one array of attention weights, and puts each product in
the form that XLA:CPU runs fastest.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from lmx.kernels.chunked import summed_as
from lmx.kernels.masks import Mask
from lmx.kernels.wide import wide, widened

wall = jax.lax.optimization_barrier


def attention(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    mask: Mask,
    *,
    scale: float,
    slopes: Float[Array, "heads"] | None = None,
    bias: Float[Array, "#batch heads queries keys"] | None = None,
) -> Float[Array, "batch queries heads head_dim"]:
    """As `reference.attention`, without soft cap and dropout."""
    queries, heads, keys, kv_heads = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    allowed = mask.dense(queries, keys)[:, None]
    fixed = jnp.where(allowed, 0.0, -jnp.inf)
    if slopes is not None:
        fixed = fixed - slopes[:, None, None] * mask.distances(queries, keys)[:, None]
    if heads != kv_heads:
        k, v = (jnp.repeat(a, heads // kv_heads, axis=2) for a in (k, v))
    return _attention(scale, q, k, v, fixed, bias)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(scale: float, q: Array, k: Array, v: Array, fixed: Array, bias: Array | None) -> Array:
    return _forward(scale, q, k, v, fixed, bias)[0]


def _forward(scale, q, k, v, fixed, bias):
    q, k, v = (wall(a.swapaxes(1, 2)) for a in (q, k, v))
    scores = scale * _product(q, k, 3, 3, wide(q.dtype)) + fixed
    if bias is not None:
        scores = scores + bias
    weights = jnp.exp(scores - jnp.maximum(scores.max(-1, keepdims=True), jnp.finfo(jnp.float32).min))
    weights = weights * (1 / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny))
    weights = wall(weights.astype(v.dtype))
    mixed = wall(_product(weights, v, 3, 2))
    return mixed.swapaxes(1, 2), (q, k, v, weights, fixed, bias)


def _backward(scale, saved, g):
    q, k, v, weights, fixed, bias = saved
    g = wall(g.swapaxes(1, 2))
    d_weights = _product(g, v, 3, 3, wide(g.dtype))
    w = widened(weights)
    centred = d_weights - (d_weights * w).sum(-1, keepdims=True)
    d_scores = wall((scale * w * centred).astype(q.dtype))
    d_bias = None if bias is None else summed_as(w * centred, bias).astype(bias.dtype)
    dq, dk, dv = _product(d_scores, k, 3, 2), _over_queries(d_scores, q), _over_queries(weights, g)
    return *(a.swapaxes(1, 2) for a in (dq, dk, dv)), jnp.zeros_like(fixed), d_bias


_attention.defvjp(_forward, _backward)


def _product(a: Array, b: Array, i: int, j: int, dtype=None) -> Array:
    """A product for each row and head."""
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((0, 1), (0, 1))), preferred_element_type=dtype)


def _over_queries(a: Array, b: Array) -> Array:
    """a `[batch, heads, queries, keys]`, b `[batch, heads, queries, head_dim]` -> `[batch, heads, keys, head_dim]`; the sum over
    queries in two halves, which XLA:CPU has a fast path for."""
    if a.shape[2] % 2:
        return _product(a, b, 2, 2)
    halves = (x.reshape(*x.shape[:2], 2, x.shape[2] // 2, x.shape[3]) for x in (a, b))
    return jax.lax.dot_general(*halves, (((2, 3), (2, 3)), ((0, 1), (0, 1))))
