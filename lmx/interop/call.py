"""A model called as its peer is: inputs and outputs by the peer's names."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lmx.core.execution import Execution
from lmx.core.tree import Tree
from lmx.core.weights import lookup
from lmx.interop import pairs
from lmx.interop.checkpoint import Model
from lmx.interop.outputs import headed
from lmx.models.config import RWKV, EncoderDecoder
from lmx.models.families import functions

TAKEN = ("input_ids", "attention_mask", "position_ids", "labels")


def call(model: Model, params: Tree, inputs: Mapping[str, Any], *, execution: Execution = Execution()) -> dict[str, Any]:
    """What the peer's forward gives: `hidden_states` (a tuple: the embeddings, then each layer's output, the last one after the final norm; of
    an RWKV up to 6 each layer's output, then that of the final norm),
    `last_hidden_state`, and what the model's head gives of it (`lmx.interop.outputs`): `logits` and with labels `loss`.

    A token's position is its place among the real ones of its row, wherever the padding is. Differentiable in params. Of an encoder-decoder:
    `lmx.interop.pairs`.

    Raises:
      ValueError: an input that the model does not take.
    """
    if isinstance(model.config, EncoderDecoder):
        return pairs.call(model, params, inputs, execution=execution)
    config, tokens = model.config, jnp.asarray(inputs["input_ids"])
    taken = (*TAKEN, *(("token_type_ids",) if config.token_types else ()))
    for name in inputs:
        if name not in taken:
            raise ValueError(f"a {model.family} takes {', '.join(taken)}, not {name}")
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    among, mask = pairs.places(None if mask is None else jnp.asarray(mask))
    if positions is not None and model.table.pads_uncounted:  # whose positions are rows of the table
        positions = jnp.asarray(positions) - config.first_position
    elif positions is None and model.table.pads_uncounted:
        counted = tokens != config.first_position - 1
        positions = jnp.where(counted, jnp.cumsum(counted, -1), 0) - 1
    elif positions is None:
        positions = among
    ends = isinstance(config, RWKV) and config.version < 7
    site = "output" if ends else "input"
    tapped = replace(execution, taps=(*execution.taps, f"layers/*/{site}"))
    more = {"token_types": inputs["token_type_ids"]} if "token_type_ids" in inputs else {}
    with jax.default_matmul_precision(execution.precision.products):
        output = functions(config).forward(params, config, tokens, positions=positions, segments=mask, execution=tapped, **more)
        found: dict[str, Any] = {
            "last_hidden_state": output.hidden,
            "hidden_states": (*(output.taps[f"layers/{i}/{site}"] for i in range(config.layers)), output.hidden),
        }
        if isinstance(config, RWKV) and not ends:  # whose first layer normalises embeddings itself
            embedded = lookup(tokens, params["embed"], output.hidden.dtype)
            found["hidden_states"] = (embedded, *found["hidden_states"][1:])
        return found | headed(model, params, output.hidden, mask, inputs, execution)
