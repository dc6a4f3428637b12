"""GPT-NeoX and Pythia (Black et al., 2022; Biderman et al., 2023)."""

from lmx.interop.families.common import rope
from lmx.interop.family import ACTIVATIONS, Family, Field, Fused

LAYER = "gpt_neox.layers.{}"


def halves(reader, _):
    parallel, biases = reader.take("use_parallel_residual", True), reader.take("attention_bias", True)
    return {"parallel": parallel, "parallel_norms": parallel, "projection_bias": biases, "output_bias": biases}


GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    fields=(
        Field("vocab_size", "vocab", 50432),
        Field("hidden_size", "embed", 6144),
        Field("num_hidden_layers", "layers", 44),
        Field("num_attention_heads", "heads", 64),
        Field("intermediate_size", "mlp", 24576),
        Field("hidden_act", "activation", "gelu", ACTIVATIONS),
        Field("max_position_embeddings", "context", 2048),
        Field("layer_norm_eps", "norm_epsilon", 1e-5),
        Field("tie_word_embeddings", "tied", False),
    ),
    settings={"norm": "layernorm", "gated": False, "bias": True},
    more=(
        rope(10_000.0, 0.25, ("rotary_emb_base", "rotary_pct")),
        (halves, lambda config: {"use_parallel_residual": config.parallel, "attention_bias": config.projection_bias}),
    ),
    modules={
        "gpt_neox.embed_in": "embed",
        "gpt_neox.final_layer_norm": "norm",
        "embed_out": "head",
        f"{LAYER}.input_layernorm": "layers/attention_norm",
        f"{LAYER}.attention.query_key_value": Fused(("layers/attention/query", "layers/attention/key", "layers/attention/value"), "groups"),
        f"{LAYER}.attention.dense": "layers/attention/output",
        f"{LAYER}.post_attention_layernorm": "layers/feedforward_norm",
        f"{LAYER}.mlp.dense_h_to_4h": "layers/feedforward/up",
        f"{LAYER}.mlp.dense_4h_to_h": "layers/feedforward/down",
    },
    prefixes=("gpt_neox.",),
    leftover=("*.attention.bias", "*.attention.masked_bias", "*rotary_emb.inv_freq"),
)
