"""Dropout (Srivastava et al., 2014) whose masks depend on (seed, step, example, site) and on nothing else.

The same example gets the same mask whatever the batch, microbatch, mesh or number of processes it is computed in.
"""

import zlib

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


@flax.struct.dataclass
class Dropout:
    """What every dropout site of one forward shares: a key with seed and step folded in, the rows' global example ids, the rate."""

    key: Array
    example_id: Int[Array, "batch"]
    rate: float = flax.struct.field(pytree_node=False, default=0.0)


def keep(dropout: Dropout, site: str, layer: Array | int, shape: tuple[int, ...]) -> Float[Array, "batch ..."]:
    """What a site multiplies by: `1 / (1 - rate)` where kept and 0 where dropped, fp32 of `[batch, *shape]`."""
    site_key = jax.random.fold_in(jax.random.fold_in(dropout.key, zlib.crc32(site.encode())), layer)

    def row(example: Array) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(site_key, example), jnp.float32(1 - dropout.rate), shape)

    return jax.vmap(row)(dropout.example_id).astype(jnp.float32) / (1 - dropout.rate)


def apply(x: Array, dropout: Dropout | None, site: str, layer: Array | int) -> Array:
    """Drops numbers of x `[batch, ...]`; the identity when dropout is None."""
    return x if dropout is None else x * keep(dropout, site, layer, x.shape[1:]).astype(x.dtype)
