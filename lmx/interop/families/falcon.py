"""Falcon (Almazrouei et al., 2023): RW (ALiBi, in series), 7B (one key head, one norm), 40B (several key heads, two norms), 2-11B.

With ALiBi transformers rounds slope times position to bfloat16, which differs from ours past 256 tokens, or with more than 7 heads that are
no power of two or more than 8 that are.
"""

from lmx.interop.families.common import rope
from lmx.interop.family import ACTIVATIONS, Family, Field, Fused

LAYER = "transformer.h.{}"


def heads_and_halves(reader, ours):
    """Key heads, and whether the halves of a layer run in parallel, with how many norms."""
    new, parallel = reader.take("new_decoder_architecture", False), reader.take("parallel_attn", True)
    multi, heads = reader.take("multi_query", True), reader.take("num_kv_heads", None) or ours["heads"]
    norms = reader.take("num_ln_in_parallel_attn", None) or (2 if new else 1)
    if norms not in ((1, 2) if new else (1,)):
        raise reader.refused("num_ln_in_parallel_attn", norms, "1, or 2 with new_decoder_architecture")
    if new and not parallel:
        raise reader.refused("parallel_attn", parallel, "true with new_decoder_architecture")
    return {"kv_heads": heads if new else 1 if multi else ours["heads"], "parallel": parallel, "parallel_norms": norms == 2}


def said_heads_and_halves(config):
    new = config.parallel_norms or config.key_heads not in (1, config.heads)
    return {
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": (2 if config.parallel_norms else 1) if new else None,
        "parallel_attn": config.parallel,
        "multi_query": config.key_heads == 1,
        "num_kv_heads": config.key_heads,
    }


def positions(reader, ours):
    found = rope()[0](reader, ours)
    return {"positions": "alibi", "alibi_scaled": True} if reader.take("alibi", False) else found


def said_positions(config):
    return {"alibi": True} if config.positions == "alibi" else {"alibi": False, **rope()[1](config)}


def biases(reader, _):
    return dict.fromkeys(("projection_bias", "output_bias", "mlp_bias"), reader.take("bias", False))


FALCON = Family(
    model_type="falcon",
    architecture="FalconForCausalLM",
    fields=(
        Field("vocab_size", "vocab", 65024),
        Field("hidden_size", "embed", 4544),
        Field("num_hidden_layers", "layers", 32),
        Field("num_attention_heads", "heads", 71),
        Field("ffn_hidden_size", "mlp", None),
        Field("max_position_embeddings", "context", 2048),
        Field("activation", "activation", "gelu", ACTIVATIONS),
        Field("layer_norm_epsilon", "norm_epsilon", 1e-5),
        Field("tie_word_embeddings", "tied", True),
    ),
    settings={"norm": "layernorm", "gated": False, "bias": True},
    expected={"apply_residual_connection_post_layernorm": False},
    ignored=("ff_factor",),
    more=(
        (heads_and_halves, said_heads_and_halves),
        (positions, said_positions),
        (biases, lambda config: {"bias": config.projection_bias}),
    ),
    modules={
        "transformer.word_embeddings": "embed",
        "transformer.ln_f": "norm",
        "lm_head": "head",
        f"{LAYER}.input_layernorm": "layers/attention_norm",
        f"{LAYER}.post_attention_layernorm": "layers/feedforward_norm",
        f"{LAYER}.self_attention.query_key_value": Fused(
            ("layers/attention/query", "layers/attention/key", "layers/attention/value"), "groups"
        ),
        f"{LAYER}.self_attention.dense": "layers/attention/output",
        f"{LAYER}.mlp.dense_h_to_4h": "layers/feedforward/up",
        f"{LAYER}.mlp.dense_4h_to_h": "layers/feedforward/down",
    },
    variants=lambda config: (
        {f"{LAYER}.ln_attn": "layers/attention_norm", f"{LAYER}.ln_mlp": "layers/feedforward_norm"} if config.parallel_norms else {}
    ),
    leftover=("*rotary_emb.inv_freq", "*.inv_freq"),
)
