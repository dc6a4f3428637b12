"""Mistral (Jiang et al., 2023)."""

from dataclasses import replace

from lmx.interop.families.common import INV_FREQ, LLAMA_MODULES, WINDOW, rope
from lmx.interop.families.llama import FIELDS
from lmx.interop.family import Family

DEFAULTS = {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 4096 * 32}

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    fields=tuple(replace(one, default=DEFAULTS.get(one.theirs, one.default)) for one in FIELDS),
    more=(rope(), WINDOW),
    modules=LLAMA_MODULES,
    leftover=INV_FREQ,
)
