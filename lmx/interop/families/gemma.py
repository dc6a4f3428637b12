"""Gemma 1 and 2 (Gemma Team, 2024)."""

from dataclasses import replace

from lmx.interop.families.common import INV_FREQ, LLAMA_MODULES, rope, shortest
from lmx.interop.families.llama import FIELDS
from lmx.interop.family import Family

DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
DEFAULTS2 = DEFAULTS | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
SETTINGS = {"norm_offset": True, "embed_scale": True, "gated": True}
GELU = {"gelu_pytorch_tanh": "gelu_tanh"}


def activation(reader, _):
    """Old files say `hidden_act` "gelu" and have always been run with the tanh form."""
    said = reader.take("hidden_activation", None) or reader.take("hidden_act", "gelu_pytorch_tanh")
    reader.take("hidden_act", None)
    if said not in ("gelu", "gelu_pytorch_tanh"):
        raise reader.refused("hidden_activation", said, "gelu_pytorch_tanh")
    return {"activation": "gelu_tanh"}


def capped(reader, ours):
    """Scores' scale and caps, and which layers have the window: every other one from the first, unless `layer_types` says."""
    scale = reader.take("query_pre_attn_scalar", 256) ** -0.5
    kinds = reader.take("layer_types", None) or ["sliding_attention", "full_attention"] * -(-ours["layers"] // 2)
    names = {"sliding_attention": "local", "full_attention": "global"}
    pattern = shortest([names[kind] for kind in kinds[: ours["layers"]]])
    window = {"window": reader.take("sliding_window", 4096)} if "local" in pattern else {}
    caps = {"attention_softcap": reader.take("attn_logit_softcapping", 50.0), "logit_softcap": reader.take("final_logit_softcapping", 30.0)}
    return {"attention_scale": scale, "pattern": pattern, **window, **caps}


def said_capped(config):
    names = {"local": "sliding_attention", "global": "full_attention"}
    kinds = [names[config.pattern[i % len(config.pattern)]] for i in range(config.layers)]
    scalar = config.attention_scale**-2
    return {
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        "layer_types": kinds,
        "sliding_window": config.window,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


def fields(defaults):
    plain = (one for one in FIELDS if one.theirs != "hidden_act")
    return tuple(replace(one, default=defaults.get(one.theirs, one.default)) for one in plain)


GEMMA = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    fields=fields(DEFAULTS),
    settings=SETTINGS,
    expected={"attention_bias": False, "use_bidirectional_attention": (None, False)},
    more=(rope(), (activation, lambda config: {"hidden_act": {v: k for k, v in GELU.items()}[config.activation]})),
    modules=LLAMA_MODULES,
    leftover=INV_FREQ,
)
GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    fields=fields(DEFAULTS2),
    settings=SETTINGS | {"norm_placement": "sandwich"},
    expected={"attention_bias": False, "use_bidirectional_attention": (None, False)},
    ignored=("cache_implementation",),
    more=(
        rope(),
        (activation, lambda config: {"hidden_activation": {v: k for k, v in GELU.items()}[config.activation]}),
        (capped, said_capped),
    ),
    modules=LLAMA_MODULES
    | {
        "model.layers.{}.post_attention_layernorm": "layers/attention_norm_post",
        "model.layers.{}.pre_feedforward_layernorm": "layers/feedforward_norm",
        "model.layers.{}.post_feedforward_layernorm": "layers/feedforward_norm_post",
    },
    leftover=INV_FREQ,
)
