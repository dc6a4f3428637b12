"""What statistics, sums and losses are computed in: fp32 at least, whatever the type of what goes into them."""

import jax.numpy as jnp
from jax import Array


def wide(dtype) -> jnp.dtype:
    """fp32, or the type itself where it is wider."""
    return jnp.promote_types(dtype, jnp.float32)


def widened(a: Array) -> Array:
    """An array in fp32, or in its own type where that is wider."""
    return a.astype(wide(a.dtype))
