"""What each kind of head gives of hidden states, by the peer's names, and its loss."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lmx.core.execution import Execution
from lmx.core.tree import Tree
from lmx.interop.checkpoint import Model
from lmx.models import heads
from lmx.models.losses import cross_entropy, logits
from lmx.models.transformer import Output

IGNORED = -100
"""The label of what is not to be predicted."""


def of_layers(output: Output, site: str, layers: int, side: str = "") -> tuple[Array, ...]:
    """What was read at a site of each layer; of an encoder's with `side` encoder/."""
    return tuple(output.taps[f"{side}layers/{i}/{site}"] for i in range(layers))


def headed(
    model: Model, params: Tree, hidden: Array, mask: Array | None, inputs: Mapping[str, Any], execution: Execution
) -> dict[str, Array]:
    """The head's outputs: `logits`; of spans `start_logits` and `end_logits`; of a pooler `pooler_output`. With labels `loss`, the mean over
    those that are not -100 (of a causal model each predicted by the token before it; of a detector over real tokens).

    Raises:
      ValueError: labels for a model without a loss.
    """
    config, labels = model.config, inputs.get("labels")
    labels = None if labels is None else jnp.asarray(labels)
    if config.head in ("none", "pooler", "spans") and labels is not None:
        raise ValueError(f"a {model.table.named(config)} has no loss of labels; leave labels out")
    if config.head == "none":
        return {}
    first = None if mask is None else jnp.argmax(mask != 0, -1)
    if config.head == "pooler":
        return {"pooler_output": heads.pooled(params, config, hidden, first)}
    if config.vocabulary_head:
        found = {"logits": logits(params, config, hidden)}
        return found if labels is None else found | {"loss": _of_vocabulary(config, params, hidden, labels, execution)}
    rows = heads.classes(params, config, hidden, first)
    if config.head == "spans":
        return {"start_logits": rows[..., 0], "end_logits": rows[..., 1]}
    if labels is None:
        return {"logits": rows}
    if config.head == "detector":
        real = jnp.ones_like(labels) if mask is None else mask
        return {"logits": rows, "loss": (real * _binary(rows, labels)).sum() / real.sum()}
    return {"logits": rows, "loss": of_classes(model, rows, labels)}


def _of_vocabulary(config, params: Tree, hidden: Array, labels: Array, execution: Execution) -> Array:
    if config.causal:
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    return entropy_of(config, params, hidden, labels, execution)


def entropy_of(config, params: Tree, hidden: Array, labels: Array, execution: Execution) -> Array:
    """The mean over labels `[batch, length]` that are not -100, each of the hidden state in its own place."""
    weights = (labels != IGNORED).astype(jnp.float32)
    total, _ = cross_entropy(params, config, hidden, jnp.maximum(labels, 0), weights, execution=execution)
    return total / weights.sum()


def _problem(model: Model, labels: Array) -> str:
    """What a classifier's labels are: what its config.json says; else numbers for a single label, classes where labels are integers, and else
    a probability for each."""
    said = json.loads(model.about).get("problem_type")
    if model.config.head == "tokens":
        return "single_label_classification"
    if said is None:
        whole = jnp.issubdtype(labels.dtype, jnp.integer)
        said = "regression" if model.config.labels == 1 else "single_label_classification" if whole else "multi_label_classification"
    return said


def of_classes(model: Model, rows: Array, labels: Array) -> Array:
    """The loss of a classifier's logits. Raises ValueError where config.json says another problem than transformers knows."""
    problem = _problem(model, labels)
    if problem == "regression":
        return jnp.mean(jnp.square(rows - labels.reshape(rows.shape)))
    if problem == "multi_label_classification":
        return jnp.mean(_binary(rows, labels))
    if problem == "single_label_classification":
        return _mean_entropy(rows, labels, labels != IGNORED)
    raise ValueError(
        f"config.json: problem_type={problem!r} is not one of regression, single_label_classification, multi_label_classification"
    )


def _mean_entropy(rows: Array, labels: Array, counted: Array) -> Array:
    chances = jax.nn.log_softmax(rows)
    picked = jnp.take_along_axis(chances, jnp.where(counted, labels, 0)[..., None], -1)[..., 0]
    return -jnp.where(counted, picked, 0).sum() / counted.sum()


def _binary(rows: Array, labels: Array) -> Array:
    """The cross-entropy of yes or no, from its logit."""
    return jnp.logaddexp(0, rows) - rows * labels
