"""A decoder that reads images among its tokens: LLaVA (Liu et al., 2023), its decoder `lmx.models.transformer`'s, its eyes
`lmx.models.vision`'s."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from lmx.core.execution import Execution
from lmx.core.tree import Tree
from lmx.core.weights import linear
from lmx.kernels.wide import widened
from lmx.models import sites, transformer, vision
from lmx.models.feedforward import ACTIVATIONS
from lmx.models.linears import linear_specs
from lmx.models.sites import Edits
from lmx.models.transformer import Embedded, Output
from lmx.models.vision_config import LLaVA
from lmx.parallel.context import arrange, as_read
from lmx.parallel.rules import constrain, placed

SEEING = ("image", "projector")
"""The parameters that a decoder alone has not."""
empty_cache = transformer.empty_cache
flops_per_token = transformer.flops_per_token
"""Of a token of text or a patch in its place; the encoder's are not counted."""


def specs(config: LLaVA) -> Tree:
    """The parameter table: the decoder's, and those of `image` and `projector`."""
    return transformer.specs(config) | {"image": vision.specs(config.image), "projector": _projector(config)}


def forward(
    params: Tree,
    config: LLaVA,
    tokens: Int[Array, "batch length"],
    *,
    pixels: Float[Array, "images channels height width"] | None = None,
    given: Embedded | None = None,
    edits: Edits | None = None,
    execution: Execution = Execution(),
    **inputs: Any,
) -> Output:
    """Hidden states of tokens, as `lmx.models.transformer.forward` gives them and with its arguments.

    Args:
      pixels: images in the order in which the texts have their tokens, row after row, however many a row has. Without, image tokens are
        looked up as any other.
      given: what is read in other tokens' places; or in images', where the caller has placed their features itself (`features`, `among`).

    Names of the encoder's sites begin with `image/`; dropout is of the decoder alone.
    """
    taps, edits = {}, edits or {}
    if pixels is not None:
        seen, taps = _look(params, config, pixels, sites.inner(edits, "image/"), execution)
        given = both(among(config, tokens, seen, execution), given)
    decoder = {name: value for name, value in params.items() if name not in SEEING}
    own = replace(execution, taps=tuple(tap for tap in execution.taps if not tap.startswith("image/")))
    edits = {name: edit for name, edit in edits.items() if not name.startswith("image/")}
    output = transformer.forward(decoder, config, tokens, given=given, edits=edits, execution=own, **inputs)
    return output.replace(taps=taps | output.taps)


def features(
    params: Tree, config: LLaVA, pixels: Float[Array, "images channels height width"], execution: Execution = Execution()
) -> Float[Array, "images patches embed"]:
    """What the decoder reads of images: their patches after the layers that the config names, through the projector."""
    return _look(params, config, pixels, {}, execution)[0]


def _look(params: Tree, config: LLaVA, pixels: Array, edits: Edits, execution: Execution) -> tuple[Array, dict[str, Array]]:
    """The features, and what is tapped on the way."""
    deepest, asked = max(config.depths), vision.side(execution, "image")
    own = {depth: f"layers/{depth}/input" for depth in config.depths if depth < deepest}
    run = replace(asked, taps=(*asked.taps, *own.values()))
    output = vision.forward(params["image"], config.image, pixels, depth=deepest, edits=edits, execution=run)
    x = jnp.concatenate([output.taps[own[depth]] if depth in own else output.hidden for depth in config.depths], -1)
    x = x if config.image_class else x[:, 1:]
    layers = placed(params["projector"], _projector(config), execution)
    x = linear(x, layers["up"]["weight"], layers["up"].get("bias"))
    x = constrain(x, ("batch", "length", "mlp"), execution.rules)
    x = ACTIVATIONS[config.projector_activation](widened(x)).astype(x.dtype)
    tapped = {name: value for name, value in output.taps.items() if any(sites.matches(name, tap) for tap in asked.taps)}
    return linear(x, layers["down"]["weight"], layers["down"].get("bias")), vision.named(tapped, "image")


def both(first: Embedded, second: Embedded | None) -> Embedded:
    """Where both give something, it is the first's."""
    if second is None:
        return first
    vectors = jnp.where(first.where[..., None], first.vectors, second.vectors.astype(first.vectors.dtype))
    return Embedded(vectors, first.where | second.where)


def among(
    config: LLaVA, tokens: Int[Array, "batch length"], features: Float[Array, "images patches embed"], execution: Execution = Execution()
) -> Embedded:
    """Features in the places of image tokens, the first feature in the first place of the first text as it is read. Where there are not as
    many of either, all are NaN: how many a text has is not known when a program is compiled."""
    where = tokens == config.image_token
    flat = features.reshape(-1, features.shape[-1])
    count = jnp.cumsum(as_read(where, execution).reshape(-1)).reshape(where.shape) - 1
    vectors = jnp.take(flat, arrange({"count": count}, execution)["count"], axis=0, mode="clip")
    return Embedded(jnp.where(where.sum() == len(flat), vectors, jnp.nan), where)


def _projector(config: LLaVA) -> Tree:
    width, embed = len(config.image_layers) * config.image.embed, config.embed
    up = linear_specs((width,), (embed,), ("embed",), ("mlp",), config, bias=config.projector_bias)
    return {"up": up, "down": linear_specs((embed,), (embed,), ("mlp",), ("embed",), config, bias=config.projector_bias)}
