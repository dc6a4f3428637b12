"""Gemma 1, 2 and the text of 3 (Gemma Team, 2024; 2025)."""

from dataclasses import replace

from lmx.interop.families.common import (
    INV_FREQ,
    KINDS,
    LLAMA_MODULES,
    QK_NORMS,
    layer_types,
    named_kinds,
    rope,
    rope_to_ours,
    rope_to_theirs,
    shortest,
)
from lmx.interop.families.llama import fields
from lmx.interop.family import Family, Reader

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


def capped(period, scores, logits):
    """What reads scores' scale and caps, and which layers have the window: all but every `period`th, unless `layer_types` says."""

    def read(reader, ours):
        scale = reader.take("query_pre_attn_scalar", 256) ** -0.5
        named = [reader.take(name, None) for name in ("sliding_window_pattern", "_sliding_window_pattern")]
        every = named[0] or named[1] or period
        usual = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(ours["layers"])]
        pattern = shortest(named_kinds(reader, reader.take("layer_types", None) or usual, ours["layers"]))
        width = reader.take("sliding_window", 4096)
        window = {"window": width} if "local" in pattern else {}
        capped = reader.take("attn_logit_softcapping", scores)
        caps = {
            "attention_softcap": None if scores is None else capped,  # of Gemma 3 transformers has the field and never reads it
            "logit_softcap": reader.take("final_logit_softcapping", logits),
        }
        return {"attention_scale": scale, "pattern": pattern, **window, **caps}

    return read


def said_capped(config):
    scalar = config.attention_scale**-2
    return {
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        "layer_types": layer_types(config),
        "sliding_window": config.window or 4096,  # transformers makes the mask even where no layer reads it
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


def ropes(reader, ours):
    """RoPE of global layers, perhaps scaled, and of local ones, in `rope_parameters` by kind or in the fields before it."""
    by_kind = reader.take("rope_parameters", None) or {}
    wide, narrow = (dict(by_kind.get(name) or {}) for name in ("full_attention", "sliding_attention"))
    if unknown := set(by_kind) - set(KINDS):
        raise reader.refused("rope_parameters", sorted(unknown), " and ".join(KINDS))
    wide = (reader.take("rope_scaling", None) or {}) | wide
    wide.setdefault("rope_theta", reader.take("rope_theta", 1_000_000.0))
    narrow.setdefault("rope_theta", reader.take("rope_local_base_freq", 10_000.0))
    reader.take("rope_theta", None), reader.take("rope_local_base_freq", None)
    found, local = (rope_to_ours()(Reader({"rope_parameters": one}, "gemma3_text"), ours) for one in (wide, narrow))
    if set(local) != {"rope_theta"}:
        raise reader.refused("rope_parameters of sliding_attention", narrow, "rope_theta with rope_type default")
    return found | {"local_rope_theta": local["rope_theta"]}


def said_ropes(config):
    local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
    return {"rope_parameters": {"full_attention": rope_to_theirs(config)["rope_parameters"], "sliding_attention": local}}


GEMMA = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    fields=fields(without=("hidden_act",), **DEFAULTS),
    settings=SETTINGS,
    expected={"attention_bias": False, "use_bidirectional_attention": (None, False)},
    more=(rope(), (activation, lambda config: {"hidden_act": {v: k for k, v in GELU.items()}[config.activation]})),
    modules=LLAMA_MODULES,
    leftover=INV_FREQ,
)
GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    fields=fields(without=("hidden_act",), **DEFAULTS2),
    settings=SETTINGS | {"norm_placement": "sandwich"},
    expected={"attention_bias": False, "use_bidirectional_attention": (None, False)},
    ignored=("cache_implementation",),
    more=(
        rope(),
        (activation, lambda config: {"hidden_activation": {v: k for k, v in GELU.items()}[config.activation]}),
        (capped(2, 50.0, 30.0), said_capped),
    ),
    modules=LLAMA_MODULES
    | {
        "model.layers.{}.post_attention_layernorm": "layers/attention_norm_post",
        "model.layers.{}.pre_feedforward_layernorm": "layers/feedforward_norm",
        "model.layers.{}.post_feedforward_layernorm": "layers/feedforward_norm_post",
    },
    leftover=INV_FREQ,
)
GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    fields=fields(without=("hidden_act",), **DEFAULTS2 | {"vocab_size": 262208, "max_position_embeddings": 131072}),
    settings=GEMMA2.settings | {"qk_norm": True},
    more=((ropes, said_ropes), GEMMA2.more[1], (capped(6, None, None), said_capped)),
    modules=GEMMA2.modules | QK_NORMS,
)
