"""Mixtral (Jiang et al., 2024): Mistral with a mixture of experts in every layer."""

from lmx.interop.families.common import INV_FREQ, LLAMA_MODULES, WINDOW, rope
from lmx.interop.families.mistral import MISTRAL
from lmx.interop.family import Family, Field

EXPERTS = "model.layers.{}.block_sparse_moe"

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    fields=(*MISTRAL.fields, Field("num_local_experts", "experts", 8), Field("num_experts_per_tok", "experts_per_token", 2)),
    more=(rope(1e6), WINDOW),
    ignored=("router_aux_loss_coef", "output_router_logits", "router_jitter_noise"),
    modules={name: ours for name, ours in LLAMA_MODULES.items() if ".mlp." not in name}
    | {
        f"{EXPERTS}.gate": "layers/experts/router",
        f"{EXPERTS}.experts.{{expert}}.w1": "layers/experts/gate",
        f"{EXPERTS}.experts.{{expert}}.w3": "layers/experts/up",
        f"{EXPERTS}.experts.{{expert}}.w2": "layers/experts/down",
    },
    leftover=INV_FREQ,
)
