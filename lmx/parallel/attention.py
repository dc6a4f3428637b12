"""The attention door under a mesh: each device computes its rows and heads, and where sequences are split, its part of each."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from lmx.core.execution import Execution
from lmx.kernels import paged, reference
from lmx.kernels.attention import attention as kernel
from lmx.kernels.masks import Mask
from lmx.kernels.paged import View
from lmx.parallel import context
from lmx.parallel.manual import axes, manual, names
from lmx.parallel.rules import partition

PAGED = {"auto": "auto", "xla": "xla", "flash": "gpu"}
"""Implementations that attention to pages has, by their names over plain arrays."""


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
      ValueError: a split sequence with dropout of attention weights or a learned bias, with a cache, of a length or heads that do not divide,
        or round a ring by an implementation that it does not go by (`lmx.parallel.context.RING`); key heads that tensor devices cannot share.
    """
    sizes = axes()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    split = execution.rules is not None and sizes.get("context", 1) > 1
    if split and keep is not None:
        raise ValueError("dropout of attention weights is not there for sequences split by layout.context; set model.dropout to 0")
    if site is not None:
        mask = context.placed_in(mask, q.shape[1], execution)
        return reference.attention(q, k, v, mask, scale=scale, softcap=softcap, slopes=slopes, bias=bias, keep=keep, site=site)
    run = partial(kernel, scale=scale, softcap=softcap, implementation=execution.attention)
    if execution.rules is None or not sizes:
        return run(q, k, v, mask, slopes=slopes, bias=bias, keep=keep)
    place = partial(partition, rules=execution.rules, sizes=sizes)
    of_q, of_k = (place(("batch", "length", h, None), a.shape) for h, a in (("heads", q), ("kv_heads", k)))
    if split:
        if bias is not None:
            raise ValueError("a learned bias of scores is not there for sequences split by layout.context; set it to 1")
        if of_q[1] != "context" or of_k[1] != "context" or q.shape[1] != k.shape[1]:
            raise ValueError(f"{q.shape[1]} queries and {k.shape[1]} keys cannot be split by layout.context={sizes['context']}")
        _check_split(q, of_q, execution, sizes)
    # Fewer key heads than tensor devices: all are everywhere, and each device takes the one its query heads share.
    choose = of_q[2] is not None and of_k[2] is None and k.shape[2] > 1
    if choose and sizes["tensor"] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} key heads are not divisible by layout.tensor={sizes['tensor']}, nor it by them; change one")

    def rows(a: Array | None, *axes_: str) -> P | None:
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
        return context.ring(q, k, v, mask, scale=scale, softcap=softcap, slopes=slopes, implementation=execution.attention)

    used = set(names(of_q)) | set(names(of_k))
    if not used:  # a mesh of one device, or rows that do not divide
        return run(q, k, v, mask, slopes=slopes, bias=bias, keep=keep)
    return manual(local, in_specs, of_q)(q, k, v, mask, slopes, bias, keep)


def _check_split(q: Array, of_q: P, execution: Execution, sizes: dict[str, int]) -> None:
    """What an experiment's check says of its knobs, of models that are no experiment's (those that see)."""
    n, heads = sizes["context"], q.shape[2] // (1 if of_q[2] is None else sizes["tensor"])
    if execution.exchange == "ring" and q.shape[1] % (2 * n):
        raise ValueError(f"a length of {q.shape[1]} is not divisible by 2 x layout.context={n}: a ring cuts it in that many pieces")
    if execution.exchange == "alltoall" and heads % n:
        raise ValueError(f"layout.exchange=alltoall trades a device's {heads} heads among layout.context={n}, which does not divide them")


@flax.struct.dataclass
class HeadBias:
    """What is added to the scores of attention to pages (`lmx.kernels.paged.Bias`), as a function of arrays, so that devices can have parts
    of these.

    Attributes:
      of_heads: arrays whose second dimension is heads.
      others: arrays that all heads share.
      function: of them all, new tokens by their index, and keys by their position. Static.
    """

    of_heads: tuple[Array, ...]
    others: tuple[Array, ...]
    function: Callable[..., Array] = flax.struct.field(pytree_node=False)

    def __call__(self, index: Int[Array, "some queries"], keys: Int[Array, "some keys"]) -> Float[Array, "some heads queries keys"]:
        return self.function(*self.of_heads, *self.others, index, keys)


def page_heads(heads: int, kv_heads: int, tensor: int) -> int:
    """How many key heads pages have for `tensor` devices to divide: where there are fewer than devices, each has its own copy of the one that
    its query heads share."""
    return kv_heads * context.repeats(heads, kv_heads, tensor)


def write_pages(
    cache: dict[str, Array],
    key: Float[Array, "tokens kv_heads head_dim"],
    value: Float[Array, "tokens kv_heads head_dim"],
    slots: Int[Array, "tokens"],
    execution: Execution,
) -> dict[str, Array]:
    """As `lmx.kernels.paged.write`, each device the heads that it has; pages may have each several times (`page_heads`)."""
    often = cache["key"].shape[1] // key.shape[1]
    if often > 1:
        key, value = (jnp.repeat(a, often, 1) for a in (key, value))
    at = _of_pages(cache, execution)
    if at is None:
        return paged.write(cache, key, value, slots)
    new = P(None, at["key"][1], None)
    return manual(paged.write, (at, new, new, P()), at)(cache, key, value, slots)


def attend_pages(
    q: Float[Array, "1 tokens heads head_dim"],
    cache: dict[str, Array],
    view: View,
    execution: Execution,
    *,
    scale: float | None = None,
    slopes: Float[Array, "heads"] | None = None,
    bias: HeadBias | None = None,
    **how: Any,
) -> Float[Array, "1 tokens heads head_dim"]:
    """As `lmx.kernels.paged.attention`, of tokens in a batch of one; each device its heads. The implementation: `paged_name`."""
    how["implementation"] = paged_name(execution)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    at = _of_pages(cache, execution)
    if at is None:
        return paged.attention(q[0], cache, view, scale=scale, slopes=slopes, bias=bias, **how)[None]
    axis = at["key"][1]
    heads, of_bias = P(None, axis), None if bias is None else HeadBias(P(None, axis), P(), bias.function)

    def local(q, cache, view, slopes, bias):
        return paged.attention(q, cache, view, scale=scale, slopes=slopes, bias=bias, **how)

    return manual(local, (heads, at, P(), P(axis), of_bias), heads)(q[0], cache, view, slopes, bias)[None]


def paged_name(execution: Execution) -> str:
    """What `lmx.kernels.paged.attention` calls the execution's implementation. Raises ValueError for one that reads no pages."""
    if execution.attention not in PAGED:
        raise ValueError(f"execution.attention={execution.attention!r} reads no pages; use {', '.join(PAGED)}")
    return PAGED[execution.attention]


def _of_pages(cache: dict[str, Array], execution: Execution) -> dict[str, P] | None:
    """Where a layer's pages are; None where nothing splits them."""
    sizes = axes()
    if execution.rules is None or not sizes:
        return None
    places = {name: partition((None, "kv_heads", *[None] * (a.ndim - 2)), a.shape, execution.rules, sizes) for name, a in cache.items()}
    return places if places["key"][1] is not None else None
