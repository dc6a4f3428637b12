"""T5 (Raffel et al., 2020): v1.0; v1.1 and Flan-T5, whose feed-forwards are gated; mT5 (Xue et al., 2021)."""

from dataclasses import replace

from lmx.interop.families.common import both, both_sides
from lmx.interop.family import Family, Field

FEED = {"relu": "relu", "gelu": "gelu", "silu": "silu", "gated-relu": "relu", "gated-gelu": "gelu_tanh", "gated-silu": "silu"}
"""Of `feed_forward_proj`; the gated gelu has always been the tanh form."""


def feed(reader, _):
    said = reader.take("feed_forward_proj", "relu")
    if said not in FEED:
        raise reader.refused("feed_forward_proj", said, ", ".join(FEED))
    return both({"activation": FEED[said], "gated": said.startswith("gated-")})


def said_feed(config):
    kinds = {(ours, name.startswith("gated-")): name for name, ours in FEED.items()}
    if (config.activation, config.gated) not in kinds:
        raise ValueError(f"t5 has no feed_forward_proj for model.activation={config.activation!r}, model.gated={config.gated}")
    return {"feed_forward_proj": kinds[config.activation, config.gated]}


def depth(reader, ours):
    return {"layers": reader.take("num_decoder_layers", None) or ours["encoder.layers"]}


def head(reader, ours):
    """Logits of a tied head are scaled, but where a newer file says that they are not."""
    tied = reader.take("tie_word_embeddings", True)
    scaled = reader.take("scale_decoder_outputs", tied)
    return {"tied": tied, "logit_scale": ours["embed"] ** -0.5 if scaled else None}


def said_head(config):
    return {"tie_word_embeddings": config.tied, "scale_decoder_outputs": config.logit_scale is not None}


def modules(config):
    names = {"shared": "embed", "lm_head": "head"}
    for side, ours in (("encoder", "encoder/"), ("decoder", "")):
        names |= {
            f"{side}.final_layer_norm": f"{ours}norm",
            f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias": f"{ours}relative",
        }
        parts = [("SelfAttention", "attention"), ("DenseReluDense", "feedforward")]
        if side == "decoder":
            parts.insert(1, ("EncDecAttention", "cross"))
        into = {"wi_0": "gate", "wi_1": "up"} if config.gated else {"wi": "up"}
        for i, (theirs, part) in enumerate(parts):
            inside = {"q": "query", "k": "key", "v": "value", "o": "output"} if theirs.endswith("Attention") else into | {"wo": "down"}
            block = f"{side}.block.{{}}.layer.{i}"
            names[f"{block}.layer_norm"] = f"{ours}layers/{part}_norm"
            names |= {f"{block}.{theirs}.{name}": f"{ours}layers/{part}/{own}" for name, own in inside.items()}
    return names


T5 = Family(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    fields=(
        *both_sides(
            Field("vocab_size", "vocab", 32128),
            Field("d_model", "embed", 512),
            Field("d_kv", "head_dim", 64),
            Field("d_ff", "mlp", 2048),
            Field("num_heads", "heads", 8),
            Field("n_positions", "context", 512),
            Field("relative_attention_num_buckets", "relative_buckets", 32),
            Field("relative_attention_max_distance", "relative_distance", 128),
            Field("layer_norm_epsilon", "norm_epsilon", 1e-6),
        ),
        Field("num_layers", "encoder.layers", 6),
        Field("num_decoder_layers", "layers", None),
    ),
    settings=both({"positions": "relative", "attention_scale": 1.0}) | {"encoder.causal": False},
    expected={"is_encoder_decoder": True},
    ignored=("is_decoder", "dense_act_fn", "is_gated_act", "output_past"),
    more=((depth, lambda config: {}), (feed, said_feed), (head, said_head)),
    modules={},
    variants=modules,
    leftover=("*EncDecAttention.relative_attention_bias.weight",),
    copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    tokens={"pad_token_id": 0, "decoder_start_token_id": 0},
)
MT5 = replace(
    T5,
    model_type="mt5",
    architecture="MT5ForConditionalGeneration",
    fields=(*T5.fields, Field("tie_word_embeddings", "tied", True)),
    more=T5.more[:2],
)
