"""What a mask says to the flash kernels: which blocks to visit, which of those need no mask, and the mask within a block.

A kernel walks, for each tile of queries, over a run of blocks of keys (and the other way round for the gradients of keys). Which run follows
from places alone, inside the kernel, or from a small table that XLA computes beforehand, from the least and the largest of what the mask
compares in each block.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Bool, Int

from lmx.kernels.masks import Mask

LARGE = 2**30
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Sight:
    """The part of a mask that is known when a kernel is compiled.

    Attributes:
      causal, window: as in `Mask`.
      keys: how many there are, of which blocks may hold more.
      bounded: whether they do.
    """

    causal: bool
    window: int | None
    keys: int
    bounded: bool


@dataclass(frozen=True)
class Run:
    """Blocks `first` to `last` are visited, and those from `clear_from` to `clear_to` hide nothing; ends are not included."""

    first: Array
    last: Array
    clear_from: Array
    clear_to: Array

    def masked(self, block: Array) -> Array:
        return (block < self.clear_from) | (block >= self.clear_to)


def sight(mask: Mask, keys: int, padded: int) -> Sight:
    return Sight(mask.causal, mask.window, keys, padded > keys)


def about(
    mask: Mask, q: Array, k: Array, queries: int, keys: int, slopes: Array | None, spelled: bool = False
) -> tuple[dict[str, Array], dict[str, Array]]:
    """What kernels must read of a mask, of queries and of keys: int32 `[batch, queries or keys]` by name, to those lengths; `spelled`: places too.

    `order` is what causality compares, where it is not simply the place; `positions` is what ALiBi measures.
    """
    batch = q.shape[0]

    def fitted(a: Array, length: int, last: bool) -> Array:
        a = jnp.broadcast_to(a, (batch, a.shape[-1])).astype(jnp.int32)
        return jnp.pad(a, ((0, 0), (0, length - a.shape[1])), **({"mode": "edge"} if last else {}))

    of_q, of_k = {}, {}
    if mask.order == "positions":
        of_q["order"], of_k["order"] = mask.query_positions, mask.key_positions
    elif mask.query_index is not None or mask.key_index is not None or (spelled and mask.causal):
        of_q["order"] = jnp.arange(q.shape[1]) if mask.query_index is None else mask.query_index
        of_k["order"] = jnp.arange(k.shape[1]) if mask.key_index is None else mask.key_index
    if slopes is not None:  # even where they are `order` too: read once for both, they would stay in registers in between
        given = mask.query_positions is not None
        of_q["positions"] = mask.query_positions if given else of_q.get("order", jnp.arange(q.shape[1]))
        of_k["positions"] = mask.key_positions if given else of_k.get("order", jnp.arange(k.shape[1]))
    if mask.query_segments is not None:
        of_q["segments"], of_k["segments"] = mask.query_segments, mask.key_segments
    if mask.key_prefix is not None:
        of_k["prefix"] = mask.key_prefix
    return tuple(
        {name: fitted(a, length, name in ("order", "positions")) for name, a in side.items()}
        for side, length in ((of_q, queries), (of_k, keys))
    )


def told(mask: Mask) -> bool:
    """Whether which blocks to visit depends on more than places."""
    said = (mask.query_segments, mask.key_prefix, mask.query_index, mask.key_index)
    return mask.order == "positions" or any(a is not None for a in said)


def blocks_seen(
    sight: Sight, of_q: dict[str, Array], of_k: dict[str, Array], queries: tuple[int, int], keys: tuple[int, int]
) -> tuple[Bool[Array, "batch q_blocks k_blocks"], Bool[Array, "batch q_blocks k_blocks"]]:
    """Whether any query of a block may see any of a block's keys, as far as bounds tell; and whether each surely sees all of them.

    `queries` and `keys` are the numbers of blocks and their sizes.
    """

    def bounds(side: dict, name: str, cut: tuple[int, int], empty: int | None = None):
        number, size = cut
        a = side[name] if name in side else jnp.arange(number * size)[None]
        a = a.reshape(-1, number, size)
        return (a if empty is None else jnp.where(a == empty, LARGE, a)).min(-1), a.max(-1)

    (low_q, high_q), (low_k, high_k) = bounds(of_q, "order", queries), bounds(of_k, "order", keys)
    across, down = (lambda a: a[:, :, None]), (lambda a: a[:, None, :])
    some = clear = jnp.ones((1, queries[0], keys[0]), bool)
    if sight.causal:
        some, clear = some & (across(high_q) >= down(low_k)), clear & (across(low_q) >= down(high_k))
    if sight.window is not None:
        some = some & (across(low_q) - down(high_k) < sight.window)
        clear = clear & (across(high_q) - down(low_k) < sight.window)
    if "prefix" in of_k:
        low, high = bounds(of_k, "prefix", keys)
        some, clear = some | down(high == 1), clear | down(low == 1)
    if "segments" in of_q:
        (low_q, high_q), (low_k, high_k) = bounds(of_q, "segments", queries, 0), bounds(of_k, "segments", keys, 0)
        some = some & (across(low_q) <= down(high_k)) & (down(low_k) <= across(high_q))
        one_q, one_k = ((side["segments"].reshape(-1, *cut) == high[:, :, None]).all(-1) for side, cut, high in
                        ((of_q, queries, high_q), (of_k, keys, high_k)))  # fmt: skip
        clear = clear & across(one_q) & down(one_k) & (across(high_q) == down(high_k)) & (across(high_q) != 0)
    ends = (jnp.arange(keys[0]) + 1) * keys[1]
    return some & (ends - keys[1] < sight.keys), clear & (ends <= sight.keys)


def runs(some: Bool[Array, "batch tiles blocks"], clear: Bool[Array, "batch tiles blocks"]) -> Int[Array, "batch tiles 4"]:
    """Each tile's `Run` over blocks."""
    blocks, place = some.shape[-1], jnp.arange(some.shape[-1])
    first = jnp.where(some, place, blocks).min(-1)
    last = jnp.where(some, place + 1, 0).max(-1)
    first = jnp.minimum(first, last)
    clear = clear & some
    begin = jnp.where(clear, place, blocks).min(-1)
    end = jnp.where(~clear & (place >= begin[..., None]), place, blocks).min(-1)
    return jnp.stack([first, last, begin, end], -1).astype(jnp.int32)


def walked(
    mask: Mask, q: Array, k: Array, queries: tuple[int, int], keys: tuple[int, int], slopes: Array | None
) -> tuple[Sight, tuple[dict[str, Array], dict[str, Array], Array | None]]:
    """What a kernel that walks over blocks of keys is to know of a mask, and read: what `about` gives, and the table of runs if they are not
    simply places'. `queries` and `keys` are the numbers of tiles and blocks, and their sizes."""
    of_q, of_k = about(mask, q, k, math.prod(queries), math.prod(keys), slopes, spelled=told(mask))
    known = sight(mask, k.shape[1], math.prod(keys))
    return known, (of_q, of_k, runs(*blocks_seen(known, of_q, of_k, queries, keys)) if told(mask) else None)


def keys_run(sight: Sight, start: Array, size: int, block: int, number: int) -> Run:
    """The run of blocks of keys, `number` in all, that queries `start` to `start + size` see, where order is the place and nothing else hides."""
    first, last, begin, end = 0, number, 0, sight.keys // block
    if sight.causal:
        last = lax.min(_up(start + size, block), number)
        end = lax.min(lax.div(start + 1, jnp.int32(block)), end)
    if sight.window is not None:
        first = lax.div(lax.max(start - sight.window + 1, 0), jnp.int32(block))
        begin = _up(lax.max(start + size - sight.window, 0), block)
    return Run(first, last, begin, end)


def _up(a: Array, b: int) -> Array:
    return lax.div(a + (b - 1), jnp.int32(b))


def read_run(table, batch: Array, tile: Array) -> Run:
    """A run of the table that `runs` gives, inside a kernel."""
    batch = batch if table.shape[0] > 1 else 0
    return Run(*(table[batch, tile, i] for i in range(4)))


@dataclass(frozen=True)
class Block:
    """A block of scores inside a kernel, `[queries, keys]` where `queries_axis` is 0 and `[keys, queries]` where it is 1.

    Attributes:
      of_q, of_k: references to what `about` gives, of the row of the batch at hand.
      query, key: where the block starts.
    """

    sight: Sight
    of_q: dict
    of_k: dict
    shape: tuple[int, int]
    queries_axis: int
    query: Array
    key: Array

    def axis(self, of_queries: bool) -> int:
        return self.queries_axis if of_queries else 1 - self.queries_axis

    def line(self, name: str, of_queries: bool) -> Array:
        """What a mask says of each query or key."""
        side, start = (self.of_q, self.query) if of_queries else (self.of_k, self.key)
        axis = self.axis(of_queries)
        return plgpu.load(side[name].at[pl.ds(start, self.shape[axis])], layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)

    def numbers(self, name: str, of_queries: bool) -> Array:
        """The same, or their places where it says nothing, broadcast to the block."""
        axis = self.axis(of_queries)
        if name in (self.of_q if of_queries else self.of_k):
            return self.along(self.line(name, of_queries), axis)
        start = self.query if of_queries else self.key
        return start + plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=plgpu.Layout.WGMMA)

    def along(self, line: Array, axis: int) -> Array:
        return lax.broadcast_in_dim(line, self.shape, [axis])

    def alibi(self, of_queries: bool, slope: Array) -> Array:
        """ALiBi's part of each query or of each key, a line; they add up to minus the slope times the distance, to base 2."""
        held, start = (self.of_k, self.key) if self.queries_axis else (self.of_q, self.query)
        base = held["positions"][start]  # counted from what is near, distances are exact
        return (self.line("positions", of_queries) - base).astype(jnp.float32) * (-LOG2E * slope if of_queries else LOG2E * slope)

    def hide(self, scores: Array) -> Array:
        """The scores, with what the mask hides at -inf."""
        allowed = []
        if self.sight.causal:
            behind = self.numbers("order", True) - self.numbers("order", False)
            seen = behind >= 0
            if self.sight.window is not None:
                seen &= behind < self.sight.window
            if "prefix" in self.of_k:
                seen |= self.numbers("prefix", False) == 1
            allowed.append(seen)
        if "segments" in self.of_q:
            segments = self.numbers("segments", True)
            allowed += [segments == self.numbers("segments", False), segments != 0]
        if self.sight.bounded:
            allowed.append(self.numbers("place", False) < self.sight.keys)
        for seen in allowed:
            scores = jnp.where(seen, scores, -jnp.inf)
        return scores


def logits(scores: Array, scale: float, softcap: float | None, biases: list[Array]) -> tuple[Array, float]:
    """Scores and what to multiply them by, so that 2 to the power of it all is what softmax sums: scale, soft cap and biases to base 2 are in it."""
    if softcap is not None:
        scores, scale = jnp.tanh(scores * (scale / softcap)), softcap
    scale *= LOG2E
    if not biases:
        return scores, scale
    scores *= scale
    for bias in biases:
        scores += bias
    return scores, 1.0
