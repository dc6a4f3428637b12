"""Where a token is: ALiBi, sinusoidal tables, relative buckets (RoPE: `lmx.models.rope`).

Positions are data: `int [batch, length]`, never an `arange` in here.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int


def alibi_slopes(heads: int, dtype=jnp.float32) -> Float[Array, "heads"]:
    """ALiBi's slopes (Press et al., 2022): `2^(-8i/n)`; for a head count that is no power of two, the paper's interleaving."""

    def powers(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    whole = 2 ** int(math.log2(heads))
    return jnp.array(powers(whole) + powers(2 * whole)[0::2][: heads - whole], dtype)


def sinusoids(positions: Int[Array, "batch length"], embed: int, dtype=jnp.float32) -> Float[Array, "batch length embed"]:
    """The original Transformer's positions (Vaswani et al., 2017): even dimensions sine, odd ones cosine, of wavelengths 2π to 10000·2π."""
    frequencies = 10_000.0 ** (-jnp.arange(0, embed, 2, dtype=dtype) / embed)
    angles = positions[..., None].astype(dtype) * frequencies
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1).reshape(*positions.shape, -1)[..., :embed]


def buckets(distances: Int[Array, "..."], count: int, furthest: int, *, causal: bool) -> Int[Array, "..."]:
    """T5's bucket of each distance of a key behind its query (Raffel et al., 2020): half of the buckets are for one distance each, the rest
    for ranges that grow as logarithms do, up to `furthest`. Keys after their query share the first bucket in a causal model, and have
    the second half of the buckets otherwise."""
    side = count if causal else count // 2
    exact = side // 2
    steps = np.arange(furthest + 1, dtype=np.float32)
    ranges = np.log(np.maximum(steps, exact) / np.float32(exact)) / np.float32(math.log(furthest / exact)) * np.float32(side - exact)
    table = np.where(steps < exact, steps, np.minimum(exact + np.trunc(ranges), side - 1)).astype(np.int32)
    size = jnp.maximum(distances, 0) if causal else jnp.abs(distances)
    found = jnp.asarray(table)[jnp.minimum(size, furthest)]
    return found if causal else jnp.where(distances < 0, found + side, found)


@jax.custom_vjp
def bucket_bias(table: Float[Array, "buckets heads"], which: Int[Array, "batch queries keys"]) -> Float[Array, "batch heads queries keys"]:
    """What each head adds to a score whose distance is in a bucket. Its gradient is a sum for each bucket, in an order that is always the
    same, with no array larger than the scores."""
    return jnp.moveaxis(table[which], -1, 1)


def _bucket_bias_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, None]:
    table, which = saved
    sums = jax.lax.map(lambda n: jnp.sum(jnp.where(which[:, None] == n, g, 0), (0, 2, 3)), jnp.arange(table.shape[0]))
    return sums.astype(table.dtype), None


bucket_bias.defvjp(lambda table, which: (bucket_bias(table, which), (table, which)), _bucket_bias_backward)
