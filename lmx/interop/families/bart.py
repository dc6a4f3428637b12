"""BART (Lewis et al., 2020)."""

from lmx.interop.families.common import both, both_sides
from lmx.interop.family import ACTIVATIONS, Family, Field


def modules(side: str, ours: str) -> dict[str, str]:
    layer, own = f"model.{side}.layers.{{}}", f"{ours}layers"
    names = {f"model.{side}.embed_positions": f"{ours}positions", f"model.{side}.layernorm_embedding": f"{ours}embed_norm"}
    parts = {"self_attn": "attention"} | ({"encoder_attn": "cross"} if side == "decoder" else {})
    for theirs, part in parts.items():
        projections = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output"}
        names |= {f"{layer}.{theirs}.{name}": f"{own}/{part}/{to}" for name, to in projections.items()}
        names[f"{layer}.{theirs}_layer_norm"] = f"{own}/{part}_norm_post"
    return names | {
        f"{layer}.fc1": f"{own}/feedforward/up",
        f"{layer}.fc2": f"{own}/feedforward/down",
        f"{layer}.final_layer_norm": f"{own}/feedforward_norm_post",
    }


BART = Family(
    model_type="bart",
    architecture="BartForConditionalGeneration",
    fields=(
        *both_sides(
            Field("vocab_size", "vocab", 50265),
            Field("d_model", "embed", 1024),
            Field("max_position_embeddings", "context", 1024),
            Field("activation_function", "activation", "gelu", ACTIVATIONS),
            Field("scale_embedding", "embed_scale", False),
        ),
        Field("encoder_layers", "encoder.layers", 12),
        Field("encoder_attention_heads", "encoder.heads", 16),
        Field("encoder_ffn_dim", "encoder.mlp", 4096),
        Field("decoder_layers", "layers", 12),
        Field("decoder_attention_heads", "heads", 16),
        Field("decoder_ffn_dim", "mlp", 4096),
        Field("tie_word_embeddings", "tied", True),
    ),
    settings=both(
        {"positions": "learned", "first_position": 2, "norm": "layernorm", "norm_placement": "post", "embed_norm": True}
        | {"gated": False, "bias": True}
    )
    | {"encoder.causal": False, "head_bias": True},
    expected={"is_encoder_decoder": True, "normalize_before": False, "add_final_layer_norm": False}
    | {"normalize_embedding": True, "static_position_embeddings": False, "extra_pos_embeddings": 2},
    ignored=(
        *("is_decoder", "num_hidden_layers", "add_bias_logits", "force*_token*", "early_stopping", "num_beams", "no_repeat_ngram_size"),
        *("length_penalty", "max_length", "min_length"),
    ),
    modules={"model.shared": "embed", "lm_head": "head"} | modules("encoder", "encoder/") | modules("decoder", ""),
    tensors={"final_logits_bias": ("head_bias", 1)},
    zeros=("final_logits_bias",),
    copies=("*coder.embed_tokens.weight",),
    tokens={"pad_token_id": 1, "decoder_start_token_id": 2},
)
