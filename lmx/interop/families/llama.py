"""Llama 1 to 3 (Touvron et al., 2023; Grattafiori et al., 2024)."""

from dataclasses import replace

from lmx.interop.families.common import INV_FREQ, LLAMA_MODULES, rope
from lmx.interop.family import ACTIVATIONS, Family, Field

FIELDS = (
    Field("vocab_size", "vocab", 32000),
    Field("hidden_size", "embed", 4096),
    Field("intermediate_size", "mlp", 11008),
    Field("num_hidden_layers", "layers", 32),
    Field("num_attention_heads", "heads", 32),
    Field("num_key_value_heads", "kv_heads", None),
    Field("head_dim", "head_dim", None),
    Field("max_position_embeddings", "context", 2048),
    Field("rms_norm_eps", "norm_epsilon", 1e-6),
    Field("hidden_act", "activation", "silu", ACTIVATIONS),
    Field("tie_word_embeddings", "tied", False),
)
"""Of Llama, and of most that came after it."""


def fields(*, without: tuple[str, ...] = (), **defaults) -> tuple[Field, ...]:
    """These, with other defaults, less some."""
    return tuple(replace(one, default=defaults.get(one.theirs, one.default)) for one in FIELDS if one.theirs not in without)


def biases(reader, _):
    both = reader.take("attention_bias", False)
    return {"projection_bias": both, "output_bias": both, "mlp_bias": reader.take("mlp_bias", False)}


def said_biases(config):
    return {"attention_bias": config.projection_bias, "mlp_bias": config.mlp_bias}


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fields=FIELDS,
    more=(rope(), (biases, said_biases)),
    modules=LLAMA_MODULES,
    leftover=INV_FREQ,
)
