"""Images and captions in one space: CLIP (Radford et al., 2021)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from lmx.core.execution import Execution
from lmx.core.params import Constant, ParamSpec
from lmx.core.tree import Tree
from lmx.core.weights import linear, whole
from lmx.kernels.wide import widened
from lmx.models import transformer, vision
from lmx.models.sites import Edits, inner
from lmx.models.vision_config import CLIP, CaptionTransformer, VisionTransformer
from lmx.parallel.context import as_read
from lmx.parallel.rules import placed


class Embeddings(NamedTuple):
    """What CLIP makes of images and texts: vectors of length 1, the hidden states that they come from, and what is tapped of either encoder
    (`image/layers/3/input`, `text/...`)."""

    images: Float[Array, "images space"]
    texts: Float[Array, "texts space"]
    image_output: transformer.Output
    text_output: transformer.Output
    taps: dict[str, Array]


def specs(config: CLIP) -> Tree:
    """The parameter table."""
    scale = ParamSpec((), (), init=Constant(config.logit_scale))
    return {"image": vision.specs(config.image), "text": transformer.specs(config.text), "logit_scale": scale}


def forward(
    params: Tree,
    config: CLIP,
    tokens: Int[Array, "texts length"],
    pixels: Float[Array, "images channels height width"],
    *,
    positions: Int[Array, "texts length"] | None = None,
    segments: Int[Array, "texts length"] | None = None,
    edits: Edits | None = None,
    execution: Execution = Execution(),
) -> Embeddings:
    """Both towers. `positions` and `segments` are of texts, as in `lmx.models.transformer.forward`; a row is one text. Names of sites begin
    with `image/` and `text/`."""
    seeing, reading = (vision.side(execution, name) for name in ("image", "text"))
    of_image, of_text = (inner(edits or {}, f"{name}/") for name in ("image", "text"))
    image = vision.forward(params["image"], config.image, pixels, edits=of_image, execution=seeing)
    read = {"positions": positions, "segments": segments, "edits": of_text}
    text = transformer.forward(params["text"], config.text, tokens, **read, execution=reading)
    images = projected(params["image"], config.image, vision.pooled(params["image"], config.image, image.hidden, execution), execution)
    texts = projected(params["text"], config.text, pooled(config.text, tokens, text.hidden, segments, execution), execution)
    taps = vision.named(image.taps, "image") | vision.named(text.taps, "text")
    return Embeddings(unit(images), unit(texts), image, text, taps)


def pooled(
    config: CaptionTransformer,
    tokens: Int[Array, "batch length"],
    hidden: Float[Array, "batch length embed"],
    mask: Array | None = None,
    execution: Execution = Execution(),
) -> Float[Array, "batch embed"]:
    """A text's summary: the hidden state of its end token, the first as it is read. `mask` is 0 at padding, which ends nothing."""
    found = tokens if config.end_token is None else (tokens == config.end_token).astype(jnp.int32)
    end = jnp.argmax(as_read(found if mask is None else jnp.where(mask != 0, found, -1), execution), -1)
    return jnp.take_along_axis(as_read(hidden, execution), end[:, None, None], 1)[:, 0]


def projected(
    params: Tree, config: VisionTransformer | CaptionTransformer, summary: Float[Array, "batch embed"], execution: Execution = Execution()
) -> Float[Array, "batch space"]:
    """Summaries of images or texts in the space that they share."""
    own = {"projection": params["projection"]}
    table = vision.specs(config) if isinstance(config, VisionTransformer) else transformer.specs(config)
    return linear(summary, placed(own, {"projection": table["projection"]}, execution)["projection"]["weight"])


def unit(rows: Float[Array, "rows space"]) -> Float[Array, "rows space"]:
    """Vectors of length 1."""
    wide = widened(rows)
    return (wide / jnp.linalg.norm(wide, axis=-1, keepdims=True)).astype(rows.dtype)


def similarities(params: Tree, images: Float[Array, "images space"], texts: Float[Array, "texts space"]) -> Float[Array, "texts images"]:
    """Scaled cosines, fp32 at least, of unit vectors: logits of which image a text is of, and transposed the reverse."""
    return jnp.exp(widened(whole(params["logit_scale"]))) * (widened(texts) @ widened(images).T)


def contrastive_loss(logits: Float[Array, "pairs pairs"]) -> Float[Array, ""]:
    """The mean cross-entropy of finding each text's image and each image's text among all of the batch, pairs being on the diagonal. It is
    no sum over pairs: each is told from the others of its batch."""

    def entropy(logits: Array) -> Array:
        return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits, -1)))

    return (entropy(logits) + entropy(logits.T)) / 2
