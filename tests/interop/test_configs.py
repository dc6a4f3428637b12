"""config.json of published checkpoints, most of them older than today's transformers, and what is refused."""

import pytest

from lmx.interop.families import FAMILIES
from lmx.models import config as model_config
from lmx.models.rope import RopeScaling

COMMON = {
    "architectures": ["A"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": [2, 3], "initializer_range": 0.02,
    "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True,
}  # fmt: skip
LLAMA = COMMON | {
    "hidden_act": "silu", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
}  # fmt: skip
NEOX = COMMON | {
    "hidden_act": "gelu", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 50, "max_position_embeddings": 64, "layer_norm_eps": 1e-5,
}  # fmt: skip
FALCON = COMMON | {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50, "layer_norm_epsilon": 1e-5}
SLIDING, FULL = "sliding_attention", "full_attention"
PUBLISHED = {
    "qwen2": ("qwen2", LLAMA | {"rope_theta": 1e6, "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 3},
              {"rope_theta": 1e6, "projection_bias": True, "output_bias": None, "window": None, "pattern": ("global",)}),
    "qwen2, window": ("qwen2", LLAMA | {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3},
                      {"window": 8, "pattern": ("global", "global", "global", "local")}),
    "qwen2, long": ("qwen2", LLAMA | {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 16, "type": "yarn"}},
                    {"rope_scaling": RopeScaling("yarn", 4.0, 16)}),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 16, "attention_bias": False}, {"qk_norm": True, "head_dim": 16, "projection_bias": False}),
    "qwen2_moe": ("qwen2_moe", LLAMA | {"decoder_sparse_step": 2, "mlp_only_layers": [1], "moe_intermediate_size": 8, "num_experts": 4,
                  "num_experts_per_tok": 2, "norm_topk_prob": False, "shared_expert_intermediate_size": 12, "router_aux_loss_coef": 0.001,
                  "sliding_window": 32768, "use_sliding_window": False, "output_router_logits": False},
                  {"pattern": ("global_dense", "global_dense", "global_dense", "global"), "shared_mlp": 12, "shared_gate": True,
                   "expert_mlp": 8, "renormalize_experts": False}),
    "gemma3": ("gemma3_text", {name: value for name, value in LLAMA.items() if name != "hidden_act"} | {
                   "hidden_activation": "gelu_pytorch_tanh", "head_dim": 8, "num_hidden_layers": 8, "sliding_window": 16,
                   "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 10000, "query_pre_attn_scalar": 16,
                   "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "attn_logit_softcapping": None,
                   "final_logit_softcapping": None, "cache_implementation": "hybrid"},
               {"pattern": (*["local"] * 5, "global"), "window": 16, "rope_theta": 1e6, "local_rope_theta": 1e4,
                "rope_scaling": RopeScaling("linear", 8.0), "attention_scale": 0.25, "qk_norm": True, "norm_offset": True}),
    "gemma3, global alone": ("gemma3_text", {"layer_types": [FULL] * 26}, {"pattern": ("global",), "window": None}),
    "phi3": ("phi3", LLAMA | {"original_max_position_embeddings": 16, "sliding_window": 262144, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
             "rope_scaling": {"type": "su", "short_factor": [1.0, 2.0, 3.0], "long_factor": [4.0, 5.0, 6.0]}},
             {"rope_scaling": RopeScaling("longrope", 4.0, 16, short_factors=(1.0, 2.0, 3.0), long_factors=(4.0, 5.0, 6.0))}),
    "phi4-mini": ("phi3", LLAMA | {"partial_rotary_factor": 0.75, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False,
                  "sliding_window": None, "tie_word_embeddings": True}, {"rope_dims": 4, "tied": True}),
    "gpt_neox": ("gpt_neox", NEOX | {"rotary_pct": 0.25, "rotary_emb_base": 500, "use_parallel_residual": True},
                 {"rope_dims": 4, "rope_theta": 500.0, "parallel": True, "parallel_norms": True, "tied": False}),
    "gptj": ("gptj", COMMON | {"n_embd": 32, "n_head": 2, "n_inner": None, "n_layer": 2, "rotary": True, "rotary_dim": 8, "vocab_size": 50,
             "n_positions": 64, "scale_attn_weights": True, "summary_type": "cls_index", "embd_pdrop": 0.0},
             {"rope_dims": 8, "rope_interleaved": True, "head_bias": True, "parallel": True, "projection_bias": False}),
    "falcon-7b": ("falcon", FALCON | {"alibi": False, "bias": False, "multi_query": True, "new_decoder_architecture": False,
                  "parallel_attn": True, "apply_residual_connection_post_layernorm": False},
                  {"kv_heads": 1, "parallel": True, "parallel_norms": False, "positions": "rope", "mlp_bias": False, "bias": True}),
    "falcon-40b": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
                   {"kv_heads": 2, "parallel": True, "parallel_norms": True, "tied": True}),
    "falcon-11b": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "ff_factor": 4,
                   "ffn_hidden_size": 96, "rope_theta": 500042.0, "rope_scaling": None},
                   {"kv_heads": 2, "parallel_norms": False, "rope_theta": 500042.0, "mlp": 96}),
    "falcon-rw": ("falcon", FALCON | {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False},
                  {"kv_heads": 4, "parallel": False, "positions": "alibi", "alibi_scaled": True, "mlp_bias": True}),
    "olmo2": ("olmo2", LLAMA | {"rope_theta": 5e5, "rope_scaling": None, "attention_bias": False},
              {"norm_placement": "output", "qk_norm_joint": True, "rope_theta": 5e5}),
    "glm4": ("glm4", LLAMA | {"head_dim": 8, "attention_bias": True, "partial_rotary_factor": 0.5},
             {"norm_placement": "sandwich", "rope_dims": 4, "rope_interleaved": True, "projection_bias": True}),
    "stablelm": ("stablelm", NEOX | {"hidden_act": "silu", "num_key_value_heads": 2, "rope_theta": 10000, "partial_rotary_factor": 0.25,
                 "use_qkv_bias": True, "qk_layernorm": False, "use_parallel_residual": False},
                 {"rope_dims": 4, "projection_bias": True, "mlp_bias": False, "norm": "layernorm"}),
    "cohere": ("cohere", NEOX | {"hidden_act": "silu", "logit_scale": 0.25, "rope_theta": 8e6, "model_max_length": 131072,
               "use_qk_norm": False, "attention_bias": False},
               {"logit_scale": 0.25, "rope_theta": 8e6, "rope_interleaved": True, "parallel": True, "tied": True, "bias": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_and_said_again(name):
    kind, theirs, expected = PUBLISHED[name]
    found = FAMILIES[kind].read(theirs)
    model_config.check(found)
    assert {setting: getattr(found, setting) for setting in expected} == expected
    assert FAMILIES[kind].read(FAMILIES[kind].write(found)) == found


@pytest.mark.parametrize(
    ("kind", "theirs", "message"),
    [
        ("qwen2", LLAMA | {"layer_types": [SLIDING] * 4}, "layer_types=.*full_attention alone where use_sliding_window is false"),
        ("qwen2", LLAMA | {"layer_types": ["linear_attention"] * 4}, "layer_types=.'linear_attention'.*sliding_attention and full_attention"),
        ("qwen3", LLAMA | {"use_sliding_window": True, "layer_types": [FULL] * 3}, "layer_types=.*one for each of 4 layers"),
        ("qwen2", LLAMA | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]}}, "rope_type='mrope' .*known is one of default"),
        ("gemma3_text", {"rope_parameters": {FULL: {}, SLIDING: {"rope_type": "linear", "factor": 2.0}}}, "of sliding_attention="),
        ("gemma3_text", {"rope_parameters": {"chunked_attention": {}}}, "chunked_attention"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("phi3", LLAMA | {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0],
                                           "original_max_position_embeddings": 16}}, "original_max_position_embeddings=4096"),
        ("phi3", LLAMA | {"lm_head_bias": True}, "lm_head_bias=True"),
        ("gptj", {"rotary_dim": None}, "rotary_dim=None of a gptj is not supported; known is a number up to 256"),
        ("falcon", FALCON | {"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn=False"),
        ("falcon", FALCON | {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2"),
        ("stablelm", NEOX | {"qk_layernorm": True}, "qk_layernorm=True"),
        ("cohere", NEOX | {"use_qk_norm": True}, "use_qk_norm=True"),
        ("llama", LLAMA | {"rms_norm_eps": "1e-6"}, "says '1e-6' for model.norm_epsilon, which is float"),
        ("llama", LLAMA | {"num_hidden_layers": 2.5}, "says 2.5 for model.layers, which is int"),
        ("llama", LLAMA | {"rms_norm_eps": float("inf")}, "says inf for model.norm_epsilon"),
        ("llama", LLAMA | {"tie_word_embeddings": "no"}, "says 'no' for model.tied, which is bool"),
        ("llama", LLAMA | {"rope_theta": "1e4"}, "says '1e4' for model.rope_theta, which is float"),
        ("llama", LLAMA | {"rope_scaling": "linear"}, "rope_scaling='linear' .*known is settings by name"),
        ("llama", LLAMA | {"rope_scaling": {"type": "linear"}}, "factor=None of a llama .*known is a number"),
        ("llama", LLAMA | {"rope_scaling": {"type": "linear", "factor": float("inf")}}, "says inf for model.rope_scaling.factor"),
        ("llama", LLAMA | {"rope_scaling": {"type": "yarn", "factor": 4, "truncate": "no"}}, "'no' for model.rope_scaling.truncate, which is bool"),
        ("llama", LLAMA | {"rope_scaling": {"type": "yarn", "factor": 4, "attention_factor": "x"}}, "'x' for model.rope_scaling.attention"),
        ("llama", LLAMA | {"rope_scaling": {"type": "longrope", "short_factor": [1.0, "a"], "long_factor": [1.0, 1.0]}},
         "says 'a' for model.rope_scaling.short_factors, which is float"),
        ("phi3", LLAMA | {"partial_rotary_factor": "x"}, "partial_rotary_factor='x' .*known is a number up to 1"),
    ],
)  # fmt: skip
def test_what_a_family_has_no_place_for_is_refused_by_name(kind, theirs, message):
    with pytest.raises(ValueError, match=message):
        FAMILIES[kind].read(theirs)
