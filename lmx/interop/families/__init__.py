"""The families, one table each: a new one is a new file and a line here."""

from lmx.interop.families import (
    albert,
    bart,
    bert,
    bloom,
    clip,
    cohere,
    distilbert,
    electra,
    falcon,
    gemma,
    glm,
    gpt2,
    gpt_neox,
    gptj,
    llama,
    llava,
    mistral,
    mixtral,
    olmo2,
    opt,
    phi3,
    qwen,
    roberta,
    rwkv,
    rwkv7,
    stablelm,
    t5,
    vit,
)
from lmx.interop.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(albert.ALBERT, bert.BERT, distilbert.DISTILBERT, electra.ELECTRA, roberta.CAMEMBERT, roberta.ROBERTA, roberta.XLM_ROBERTA),
        *(bloom.BLOOM, falcon.FALCON, gemma.GEMMA, gemma.GEMMA2, gemma.GEMMA3, glm.GLM, glm.GLM4, gpt2.GPT2, gpt_neox.GPT_NEOX, gptj.GPTJ),
        *(llama.LLAMA, mistral.MISTRAL, mixtral.MIXTRAL, olmo2.OLMO2, opt.OPT, phi3.PHI3, qwen.QWEN2, qwen.QWEN2_MOE, qwen.QWEN3),
        *(stablelm.STABLELM, cohere.COHERE, rwkv.RWKV, rwkv.RWKV5, rwkv.RWKV6, rwkv7.RWKV7),
        *(bart.BART, t5.T5, t5.MT5),
        *(vit.VIT, clip.CLIP, clip.TEXT, clip.VISION, llava.LLAVA),
    )
}
"""By `model_type`."""
