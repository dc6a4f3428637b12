"""What stands on hidden states: the vocabulary's head, BERT's masked one, pooler, classifiers (Devlin et al., 2019), ELECTRA's detector
(Clark et al., 2020). The matrix of logits and the loss are `lmx.models.losses`'."""

from functools import partial

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from lmx.core.execution import Execution
from lmx.core.params import ZEROS, Normal, ParamSpec
from lmx.core.tree import Tree
from lmx.core.weights import linear
from lmx.kernels.wide import widened
from lmx.models import norms
from lmx.models.config import Model, Transformer
from lmx.models.feedforward import ACTIVATIONS
from lmx.models.linears import linear_specs
from lmx.parallel.rules import placed_outside

DENSE = {"masked": "transform", "pooler": "pooler", "classifier": "pooler", "detector": "transform"}
"""What the dense layer of a head is called, in heads that have one."""


def specs(config: Transformer) -> Tree:
    """Parameters of the head."""
    tree, head = {}, config.head
    dense = partial(linear_specs, (config.embed,), input_axes=("embed",), output_axes=(None,), config=config)
    if head in DENSE:
        tree[DENSE[head]] = dense((config.table_size if head == "masked" else config.embed,))
    if head == "masked":
        tree["transform_norm"] = norms.specs(config.norm, config.table_size, "embed", bias=config.bias, offset=config.norm_offset)
    if outputs := {"classifier": config.labels, "tokens": config.labels, "spans": 2, "detector": 1}.get(head):
        tree["classifier"] = dense((outputs,))
    if head == "projection":
        tree["projection"] = dense((config.summary_size,), bias=False)
    if config.vocabulary_head and not config.tied:
        width = config.table_size if head == "masked" else config.embed
        tree["head"] = ParamSpec((width, config.vocab), ("embed", "vocab"), 1, Normal(config.init_std))
    if config.head_bias:
        tree["head_bias"] = ParamSpec((config.vocab,), ("vocab",), init=ZEROS)
    return tree


def transformed(
    params: Tree, config: Model, hidden: Float[Array, "batch length embed"], execution: Execution = Execution()
) -> Float[Array, "batch length width"]:
    """What the matrix of logits multiplies: hidden states, or a masked head's transform of them."""
    if config.head != "masked":
        return hidden
    params = placed_outside(params, specs(config), execution)
    return norms.norm(_dense(params, config, hidden), params["transform_norm"], config.norm, config.norm_epsilon, offset=config.norm_offset)


def pooled(
    params: Tree, config: Transformer, hidden: Float[Array, "batch length embed"], first: Int[Array, "batch"] | None = None
) -> Float[Array, "batch embed"]:
    """A text's summary, from its first token: the one at index `first` of hidden states as they lie (on a ring, arranged), or 0."""
    rows = hidden[:, 0] if first is None else jnp.take_along_axis(hidden, first[:, None, None], 1)[:, 0]
    return _dense(params, config, rows)


def classes(
    params: Tree, config: Transformer, hidden: Float[Array, "batch length embed"], first: Int[Array, "batch"] | None = None
) -> Float[Array, "batch ..."]:
    """Logits, fp32 at least: of a text's classes `[batch, labels]` (classifier), of each token's `[batch, length, labels]` (tokens), of each
    token as the first and the last of a span `[batch, length, 2]` (spans), of each token's being no original `[batch, length]` (detector)."""
    if config.head == "classifier":
        read = pooled(params, config, hidden, first)
    else:
        read = _dense(params, config, hidden) if config.head == "detector" else hidden
    rows = widened(linear(read, params["classifier"]["weight"], params["classifier"].get("bias")))
    return rows[..., 0] if config.head == "detector" else rows


def _dense(params: Tree, config: Transformer, x: Array) -> Array:
    layer = params[DENSE[config.head]]
    y = linear(x, layer["weight"], layer.get("bias"))
    return ACTIVATIONS[config.head_activation or config.activation](widened(y)).astype(y.dtype)
