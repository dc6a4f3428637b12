"""An encoder of images or captions, or both, called as its peer is."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lmx.core.execution import Execution
from lmx.core.tree import Tree
from lmx.interop.checkpoint import Model
from lmx.interop.outputs import of_classes, of_layers
from lmx.interop.pairs import places
from lmx.models import clip, llava, transformer, vision
from lmx.models.transformer import Embedded
from lmx.models.vision_config import CLIP, CaptionTransformer, LLaVA, VisionTransformer

IMAGES = ("pixel_values", "interpolate_pos_encoding")
"""The second changes nothing: images of another size than the model's are refused."""
TEXTS = ("input_ids", "attention_mask", "position_ids")


def call(
    model: Model, params: Tree, inputs: Mapping[str, Any], *, output_attentions: bool = False, execution: Execution = Execution()
) -> dict[str, Any]:
    """What the peer's forward gives. Of one tower: `last_hidden_state`, `hidden_states` (a tuple: the embeddings, then each layer's output,
    before a final norm), and as its head is `pooler_output`, `logits` and with labels `loss`, or `image_embeds` or `text_embeds`. Of CLIP:
    `logits_per_text`, `logits_per_image`, `image_embeds`, `text_embeds` (of length 1), what each tower gives as `vision_model_output` and
    `text_model_output` (whose `pooler_output` is what becomes those, as `get_image_features` gives it), and with `return_loss` its `loss`;
    images or texts alone are embedded alone. With `output_attentions` each tower's `attentions` too. Differentiable in params.

    Raises:
      ValueError: an input that the model does not take, or lacks.
    """
    config = model.config
    taken = {VisionTransformer: IMAGES, CaptionTransformer: TEXTS, CLIP: (*IMAGES, *TEXTS, "return_loss")}[type(config)]
    taken += ("labels",) if isinstance(config, VisionTransformer) and config.head == "classifier" else ()
    given = {name: value for name, value in inputs.items() if value is not None}
    for name in given:
        if name not in taken:
            raise ValueError(f"a {model.table.named(config)} takes {', '.join(taken)}, not {name}")
    with jax.default_matmul_precision(execution.precision.products):
        if isinstance(config, CLIP):
            return _both(model, params, given, output_attentions, execution)
        found, summary = _tower(params, config, given, output_attentions, execution)
        if config.head == "projection":
            embeds = clip.projected(params, config, summary, execution)
            return found | {"image_embeds" if isinstance(config, VisionTransformer) else "text_embeds": embeds}
        if config.head != "classifier":
            return found
        rows = vision.classes(params, config, found["last_hidden_state"], execution)
        return found | {"logits": rows} | ({"loss": of_classes(model, rows, jnp.asarray(given["labels"]))} if "labels" in given else {})


def _tower(
    params: Tree, config: VisionTransformer | CaptionTransformer, inputs: Mapping[str, Any], attentions: bool, execution: Execution
) -> tuple[dict[str, Any], Array]:
    """What one tower gives, and its summary of each row."""
    last = f"layers/{config.layers - 1}/output"
    weights = ("layers/*/attention/weights",) if attentions else ()
    tapped = replace(execution, taps=(*execution.taps, "layers/*/input", last, *weights))
    needed = "pixel_values" if isinstance(config, VisionTransformer) else "input_ids"
    if needed not in inputs:
        raise ValueError(f"inputs lack {needed}; they have {', '.join(inputs) or 'nothing'}")
    if isinstance(config, VisionTransformer):
        output = vision.forward(params, config, jnp.asarray(inputs["pixel_values"]), execution=tapped)
        summary = vision.pooled(params, config, output.hidden, execution)
    else:
        tokens, mask = jnp.asarray(inputs["input_ids"]), inputs.get("attention_mask")
        among, mask = places(None if mask is None else jnp.asarray(mask))
        positions = jnp.asarray(inputs["position_ids"]) if "position_ids" in inputs else among
        output = transformer.forward(params, config, tokens, positions=positions, segments=mask, execution=tapped)
        summary = clip.pooled(config, tokens, output.hidden, mask)
    states = (*of_layers(output, "input", config.layers), output.taps[last])
    found = {"last_hidden_state": output.hidden, "hidden_states": states, "pooler_output": summary}
    return found | ({"attentions": of_layers(output, "attention/weights", config.layers)} if attentions else {}), summary


def among(config: LLaVA, tokens: Array, features: Array) -> Embedded:
    """`lmx.models.llava.among`, refused where tokens are known and there are more or fewer of them than features. Raises ValueError."""
    there, here = features.shape[0] * features.shape[1], tokens == config.image_token
    if not isinstance(here, jax.core.Tracer) and int(here.sum()) != there:
        raise ValueError(
            f"input_ids has {int(here.sum())} image tokens ({config.image_token}), and pixel_values has {features.shape[0]} images of "
            f"{features.shape[1]} each"
        )
    return llava.among(config, tokens, features)


def _both(model: Model, params: Tree, inputs: Mapping[str, Any], attentions: bool, execution: Execution) -> dict[str, Any]:
    config, found, units = model.config, {}, {}
    sides = {"image": ("pixel_values", "vision_model_output"), "text": ("input_ids", "text_model_output")}
    present = {side: name for side, (needed, name) in sides.items() if needed in inputs}
    if not present or (inputs.get("return_loss") and len(present) < 2):
        raise ValueError("a clip needs pixel_values, input_ids or both, and both for a loss")
    pairs = [len(inputs[sides[side][0]]) for side in present]
    if inputs.get("return_loss") and pairs[0] != pairs[1]:
        raise ValueError(f"{pairs[0]} images and {pairs[1]} texts: the loss is of pairs")
    for side, name in present.items():
        own, tower = params[side], getattr(config, side)
        found[name], summary = _tower(own, tower, inputs, attentions, vision.side(execution, side))
        found[name]["pooler_output"] = clip.projected(own, tower, summary, execution)
        found[f"{side}_embeds"] = units[side] = clip.unit(found[name]["pooler_output"])
    if len(units) < 2:
        return found
    per_text = clip.similarities(params, units["image"], units["text"])
    found |= {"logits_per_text": per_text, "logits_per_image": per_text.T}
    return found | ({"loss": clip.contrastive_loss(per_text)} if inputs.get("return_loss") else {})
