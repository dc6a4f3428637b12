"""The one door to attention over plain arrays: it picks an implementation."""

from jax import Array
from jaxtyping import Float

from lmx.kernels import chunked, cudnn, dense, devices, flash, reference, single
from lmx.kernels.masks import Mask

IMPLEMENTATIONS = ("auto", "xla", "reference", "dense", "chunked", "cudnn", "flash", "single")
"""`reference` is the textbook; `dense` forms every score too, with a faster backward pass; `chunked` never forms more than a tile of
them; `cudnn` is NVIDIA's; `flash` is our own kernel for Hopper GPUs; `single` is for one query a row (decoding). `why` says which of them
`auto` takes, and `xla`, which is `auto` without the kernels of GPUs."""
UNMEASURED = "does what is asked, and is taken by name until it has been measured"
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
    asked = {"scale": scale, "softcap": softcap, "slopes": slopes, "bias": bias, "keep": keep}
    implementation, _ = why(q, k, mask, v, **asked, implementation=implementation)
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
    if implementation == "flash":
        flash.check(q, k, v, mask, scale=scale, softcap=softcap, slopes=slopes, bias=bias, keep=keep)
        return flash.attention(q, k, v, mask, scale=scale, softcap=softcap, slopes=slopes)
    if implementation == "chunked":
        if keep is not None:
            raise ValueError("attention='chunked' takes no dropout; use auto")
        return chunked.attention(q, k, v, mask, scale=scale, softcap=softcap, slopes=slopes, bias=bias)
    return reference.attention(q, k, v, mask, scale=scale, softcap=softcap, slopes=slopes, bias=bias, keep=keep)


def why(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    mask: Mask,
    v: Float[Array, "batch keys kv_heads head_dim"] | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    slopes: Array | None = None,
    bias: Array | None = None,
    keep: Array | None = None,
    implementation: str = "auto",
) -> tuple[str, str]:
    """What `auto`, or `xla`, takes for a call (another name is taken by its word), and the reason in words. Arrays may be abstract; values are
    as keys unless given.

    Our own kernel is taken by its name alone until it has been checked and measured on a GPU (`experiments.bench.attention`).
    """
    if implementation not in ("auto", "xla"):
        return implementation, "it was named"
    v, scale = k if v is None else v, q.shape[-1] ** -0.5 if scale is None else scale
    if keep is not None:
        return "reference", "dropout of attention weights is the textbook's alone"
    if q.shape[1] == 1:
        return "single", "there is one query a row"
    said = []
    if implementation == "auto" and devices.on_nvidia():
        asked = {"softcap": softcap, "slopes": slopes, "bias": bias, "keep": keep}
        refused = cudnn.refusal(q, k, mask, **asked)
        if refused is None:
            return "cudnn", "the GPU is NVIDIA's, and cuDNN does what is asked"
        said.append(f"cudnn {refused}")
        if devices.on_hopper():
            said.append(f"flash {flash.refusal(q, k, v, mask, scale=scale, **asked) or UNMEASURED}")
    if softcap is None and k.shape[1] <= LONG:
        return "dense", "; ".join([*said, f"there are no more than {LONG} keys"])
    return "chunked", "; ".join([*said, "there is a soft cap" if k.shape[1] <= LONG else f"there are more than {LONG} keys"])
