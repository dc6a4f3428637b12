"""Attention in tiles, with memory linear in the length (Rabe and Staats, 2021; Dao et al., 2022), in plain XLA.

Tiles in which no query may see any key are skipped when the program runs. `forward` also gives each query's log-sum-exp, and `backward`
takes it, so that one attention can be several calls over different keys, each going on from the last (ring attention).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from lmx.kernels.masks import Mask
from lmx.kernels.wide import wide, widened

TILE = 512
"""Queries, and keys, of a tile at most."""
NONE = -1e30
"""The log-sum-exp of a query that sees no key."""


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
) -> Float[Array, "batch queries heads head_dim"]:
    """As `reference.attention`, without dropout."""
    return _attention((scale, softcap), q, k, v, mask, slopes, bias)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q, k, v, mask, slopes, bias):
    return untiled(forward(static, q, k, v, mask, slopes, nothing(q, k, v), bias), q)[0]


def _attention_forward(static, q, k, v, mask, slopes, bias):
    out, lse = untiled(forward(static, q, k, v, mask, slopes, nothing(q, k, v), bias), q)
    return out, (q, k, v, mask, slopes, bias, out, lse)


def _attention_backward(static, saved, g):
    q, k, v, mask, slopes, bias, out, lse = saved
    dq, dk, dv, d_bias = backward(static, q, k, v, mask, slopes, lse, weigh(g, out), g, bias)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, d_bias


_attention.defvjp(_attention_forward, _attention_backward)


def weigh(g: Array, out: Array) -> Float[Array, "batch queries heads"]:
    """What the backward pass subtracts from each row of the weights' cotangent."""
    return jnp.sum(widened(g) * widened(out), -1)


def nothing(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """What `forward` gives of no keys."""
    shape, dtype = (*q.shape[:-1], v.shape[-1]), wide(q.dtype)
    out, lse = jnp.zeros(shape, dtype), jnp.full(shape[:-1], NONE, dtype)
    return tuple(_tiled(a, q.shape[2] // k.shape[2], _divisor(q.shape[1])) for a in (out, lse))


def forward(
    static, q: Array, k: Array, v: Array, mask: Mask, slopes: Array | None, so_far: tuple, bias: Array | None = None
) -> tuple[Array, Array]:
    """The output and each query's log-sum-exp, fp32 at least and in tiles (`untiled` puts them in order); `static`: scale and soft cap; `so_far`:
    both, over other keys, which are then counted in (`nothing` at first)."""
    tiles_q, tiles_k = _tiles(q, k, v, mask)

    def queries(tile):
        q, rows, out, lse, across = tile
        start = out, lse, (lse > NONE).astype(lse.dtype)

        def step(carry, other):
            (k, v, columns), here = other

            def see(carry):
                out, top, total = carry
                scores, _ = _scores(static, q, k, rows, columns, mask, slopes, here)
                higher = jnp.maximum(top, scores.max(-1))
                weights, shrink = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
                mixed = jnp.einsum("bhgqk,bkhd->bhgqd", weights.astype(v.dtype), v, preferred_element_type=out.dtype)
                return out * shrink[..., None] + mixed, higher, total * shrink + weights.sum(-1)

            return jax.lax.cond(_visible(rows, columns, mask), see, lambda carry: carry, carry), None

        (out, top, total), _ = jax.lax.scan(step, start, (tiles_k, across))
        some = total > 0
        total = jnp.where(some, total, 1.0)
        return out / total[..., None], jnp.where(some, top + jnp.log(total), NONE)

    return jax.lax.map(queries, (*tiles_q, *so_far, _bias_tiles(bias, q, k)))


def untiled(found: tuple[Array, Array], q: Array) -> tuple[Array, Array]:
    """What `forward` gives, as `[batch, queries, heads, head_dim]` in q's type and `[batch, queries, heads]`."""
    out, lse = found
    return _untiled(out.astype(q.dtype), q.shape[:3]), _untiled(lse, q.shape[:3])


def backward(static, q, k, v, mask, slopes, lse, delta, g, bias=None) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of q, k and v in fp32 at least, and of the bias, given the log-sum-exp over all keys and `delta = weigh(g, out)`."""
    (scale, softcap), dtype = static, wide(q.dtype)
    tiles_q, tiles_k = _tiles(q, k, v, mask)
    product = partial(jnp.einsum, preferred_element_type=dtype)
    split = partial(_tiled, groups=q.shape[2] // k.shape[2], size=tiles_q[0].shape[-2])
    tiles_q = (*tiles_q, split(g), split(lse), split(delta))

    def keys(total, tile):
        (k, v, columns), down = tile
        zero = jax.tree.map(lambda a: jnp.zeros(a.shape, dtype), (k, v))

        def step(carry, other):
            (q, rows, g, lse, delta), here = other

            def see(carry):
                dk, dv = carry
                scores, capped = _scores(static, q, k, rows, columns, mask, slopes, here)
                weights = jnp.exp(scores - lse[..., None])
                dv = dv + product("bhgqk,bhgqd->bkhd", weights.astype(g.dtype), g)
                d_weights = product("bhgqd,bkhd->bhgqk", g, v)
                centred = d_weights - delta[..., None]
                d_scores = scale * weights * centred
                d_here = None if here is None else summed_as(weights * centred, here)
                if softcap is not None:
                    d_scores = d_scores * (1 - jnp.square(capped / softcap))
                d_scores = d_scores.astype(q.dtype)
                dk = dk + product("bhgqk,bhgqd->bkhd", d_scores, q)
                return (dk, dv), (product("bhgqk,bkhd->bhgqd", d_scores, k), d_here)

            def none(carry):
                return carry, (jnp.zeros(q.shape, dtype), None if here is None else jnp.zeros(here.shape, dtype))

            return jax.lax.cond(_visible(rows, columns, mask), see, none, carry)

        found, (dq, d_bias) = jax.lax.scan(step, zero, (tiles_q, down))
        return total + dq, (*found, d_bias)

    across = _bias_tiles(bias, q, k)
    down = None if across is None else jnp.moveaxis(across, 1, 0)
    dq, (dk, dv, d_bias) = jax.lax.scan(keys, jnp.zeros(tiles_q[0].shape, dtype), (tiles_k, down))
    together = [jnp.moveaxis(a, 0, 1).reshape(b.shape) for a, b in ((dk, k), (dv, v))]
    if d_bias is not None:  # [tiles of keys, tiles of queries, batch, kv_heads, group, queries, keys]
        d_bias = jnp.transpose(d_bias, (2, 3, 4, 1, 5, 0, 6)).reshape(bias.shape).astype(bias.dtype)
    return _untiled(dq, q.shape[:3]), *together, d_bias


def _tiles(q, k, v, mask):
    """Queries as `[tiles, batch, kv_heads, group, tile, head_dim]` and keys as `[tiles, batch, tile, kv_heads, head_dim]`, each with what
    the mask says of them: `(index [tile], segments, positions, prefix [batch, tile] or None)`."""
    (batch, queries), keys = q.shape[:2], k.shape[1]
    of_q, of_k = _divisor(queries), _divisor(keys)

    def rows(n, size, index, *about):
        index = (jnp.arange(n) if index is None else index).reshape(-1, size)
        cut = [None if a is None else jnp.moveaxis(jnp.broadcast_to(a, (batch, n)).reshape(batch, -1, size), 1, 0) for a in about]
        return index, *cut

    def cut(a):
        return jnp.moveaxis(a.reshape(batch, keys // of_k, of_k, *a.shape[2:]), 1, 0)

    tiles_q = (_tiled(q, q.shape[2] // k.shape[2], of_q), rows(queries, of_q, mask.query_index, mask.query_segments, mask.query_positions))
    tiles_k = (cut(k), cut(v), rows(keys, of_k, mask.key_index, mask.key_segments, mask.key_positions, mask.key_prefix))
    # Masks of tiles depend on no layer: JAX would compute all of them, of a size that is quadratic in the length, ahead of a scan over layers.
    return jax.lax.optimization_barrier((tiles_q, tiles_k))


def _tiled(a: Array, groups: int, size: int) -> Array:
    """`[batch, queries, heads, ...]` as `[tiles, batch, kv_heads, group, tile, ...]`."""
    batch, queries, heads, *rest = a.shape
    a = a.reshape(batch, queries // size, size, heads // groups, groups, *rest)
    return jnp.moveaxis(a, (1, 0, 3, 4, 2), (0, 1, 2, 3, 4))


def _untiled(a: Array, shape: tuple[int, ...]) -> Array:
    return jnp.moveaxis(a, (0, 1, 2, 3, 4), (1, 0, 3, 4, 2)).reshape(*shape, *a.shape[5:])


def _bias_tiles(bias: Array | None, q: Array, k: Array) -> Array | None:
    """A bias as `[tiles of queries, tiles of keys, batch, kv_heads, group, queries, keys]`."""
    if bias is None:
        return None
    (queries, heads), (keys, kv_heads) = q.shape[1:3], k.shape[1:3]
    of_q, of_k = _divisor(queries), _divisor(keys)
    cut = bias.reshape(-1, kv_heads, heads // kv_heads, queries // of_q, of_q, keys // of_k, of_k)
    return jnp.transpose(cut, (3, 5, 0, 1, 2, 4, 6))


def summed_as(d_scores: Array, bias: Array) -> Array:
    """The gradient of scores as that of a bias, which may be one for all rows."""
    return d_scores.sum(0, keepdims=True) if bias.shape[0] == 1 else d_scores


def _scores(static, q, k, rows, columns, mask, slopes, bias):
    """Scores of a tile with what is hidden at -inf, and the soft-capped scores before the mask, bias and ALiBi; fp32 at least."""
    scale, softcap = static
    scores = scale * jnp.einsum("bhgqd,bkhd->bhgqk", q, k, preferred_element_type=wide(q.dtype))
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    tile = _mask(rows, columns, mask)
    queries, keys = q.shape[-2], k.shape[1]
    hidden = jnp.where(tile.dense(queries, keys), 0.0, -jnp.inf)[:, None, None]
    if bias is not None:
        hidden = hidden + bias
    if slopes is None:
        return scores + hidden, scores
    distances = tile.distances(queries, keys)[:, None, None]
    return scores + hidden - slopes.reshape(1, *q.shape[1:3], 1, 1) * distances, scores


def _mask(rows, columns, mask: Mask) -> Mask:
    (index, segments, positions), (key_index, key_segments, key_positions, key_prefix) = rows, columns
    return mask.replace(
        query_index=index,
        key_index=key_index,
        query_segments=segments,
        key_segments=key_segments,
        key_prefix=key_prefix,
        query_positions=positions,
        key_positions=key_positions,
    )


def _visible(rows, columns, mask: Mask) -> Array:
    """Whether any query of a tile may see any of its keys, as far as order tells."""
    (index, _, positions), (key_index, _, key_positions, key_prefix) = rows, columns
    compared = (positions, key_positions) if mask.order == "positions" else (index, key_index)
    first_q, last_q, first_k, last_k = (f(a) for a in compared for f in (jnp.min, jnp.max))
    seen = jnp.bool_(True)
    if mask.causal:
        seen &= last_q >= first_k
    if mask.window is not None:
        seen &= first_q - last_k < mask.window
    return seen if key_prefix is None else seen | (key_prefix == 1).any()


def _divisor(n: int) -> int:
    return next(size for size in range(min(n, TILE), 0, -1) if n % size == 0)
