"""Phi-3 and the models that followed it (Abdin et al., 2024)."""

from lmx.interop.families.common import GATE_UP, INV_FREQ, LLAMA_MODULES, WINDOW, rope, without
from lmx.interop.families.llama import fields
from lmx.interop.family import Family, Fused

ORIGINAL = "original_max_position_embeddings"


def original(reader, ours):
    """Transformers takes the context of training from outside of `rope_parameters`, whatever is inside."""
    scaling, said = ours.get("rope_scaling"), reader.take(ORIGINAL, 4096)
    if scaling is not None and scaling.original_context != said:
        raise reader.refused(ORIGINAL, said, f"that of rope_parameters, {scaling.original_context}")
    return {}


PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    fields=fields(vocab_size=32064, hidden_size=3072, intermediate_size=8192, max_position_embeddings=4096, rms_norm_eps=1e-5),
    expected={"lm_head_bias": False, "mlp_bias": False, "attention_bias": False},
    ignored=("full_attn_mod", "interpolate_factor"),
    more=(
        rope(),
        (original, lambda config: {ORIGINAL: config.rope_scaling.original_context} if config.rope_scaling else {}),
        WINDOW,
    ),
    modules=without(LLAMA_MODULES, "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    | GATE_UP
    | {"model.layers.{}.self_attn.qkv_proj": Fused(("layers/attention/query", "layers/attention/key", "layers/attention/value"))},
    leftover=INV_FREQ,
)
