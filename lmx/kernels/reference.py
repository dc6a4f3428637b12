"""Attention as the textbook has it (Vaswani et al., 2017): every score is formed. Every other implementation is held against it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from lmx.kernels.masks import Mask
from lmx.kernels.wide import widened


def attention(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    slopes: Float[Array, "heads"] | None = None,
    bias: Float[Array, "#batch heads queries keys"] | None = None,
    keep: Float[Array, "batch heads queries keys"] | None = None,
    site: Callable[[str, Array], Array] = lambda name, value: value,
) -> Float[Array, "batch queries heads head_dim"]:
    """Scaled dot-product attention with grouped heads; see `lmx.kernels.attention` for the arguments.

    Everything is fp32 at least. A query that may see nothing gets zeros, never NaN. `keep` multiplies
    the attention weights (dropout). `site` is given `scores`, before the mask, and `weights`, both `[batch, heads, queries, keys]`, and
    gives what to go on with.
    """
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    grouped = widened(q).reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    scores = scale * jnp.einsum("bqhgd,bkhd->bhgqk", grouped, widened(k)).reshape(batch, heads, queries, keys)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if slopes is not None:
        scores -= slopes[:, None, None] * mask.distances(queries, keys)[:, None]
    if bias is not None:
        scores += bias
    scores = jnp.where(mask.dense(queries, keys)[:, None], site("scores", scores), -jnp.inf)
    largest = jnp.maximum(jax.lax.stop_gradient(scores.max(-1, keepdims=True)), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - largest)
    weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    if keep is not None:
        weights = weights * keep
    weights = site("weights", weights).reshape(batch, kv_heads, heads // kv_heads, queries, keys)
    mixed = jnp.einsum("bhgqk,bkhd->bqhgd", weights, widened(v))
    return mixed.reshape(q.shape).astype(q.dtype)
