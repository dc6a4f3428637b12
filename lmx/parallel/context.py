"""Attention over sequences that the `context` axis splits: inside a manual region, on each device's part.

Two ways. In a ring (Liu et al., 2023) each device keeps its queries, and keys and values go round. In tiles each hop's attention goes on from
the last; of the flash kernels each hop's output is weighed by its log-sum-exp. Causal work is balanced by giving device i of n the 2n-ths i and
2n-1-i of each sequence ("zig-zag"): `arrange` puts a batch in that order, and everything else in a forward is indifferent to it, since positions
and segments are data. In an all-to-all (DeepSpeed-Ulysses, Jacobs et al., 2023) devices trade their parts of all heads for all of their part of
the heads; sequences stay in order.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Shaped

from lmx.core.execution import Execution
from lmx.kernels import chunked, flash
from lmx.kernels.masks import Mask
from lmx.kernels.wide import widened
from lmx.parallel.layout import divisors
from lmx.parallel.manual import axes

AXIS = "context"
RING = ("auto", "xla", "chunked", "flash")
"""Implementations of attention by which a ring can go: tiles under three names, and the kernels for Hopper GPUs."""


def arrange(batch: dict[str, Array], execution: Execution) -> dict[str, Array]:
    """A batch of `[rows, length]` (and `[rows]`) in the order in which its forward wants the length: zig-zag for a ring.

    Raises:
      ValueError: a length that does not divide, or arrays of several, of which not all can be of tokens (images are not ordered: leave them out).
    """
    n = ring_size(execution)
    if n == 1:
        return batch
    lengths = {name: a.shape[1] for name, a in batch.items() if a.ndim > 1}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"layout.exchange='ring' orders what is of tokens, [rows, length], and second dimensions are {lengths}; leave out what is not"
        )
    return {name: a if a.ndim < 2 else _ordered(a, _zigzag(n)) for name, a in batch.items()}


def as_read(a: Shaped[Array, "rows length ..."], execution: Execution) -> Shaped[Array, "rows length ..."]:
    """The inverse of `arrange`, of one array: texts from their beginning to their end. Raises ValueError for a length that does not divide."""
    n = ring_size(execution)
    return a if n == 1 else _ordered(a, np.argsort(_zigzag(n)))


def placed_in(mask: Mask, length: int, execution: Execution) -> Mask:
    """A mask of whole sequences in the order of `arrange`, which says where in them each token is."""
    if ring_size(execution) == 1 or not mask.causal or mask.order != "index":
        return mask
    (index,) = arrange({"index": jnp.arange(length)[None]}, execution)["index"]
    return mask.replace(query_index=index, key_index=index)


def ring_size(execution: Execution) -> int:
    """Over how many devices a ring goes; 1 where sequences are in order."""
    return 1 if execution.rules is None or execution.exchange != "ring" else axes().get(AXIS, 1)


def _zigzag(n: int) -> np.ndarray:
    """Which of the 2n pieces of a sequence stands where."""
    return np.stack([np.arange(n), 2 * n - 1 - np.arange(n)], 1).reshape(-1)


def _ordered(a: Array, pieces: np.ndarray) -> Array:
    if a.shape[1] % len(pieces):
        raise ValueError(f"a length of {a.shape[1]} is not divisible by 2 x layout.context={len(pieces) // 2}; change data.length")
    return a.reshape(a.shape[0], len(pieces), -1)[:, pieces].reshape(a.shape)


def places(device: Array, n: int, length: int) -> Array:
    """Where in the sequence the numbers of a device's part are; `length` is the part's."""
    half = jnp.arange(length // 2)
    return jnp.concatenate([device * (length // 2) + half, (2 * n - 1 - device) * (length // 2) + half])


def alltoall(attend: Callable, q: Array, k: Array, v: Array, mask: Mask, slopes: Array | None) -> Array:
    """Attention of each device's part `[batch, length / n, heads, head_dim]`, in order, through heads of the whole sequence."""
    n, me = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    trade = partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=2, concat_axis=1, tiled=True)
    gather = partial(jax.lax.all_gather, axis_name=AXIS, axis=1, tiled=True)
    mine, often = q.shape[2] // n, repeats(q.shape[2], k.shape[2], n)
    k, v = (trade(jnp.repeat(a, often, axis=2)) for a in (k, v))
    if slopes is not None:
        slopes = jax.lax.dynamic_slice_in_dim(slopes, me * mine, mine)
    mixed = attend(trade(q), k, v, jax.tree.map(gather, mask), slopes=slopes)
    return jax.lax.all_to_all(mixed, AXIS, split_axis=1, concat_axis=2, tiled=True)


def repeats(heads: int, kv_heads: int, n: int) -> int:
    """How often key heads are repeated, so that n devices, which divide the query heads, can take them in equal parts with the query heads
    that share them."""
    return next(often for often in divisors(heads // kv_heads) if kv_heads * often % n == 0)


def ring_refusal(implementation: str) -> str | None:
    """Why a ring cannot go by an implementation of attention, or None."""
    if implementation in RING:
        return None
    return (
        "cannot go on from what a hop of layout.exchange='ring' found; use auto or xla (in tiles) or flash, or layout.exchange='alltoall'"
    )


def ring(
    q: Array, k: Array, v: Array, mask: Mask, *, scale: float, softcap: float | None, slopes: Array | None, implementation: str = "auto"
) -> Array:
    """Attention of each device's part `[batch, length / n, heads, head_dim]`, in zig-zag order, over the whole sequence.

    Args:
      implementation: one of `RING`: `"flash"` takes the kernels for Hopper GPUs, the others tiles (`lmx.kernels.chunked`).

    Raises:
      ValueError: another implementation, or `"flash"` cannot do what is asked, or not here.
    """
    if reason := ring_refusal(implementation):
        raise ValueError(f"attention={implementation!r} {reason}")
    by_flash = implementation == "flash"
    if by_flash:
        flash.check(q, k, v, mask, scale=scale, softcap=softcap, slopes=slopes)
    return _ring((by_flash, scale, softcap), q, k, v, mask, slopes)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(static, q, k, v, mask, slopes):
    return _forward(static, q, k, v, mask, slopes)[0]


def _forward(static, q, k, v, mask, slopes):
    by_flash, scale, softcap = static

    def in_tiles(found, k, v, mask):
        return chunked.forward((scale, softcap), q, k, v, mask, slopes, found)

    def by_kernel(found, k, v, mask):
        return joined(found, flash.with_lse(q, k, v, mask, scale=scale, softcap=softcap, slopes=slopes))

    if by_flash:
        nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], chunked.NONE, jnp.float32)
        out, lse = _round(by_kernel, nothing, (k, v), mask)
        out = out.astype(q.dtype)
    else:
        out, lse = chunked.untiled(_round(in_tiles, chunked.nothing(q, k, v), (k, v), mask), q)
    return out, (q, k, v, mask, slopes, out, lse)


def joined(
    first: tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch queries heads"]],
    second: tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch queries heads"]],
) -> tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch queries heads"]]:
    """Output and log-sum-exp over two sets of keys, from those over each; `chunked.NONE` is the log-sum-exp of no key."""
    (out, lse), (other, its) = first, second
    both = jnp.logaddexp(lse, its)
    return out * jnp.exp(lse - both)[..., None] + other * jnp.exp(its - both)[..., None], both


def _backward(static, saved, g):
    by_flash, scale, softcap = static
    q, k, v, mask, slopes, out, lse = saved
    delta = chunked.weigh(g, out)

    def through(k, v, mask):
        if by_flash:
            found = flash.gradients(q, k, v, mask, lse, delta, g, scale=scale, softcap=softcap, slopes=slopes)
            return tuple(widened(a) for a in found)
        return chunked.backward((scale, softcap), q, k, v, mask, slopes, lse, delta, g)[:3]

    n = jax.lax.axis_size(AXIS)

    def hop(dq, keys, h):
        k, v, about = keys
        more, dk, dv = through(k, v, _at(mask, about, h))
        return dq + more, (dk, dv)

    # The gradients of keys and values travel with them, one hop behind, and come home with one more.
    def step(carry, h):
        dq, keys, gradients = carry
        following, arrived = _next((keys, gradients))
        dq, found = hop(dq, keys, h)
        return (dq, following, jax.tree.map(jnp.add, arrived, found)), None

    keys = (k, v, _of_keys(mask))
    following = _next(keys)
    dq, gradients = hop(0.0, keys, 0)
    (dq, keys, gradients), _ = jax.lax.scan(step, (dq, following, gradients), jnp.arange(1, n - 1))
    arrived = _next(gradients)
    dq, found = hop(dq, keys, n - 1)
    dk, dv = _next(jax.tree.map(lambda a, b, keys: (a + b).astype(keys.dtype), arrived, found, (k, v)))
    return dq.astype(q.dtype), dk, dv, None, None


_ring.defvjp(_forward, _backward)


def _round(hop: Callable, found, keys: tuple[Array, Array], mask: Mask):
    """`hop(found, k, v, mask)` over every device's keys, the next ones under way while these are worked on."""
    n = jax.lax.axis_size(AXIS)

    def step(carry, h):
        found, (k, v, about) = carry
        following = _next((k, v, about))
        return (hop(found, k, v, _at(mask, about, h)), following), None

    (found, (k, v, about)), _ = jax.lax.scan(step, (found, (*keys, _of_keys(mask))), jnp.arange(n - 1))
    return hop(found, k, v, _at(mask, about, n - 1))


def _next(tree):
    n = jax.lax.axis_size(AXIS)
    return jax.tree.map(lambda a: jax.lax.ppermute(a, AXIS, [(i, (i + 1) % n) for i in range(n)]), tree)


def _of_keys(mask: Mask):
    return mask.key_segments, mask.key_positions, mask.key_prefix


def _at(mask: Mask, about, hops: Array) -> Mask:
    """The mask between this device's queries and the keys that have come `hops` devices far."""
    n, me = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    length = mask.query_positions.shape[1]
    segments, positions, prefix = about
    return mask.replace(
        query_index=places(me, n, length),
        key_index=places((me - hops) % n, n, length),
        key_segments=segments,
        key_positions=positions,
        key_prefix=prefix,
    )
