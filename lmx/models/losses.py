"""Heads and losses on top of hidden states: sums with weights, in chunks, so that full logits never exist."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from lmx.core.execution import Execution
from lmx.core.params import ParamSpec
from lmx.core.products import dot, weight_gradient
from lmx.core.tree import Tree
from lmx.core.weights import Twofold, attend, gradient_of, values, whole
from lmx.kernels import devices
from lmx.kernels.wide import wide
from lmx.models import heads
from lmx.models.config import Model
from lmx.parallel import manual
from lmx.parallel.rules import placed
from lmx.parallel.tensor import chunks, places


class Static(NamedTuple):
    """What a chunk needs to know: the logits' soft cap, the weight of log(Z)^2, the mesh axis over which the vocabulary is split."""

    softcap: float | None
    z_loss: float
    master: type
    axis: str | None = None


def logits(params: Tree, config: Model, hidden: Float[Array, "batch length embed"]) -> Float[Array, "batch length vocab"]:
    """Logits of the vocabulary, fp32 at least, soft-capped where the config says so. For sampling and inspection; losses do not need them."""
    hidden = heads.transformed(params, config, hidden)
    rows = attend(_scaled(hidden, config), params["embed"] if config.tied else params["head"].T)
    if config.head_bias:
        rows = rows + params["head_bias"].astype(rows.dtype)
    return rows if config.logit_softcap is None else config.logit_softcap * jnp.tanh(rows / config.logit_softcap)


def cross_entropy(
    params: Tree,
    config: Model,
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
      the sum (scalar, fp32 at least, differentiable in params and hidden), and `{"cross_entropy", "z_loss", "correct"}`, each a weighted sum and
      a constant to differentiation.
    """
    if not config.vocabulary_head:
        raise ValueError(f"model.head={config.head} gives no logits of the vocabulary to train; use lm or masked")
    head = params["embed"] if config.tied else params["head"].T
    head = whole(head.head if isinstance(head, Twofold) else head)
    hidden = _scaled(heads.transformed(params, config, hidden, execution), config)
    if config.head_bias:  # one column more, that every hidden state has a one for
        head = jnp.concatenate([head, params["head_bias"][:, None]], 1)
        hidden = jnp.concatenate([hidden, jnp.ones_like(hidden[..., :1])], -1)
    head = placed({"head": head}, {"head": ParamSpec(head.shape, ("vocab", "embed"))}, execution)["head"]
    loss, metrics = _cross_entropy((config.logit_softcap, z_loss, execution.rules), head, hidden, targets, weights)
    return loss, jax.lax.stop_gradient(metrics)


def _scaled(hidden: Array, config: Model) -> Array:
    return hidden if config.logit_scale is None else hidden * jnp.asarray(config.logit_scale, hidden.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(static, head, hidden, targets, weights) -> tuple[Array, Tree]:
    return _on_mesh(static, head, hidden, targets, weights, gradients=False)[0]


def _forward(static, head, hidden, targets, weights):
    sums, d_head, d_hidden = _on_mesh(static, head, hidden, targets, weights, gradients=True)
    return sums, (d_head, d_hidden, weights)


def _backward(static, saved, cotangents):
    (d_head, d_hidden, weights), (factor, _) = saved, cotangents
    d_head, d_hidden = jax.tree.map(lambda d: (factor * d).astype(d.dtype), (d_head, d_hidden))
    return d_head, d_hidden, None, jnp.zeros_like(weights)


_cross_entropy.defvjp(_forward, _backward)


def _on_mesh(static, head, hidden, targets, weights, *, gradients: bool):
    """Each device computes its tokens against its part of the vocabulary. What crosses devices: three numbers a token for its loss and
    the gradient of its hidden state (over parts of the vocabulary), and once for all chunks the gradient of the head (over tokens)."""
    softcap, z_loss, rules = static
    if rules is None or not manual.axes():
        here = Static(softcap, z_loss, head.dtype)
        return _over_chunks(here, values(head, hidden.dtype), hidden, targets, weights, gradients=gradients)
    at = places(targets.shape, head, rules)
    here = Static(softcap, z_loss, head.dtype, at.split)

    def local(head, hidden, targets, weights):
        sums, d_head, d_hidden = _over_chunks(here, head, at.gathered(hidden), targets, weights, gradients=gradients)
        sums = jax.lax.psum(sums, manual.names(at.tokens))
        return (sums, at.summed(d_head), at.reduced(d_hidden)) if gradients else (sums, None, None)

    out = (P(), at.gradient, at.vectors) if gradients else (P(), None, None)
    run = manual.manual(local, (at.table, at.vectors, at.tokens, at.tokens), out)
    sums, d_head, d_hidden = run(values(head, hidden.dtype), hidden, targets, weights)
    return sums, gradient_of(head, d_head) if gradients else None, d_hidden


def _over_chunks(static: Static, head, hidden, targets, weights, *, gradients: bool):
    """Sums over all chunks and, where wanted, gradients of the loss sum: of the head `[vocab, embed]` and of `hidden`."""
    batch, length = targets.shape
    parts = chunks(batch, length, head.shape[0], cpu=devices.on_cpu())
    if parts == 1:
        return _chunk(static, head, hidden, targets, weights, gradients=gradients)

    def split(a: Array) -> Array:
        return jnp.moveaxis(a.reshape(batch, parts, length // parts, *a.shape[2:]), 1, 0)

    def step(total, inputs):
        sums, d_head, d_hidden = _chunk(static, head, *inputs, gradients=gradients)
        return jax.tree.map(jnp.add, total, (sums, d_head)), d_hidden

    inputs = (split(hidden), split(targets), split(weights))
    shapes = jax.eval_shape(partial(_chunk, static, gradients=gradients), head, *jax.tree.map(lambda a: a[0], inputs))
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes[:2])
    (sums, d_head), d_hidden = jax.lax.scan(step, zero, inputs)
    return sums, d_head, None if d_hidden is None else jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape)


def statistics(rows: Array, hit: Array) -> tuple[Array, Array, Array]:
    """Of logits `[..., vocab]`: the largest, the sum of `exp(logit - largest)`, and the sum of those that are `hit`."""
    largest = rows.max(-1)
    return largest, jnp.exp(rows - largest[..., None]).sum(-1), jnp.where(hit, rows, 0.0).sum(-1)


def at_once(rows: Array, hit: Array) -> tuple[Array, Array, Array]:
    """`statistics`, in one pass over the logits: on a GPU each pass is a read of its memory (Milakov and Gimelshein, 2018)."""

    def both(a, b):
        largest = jnp.maximum(a[0], b[0])
        return largest, a[1] * jnp.exp(a[0] - largest) + b[1] * jnp.exp(b[0] - largest), a[2] + b[2]

    zero = jnp.zeros((), rows.dtype)
    nothing = (jnp.full((), jnp.finfo(rows.dtype).min), zero, zero)
    return jax.lax.reduce((rows, jnp.ones_like(rows), jnp.where(hit, rows, zero)), nothing, both, (rows.ndim - 1,))


def _chunk(static: Static, head, hidden, targets, weights, *, gradients: bool):
    softcap, z_loss, axis = static.softcap, static.z_loss, static.axis

    def over_vocab(reduce, a):
        return a if axis is None else reduce(a, axis)

    rows = dot(hidden, head.astype(hidden.dtype), 2, 1, wide(hidden.dtype))
    if softcap is not None:
        rows = softcap * jnp.tanh(rows / softcap)
    # A comparison with the vocabulary's indices, not a gather: it stays local when the vocabulary is sharded.
    first = 0 if axis is None else jax.lax.axis_index(axis) * head.shape[0]
    hit = first + jnp.arange(head.shape[0]) == targets[..., None]
    own, total, target = jax.lax.platform_dependent(rows, hit, cpu=statistics, default=at_once)
    largest = over_vocab(jax.lax.pmax, own)
    log_z = jnp.log(over_vocab(jax.lax.psum, total * jnp.exp(own - largest))) + largest
    target = over_vocab(jax.lax.psum, target)
    entropy = jnp.sum(weights * (log_z - target))
    z = z_loss * jnp.sum(weights * log_z**2)
    sums = entropy + z, {"cross_entropy": entropy, "z_loss": z, "correct": jnp.sum(weights * (target >= largest))}
    if not gradients:
        return sums, None, None
    log_z = log_z[..., None]
    d_rows = weights[..., None] * (jnp.exp(rows - log_z) * (1 + 2 * z_loss * log_z) - hit)
    if softcap is not None:
        d_rows = d_rows * (1 - jnp.square(rows / softcap))
    d_rows = d_rows.astype(hidden.dtype)
    d_head = weight_gradient(d_rows, hidden, static.master)
    return sums, d_head, dot(d_rows, head.astype(d_rows.dtype), 2, 0)
