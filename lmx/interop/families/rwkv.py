"""RWKV-4 (Peng et al., 2023)."""

from lmx.interop.family import Family, Field
from lmx.models import config

BLOCK = "rwkv.blocks.{}"
MIXED = (("attention", "attention", ("key", "value", "receptance")), ("feed_forward", "feedforward", ("key", "receptance")))


def rescale(reader, _):
    return {"rescale_every": max(reader.take("rescale_every", 6), 0)}


RWKV = Family(
    model_type="rwkv",
    architecture="RwkvForCausalLM",
    kind=config.RWKV,
    fields=(
        Field("vocab_size", "vocab", 50277),
        Field("hidden_size", "embed", 4096),
        Field("attention_hidden_size", "channels", None),
        Field("intermediate_size", "mlp", None),
        Field("num_hidden_layers", "layers", 32),
        Field("context_length", "context", 1024),
        Field("layer_norm_epsilon", "norm_epsilon", 1e-5),
        Field("tie_word_embeddings", "tied", False),
    ),
    more=((rescale, lambda ours: {"rescale_every": ours.rescale_every}),),
    modules={
        "rwkv.embeddings": "embed",
        "rwkv.blocks.0.pre_ln": "embed_norm",
        "rwkv.ln_out": "norm",
        "head": "head",
        f"{BLOCK}.ln1": "layers/attention_norm",
        f"{BLOCK}.ln2": "layers/feedforward_norm",
        f"{BLOCK}.attention.output": "layers/attention/output",
        f"{BLOCK}.feed_forward.value": "layers/feedforward/value",
    }
    | {f"{BLOCK}.{theirs}.{name}": f"layers/{ours}/{name}" for theirs, ours, names in MIXED for name in names},
    tensors={f"{BLOCK}.{theirs}.time_mix_{name}": (f"layers/{ours}/shift/{name}", 2) for theirs, ours, names in MIXED for name in names}
    | {
        f"{BLOCK}.attention.time_decay": ("layers/attention/time/decay", 0),
        f"{BLOCK}.attention.time_first": ("layers/attention/time/bonus", 0),
    },
    prefixes=("rwkv.",),
)
