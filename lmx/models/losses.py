"""Heads and losses on top of hidden states: sums with weights, in chunks, so that full fp32 logits never exist."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from lmx.core.execution import Execution
from lmx.core.tree import Tree
from lmx.core.weights import attend
from lmx.models.config import Transformer
from lmx.parallel.rules import constrain

CHUNK = 2**22
"""How many logits exist at once: 16 MB in fp32, on each device that holds a share of them."""


def logits(params: Tree, config: Transformer, hidden: Float[Array, "batch length embed"]) -> Float[Array, "batch length vocab"]:
    """Next-token logits, fp32, soft-capped where the config says so. For sampling and inspection; losses do not need them."""
    rows = attend(hidden, params["embed"] if config.tied else params["head"].T)
    return rows if config.logit_softcap is None else config.logit_softcap * jnp.tanh(rows / config.logit_softcap)


def cross_entropy(
    params: Tree,
    config: Transformer,
    hidden: Float[Array, "batch length embed"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    *,
    z_loss: float = 0.0,
    execution: Execution = Execution(),
) -> tuple[Float[Array, ""], Tree]:
    """Weighted sum over tokens of `-log p(target)`, plus `z_loss * log(Z)^2` (PaLM), with sums of metrics beside it.

    Head and loss are one function over chunks of the length, and the backward pass forms each chunk's logits again.

    Returns:
      the sum (fp32 scalar, differentiable in params and hidden), and `{"cross_entropy", "z_loss", "correct"}`, each a weighted sum.
    """
    batch, length = targets.shape
    chunks = next(n for n in range(1, length + 1) if length % n == 0 and (batch * length // n * config.vocab <= CHUNK or n == length))

    @partial(jax.checkpoint, prevent_cse=False)
    def chunk_sums(hidden, targets, weights):
        rows = constrain(logits(params, config, hidden), ("batch", None, "vocab"), execution.rules)
        log_z = jax.nn.logsumexp(rows, -1)
        # A comparison with the vocabulary's indices, not a gather: it stays local when the vocabulary is sharded.
        target = jnp.where(jnp.arange(config.vocab) == targets[..., None], rows, 0.0).sum(-1)
        entropy = jnp.sum(weights * (log_z - target))
        z = z_loss * jnp.sum(weights * log_z**2)
        correct = jnp.sum(weights * (jax.lax.stop_gradient(target) >= jax.lax.stop_gradient(rows).max(-1)))
        return entropy + z, {"cross_entropy": entropy, "z_loss": z, "correct": correct}

    if chunks == 1:
        return chunk_sums(hidden, targets, weights)

    def split(a: Array) -> Array:
        return jnp.moveaxis(a.reshape(batch, chunks, length // chunks, *a.shape[2:]), 1, 0)

    def add(sums, chunk):
        return jax.tree.map(jnp.add, sums, chunk_sums(*chunk)), None

    zero = (jnp.float32(0), {"cross_entropy": jnp.float32(0), "z_loss": jnp.float32(0), "correct": jnp.float32(0)})
    return jax.lax.scan(add, zero, (split(hidden), split(targets), split(weights)))[0]
