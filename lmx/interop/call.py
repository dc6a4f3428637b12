"""A model called as its peer is: inputs and outputs by the peer's names."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lmx.core.execution import Execution
from lmx.core.tree import Tree
from lmx.core.weights import lookup
from lmx.interop import images, pairs, soft
from lmx.interop.checkpoint import Model
from lmx.interop.outputs import headed, of_layers
from lmx.models import llava, virtual
from lmx.models.config import RWKV, EncoderDecoder
from lmx.models.families import functions
from lmx.models.rope import by_length
from lmx.models.vision_config import CLIP, CaptionTransformer, LLaVA, VisionTransformer
from lmx.parallel.context import ring_size

TAKEN = ("input_ids", "attention_mask", "position_ids", "labels")


def call(
    model: Model, params: Tree, inputs: Mapping[str, Any], *, output_attentions: bool = False, execution: Execution = Execution()
) -> dict[str, Any]:
    """What the peer's forward gives: `hidden_states` (a tuple: the embeddings, then each layer's output, the last one after the final norm; of
    an RWKV up to 6 each layer's output, then that of the final norm),
    `last_hidden_state`, and what the model's head gives of it (`lmx.interop.outputs`): `logits` and with labels `loss`.
    With `output_attentions` also `attentions`, each layer's weights, fp32 at least `[batch, heads, queries, keys]` (a query that may see nothing
    has zeros), for which attention is computed as `lmx.models.sites` says.

    A token's position is its place among the real ones of its row, wherever the padding is. Differentiable in params. Of an encoder-decoder:
    `lmx.interop.pairs`; of an encoder of images or captions: `lmx.interop.images`. A decoder that reads images takes `pixel_values` (`[images,
    channels, height, width]`, in the order of their tokens) and gives `image_hidden_states`, what it reads of them, too. Virtual tokens
    (`lmx.interop.soft`) stand before each row as PEFT puts them.

    Raises:
      ValueError: an input that the model does not take, attentions of a model without, or an execution that puts texts in another order.
    """
    if ring_size(execution) > 1:
        raise ValueError("layout.exchange=ring wants sequences in another order than a peer's; use alltoall")
    if isinstance(model.config, EncoderDecoder):
        return pairs.call(model, params, inputs, output_attentions=output_attentions, execution=execution)
    if isinstance(model.config, VisionTransformer | CaptionTransformer | CLIP):
        return images.call(model, params, inputs, output_attentions=output_attentions, execution=execution)
    config = model.config
    taken = (*TAKEN, *(("token_type_ids",) if config.token_types else ()), *(("pixel_values",) if isinstance(config, LLaVA) else ()))
    for name in inputs:
        if name not in taken:
            raise ValueError(f"a {model.family} takes {', '.join(taken)}, not {name}")
    prompt, prefix = virtual.prompt(params), virtual.prefix(params)
    inputs = soft.behind(inputs, prompt)
    tokens = jnp.asarray(inputs["input_ids"])
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    among, mask = pairs.places(None if mask is None else jnp.asarray(mask))
    if prompt or prefix:
        positions = soft.positions(model, inputs, mask, prompt, prefix)
    elif positions is not None and model.table.pads_uncounted:  # whose positions are rows of the table
        positions = jnp.asarray(positions) - config.first_position
    elif positions is None and model.table.pads_uncounted:
        counted = tokens != config.first_position - 1
        positions = jnp.where(counted, jnp.cumsum(counted, -1), 0) - 1
    elif positions is None:
        positions = among
    ends = isinstance(config, RWKV) and config.version < 7
    site = "output" if ends else "input"
    if output_attentions and isinstance(config, RWKV):
        raise ValueError(f"a {model.family} has no attention weights; leave output_attentions out")
    weights = ("layers/*/attention/weights",) if output_attentions else ()
    tapped = replace(execution, taps=(*execution.taps, f"layers/*/{site}", *weights))
    more = {"token_types": inputs["token_type_ids"]} if "token_type_ids" in inputs else {}
    if positions is not None and by_length(getattr(config, "rope_scaling", None)):  # transformers turns all of a batch as its longest row
        more["lengths"] = jnp.broadcast_to(positions.max() + 1, (1, 1))
    if prompt:
        more["given"] = virtual.embedded(params, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
    if prefix:
        more["cache"] = virtual.cache(params, config, len(tokens), prefix + tokens.shape[1], jnp.dtype(execution.precision.compute))
    with jax.default_matmul_precision(execution.precision.products):
        seen = {}
        if inputs.get("pixel_values") is not None:
            seen = {"image_hidden_states": llava.features(params, config, jnp.asarray(inputs["pixel_values"]), execution)}
            more["given"] = llava.both(images.among(config, tokens, seen["image_hidden_states"]), more.get("given"))
        output = functions(config).forward(params, config, tokens, positions=positions, segments=mask, execution=tapped, **more)
        found: dict[str, Any] = seen | {
            "last_hidden_state": output.hidden,
            "hidden_states": (*of_layers(output, site, config.layers), output.hidden),
        }
        if isinstance(config, RWKV) and not ends:  # whose first layer normalises embeddings itself
            embedded = lookup(tokens, params["embed"], output.hidden.dtype)
            found["hidden_states"] = (embedded, *found["hidden_states"][1:])
        if output_attentions:
            found["attentions"] = of_layers(output, "attention/weights", config.layers)
        return found | headed(model, params, output.hidden, mask, inputs, execution)
