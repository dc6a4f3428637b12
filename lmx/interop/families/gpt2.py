"""GPT-2 (Radford et al., 2019)."""

from lmx.interop.family import ACTIVATIONS, Family, Field, Fused

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    fields=(
        Field("vocab_size", "vocab", 50257),
        Field("n_embd", "embed", 768),
        Field("n_layer", "layers", 12),
        Field("n_head", "heads", 12),
        Field("n_inner", "mlp", None),
        Field("n_positions", "context", 1024),
        Field("layer_norm_epsilon", "norm_epsilon", 1e-5),
        Field("activation_function", "activation", "gelu_new", ACTIVATIONS),
        Field("tie_word_embeddings", "tied", True),
    ),
    settings={"positions": "learned", "norm": "layernorm", "gated": False, "bias": True},
    expected={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    ignored=("summary_*", "n_ctx", "reorder_and_upcast_attn"),
    modules={
        "transformer.wte": "embed",
        "transformer.wpe": "positions",
        "transformer.ln_f": "norm",
        "lm_head": "head",
        "transformer.h.{}.ln_1": "layers/attention_norm",
        "transformer.h.{}.attn.c_attn": Fused(("layers/attention/query", "layers/attention/key", "layers/attention/value")),
        "transformer.h.{}.attn.c_proj": "layers/attention/output",
        "transformer.h.{}.ln_2": "layers/feedforward_norm",
        "transformer.h.{}.mlp.c_fc": "layers/feedforward/up",
        "transformer.h.{}.mlp.c_proj": "layers/feedforward/down",
    },
    turned=False,
    leftover=("*h.*.attn.bias", "*h.*.attn.masked_bias"),
)
