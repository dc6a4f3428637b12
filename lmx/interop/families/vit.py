"""ViT (Dosovitskiy et al., 2021)."""

from lmx.interop.families.bert import LABELS
from lmx.interop.family import ACTIVATIONS, Architecture, Family, Field
from lmx.models.vision_config import VisionTransformer

LAYER = "vit.encoder.layer.{}"


def sizes(image: int, patch: int):
    """Of images and patches: one number, or height and width."""

    def read(reader, _):
        found = {name: reader.take(name, usual) for name, usual in (("image_size", image), ("patch_size", patch))}
        for name, said in found.items():
            if not isinstance(said, int) and not (isinstance(said, list | tuple) and len(said) == 2):
                raise reader.refused(name, said, "a number, or height and width")
        return {name: (said, said) if isinstance(said, int) else tuple(said) for name, said in found.items()}

    def write(config):
        both = {"image_size": config.image_size, "patch_size": config.patch_size}
        return {name: size[0] if size[0] == size[1] else list(size) for name, size in both.items()}

    return read, write


def pooler(reader, ours):
    width, activation = reader.take("pooler_output_size", None), reader.take("pooler_act", "tanh")
    if ours["head"] != "pooler":
        return {}
    if activation not in POOLERS:
        raise reader.refused("pooler_act", activation, f"one of {', '.join(POOLERS)}")
    return {"summary": None if width in (None, ours["embed"]) else width, "head_activation": POOLERS[activation]}


def said_pooler(config):
    if config.head != "pooler":
        return {}
    said = {ours: name for name, ours in POOLERS.items()}
    return {"pooler_output_size": config.summary_size, "pooler_act": said[config.head_activation or config.activation]}


POOLERS = {"tanh": "tanh"} | ACTIVATIONS
ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
MODERN = (
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    ("encoder.layer.", "layers."),
    *((f"attention.attention.{name}", f"attention.{now}") for name, now in ATTENTION.items()),
)
"""Of transformers 5, inside; its files have the names of the table."""
VIT = Family(
    model_type="vit",
    architecture="ViTModel",
    architectures={
        "ViTModel": Architecture({"head": "pooler"}, {"pooler.dense": "pooler"}, bare="vit."),
        "ViTForImageClassification": Architecture({"head": "classifier"}, {"classifier": "classifier"}),
    },
    kind=VisionTransformer,
    fields=(
        Field("hidden_size", "embed", 768),
        Field("num_hidden_layers", "layers", 12),
        Field("num_attention_heads", "heads", 12),
        Field("head_dim", "head_dim", None),
        Field("intermediate_size", "mlp", 3072),
        Field("num_channels", "channels", 3),
        Field("hidden_act", "activation", "gelu", ACTIVATIONS),
        Field("layer_norm_eps", "norm_epsilon", 1e-12),
        Field("qkv_bias", "projection_bias", True, {True: None, False: False}),
    ),
    ignored=("encoder_stride", "tie_word_embeddings"),
    more=(sizes(224, 16), LABELS, (pooler, said_pooler)),
    modules={
        "vit.embeddings.patch_embeddings.projection": "patches",
        "vit.layernorm": "norm",
        f"{LAYER}.attention.attention.query": "layers/attention/query",
        f"{LAYER}.attention.attention.key": "layers/attention/key",
        f"{LAYER}.attention.attention.value": "layers/attention/value",
        f"{LAYER}.attention.output.dense": "layers/attention/output",
        f"{LAYER}.layernorm_before": "layers/attention_norm",
        f"{LAYER}.intermediate.dense": "layers/feedforward/up",
        f"{LAYER}.output.dense": "layers/feedforward/down",
        f"{LAYER}.layernorm_after": "layers/feedforward_norm",
    },
    tensors={"vit.embeddings.cls_token": ("class_token", 2), "vit.embeddings.position_embeddings": ("positions", 1)},
    prefixes=("vit.",),
    kernels=("patches/weight",),
    dialects=(MODERN,),
    leftover=("*pooler.*", "*mask_token"),
)
