"""A model called as its peer is: inputs and outputs by the peer's names."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lmx.core.execution import Execution
from lmx.core.tree import Tree
from lmx.interop.checkpoint import Model
from lmx.models.losses import cross_entropy, logits
from lmx.models.transformer import forward

TAKEN = ("input_ids", "attention_mask", "position_ids", "labels")
IGNORED = -100
"""The label of what is not to be predicted."""


def call(model: Model, params: Tree, inputs: Mapping[str, Any], *, execution: Execution = Execution()) -> dict[str, Any]:
    """What the peer's forward gives: `logits`, `hidden_states` (a tuple: the embeddings, then each layer's output, the last one after the
    final norm), `last_hidden_state`, and with labels `loss`, a mean over those that are not -100, each predicted by the token before it.

    A token's position is its place among the real ones of its row, wherever the padding is. Differentiable in params.

    Raises:
      ValueError: an input that the model does not take.
    """
    for name in inputs:
        if name not in TAKEN:
            raise ValueError(f"a {model.family} takes {', '.join(TAKEN)}, not {name}")
    config, tokens = model.config, jnp.asarray(inputs["input_ids"])
    mask = inputs.get("attention_mask")
    mask = None if mask is None else jnp.asarray(mask).astype(jnp.int32)
    positions = inputs.get("position_ids")
    if positions is None and mask is not None:
        positions = jnp.maximum(jnp.cumsum(mask, -1) - 1, 0)
    tapped = Execution(**vars(execution) | {"taps": (*execution.taps, "layers/*/input")})
    with jax.default_matmul_precision(execution.precision.products):
        output = forward(params, config, tokens, positions=positions, segments=mask, execution=tapped)
        found: dict[str, Any] = {
            "logits": logits(params, config, output.hidden),
            "last_hidden_state": output.hidden,
            "hidden_states": (*(output.taps[f"layers/{i}/input"] for i in range(config.layers)), output.hidden),
        }
        if inputs.get("labels") is not None:
            found["loss"] = _loss(config, params, output.hidden, jnp.asarray(inputs["labels"]), execution)
    return found


def _loss(config, params: Tree, hidden: Array, labels: Array, execution: Execution) -> Array:
    targets = labels[:, 1:]
    weights = (targets != IGNORED).astype(jnp.float32)
    total, _ = cross_entropy(params, config, hidden[:, :-1], jnp.maximum(targets, 0), weights, execution=execution)
    return total / weights.sum()
