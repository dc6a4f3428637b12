"""Logits to tokens."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from its logits."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability (Holtzman et al., 2020)."""

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must be at least 0 (0 takes the likeliest token)")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be at least 0 (0 keeps every token)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1 (1 keeps every token)")


def sample(logits: Float[Array, "batch vocab"], sampling: Sampling, keys: Array) -> Int[Array, "batch"]:
    """One token a row; `keys` holds a random key for each, so that a row's draw depends on nothing else in the batch."""
    if sampling.temperature == 0:
        return logits.argmax(-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        order = jnp.argsort(-logits, -1)
        shares = jax.nn.softmax(jnp.take_along_axis(logits, order, -1), -1)
        # A token is kept while those before it have not reached top_p: the likeliest always is.
        kept = jnp.cumsum(shares, -1) - shares < sampling.top_p
        kept = jnp.zeros_like(kept).at[jnp.arange(logits.shape[0])[:, None], order].set(kept)
        logits = jnp.where(kept, logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
