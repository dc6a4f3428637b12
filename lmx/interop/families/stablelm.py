"""StableLM 2 (Bellagente et al., 2024)."""

from lmx.interop.families.common import INV_FREQ, LLAMA_MODULES, rope
from lmx.interop.families.llama import fields
from lmx.interop.family import Family, Field

STABLELM = Family(
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    fields=(
        *fields(
            without=("rms_norm_eps", "head_dim"),
            vocab_size=50304,
            hidden_size=2560,
            intermediate_size=6912,
            num_key_value_heads=32,
            max_position_embeddings=4096,
        ),
        Field("layer_norm_eps", "norm_epsilon", 1e-5),
        Field("use_qkv_bias", "projection_bias", False),
        Field("use_parallel_residual", "parallel", False),
    ),
    settings={"norm": "layernorm", "bias": True, "output_bias": False, "mlp_bias": False},
    expected={"qk_layernorm": False},
    more=(rope(partial=0.25),),
    modules=LLAMA_MODULES,
    leftover=INV_FREQ,
)
