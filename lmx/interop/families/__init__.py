"""The families, one table each: a new one is a new file and a line here."""

from lmx.interop.families import bloom, gemma, glm, gpt2, llama, mistral, mixtral, opt
from lmx.interop.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (bloom.BLOOM, gemma.GEMMA, gemma.GEMMA2, glm.GLM, gpt2.GPT2, llama.LLAMA, mistral.MISTRAL, mixtral.MIXTRAL, opt.OPT)
}
"""By `model_type`."""
