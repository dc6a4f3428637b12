"""GPT-J (Wang and Komatsuzaki, 2021)."""

from lmx.interop.family import ACTIVATIONS, Family, Field

LAYER = "transformer.h.{}"


def turned(reader, ours):
    """How many dimensions turn. Transformers makes nothing sensible of none."""
    dims, size = reader.take("rotary_dim", 64), ours["embed"] // ours["heads"]
    if not dims:
        raise reader.refused("rotary_dim", dims, f"a number up to {size}")
    return {} if dims == size else {"rope_dims": dims}


GPTJ = Family(
    model_type="gptj",
    architecture="GPTJForCausalLM",
    fields=(
        Field("vocab_size", "vocab", 50400),
        Field("n_embd", "embed", 4096),
        Field("n_layer", "layers", 28),
        Field("n_head", "heads", 16),
        Field("n_inner", "mlp", None),
        Field("n_positions", "context", 2048),
        Field("layer_norm_epsilon", "norm_epsilon", 1e-5),
        Field("activation_function", "activation", "gelu_new", ACTIVATIONS),
        Field("tie_word_embeddings", "tied", False),
    ),
    settings={
        "norm": "layernorm",
        "gated": False,
        "parallel": True,
        "rope_interleaved": True,
        "bias": True,
        "projection_bias": False,
        "output_bias": False,
        "head_bias": True,
    },
    expected={"scale_attn_weights": True},
    ignored=("summary_*", "gradient_checkpointing", "rotary", "n_ctx"),
    more=((turned, lambda config: {"rotary_dim": config.rope_size}),),
    modules={
        "transformer.wte": "embed",
        "transformer.ln_f": "norm",
        "lm_head": "head",
        f"{LAYER}.ln_1": "layers/attention_norm",
        f"{LAYER}.attn.q_proj": "layers/attention/query",
        f"{LAYER}.attn.k_proj": "layers/attention/key",
        f"{LAYER}.attn.v_proj": "layers/attention/value",
        f"{LAYER}.attn.out_proj": "layers/attention/output",
        f"{LAYER}.mlp.fc_in": "layers/feedforward/up",
        f"{LAYER}.mlp.fc_out": "layers/feedforward/down",
    },
    leftover=("*h.*.attn.bias", "*h.*.attn.masked_bias"),
)
