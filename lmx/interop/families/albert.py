"""ALBERT (Lan et al., 2020): narrow embeddings, and one layer's parameters for all."""

from dataclasses import replace

from lmx.interop.families.bert import FIELDS, LABELS, LEFTOVER, RENAMED, SETTINGS, classes, embeddings
from lmx.interop.family import Architecture, Family, Field

DEFAULTS = {
    "vocab_size": 30000,
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "intermediate_size": 16384,
    "hidden_act": "gelu_new",
}
LAYER = "albert.encoder.albert_layer_groups.0.albert_layers.0"
ALBERT = Family(
    model_type="albert",
    architecture="AlbertForMaskedLM",
    architectures=classes("Albert", "albert.", "pooler")
    | {
        "AlbertForMaskedLM": Architecture(
            {"head": "masked", "head_bias": True},
            {
                "predictions.dense": "transform",
                "predictions.LayerNorm": "transform_norm",
                "predictions.decoder": "head",
                "predictions.bias": "head_bias",
            },
        )
    },
    fields=(
        *(replace(one, default=DEFAULTS.get(one.theirs, one.default)) for one in FIELDS),
        Field("embedding_size", "embed_size", 128),
    ),
    settings=SETTINGS | {"shared_layers": True},
    expected={"num_hidden_groups": 1, "inner_group_num": 1, "position_embedding_type": ("absolute", None)},
    ignored=("down_scale_factor", "gap_size", "net_structure_type", "num_memory_blocks", "layers_to_keep"),
    more=(LABELS,),
    modules=embeddings("albert.embeddings")
    | {
        "albert.encoder.embedding_hidden_mapping_in": "embed_projection",
        f"{LAYER}.attention.query": "layers/attention/query",
        f"{LAYER}.attention.key": "layers/attention/key",
        f"{LAYER}.attention.value": "layers/attention/value",
        f"{LAYER}.attention.dense": "layers/attention/output",
        f"{LAYER}.attention.LayerNorm": "layers/attention_norm_post",
        f"{LAYER}.ffn": "layers/feedforward/up",
        f"{LAYER}.ffn_output": "layers/feedforward/down",
        f"{LAYER}.full_layer_layer_norm": "layers/feedforward_norm_post",
    },
    prefixes=("albert.",),
    renamed=RENAMED,
    leftover=LEFTOVER,
)
