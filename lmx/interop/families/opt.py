"""OPT (Zhang et al., 2022)."""

from lmx.interop.family import ACTIVATIONS, Family, Field

LAYER = "model.decoder.layers.{}"


def width(reader, ours):
    """Embeddings are as wide as the model but in the 350M one, which projects them."""
    if reader.take("word_embed_proj_dim", ours["embed"]) not in (None, ours["embed"]):
        raise reader.refused("word_embed_proj_dim", reader.take("word_embed_proj_dim"), f"hidden_size, {ours['embed']}")
    return {}


def biases(reader, _):
    """Of linear layers; LayerNorms have them always."""
    return dict.fromkeys(("projection_bias", "output_bias", "mlp_bias"), reader.take("enable_bias", True))


OPT = Family(
    model_type="opt",
    architecture="OPTForCausalLM",
    fields=(
        Field("vocab_size", "vocab", 50272),
        Field("hidden_size", "embed", 768),
        Field("num_hidden_layers", "layers", 12),
        Field("ffn_dim", "mlp", 3072),
        Field("num_attention_heads", "heads", 12),
        Field("max_position_embeddings", "context", 2048),
        Field("activation_function", "activation", "relu", ACTIVATIONS),
        Field("tie_word_embeddings", "tied", True),
    ),
    settings={"positions": "learned", "first_position": 2, "norm": "layernorm", "gated": False, "bias": True},
    expected={"do_layer_norm_before": True, "layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False},
    more=(
        (width, lambda config: {"word_embed_proj_dim": config.embed}),
        (biases, lambda config: {"enable_bias": config.projection_bias}),
    ),
    modules={
        "model.decoder.embed_tokens": "embed",
        "model.decoder.embed_positions": "positions",
        "model.decoder.final_layer_norm": "norm",
        "lm_head": "head",
        f"{LAYER}.self_attn_layer_norm": "layers/attention_norm",
        f"{LAYER}.self_attn.q_proj": "layers/attention/query",
        f"{LAYER}.self_attn.k_proj": "layers/attention/key",
        f"{LAYER}.self_attn.v_proj": "layers/attention/value",
        f"{LAYER}.self_attn.out_proj": "layers/attention/output",
        f"{LAYER}.final_layer_norm": "layers/feedforward_norm",
        f"{LAYER}.fc1": "layers/feedforward/up",
        f"{LAYER}.fc2": "layers/feedforward/down",
    },
)
