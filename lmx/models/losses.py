"""Heads and losses on top of hidden states: sums with weights, in chunks, so that full fp32 logits never exist."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from lmx.core.execution import Execution
from lmx.core.tree import Tree
from lmx.core.weights import attend, dot, weight_gradient
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

    Head and loss are one function over chunks of the length. Differentiated, it forms each chunk's gradients together with its loss,
    since a sum's gradients are known but for a factor: logits are neither kept nor formed twice.

    Returns:
      the sum (fp32 scalar, differentiable in params and hidden), and `{"cross_entropy", "z_loss", "correct"}`, each a weighted sum and
      a constant to differentiation.
    """
    head = params["embed"] if config.tied else params["head"].T
    loss, metrics = _cross_entropy((config.logit_softcap, z_loss, execution.rules), head, hidden, targets, weights)
    return loss, jax.lax.stop_gradient(metrics)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(static, head, hidden, targets, weights) -> tuple[Array, Tree]:
    return _over_chunks(static, head, hidden, targets, weights, gradients=False)[0]


def _forward(static, head, hidden, targets, weights):
    sums, d_head, d_hidden = _over_chunks(static, head, hidden, targets, weights, gradients=True)
    return sums, (d_head, d_hidden, weights)


def _backward(static, saved, cotangents):
    (d_head, d_hidden, weights), (factor, _) = saved, cotangents
    return (factor * d_head).astype(d_head.dtype), (factor * d_hidden).astype(d_hidden.dtype), None, jnp.zeros_like(weights)


_cross_entropy.defvjp(_forward, _backward)


def _over_chunks(static, head, hidden, targets, weights, *, gradients: bool):
    """Sums over all chunks and, where wanted, gradients of the loss sum: of the head `[vocab, embed]` and of `hidden`."""
    (batch, length), vocab = targets.shape, head.shape[0]
    chunks = next(n for n in range(1, length + 1) if length % n == 0 and (batch * length // n * vocab <= CHUNK or n == length))
    if chunks == 1:
        return _chunk(static, head, hidden, targets, weights, gradients=gradients)

    def split(a: Array) -> Array:
        return jnp.moveaxis(a.reshape(batch, chunks, length // chunks, *a.shape[2:]), 1, 0)

    def step(total, inputs):
        sums, d_head, d_hidden = _chunk(static, head, *inputs, gradients=gradients)
        return jax.tree.map(jnp.add, total, (sums, d_head)), d_hidden

    inputs = (split(hidden), split(targets), split(weights))
    shapes = jax.eval_shape(partial(_chunk, static, gradients=gradients), head, *jax.tree.map(lambda a: a[0], inputs))
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes[:2])
    (sums, d_head), d_hidden = jax.lax.scan(step, zero, inputs)
    return sums, d_head, None if d_hidden is None else jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape)


def _chunk(static, head, hidden, targets, weights, *, gradients: bool):
    softcap, z_loss, rules = static
    rows = constrain(attend(hidden, head), ("batch", None, "vocab"), rules)
    if softcap is not None:
        rows = softcap * jnp.tanh(rows / softcap)
    # A comparison with the vocabulary's indices, not a gather: it stays local when the vocabulary is sharded.
    hit = jnp.arange(head.shape[0]) == targets[..., None]
    largest = rows.max(-1, keepdims=True)
    log_z = jnp.log(jnp.exp(rows - largest).sum(-1, keepdims=True)) + largest
    target = jnp.where(hit, rows, 0.0).sum(-1)
    entropy = jnp.sum(weights * (log_z[..., 0] - target))
    z = z_loss * jnp.sum(weights * log_z[..., 0] ** 2)
    sums = entropy + z, {"cross_entropy": entropy, "z_loss": z, "correct": jnp.sum(weights * (target >= largest[..., 0]))}
    if not gradients:
        return sums, None, None
    d_rows = weights[..., None] * (jnp.exp(rows - log_z) * (1 + 2 * z_loss * log_z) - hit)
    if softcap is not None:
        d_rows = d_rows * (1 - jnp.square(rows / softcap))
    d_rows = constrain(d_rows.astype(hidden.dtype), ("batch", None, "vocab"), rules)
    d_head = weight_gradient(d_rows.reshape(-1, head.shape[0]), hidden.reshape(-1, head.shape[1]), head.dtype)
    return sums, d_head, dot(d_rows, head.astype(d_rows.dtype), 2, 0)
