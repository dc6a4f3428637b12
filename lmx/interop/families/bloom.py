"""BLOOM (BigScience Workshop, 2022)."""

from lmx.interop.family import Family, Field, Fused

BLOOM = Family(
    model_type="bloom",
    architecture="BloomForCausalLM",
    fields=(
        Field("vocab_size", "vocab", 250880),
        Field("hidden_size", "embed", 64),
        Field("n_layer", "layers", 2),
        Field("n_head", "heads", 8),
        Field("layer_norm_epsilon", "norm_epsilon", 1e-5),
        Field("tie_word_embeddings", "tied", True),
    ),
    settings={
        "positions": "alibi",
        "norm": "layernorm",
        "activation": "gelu_tanh",
        "gated": False,
        "bias": True,
        "embed_norm": True,
        "context": 2048,
    },
    expected={"apply_residual_connection_post_layernorm": False},
    ignored=(
        "slow_but_exact",
        "seq_length",
        "skip_bias_add*",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "offset_alibi",
        "unk_token_id",
    ),
    modules={
        "transformer.word_embeddings": "embed",
        "transformer.word_embeddings_layernorm": "embed_norm",
        "transformer.ln_f": "norm",
        "lm_head": "head",
        "transformer.h.{}.input_layernorm": "layers/attention_norm",
        "transformer.h.{}.self_attention.query_key_value": Fused(
            ("layers/attention/query", "layers/attention/key", "layers/attention/value"), "groups"
        ),
        "transformer.h.{}.self_attention.dense": "layers/attention/output",
        "transformer.h.{}.post_attention_layernorm": "layers/feedforward_norm",
        "transformer.h.{}.mlp.dense_h_to_4h": "layers/feedforward/up",
        "transformer.h.{}.mlp.dense_4h_to_h": "layers/feedforward/down",
    },
)
