"""Command R (Cohere, 2024)."""

from lmx.interop.families.common import BIASES, INV_FREQ, LLAMA_MODULES, rope, without
from lmx.interop.families.llama import fields
from lmx.interop.family import Family, Field

COHERE = Family(
    model_type="cohere",
    architecture="CohereForCausalLM",
    fields=(
        *fields(
            without=("rms_norm_eps",),
            vocab_size=256000,
            hidden_size=8192,
            intermediate_size=22528,
            num_hidden_layers=40,
            num_attention_heads=64,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        ),
        Field("layer_norm_eps", "norm_epsilon", 1e-5),
        Field("logit_scale", "logit_scale", 0.0625),
    ),
    settings={"norm": "layernorm", "parallel": True, "rope_interleaved": True},
    expected={"use_qk_norm": (False, None)},
    ignored=("model_max_length",),
    more=(rope(500_000.0), BIASES),
    modules=without(LLAMA_MODULES, "post_attention_layernorm"),
    leftover=INV_FREQ,
)
