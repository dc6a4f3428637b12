"""OLMo 2 (OLMo Team, 2024)."""

from lmx.interop.families.common import BIASES, INV_FREQ, LLAMA_MODULES, QK_NORMS, rope, without
from lmx.interop.families.llama import fields
from lmx.interop.family import Family

OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    fields=fields(vocab_size=50304, rms_norm_eps=1e-5),
    settings={"norm_placement": "output", "qk_norm": True, "qk_norm_joint": True},
    more=(rope(), BIASES),
    modules=without(LLAMA_MODULES, "layernorm")
    | QK_NORMS
    | {
        "model.layers.{}.post_attention_layernorm": "layers/attention_norm_post",
        "model.layers.{}.post_feedforward_layernorm": "layers/feedforward_norm_post",
    },
    leftover=INV_FREQ,
)
