"""What config.json of several families says in more than one field: RoPE, kinds of layers."""

from dataclasses import replace
from typing import Any

from lmx.interop.family import Field, Fused, Reader
from lmx.models.config import Transformer, is_local
from lmx.models.rope import RopeScaling

LLAMA_MODULES = {
    "model.embed_tokens": "embed",
    "model.norm": "norm",
    "lm_head": "head",
    "model.layers.{}.input_layernorm": "layers/attention_norm",
    "model.layers.{}.self_attn.q_proj": "layers/attention/query",
    "model.layers.{}.self_attn.k_proj": "layers/attention/key",
    "model.layers.{}.self_attn.v_proj": "layers/attention/value",
    "model.layers.{}.self_attn.o_proj": "layers/attention/output",
    "model.layers.{}.post_attention_layernorm": "layers/feedforward_norm",
    "model.layers.{}.mlp.gate_proj": "layers/feedforward/gate",
    "model.layers.{}.mlp.up_proj": "layers/feedforward/up",
    "model.layers.{}.mlp.down_proj": "layers/feedforward/down",
}
"""Names that most decoders have taken from Llama."""
QK_NORMS = {
    "model.layers.{}.self_attn.q_norm": "layers/attention/query_norm",
    "model.layers.{}.self_attn.k_norm": "layers/attention/key_norm",
}
GATE_UP = {"model.layers.{}.mlp.gate_up_proj": Fused(("layers/feedforward/gate", "layers/feedforward/up"))}
"""Gate and what it gates as one tensor."""
INV_FREQ = ("*rotary_emb.inv_freq",)


def rope_to_ours(theta: float = 10_000.0, partial: float = 1.0, old: tuple[str, str] = ("rope_theta", "partial_rotary_factor")):
    """RoPE's base, share of dimensions and scaling, from `rope_parameters` or from what came before it: `rope_scaling`, and the two old
    names."""

    def read(reader: Reader, ours: dict[str, Any]) -> dict[str, Any]:
        now, before = (reader.take(name, None) for name in ("rope_parameters", "rope_scaling"))
        if not isinstance(now or before or {}, dict):
            raise reader.refused("rope_parameters" if now else "rope_scaling", now or before, "settings by name")
        given = dict(now or before or {})
        base, share = (
            given.pop(new, None) or reader.take(name, None) or default
            for new, name, default in zip(("rope_theta", "partial_rotary_factor"), old, (theta, partial), strict=True)
        )
        reader.take(old[0], None), reader.take(old[1], None)
        kind = given.pop("rope_type", given.pop("type", "default"))
        given.pop("type", None)
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise reader.refused(old[1], share, "a number up to 1")
        found: dict[str, Any] = {"rope_theta": _floating(base)}
        head = ours.get("head_dim") or ours["embed"] // ours["heads"]
        if int(head * share) != head:
            found["rope_dims"] = int(head * share)
        if kind != "default":
            found["rope_scaling"] = _scaling(kind, given, reader, ours["context"])
        elif given:
            raise reader.refused("rope_parameters", given, "nothing beside rope_theta with rope_type default")
        return found

    return read


def _scaling(kind: str, given: dict[str, Any], reader: Reader, context: int) -> RopeScaling:
    if kind not in ("linear", "dynamic", "yarn", "llama3", "longrope", "su"):
        raise reader.refused("rope_type", kind, "one of default, linear, dynamic, yarn, llama3, longrope")
    kind = "longrope" if kind == "su" else kind
    inside, outside = given.pop("original_max_position_embeddings", None), reader.take("original_max_position_embeddings", None)
    original = outside or inside or (0 if kind == "linear" else context)
    made: dict[str, Any] = {"kind": kind, "original_context": original}
    factor = given.pop("factor", None)
    if factor is None and not (isinstance(original, int) and original > 0):
        raise reader.refused("factor", factor, "a number")
    made["factor"] = _floating(context / original if factor is None else factor)
    low, high = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ("beta_slow", "beta_fast")
    if kind in ("llama3", "yarn"):
        default = {"low": 1.0, "high": 4.0 if kind == "llama3" else 32.0}
        said = {ours: given.pop(name, None) for ours, name in (("low", low), ("high", high))}
        # transformers reads 0 as nothing said, of yarn.
        made |= {ours: default[ours] if n is None or (n == 0 and kind == "yarn") else _floating(n) for ours, n in said.items()}
    if kind == "yarn":
        made["truncate"] = given.pop("truncate", True)
        one, all_ = given.pop("mscale", None), given.pop("mscale_all_dim", None)
        if one and all_ and given.get("attention_factor") is None:
            raise reader.refused("mscale", one, "attention_factor in its place")
    if kind == "longrope":
        made |= {"short_factors": tuple(given.pop("short_factor")), "long_factors": tuple(given.pop("long_factor"))}
    made["attention"] = given.pop("attention_factor", None)
    if given:
        raise reader.refused("rope_parameters", given, f"no such entries with rope_type {kind}")
    return RopeScaling(**made)


def _floating(number: Any) -> Any:
    """A number as a float; anything else as it is, to be refused by name."""
    return float(number) if isinstance(number, int) and not isinstance(number, bool) else number


def rope_to_theirs(config: Transformer) -> dict[str, Any]:
    """The inverse, as transformers writes it now."""
    share = config.rope_size / config.head_size
    said: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default", "partial_rotary_factor": share}
    scaling = config.rope_scaling
    if scaling is not None:
        said |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.original_context:
            said["original_max_position_embeddings"] = scaling.original_context
        if scaling.kind == "llama3":
            said |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
        if scaling.kind == "yarn":
            said |= {"beta_slow": scaling.low, "beta_fast": scaling.high, "truncate": scaling.truncate}
        if scaling.kind == "longrope":
            said |= {"short_factor": list(scaling.short_factors), "long_factor": list(scaling.long_factors)}
        if scaling.attention is not None:
            said["attention_factor"] = scaling.attention
    return {"rope_parameters": said}


def rope(*defaults, **more):
    """Both ways."""
    return rope_to_ours(*defaults, **more), rope_to_theirs


def _window_to_ours(reader: Reader, ours: dict[str, Any]) -> dict[str, Any]:
    window, kinds = reader.take("sliding_window", None), reader.take("layer_types", None)
    if reader.take("use_sliding_window", True) is False or window is None:
        return {}
    if kinds is None:
        return {"window": window, "pattern": ("local",)}
    pattern = shortest(named_kinds(reader, kinds, ours["layers"]))
    return {"window": window, "pattern": pattern} if "local" in pattern else {}


KINDS = {"sliding_attention": "local", "full_attention": "global"}


def named_kinds(reader: Reader, kinds: list[str], layers: int) -> list[str]:
    """Our kinds of all layers from `layer_types`."""
    unknown = set(kinds) - set(KINDS)
    if unknown:
        raise reader.refused("layer_types", sorted(unknown), " and ".join(KINDS))
    if len(kinds) != layers:
        raise reader.refused("layer_types", kinds, f"one for each of {layers} layers")
    return [KINDS[kind] for kind in kinds]


def layer_types(config: Transformer) -> list[str]:
    """The inverse."""
    kinds = (config.pattern[i % len(config.pattern)] for i in range(config.layers))
    return ["sliding_attention" if is_local(kind) else "full_attention" for kind in kinds]


def shortest(kinds: list) -> tuple:
    """The shortest pattern that, repeated and cut off, gives a list."""
    return next(tuple(kinds[:n]) for n in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))


def _window_to_theirs(config: Transformer) -> dict[str, Any]:
    if config.window is None:
        return {"sliding_window": None}
    if config.pattern == ("local",):
        return {"sliding_window": config.window}
    return {"sliding_window": config.window, "layer_types": layer_types(config)}


def biases_to_ours(reader: Reader, _) -> dict[str, Any]:
    """Of all four projections of attention, as one switch."""
    both = reader.take("attention_bias", False)
    return {"projection_bias": both, "output_bias": both}


BIASES = (biases_to_ours, lambda config: {"attention_bias": config.projection_bias})
WINDOW = (_window_to_ours, _window_to_theirs)
"""A sliding window, of all layers or of those that `layer_types` names."""


def without(modules: dict, *parts: str) -> dict:
    """A table of names less those that have one of these parts."""
    return {name: ours for name, ours in modules.items() if not any(part in name for part in parts)}


def both(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a decoder that are its encoder's too."""
    return settings | {f"encoder.{name}": value for name, value in settings.items()}


def both_sides(*fields: Field) -> tuple[Field, ...]:
    """Fields of a decoder that are its encoder's too."""
    return (*fields, *(replace(one, ours=f"encoder.{one.ours}") for one in fields))
