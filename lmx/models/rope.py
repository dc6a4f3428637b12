"""RoPE (Su et al., 2021), its layouts, and what stretches its wavelengths for texts longer than those of training."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from lmx.kernels.wide import widened


@dataclass(frozen=True)
class RopeScaling:
    """How wavelengths are stretched."""

    kind: Literal["linear", "dynamic", "yarn", "llama3", "longrope"] = "linear"
    """linear: all alike (Chen et al., 2023). dynamic: by a larger base, from the length at hand (NTK). yarn: long ones alone, with a
    ramp between (Peng et al., 2023). llama3: the same with other bounds. longrope: each by a factor of its own (Ding et al., 2024)."""
    factor: float = 1.0
    """How much longer texts become."""
    original_context: int = 0
    """The context of training. (yarn, llama3, longrope, dynamic)"""
    low: float = 1.0
    """Wavelengths that fit into the original context fewer times than this are stretched whole (llama3: low_freq_factor; yarn: beta_slow)."""
    high: float = 32.0
    """Those that fit more often are left alone (llama3: high_freq_factor; yarn: beta_fast)."""
    truncate: bool = True
    """Whether yarn's bounds are whole dimensions."""
    attention: float | None = None
    """What cosines and sines are multiplied by. None: 0.1 ln(factor) + 1 for yarn, sqrt(1 + ln(factor) / ln(original_context)) for longrope."""
    short_factors: tuple[float, ...] = ()
    """longrope: what each wavelength is multiplied by in texts up to the original context."""
    long_factors: tuple[float, ...] = ()
    """longrope: and in longer ones."""


def check_scaling(scaling: RopeScaling, dims: int) -> None:
    """Refuses what is no scaling of that many dimensions. Raises ValueError."""
    for name in ("factor", "low", "high", "attention", "short_factors", "long_factors"):
        value = getattr(scaling, name)
        if value is not None and not all(0 < number < math.inf for number in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"model.rope_scaling.{name}={value} must be above 0, and finite")
    if scaling.kind != "linear" and scaling.original_context < 1:
        raise ValueError(f"model.rope_scaling.kind={scaling.kind} needs model.rope_scaling.original_context, the context of training")
    if scaling.kind in ("yarn", "llama3") and not scaling.low < scaling.high:
        raise ValueError(f"model.rope_scaling.low={scaling.low} must be below high={scaling.high}")
    for name in ("short_factors", "long_factors"):
        if scaling.kind == "longrope" and len(getattr(scaling, name)) != dims // 2:
            raise ValueError(f"model.rope_scaling.{name} has {len(getattr(scaling, name))} numbers; a head turns in {dims // 2} pairs")


def by_length(scaling: RopeScaling | None) -> Literal["dynamic", "longrope"] | None:
    """The kind, where wavelengths depend on the length at hand."""
    return scaling.kind if scaling is not None and scaling.kind in ("dynamic", "longrope") else None


def text_lengths(positions: Int[Array, "batch length"], segments: Int[Array, "batch length"] | None) -> Int[Array, "batch #length"]:
    """Of each token's text: its largest position and one. A row is one text where there are no segments."""
    if segments is None:
        return positions.max(1, keepdims=True) + 1

    def row(positions: Array, segments: Array) -> Array:
        most = jnp.zeros(len(positions) + 1, positions.dtype)  # no row has more texts than tokens
        return most.at[segments].max(positions + 1)[segments]

    return jax.vmap(row)(positions, segments)


def rope_table(
    positions: Int[Array, "batch length"],
    dims: int,
    theta: float,
    dtype=jnp.float32,
    scaling: RopeScaling | None = None,
    lengths: Int[Array, "#batch #length"] | None = None,
) -> tuple[Array, Array]:
    """Cosines and sines, `[batch, length, 1, dims / 2]`, of angles `position * theta^(-2i / dims)`, wavelengths stretched as `scaling` says.

    Kinds that depend on the length at hand (dynamic, longrope) take it from `lengths`, for each token, or to be the largest position and one,
    over the batch. So that nothing depends on what else is in a batch, a forward without a cache gives each token that of its text
    (`text_lengths`). What a cache has keeps the wavelengths of the length at which it came (`lmx.infer` makes it anew where longrope
    turns otherwise).
    """
    length = None
    if by_length(scaling):
        length = positions.max() + 1 if lengths is None else lengths[..., None, None]
    frequencies, factor = _frequencies(dims, theta, dtype, scaling, length)
    angles = positions[..., None, None].astype(dtype) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def _frequencies(dims: int, theta: float, dtype, scaling: RopeScaling | None, length: Array | None) -> tuple[Array, float]:
    """Radians a position of each pair, `[dims / 2]` (and of each token, where lengths are), and what cosines and sines are multiplied by."""
    exponents = jnp.arange(0, dims, 2, dtype=dtype) / dims
    plain = theta**-exponents
    if scaling is None:
        return plain, 1.0
    original, factor = scaling.original_context, scaling.factor
    if scaling.kind == "linear":
        return plain / factor, scaling.attention or 1.0
    if scaling.kind == "dynamic":
        longer = jnp.maximum(length, original).astype(dtype)
        base = theta * ((factor * longer / original) - (factor - 1)) ** (dims / (dims - 2))
        return base**-exponents, scaling.attention or 1.0
    if scaling.kind == "longrope":
        short, long = (jnp.array(f, dtype) for f in (scaling.short_factors, scaling.long_factors))
        stretch = jnp.where(length > original, long, short)
        grown = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        return plain / stretch, grown if scaling.attention is None else scaling.attention
    turns = original * plain / (2 * math.pi)  # of each pair over the original context
    if scaling.kind == "llama3":
        kept = jnp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
        return (1 - kept) * plain / factor + kept * plain, scaling.attention or 1.0

    def pair(often: float) -> float:
        """The pair, counted as a number, that turns so often."""
        return dims * math.log(original / (often * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(scaling.high), pair(scaling.low)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    stretched = jnp.clip((jnp.arange(dims // 2, dtype=dtype) - first) / max(last - first, 0.001), 0, 1)
    grown = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0
    return stretched * plain / factor + (1 - stretched) * plain, grown if scaling.attention is None else scaling.attention


def rotate(x: Float[Array, "batch length heads head_dim"], table: tuple[Array, Array], *, interleaved: bool = False) -> Array:
    """Turns the first dimensions of each head, twice as many as the table has columns. In pairs of i and half as many on (Llama in
    Transformers), or of neighbours (GPT-J)."""
    cos, sin = table
    dims = 2 * cos.shape[-1]
    turning, rest = widened(x[..., :dims]), x[..., dims:]
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(turning.shape)
    else:
        a, b = jnp.split(turning, 2, -1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    return jnp.concatenate([turned.astype(x.dtype), rest], -1) if rest.shape[-1] else turned.astype(x.dtype)
