"""The attention door under a mesh: each device computes its rows and heads, and where sequences are split, its part of each."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import Array
from jaxtyping import Float

from lmx.core.execution import Execution
from lmx.kernels import paged, reference
from lmx.kernels.attention import attention as kernel
from lmx.kernels.masks import Mask
from lmx.kernels.paged import View
from lmx.parallel import context
from lmx.parallel.manual import axes, manual, names
from lmx.parallel.rules import partition


def attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    execution: Execution,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    slopes: Array | None = None,
    bias: Array | None = None,
    keep: Array | None = None,
    site: Callable[[str, Array], Array] | None = None,
) -> Array:
    """As `lmx.kernels.attention.attention`, for arrays that the execution's rules place on the surrounding mesh. With `site`, which wants to see
    scores and weights, as `lmx.kernels.reference.attention`: every score is formed, and XLA splits it as its inputs are.

    Raises:
      ValueError: a split sequence with dropout of attention weights or a learned bias, with a cache, or of a length that does not divide.
    """
    sizes = axes()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if site is not None:
        return reference.attention(q, k, v, mask, scale=scale, softcap=softcap, slopes=slopes, bias=bias, keep=keep, site=site)
    run = partial(kernel, scale=scale, softcap=softcap, implementation=execution.attention)
    if execution.rules is None or not sizes:
        return run(q, k, v, mask, slopes=slopes, bias=bias, keep=keep)
    place = partial(partition, rules=execution.rules, sizes=sizes)
    of_q, of_k = (place(("batch", "length", h, None), a.shape) for h, a in (("heads", q), ("kv_heads", k)))
    split = sizes.get("context", 1) > 1
    if split:
        if keep is not None:
            raise ValueError("dropout of attention weights is not there for sequences split by layout.context; set model.dropout to 0")
        if bias is not None:
            raise ValueError("a learned bias of scores is not there for sequences split by layout.context; set it to 1")
        if of_q[1] != "context" or of_k[1] != "context" or q.shape[1] != k.shape[1]:
            raise ValueError(f"{q.shape[1]} queries and {k.shape[1]} keys cannot be split by layout.context={sizes['context']}")
    # Fewer key heads than tensor devices: all are everywhere, and each device takes the one its query heads share.
    choose = of_q[2] is not None and of_k[2] is None and k.shape[2] > 1

    def rows(a: Array | None, *axes_: str) -> jax.sharding.PartitionSpec | None:
        return None if a is None else place(axes_, a.shape)

    of_mask = jax.tree.map(lambda a: rows(a, "batch", "length"), mask)
    of_scores = [rows(a, "batch", "heads", None, None) for a in (bias, keep)]
    in_specs = (of_q, of_k, of_k, of_mask, rows(slopes, "heads"), *of_scores)

    def local(q, k, v, mask, slopes, bias, keep):
        if choose:
            share = q.shape[2] * sizes["tensor"] // k.shape[2]
            mine = jax.lax.axis_index("tensor") * q.shape[2] // share
            k, v = (jax.lax.dynamic_slice_in_dim(a, mine, max(1, q.shape[2] // share), 2) for a in (k, v))
        if not split:
            return run(q, k, v, mask, slopes=slopes, bias=bias, keep=keep)
        if execution.exchange == "alltoall":
            return context.alltoall(run, q, k, v, mask, slopes)
        return context.ring(q, k, v, mask, scale=scale, softcap=softcap, slopes=slopes)

    used = set(names(of_q)) | set(names(of_k))
    if not used:  # a mesh of one device, or rows that do not divide
        return run(q, k, v, mask, slopes=slopes, bias=bias, keep=keep)
    return manual(local, in_specs, of_q)(q, k, v, mask, slopes, bias, keep)


def attend_pages(
    q: Float[Array, "1 tokens heads head_dim"],
    cache: dict[str, Array],
    view: View,
    execution: Execution,
    *,
    scale: float | None = None,
    **how: Any,
) -> Float[Array, "1 tokens heads head_dim"]:
    """As `lmx.kernels.paged.attention`, of tokens in a batch of one."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return paged.attention(q[0], cache, view, scale=scale, **how)[None]
