"""An encoder-decoder called as its peer is."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lmx.core.execution import Execution
from lmx.core.tree import Tree
from lmx.interop import soft
from lmx.interop.checkpoint import Model
from lmx.interop.outputs import IGNORED, entropy_of, of_layers
from lmx.models import virtual
from lmx.models.losses import logits
from lmx.models.transformer import Source, forward

TAKEN = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask", "labels")


def call(
    model: Model, params: Tree, inputs: Mapping[str, Any], *, output_attentions: bool = False, execution: Execution = Execution()
) -> dict[str, Any]:
    """What the peer's forward gives: `logits` (of the decoder), `encoder_last_hidden_state`, `encoder_hidden_states` and
    `decoder_hidden_states` (tuples: the embeddings, then each layer's output, the last one after the final norm), and with labels `loss`,
    a mean over those that are not -100. With `output_attentions` also `encoder_attentions`, `decoder_attentions` and `cross_attentions`, as
    `lmx.interop.call` gives attentions.

    Without `decoder_input_ids` the decoder reads the labels, shifted right. Positions as in `lmx.interop.call`. Differentiable in params.

    Raises:
      ValueError: an input that the model does not take, or nothing for the decoder to read.
    """
    for name in inputs:
        if name not in TAKEN:
            raise ValueError(f"a {model.family} takes {', '.join(TAKEN)}, not {name}")
    given = {name: jnp.asarray(value) for name, value in inputs.items() if value is not None}
    config, labels = model.config, given.get("labels")
    tokens = given.get("decoder_input_ids")
    if tokens is None:
        if labels is None:
            raise ValueError(f"a {model.family} needs decoder_input_ids, or labels to make them of")
        tokens = shifted(model, labels)
    prompt, prefix = virtual.prompt(params), virtual.prefix(params)
    read = soft.behind({name: given.get(name) for name in ("input_ids", "attention_mask")}, prompt)
    positions, segments = places(read["attention_mask"])
    before = None
    if prompt:
        positions = soft.positions(model, read, segments, prompt, 0)
        before = virtual.embedded(params, positions)
    source = Source(read["input_ids"], positions, segments, before)
    positions, segments = places(given.get("decoder_attention_mask"))
    more = {}
    if prefix:
        positions = soft.positions(model, {"input_ids": tokens}, segments, 0, prefix)
        more["cache"] = virtual.cache(params, config, len(tokens), prefix + tokens.shape[1], jnp.dtype(execution.precision.compute))
    weights = ("layers/*/attention/weights", "layers/*/cross/weights", "encoder/layers/*/attention/weights") if output_attentions else ()
    taps = (*execution.taps, "layers/*/input", "encoder/layers/*/input", *weights)
    with jax.default_matmul_precision(execution.precision.products):
        output = forward(
            params, config, tokens, positions=positions, segments=segments, source=source, execution=replace(execution, taps=taps), **more
        )
        found: dict[str, Any] = {
            "logits": logits(params, config, output.hidden),
            "encoder_last_hidden_state": output.encoded,
            "encoder_hidden_states": (*of_layers(output, "input", config.encoder.layers, "encoder/"), output.encoded),
            "decoder_hidden_states": (*of_layers(output, "input", config.layers), output.hidden),
        }
        if output_attentions:
            found["encoder_attentions"] = of_layers(output, "attention/weights", config.encoder.layers, "encoder/")
            found["decoder_attentions"] = of_layers(output, "attention/weights", config.layers)
            found["cross_attentions"] = of_layers(output, "cross/weights", config.layers)
        if labels is not None:
            found["loss"] = entropy_of(config, params, output.hidden, labels, execution)
    return found


def shifted(model: Model, labels: Array) -> Array:
    """What the decoder reads to predict labels `[batch, length]`: those before each, the first behind `decoder_start_token_id`, padding for
    -100. Raises ValueError where neither config.json nor the family says which tokens those are."""
    about, ids = model.hub, {}
    for name in ("decoder_start_token_id", "pad_token_id"):
        ids[name] = about[name] if about.get(name) is not None else model.table.tokens.get(name)
        if ids[name] is None:
            raise ValueError(f"config.json of the {model.family} lacks {name}, so labels alone do not say what the decoder reads")
    before = jnp.pad(labels[:, :-1], ((0, 0), (1, 0)), constant_values=ids["decoder_start_token_id"])
    return jnp.where(before == IGNORED, ids["pad_token_id"], before)


def places(mask: Array | None) -> tuple[Array | None, Array | None]:
    """Positions and segments of tokens, padding on either side."""
    if mask is None:
        return None, None
    mask = mask.astype(jnp.int32)
    return jnp.maximum(jnp.cumsum(mask, -1) - 1, 0), mask
