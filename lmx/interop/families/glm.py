"""GLM-4 as transformers first had it, `model_type` glm (GLM Team, 2024)."""

from dataclasses import replace

from lmx.interop.families.common import INV_FREQ, LLAMA_MODULES, rope
from lmx.interop.families.llama import FIELDS
from lmx.interop.family import Family, Field, Fused

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
    fields=(
        *(replace(one, default=DEFAULTS.get(one.theirs, one.default)) for one in FIELDS),
        Field("attention_bias", "projection_bias", True),
    ),
    settings={"rope_interleaved": True},
    more=(rope(partial=0.5),),
    modules={name: ours for name, ours in LLAMA_MODULES.items() if "gate_proj" not in name and "up_proj" not in name}
    | {"model.layers.{}.mlp.gate_up_proj": Fused(("layers/feedforward/gate", "layers/feedforward/up"))},
    leftover=INV_FREQ,
)
