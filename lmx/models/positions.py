"""Where a token is: ALiBi, sinusoidal tables (RoPE: `lmx.models.rope`). Positions are data: `int [batch, length]`, never an `arange` in here."""

import math

import jax.numpy as jnp
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
