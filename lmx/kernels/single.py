"""Attention of one query a row, as products and sums without matrix products: what decoding over a dense cache wants.

On a CPU it is about ten times faster than the einsum over the same cache, which falls off every fast path.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from lmx.kernels.masks import Mask
from lmx.kernels.wide import widened


def attention(
    q: Float[Array, "batch 1 heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    slopes: Float[Array, "heads"] | None = None,
    bias: Float[Array, "#batch heads 1 keys"] | None = None,
) -> Float[Array, "batch 1 heads head_dim"]:
    """As `reference.attention`, for one query; no dropout."""
    batch, _, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    k, v = (widened(a.swapaxes(1, 2)[:, :, None]) for a in (k, v))
    grouped = scale * widened(q).reshape(batch, kv_heads, heads // kv_heads, 1, head_dim)
    scores = (grouped * k).sum(-1)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if slopes is not None:
        scores -= slopes.reshape(1, kv_heads, -1, 1) * mask.distances(1, keys)[:, :, None]
    if bias is not None:
        scores += bias.reshape(-1, *scores.shape[1:])
    scores = jnp.where(mask.dense(1, keys)[:, :, None], scores, -jnp.inf)
    weights = jnp.exp(scores - jnp.maximum(scores.max(-1, keepdims=True), jnp.finfo(jnp.float32).min))
    weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return (weights[..., None] * v).sum(3).reshape(q.shape).astype(q.dtype)
