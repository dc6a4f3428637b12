"""GLM-4 (GLM Team, 2024): as transformers first had it, `model_type` glm, and with more norms, glm4."""

from dataclasses import replace

from lmx.interop.families.common import GATE_UP, INV_FREQ, LLAMA_MODULES, rope, without
from lmx.interop.families.llama import fields
from lmx.interop.family import Family, Field

DEFAULTS = {
    "vocab_size": 151552,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
}

GLM = Family(
    model_type="glm",
    architecture="GlmForCausalLM",
    fields=(*fields(**DEFAULTS), Field("attention_bias", "projection_bias", True)),
    settings={"rope_interleaved": True},
    more=(rope(partial=0.5),),
    modules=without(LLAMA_MODULES, "gate_proj", "up_proj") | GATE_UP,
    leftover=INV_FREQ,
)
GLM4 = replace(
    GLM,
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    settings=GLM.settings | {"norm_placement": "sandwich"},
    modules=GLM.modules
    | {
        "model.layers.{}.post_self_attn_layernorm": "layers/attention_norm_post",
        "model.layers.{}.post_mlp_layernorm": "layers/feedforward_norm_post",
    },
)
