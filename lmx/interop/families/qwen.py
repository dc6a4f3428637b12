"""Qwen 2, 2-MoE and 3 (Qwen Team, 2024; 2025)."""

from collections.abc import Callable

from lmx.interop.families.common import BIASES, INV_FREQ, LLAMA_MODULES, QK_NORMS, layer_types, named_kinds, rope, shortest
from lmx.interop.families.llama import fields
from lmx.interop.family import Family, Field, Reader
from lmx.models.config import Transformer, is_mixture

MLP = "model.layers.{}.mlp"
DEFAULTS = {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768}
DEFAULTS_MOE = DEFAULTS | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}


def windows(local: Callable[[int, int], bool]):
    """Which layers have the window: those that `layer_types` names, else those of which `local(layer, max_window_layers)` holds."""

    def to_ours(reader: Reader, ours: dict) -> dict:
        used, window = reader.take("use_sliding_window", False), reader.take("sliding_window", 4096)
        border, kinds = reader.take("max_window_layers", 28), reader.take("layer_types", None)
        layers = range(ours["layers"])
        used = bool(used and window)
        kinds = kinds or ["sliding_attention" if used and local(i, border) else "full_attention" for i in layers]
        pattern = named_kinds(reader, kinds, ours["layers"])
        if "local" in pattern and not used:
            raise reader.refused("layer_types", kinds, "full_attention alone where use_sliding_window is false")
        return {"pattern": shortest(pattern)} | ({"window": window} if "local" in pattern else {})

    def to_theirs(config: Transformer) -> dict:
        return {"use_sliding_window": config.window is not None, "sliding_window": config.window, "layer_types": layer_types(config)}

    return to_ours, to_theirs


def dense_to_ours(reader: Reader, ours: dict) -> dict:
    """Which layers are no mixtures."""
    step, dense = reader.take("decoder_sparse_step", 1), reader.take("mlp_only_layers", None) or []
    pattern = ours["pattern"]
    kinds = [pattern[i % len(pattern)] + ("_dense" if i in dense or (i + 1) % step else "") for i in range(ours["layers"])]
    return {"pattern": shortest(kinds)}


def dense_to_theirs(config: Transformer) -> dict:
    dense = [i for i in range(config.layers) if not is_mixture(config, config.pattern[i % len(config.pattern)])]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=fields(**DEFAULTS),
    settings={"projection_bias": True},
    more=(rope(), windows(lambda layer, border: layer >= border)),
    modules=LLAMA_MODULES,
    leftover=INV_FREQ,
)
QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=fields(**DEFAULTS, head_dim=128),
    settings={"qk_norm": True},
    more=(rope(), BIASES, windows(lambda layer, border: layer >= border)),
    modules=LLAMA_MODULES | QK_NORMS,
    leftover=INV_FREQ,
)
QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    fields=(
        *fields(**DEFAULTS_MOE),
        Field("num_experts", "experts", 60),
        Field("num_experts_per_tok", "experts_per_token", 4),
        Field("moe_intermediate_size", "expert_mlp", 1408),
        Field("shared_expert_intermediate_size", "shared_mlp", 5632),
        Field("norm_topk_prob", "renormalize_experts", False),
        Field("qkv_bias", "projection_bias", True),
    ),
    settings={"shared_experts": 1, "shared_gate": True},
    ignored=("router_aux_loss_coef", "output_router_logits"),
    more=(rope(), windows(lambda layer, border: layer % 2 == 0 and layer < border), (dense_to_ours, dense_to_theirs)),
    modules=LLAMA_MODULES
    | {
        f"{MLP}.gate": "layers/experts/router",
        f"{MLP}.experts.{{expert}}.gate_proj": "layers/experts/gate",
        f"{MLP}.experts.{{expert}}.up_proj": "layers/experts/up",
        f"{MLP}.experts.{{expert}}.down_proj": "layers/experts/down",
        f"{MLP}.shared_expert.gate_proj": "layers/experts/shared/gate",
        f"{MLP}.shared_expert.up_proj": "layers/experts/shared/up",
        f"{MLP}.shared_expert.down_proj": "layers/experts/shared/down",
        f"{MLP}.shared_expert_gate": "layers/experts/shared_gate",
    },
    leftover=INV_FREQ,
)
