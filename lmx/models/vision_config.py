"""What a model that sees is: one frozen value, as those of `lmx.models.config`."""

from dataclasses import dataclass, replace
from typing import ClassVar

from lmx.models import config as text_config
from lmx.models.config import Activation, Head, Norm, Positions, Transformer

HEADS = ("none", "pooler", "classifier", "projection")
"""Of an encoder of images."""


@dataclass(frozen=True)
class VisionTransformer(Transformer):
    """An encoder of images (Dosovitskiy et al., 2021): patches, and before them a class token, stand where a text has tokens. What is said
    of tokens alone (vocab, context, token_types) is not read."""

    image_size: tuple[int, int] = (224, 224)
    """Height and width of images, in pixels."""
    patch_size: tuple[int, int] = (16, 16)
    """Those of a patch; what an image has beyond whole patches is not seen."""
    channels: int = 3
    """Of a pixel."""
    patch_bias: bool = True
    """Whether the layer that embeds patches has a bias."""
    class_token: bool = True
    """Whether there is a class token (SigLIP has none)."""
    summary_norm: bool = False
    """Whether the final norm is of the class token alone, where the head reads it (CLIP), or of all hidden states."""
    summary: int | None = None
    """Width of what the heads pooler and projection give of an image. None: that of embed."""
    vocab: int = 0
    """None."""
    causal: bool = False
    """No: every patch sees all others."""
    positions: Positions = "learned"
    """One for each patch and the class token."""
    norm: Norm = "layernorm"
    """Which normalisation."""
    gated: bool = False
    """Whether a second projection gates the feed-forward."""
    activation: Activation = "gelu"
    """The feed-forward's nonlinearity."""
    bias: bool = True
    """Whether linear layers and LayerNorms have biases."""
    tied: bool = False
    """No: there is no table of embeddings."""
    head: Head = "none"
    """What stands on the class token. none; pooler: a dense layer and an activation; classifier: logits of labels; projection: a linear layer
    without bias into a space that is shared with texts (CLIP)."""

    @property
    def patches(self) -> int:
        """Of an image."""
        (height, width), (rows, columns) = self.image_size, self.patch_size
        return (height // rows) * (width // columns)

    @property
    def places(self) -> int:
        """Patches and class token."""
        return self.patches + self.class_token

    @property
    def summary_size(self) -> int:
        return self.embed if self.summary is None else self.summary


@dataclass(frozen=True)
class CaptionTransformer(Transformer):
    """A reader of captions: a transformer whose summary of a text is the hidden state of its end (CLIP's text tower)."""

    end_token: int | None = None
    """The token that ends a text, the first of them. None: that of the highest id."""
    summary: int | None = None
    """Width of the head projection. None: that of embed."""

    @property
    def summary_size(self) -> int:
        return self.embed if self.summary is None else self.summary


@dataclass(frozen=True)
class CLIP:
    """An encoder of images and one of texts, which meet in one space (Radford et al., 2021)."""

    image: VisionTransformer = VisionTransformer(
        patch_size=(32, 32), patch_bias=False, embed_norm=True, summary_norm=True, activation="gelu_quick", head="projection"
    )
    """What reads images."""
    text: CaptionTransformer = CaptionTransformer(
        vocab=49408, positions="learned", norm="layernorm", gated=False, bias=True, activation="gelu_quick", head="projection"
    )
    """What reads texts."""
    logit_scale: float = 2.6592
    """The logarithm of what cosines are multiplied by, in the beginning: it is learned."""

    tied: ClassVar[bool] = False


@dataclass(frozen=True)
class LLaVA(Transformer):
    """A decoder that reads images among its tokens (Liu et al., 2023): all fields but these are the decoder's. What an encoder makes of an
    image's patches goes through two linear layers, and stands where the text has as many image tokens."""

    image: VisionTransformer = VisionTransformer()
    """The encoder of images."""
    image_token: int = 0
    """The token in whose place a patch is read."""
    image_layers: tuple[int, ...] = (-2,)
    """After how many layers of the encoder a patch is taken; -1: all, -2: all but the last. Of several one beside another."""
    image_class: bool = False
    """Whether the first of the encoder's places, its class token, is taken too."""
    projector_activation: Activation = "gelu"
    """Between the two linear layers."""
    projector_bias: bool = True
    """Whether they have biases."""

    @property
    def image_tokens(self) -> int:
        """Places that an image takes in a text."""
        return self.image.places - (not self.image_class)

    @property
    def depths(self) -> tuple[int, ...]:
        """`image_layers`, all counted from the first."""
        return tuple(depth if depth >= 0 else self.image.layers + 1 + depth for depth in self.image_layers)


Seeing = VisionTransformer | CaptionTransformer | CLIP | LLaVA


def check(config: Seeing) -> None:
    """Refuses a config that is no model, with one line that names the knob. Raises ValueError."""
    if isinstance(config, CLIP):
        _check_part(config.image, "image")
        _check_part(config.text, "text")
        if (config.image.head, config.text.head) != ("projection", "projection"):
            raise ValueError(f"model.image.head={config.image.head}, model.text.head={config.text.head}: both must be projection")
        if config.image.summary_size != config.text.summary_size:
            raise ValueError(
                f"model.image.summary={config.image.summary} is not model.text.summary={config.text.summary}: they meet in one space"
            )
    elif isinstance(config, VisionTransformer):
        _check_image(config)
    else:
        text_config.check(config)
    if isinstance(config, LLaVA):
        _check_part(config.image, "image")
        if not config.image_layers:
            raise ValueError("model.image_layers is empty; name at least one layer, (-2,) is usual")
        for layer, depth in zip(config.image_layers, config.depths, strict=True):
            if not 0 <= depth <= config.image.layers:
                raise ValueError(f"model.image_layers has {layer}, and model.image has {config.image.layers} layers")


def _check_part(config: VisionTransformer | CaptionTransformer, name: str) -> None:
    try:
        check(config)
    except ValueError as error:
        raise ValueError(str(error).replace("model.", f"model.{name}.")) from error


def _check_image(config: VisionTransformer) -> None:
    text_config.check(replace(config, vocab=1, head="none", labels=0))
    if config.head not in HEADS:
        raise ValueError(f"model.head={config.head} of an encoder of images is not one of {', '.join(HEADS)}")
    if not config.class_token and (config.head != "none" or config.summary_norm):
        raise ValueError(f"model.head={config.head} and model.summary_norm={config.summary_norm} read a class token; set model.class_token")
    if (config.head == "classifier") != (config.labels > 0):
        raise ValueError(f"model.labels={config.labels} with model.head={config.head}: labels are of the classifier; set both or neither")
    if config.channels < 1:
        raise ValueError(f"model.channels={config.channels} must be at least 1")
    if not all(1 <= patch <= size for patch, size in zip(config.patch_size, config.image_size, strict=True)):
        raise ValueError(f"model.patch_size={config.patch_size} must be at least 1 and no more than model.image_size={config.image_size}")
    fixed = {"causal": False, "positions": "learned", "pattern": ("global",), "shared_layers": False, "embed_size": None}
    for knob, value in fixed.items():
        if getattr(config, knob) != value:
            raise ValueError(f"model.{knob}={getattr(config, knob)!r} is not of an encoder of images, whose is {value!r}")
