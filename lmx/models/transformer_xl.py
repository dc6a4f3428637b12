"""Transformer-XL's relative positions (Dai et al., 2019, arXiv 1901.02860), which Gopher has (Rae et al., 2021, arXiv 2112.11446).

Query i scores key j by `(q_i + u) k_j + (q_i + v) W r_(i-j)`, r being the sinusoids of the distance and W, u and v a layer's own. Any
implementation of attention computes the first product; the second goes to it as a bias, `[batch, heads, queries, keys]` in fp32, in one of two
ways:

- where texts lie in their rows as they are read, W times the sinusoids of every distance is one small array for all rows, its product with the
  queries costs what that with the keys does, and each row of it is then shifted by one more (their appendix B);
- where they do not (a cache, a text with gaps), the angle-difference identity makes the second product one of a vector of the query and its
  position with the sinusoids of the key's position. That is exact for any positions, and costs embed / head_dim times as much.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from lmx.core.params import Normal, ParamSpec
from lmx.core.tree import Tree
from lmx.core.weights import whole
from lmx.kernels.masks import Mask
from lmx.kernels.wide import wide, widened
from lmx.models.config import Transformer
from lmx.models.positions import sinusoids


def specs(config: Transformer) -> Tree:
    """Of one layer: W as `projection`, u as `content` and v as `position`."""
    shape, init = (config.heads, config.head_size), Normal(config.init_std)
    tree = {"projection": ParamSpec((config.embed, *shape), ("embed", "heads", "head_dim"), 1, init)}
    return tree | {name: ParamSpec(shape, ("heads", "head_dim"), init=init) for name in ("content", "position")}


def in_order(mask: Mask, length: int) -> Bool[Array, ""]:
    """Whether every key that a query may see lies as far before it in the row as in its text."""
    apart = mask.distances(length, length) != jnp.arange(length)[:, None] - jnp.arange(length)
    return ~jnp.any(apart & mask.dense(length, length))


def scored(
    query: Float[Array, "batch queries heads head_dim"], params: Tree, mask: Mask, ordered: Bool[Array, ""] | None, scale: float
) -> tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch heads queries keys"]]:
    """What attention takes as queries, and the bias.

    Args:
      ordered: `in_order`, or None with a cache.
      scale: what attention multiplies products of queries and keys by.
    """
    towards_keys, *towards_distances = towards(query, params, scale)
    operands = *towards_distances, mask.query_positions, mask.key_positions
    if ordered is None:
        return towards_keys, by_positions(*operands)
    both_ways = not mask.causal or mask.key_prefix is not None
    # Neither way has anything in it that devices do together: each may take its own.
    bias = jax.lax.cond(ordered, lambda *a: _shifted(*a[:2], both_ways=both_ways), by_positions, *operands)
    return towards_keys, bias


def towards(query: Array, params: Tree, scale: float) -> tuple[Array, Array, Array]:
    """Queries as keys meet them, and as distances do, `scale` and W for these."""
    content, position, projection = (whole(params[name]) for name in ("content", "position", "projection"))
    towards_keys, towards_distances = ((widened(query) + a).astype(query.dtype) for a in (content, position))
    return towards_keys, scale * towards_distances, projection.astype(query.dtype)


def _shifted(query: Array, projection: Array, *, both_ways: bool) -> Float[Array, "batch heads length length"]:
    """Of whole texts in order; without `both_ways`, of keys behind their query anything."""
    batch, length, heads, _ = query.shape
    nearest = -length if both_ways else -1
    distances = jnp.arange(length - 1, nearest - 1, -1)  # the last is there for the shift
    far = sinusoids(distances[None], projection.shape[0], wide(query.dtype))[0].astype(query.dtype)
    scores = jnp.einsum("bqhk,dhk->bhqd", query, jnp.einsum("de,ehk->dhk", far, projection), preferred_element_type=wide(query.dtype))
    # Row i begins at the distance i. Read in rows that are one shorter, behind the first length - 1 numbers, so do all.
    row = scores.shape[-1] - 1
    flat = scores.reshape(batch, heads, -1)[..., length - 1 : length - 1 + length * row]
    return flat.reshape(batch, heads, length, row)[..., :length]


def by_positions(query: Array, projection: Array, of_queries: Array, of_keys: Array) -> Float[Array, "batch heads queries keys"]:
    """Of tokens at any positions."""
    embed, dtype = projection.shape[0], wide(query.dtype)
    sines, cosines = _halves(sinusoids(of_queries, embed, dtype)[:, :, None])
    by_sine, by_cosine = _halves(jnp.einsum("bqhk,ehk->bqhe", query, projection, preferred_element_type=dtype))
    turned = jnp.concatenate([by_cosine * sines - by_sine * cosines, by_sine * sines + by_cosine * cosines], -1)
    keys = jnp.concatenate(_halves(sinusoids(of_keys, embed, dtype)), -1)
    return jnp.einsum("bqhe,bke->bhqk", turned, keys)


def _halves(a: Array) -> tuple[Array, Array]:
    """Of sinusoids, or of what multiplies them, the sines' numbers and the cosines'."""
    return a[..., 0::2], a[..., 1::2]
