"""RWKV-4 (Peng et al., 2023), which transformers has; and 5 and 6 (Peng et al., 2024), which come with their code."""

from lmx.interop.family import Family, Field
from lmx.models import config

BLOCK = "rwkv.blocks.{}"
MIXED = (("attention", "attention", ("key", "value", "receptance")), ("feed_forward", "feedforward", ("key", "receptance")))
LETTERS = {"base": "x", "decay": "w", "key": "k", "value": "v", "receptance": "r", "gate": "g"}
MODULES = {
    "rwkv.embeddings": "embed",
    "rwkv.blocks.0.pre_ln": "embed_norm",
    "rwkv.ln_out": "norm",
    "head": "head",
    f"{BLOCK}.ln1": "layers/attention_norm",
    f"{BLOCK}.ln2": "layers/feedforward_norm",
    f"{BLOCK}.attention.output": "layers/attention/output",
    f"{BLOCK}.feed_forward.value": "layers/feedforward/value",
} | {f"{BLOCK}.{theirs}.{name}": f"layers/{ours}/{name}" for theirs, ours, names in MIXED for name in names}
SHARES = {f"{BLOCK}.{theirs}.time_mix_{name}": (f"layers/{ours}/shift/{name}", 2) for theirs, ours, names in MIXED for name in names}
DECAY, BONUS = "layers/attention/time/decay", "layers/attention/time/bonus"
SIZES = (
    Field("attention_hidden_size", "channels", None),
    Field("intermediate_size", "mlp", None),
    Field("layer_norm_epsilon", "norm_epsilon", 1e-5),
    Field("tie_word_embeddings", "tied", False),
)


def rescale(reader, _):
    return {"rescale_every": max(reader.take("rescale_every", 6), 0)}


def divided(reader, _):
    """What heads read is divided by head_size_divisor before its norm, which is the same as a larger epsilon."""
    return {"head_norm_epsilon": round(1e-5 * reader.take("head_size_divisor", 8) ** 2, 12)}


def divisor(ours):
    return {"head_size_divisor": round((ours.head_norm_epsilon / 1e-5) ** 0.5)}


def ranks(_, ours):
    """They are no fields: their code has these numbers."""
    wide = ours["embed"] == 4096
    return {"mix_rank": 64 if wide else 32, "decay_rank": 128 if wide else 64}


RWKV = Family(
    model_type="rwkv",
    architecture="RwkvForCausalLM",
    kind=config.RWKV,
    fields=(
        *SIZES,
        Field("vocab_size", "vocab", 50277),
        Field("hidden_size", "embed", 4096),
        Field("num_hidden_layers", "layers", 32),
        Field("context_length", "context", 1024),
    ),
    more=((rescale, lambda ours: {"rescale_every": ours.rescale_every}),),
    modules=MODULES,
    tensors=SHARES | {f"{BLOCK}.attention.time_decay": (DECAY, 0), f"{BLOCK}.attention.time_first": (BONUS, 0)},
    prefixes=("rwkv.",),
)
WORLD = {
    "kind": config.RWKV,
    "fields": (
        *SIZES,
        Field("vocab_size", "vocab", 65536),
        Field("hidden_size", "embed", 768),
        Field("num_hidden_layers", "layers", 24),
        Field("head_size", "head_dim", 64),
        Field("context_length", "context", 4096),
    ),
    # Their code halves the stream in half precision alone.
    "ignored": ("rescale_every", "num_attention_heads"),
    "modules": MODULES | {f"{BLOCK}.attention.gate": "layers/attention/gate", f"{BLOCK}.attention.ln_x": "layers/attention/norm"},
    "prefixes": ("rwkv.",),
}
RWKV5 = Family(
    model_type="rwkv5",
    architecture="Rwkv5ForCausalLM",
    settings={"version": 5},
    more=((divided, divisor),),
    tensors=SHARES
    | {
        f"{BLOCK}.attention.time_mix_gate": ("layers/attention/shift/gate", 2),
        f"{BLOCK}.attention.time_decay": (DECAY, 0),
        f"{BLOCK}.attention.time_faaaa": (BONUS, 0),
    },
    **WORLD,
)
RWKV6 = Family(
    model_type="rwkv6",
    architecture="Rwkv6ForCausalLM",
    settings={"version": 6},
    more=((divided, divisor), (ranks, lambda _: {})),
    tensors={f"{BLOCK}.attention.time_maa_{letter}": (f"layers/attention/shift/{name}", 2) for name, letter in LETTERS.items()}
    | {f"{BLOCK}.feed_forward.time_maa_{LETTERS[name]}": (f"layers/feedforward/shift/{name}", 2) for name in ("key", "receptance")}
    | {
        f"{BLOCK}.attention.time_maa_w1": ("layers/attention/down/mix", 0),
        f"{BLOCK}.attention.time_maa_w2": ("layers/attention/up/mix", 0),
        f"{BLOCK}.attention.time_decay_w1": ("layers/attention/down/decay", 0),
        f"{BLOCK}.attention.time_decay_w2": ("layers/attention/up/decay", 0),
        f"{BLOCK}.attention.time_decay": (DECAY, 2),
        f"{BLOCK}.attention.time_faaaa": (BONUS, 0),
    },
    **WORLD,
)
