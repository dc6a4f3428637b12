"""cuDNN's flash attention, through JAX: for NVIDIA GPUs, until there is a kernel of our own.

Causality and windows are cuDNN's own and skip what is hidden. Packed segments go as an array of queries by keys, one for all heads, since
cuDNN's packed layout wants to know how many there are at most.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from lmx.kernels.masks import Mask

TYPES = ("bfloat16", "float16")
WIDEST = 128
"""Of heads; on Hopper it could be 256."""
LONGEST = 8192
"""Up to this many keys segments are worth an array of queries by keys."""


def refusal(q: Array, k: Array, mask: Mask, *, softcap, slopes, keep, bias=None) -> str | None:
    """What of a call cuDNN cannot do, or None."""
    if q.dtype not in TYPES or k.dtype != q.dtype:
        return f"computes in {' or '.join(TYPES)}, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > WIDEST:
        return f"takes head dimensions that are multiples of 8 up to {WIDEST}, not {q.shape[-1]}"
    for name, value in (("soft cap", softcap), ("ALiBi", slopes), ("learned bias", bias), ("dropout", keep)):
        if value is not None:
            return f"takes no {name}"
    if mask.order != "index" or mask.query_index is not None or mask.key_index is not None or q.shape[1] != k.shape[1]:
        return "takes whole sequences in order, not a cache or parts of one"
    if not (mask.query_segments is None and mask.key_prefix is None) and (k.shape[1] > LONGEST or k.shape[1] % 2):
        return f"takes segments and prefixes of an even number of up to {LONGEST} keys, not {k.shape[1]}"
    return None


def attention(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    mask: Mask,
    *,
    scale: float,
) -> Float[Array, "batch length heads head_dim"]:
    """As `reference.attention`, of what `refusal` has nothing against."""
    window = None if mask.window is None else (mask.window - 1, 0)
    if mask.query_segments is None and mask.key_prefix is None:
        return _cudnn(q, k, v, None, mask.causal, window, scale)
    causal = mask.causal and mask.key_prefix is None  # what a prefix shows is beyond cuDNN's own causality
    said = mask if not causal else Mask(causal=False, query_segments=mask.query_segments, key_segments=mask.key_segments)
    mixed = _cudnn(q, k, v, said.dense(q.shape[1], k.shape[1])[:, None], causal, window, scale)
    if mask.query_segments is None:
        return mixed
    # A query that sees nothing: cuDNN hides by a large number, not an infinite one, and gives the mean of what it was to hide.
    return jnp.where((mask.query_segments != 0)[:, :, None, None], mixed, 0)


def _cudnn(q, k, v, allowed, causal, window, scale):
    return jax.nn.dot_product_attention(
        q, k, v, mask=allowed, is_causal=causal, local_window_size=window, scale=scale, implementation="cudnn"
    )
