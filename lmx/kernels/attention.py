"""The one door to attention over plain arrays: it picks an implementation."""

from jax import Array
from jaxtyping import Float

from lmx.kernels import chunked, cudnn, dense, devices, reference, single
from lmx.kernels.masks import Mask

IMPLEMENTATIONS = ("auto", "xla", "reference", "dense", "chunked", "cudnn", "single")
"""`reference` is the textbook; `dense` forms every score too, with a faster backward pass; `chunked` never forms more than a tile of
them; `cudnn` is NVIDIA's; `single` is for one query a row (decoding). `auto` takes `single` for one query, `reference` under dropout,
`cudnn` on NVIDIA GPUs where it can do what is asked, `dense` up to `LONG` keys where there is no soft cap, and else `chunked`; `xla` does
so anywhere without `cudnn`."""
LONG = 2048
"""From this many keys on, scores are not kept."""


def attention(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    mask: Mask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    slopes: Float[Array, "heads"] | None = None,
    bias: Float[Array, "#batch heads queries keys"] | None = None,
    keep: Float[Array, "batch heads queries keys"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "batch queries heads head_dim"]:
    """Attention of each query over the keys its mask allows; `heads` is a multiple of `kv_heads`, consecutive heads sharing one.

    Args:
      scale: what scores are multiplied by; `head_dim ** -0.5` when None.
      softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
      slopes: ALiBi's slope of each head; a score falls by `slope * distance`.
      bias: what is added to scores, and learned (T5's relative positions).
      keep: what attention weights are multiplied by (dropout: 0 or 1 / (1 - rate)).
      implementation: one of `IMPLEMENTATIONS`.

    Raises:
      ValueError: an unknown implementation, one that cannot do what is asked, or heads that do not share evenly.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads cannot share {k.shape[2]} key heads evenly")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if implementation in ("auto", "xla"):
        if keep is not None:
            implementation = "reference"
        elif q.shape[1] == 1:
            implementation = "single"
        elif (
            implementation == "auto"
            and devices.on_nvidia()
            and cudnn.refusal(q, k, mask, softcap=softcap, slopes=slopes, bias=bias, keep=keep) is None
        ):
            implementation = "cudnn"
        else:
            implementation = "dense" if softcap is None and k.shape[1] <= LONG else "chunked"
    if implementation == "single":
        if q.shape[1] != 1 or keep is not None:
            raise ValueError(f"attention='single' takes one query a row, not {q.shape[1]}, and no dropout; use auto")
        return single.attention(q, k, v, mask, scale=scale, softcap=softcap, slopes=slopes, bias=bias)
    if implementation == "dense":
        if softcap is not None or keep is not None:
            raise ValueError("attention='dense' takes neither a soft cap nor dropout; use auto")
        return dense.attention(q, k, v, mask, scale=scale, slopes=slopes, bias=bias)
    if implementation == "cudnn":
        if reason := cudnn.refusal(q, k, mask, softcap=softcap, slopes=slopes, bias=bias, keep=keep):
            raise ValueError(f"attention='cudnn' {reason}; use auto")
        return cudnn.attention(q, k, v, mask, scale=scale)
    if implementation == "chunked":
        if keep is not None:
            raise ValueError("attention='chunked' takes no dropout; use auto")
        return chunked.attention(q, k, v, mask, scale=scale, softcap=softcap, slopes=slopes, bias=bias)
    return reference.attention(q, k, v, mask, scale=scale, softcap=softcap, slopes=slopes, bias=bias, keep=keep)
