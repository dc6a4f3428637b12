"""CLIP (Radford et al., 2021): both towers, and each alone; and what is much alike in SigLIP (Zhai et al., 2023)."""

from dataclasses import replace

from lmx.interop.families.vit import sizes
from lmx.interop.family import ACTIVATIONS, Architecture, Family, Field, Inside
from lmx.models.vision_config import CLIP as BOTH
from lmx.models.vision_config import CaptionTransformer, VisionTransformer

SETTINGS = {"positions": "learned", "norm": "layernorm", "gated": False, "bias": True}


def fields(embed: int, mlp: int, heads: int) -> tuple[Field, ...]:
    return (
        Field("hidden_size", "embed", embed),
        Field("intermediate_size", "mlp", mlp),
        Field("num_hidden_layers", "layers", 12),
        Field("num_attention_heads", "heads", heads),
        Field("hidden_act", "activation", "quick_gelu", ACTIVATIONS),
        Field("layer_norm_eps", "norm_epsilon", 1e-5),
    )


def layers(lead: str) -> dict[str, str]:
    layer = f"{lead}.encoder.layers.{{}}"
    projections = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output"}
    return {f"{layer}.self_attn.{theirs}": f"layers/attention/{ours}" for theirs, ours in projections.items()} | {
        f"{layer}.layer_norm1": "layers/attention_norm",
        f"{layer}.layer_norm2": "layers/feedforward_norm",
        f"{layer}.mlp.fc1": "layers/feedforward/up",
        f"{layer}.mlp.fc2": "layers/feedforward/down",
    }


def classes(kind: str, lead: str, projection: str) -> dict[str, Architecture]:
    """With what leads into the space that images and texts share, or without."""
    return {
        f"CLIP{kind}Model": Architecture({"head": "none"}, bare=f"{lead}."),
        f"CLIP{kind}ModelWithProjection": Architecture({"head": "projection"}, {projection: "projection"}),
    }


def width(reader, ours):
    space = reader.take("projection_dim", 512)
    return {"summary": space} if ours["head"] == "projection" else {}


WIDTH = (width, lambda config: {"projection_dim": config.summary_size} if config.head == "projection" else {})


def end(reader, _):
    """2 is what old files say, whose end token is another: that of the highest id."""
    token = reader.take("eos_token_id", 49407)
    if not isinstance(token, int):
        raise reader.refused("eos_token_id", token, "one number")
    return {"end_token": None if token == 2 else token}


def widths(reader, ours):
    """That of the space, which the config of the whole says."""
    space = reader.take("projection_dim", 512)
    return {part: replace(ours[part], summary=space) for part in ("image", "text")}


VISION = Family(
    model_type="clip_vision_model",
    architecture="CLIPVisionModel",
    architectures=classes("Vision", "vision_model", "visual_projection"),
    kind=VisionTransformer,
    fields=(*fields(768, 3072, 12), Field("num_channels", "channels", 3)),
    settings=SETTINGS | {"patch_bias": False, "embed_norm": True, "summary_norm": True},
    ignored=("vocab_size", "tie_word_embeddings"),
    more=(sizes(224, 32), WIDTH),
    modules={
        "vision_model.embeddings.patch_embedding": "patches",
        "vision_model.embeddings.position_embedding": "positions",
        "vision_model.pre_layrnorm": "embed_norm",
        "vision_model.post_layernorm": "norm",
    }
    | layers("vision_model"),
    tensors={"vision_model.embeddings.class_embedding": ("class_token", 0)},
    prefixes=("vision_model.",),
    kernels=("patches/weight",),
    leftover=("*position_ids",),
)


def headless(reader, _):
    if reader.take("vision_use_head", True):
        raise reader.refused("vision_use_head", True, "False: its head is read by nothing here")
    return {}


SIGLIP = replace(
    VISION,
    model_type="siglip_vision_model",
    architecture="SiglipVisionModel",
    architectures={},
    fields=(
        *(
            replace(one, default={"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}.get(one.theirs, one.default))
            for one in VISION.fields
        ),
    ),
    settings=SETTINGS | {"class_token": False, "summary_norm": False},
    more=(sizes(224, 16), (headless, lambda _: {"vision_use_head": False})),
    modules={name.removeprefix("vision_model."): ours for name, ours in VISION.modules.items() if ours != "embed_norm"},
    tensors={},
)
"""SigLIP's eyes (Zhai et al., 2023), as they are inside other models: without a head."""
TEXT = Family(
    model_type="clip_text_model",
    architecture="CLIPTextModel",
    architectures=classes("Text", "text_model", "text_projection"),
    kind=CaptionTransformer,
    fields=(*fields(512, 2048, 8), Field("vocab_size", "vocab", 49408), Field("max_position_embeddings", "context", 77)),
    settings=SETTINGS,
    ignored=("tie_word_embeddings",),
    more=(WIDTH, (end, lambda config: {"eos_token_id": 2 if config.end_token is None else config.end_token})),
    modules={
        "text_model.embeddings.token_embedding": "embed",
        "text_model.embeddings.position_embedding": "positions",
        "text_model.final_layer_norm": "norm",
    }
    | layers("text_model"),
    prefixes=("text_model.",),
    leftover=("*position_ids",),
)
CLIP = Family(
    model_type="clip",
    architecture="CLIPModel",
    architectures={"CLIPModel": Architecture({})},
    kind=BOTH,
    fields=(Field("logit_scale_init_value", "logit_scale", 2.6592),),
    ignored=("tie_word_embeddings",),
    more=((widths, lambda config: {"projection_dim": config.text.summary_size}),),
    modules={},
    tensors={"logit_scale": ("logit_scale", 0)},
    prefixes=("clip.",),
    inside=(
        Inside("text_config", "text", (TEXT,), architecture="CLIPTextModelWithProjection", older="text_config_dict"),
        Inside("vision_config", "image", (VISION,), architecture="CLIPVisionModelWithProjection", older="vision_config_dict"),
    ),
)
