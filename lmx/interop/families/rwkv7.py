"""RWKV-7 (Peng et al., 2025), as flash-linear-attention has it (`fla-hub`'s checkpoints)."""

from lmx.interop.family import Family, Field
from lmx.models import config

LAYER = "model.layers.{}"
PROJECTED = {"r_proj": "receptance", "k_proj": "key", "v_proj": "value", "o_proj": "output", "g_norm": "norm"}
LETTERS = {"receptance": "r", "decay": "w", "key": "k", "value": "v", "rate": "a", "gate": "g"}
LOW_RANK = {"w_lora": "decay", "a_lora": "rate", "v_lora": "first", "g_lora": "gate"}


def width(reader, ours):
    """Of the hidden layer: intermediate_size, else hidden_ratio times the width, as a multiple of 32."""
    given, ratio = reader.take("intermediate_size", None), reader.take("hidden_ratio", 4)
    wanted = given or -(-int(ours["embed"] * (ratio or 4)) // 32) * 32
    return {"mlp": None if wanted == 4 * ours["embed"] else wanted}


def width_back(ours):
    return {"intermediate_size": ours.hidden, "hidden_ratio": ours.hidden / ours.embed}


def heads(reader, ours):
    """Values are as wide as keys, and a head's norm has an epsilon for each of its channels."""
    value = reader.take("value_dim", None)
    if value is not None and set(value if isinstance(value, list) else [value]) != {ours["embed"]}:
        raise reader.refused("value_dim", value, f"hidden_size={ours['embed']} in every layer")
    return {"head_norm_epsilon": round(ours["head_dim"] * ours["norm_epsilon"], 12)}


RWKV7 = Family(
    model_type="rwkv7",
    architecture="RWKV7ForCausalLM",
    kind=config.RWKV,
    settings={"version": 7},
    fields=(
        Field("vocab_size", "vocab", 32000),
        Field("hidden_size", "embed", 2048),
        Field("num_hidden_layers", "layers", 24),
        Field("head_dim", "head_dim", 64),
        Field("decay_low_rank_dim", "decay_rank", 64),
        Field("a_low_rank_dim", "rate_rank", 64),
        Field("v_low_rank_dim", "value_rank", 16),
        Field("gate_low_rank_dim", "gate_rank", 128),
        Field("max_position_embeddings", "context", 2048),
        Field("norm_eps", "norm_epsilon", 1e-5),
        Field("norm_eps", "final_norm_epsilon", 1e-5),
        Field("tie_word_embeddings", "tied", False),
    ),
    expected={"norm_first": True, "norm_bias": True, "hidden_act": "sqrelu", "attn": None},
    ignored=("attn_mode", "fuse_*", "num_heads", "use_l2warp"),
    more=((width, width_back), (heads, lambda ours: {"value_dim": [ours.embed] * ours.layers})),
    modules={
        "model.embeddings": "embed",
        "model.layers.0.pre_norm": "embed_norm",
        "model.norm": "norm",
        "lm_head": "head",
        f"{LAYER}.attn_norm": "layers/attention_norm",
        f"{LAYER}.ffn_norm": "layers/feedforward_norm",
        f"{LAYER}.ffn.key": "layers/feedforward/key",
        f"{LAYER}.ffn.value": "layers/feedforward/value",
    }
    | {f"{LAYER}.attn.{theirs}": f"layers/attention/{ours}" for theirs, ours in PROJECTED.items()}
    | {f"{LAYER}.attn.{theirs}.lora.0": f"layers/attention/{ours}/down" for theirs, ours in LOW_RANK.items()}
    | {f"{LAYER}.attn.{theirs}.lora.2": f"layers/attention/{ours}/up" for theirs, ours in LOW_RANK.items()},
    tensors={f"{LAYER}.attn.x_{letter}": (f"layers/attention/shift/{name}", 2) for name, letter in LETTERS.items()}
    | {
        f"{LAYER}.attn.k_k": ("layers/attention/keys/place", 0),
        f"{LAYER}.attn.k_a": ("layers/attention/keys/rate", 0),
        f"{LAYER}.attn.r_k": ("layers/attention/keys/bonus", 0),
        f"{LAYER}.ffn.x_k": ("layers/feedforward/shift/key", 0),
    },
    unread=("model.layers.0.attn.v_lora.*",),
)
