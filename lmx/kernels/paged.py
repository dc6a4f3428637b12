"""Attention of new tokens to keys and values that lie in pages (Kwon et al., 2023), and the writing of pages.

New tokens of all rows stand one after another, without a batch dimension: those of rows that decode, one each, and chunks of prompts. A layer's
cache is `{"key", "value"}` of `[pages, kv_heads, page, head_dim]`; or int8 with a scale for each vector, `{"key_scale", "value_scale"}` of
`[pages, kv_heads, page]` beside them. What is here is the plain XLA form: it goes through the pages that are in use, some at a time, so
that what it costs is what texts are long, however many pages there are. Hopper GPUs have kernels, in `paged_gpu`; the writing of pages is
XLA's there too, which compiles it to one kernel for each array, in place where the cache is donated.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from lmx.kernels.wide import widened

IMPLEMENTATIONS = ("auto", "xla", "gpu")
"""`gpu` are kernels for Hopper, taken by name until they have been checked and measured on one (`experiments.bench.decode`); `auto` is `xla`."""
BLOCK = 512
"""Slots that are read at once; half as many by the tokens of prompts."""
FEW = 64
"""So many slots at once for each row that decodes, where that is fewer and no more than three such parts are left: a short text is not to wait
for the reading of empty pages."""
TILE = 64
"""So many tokens of prompts read together, at most."""
NONE = -1e30
"""The score of what is hidden."""

Bias = Callable[[Int[Array, "some queries"], Int[Array, "some keys"]], Float[Array, "some heads queries keys"]]
"""What is added to scores: of new tokens, by their index, and keys, by their position."""


@flax.struct.dataclass
class View:
    """Which pages the new tokens of one call read.

    Attributes:
      pages: pages in use, row after row, those of a row in the order of its text; what comes after `first[-1]` is not read.
      first: where each row's pages begin in `pages`, and behind the last row's.
      lengths: how many tokens of a row its pages hold, new ones included; 0 for a row that is not there.
      queries: where each row's new tokens begin, and behind the last row's; they are the last of its text.
      singles: so many rows come first that have one new token each, or are not there: token i is row i's. Static.
      prefix: so many of each row's first tokens see each other in both directions; None: none of any row's.
    """

    pages: Int[Array, "n"]
    first: Int[Array, "rows_and_one"]
    lengths: Int[Array, "rows"]
    queries: Int[Array, "rows_and_one"]
    singles: int = flax.struct.field(pytree_node=False)
    prefix: Int[Array, "rows"] | None = None

    def owners(self) -> tuple[Int[Array, "n"], Int[Array, "n"]]:
        """Of each of `pages` its row, or how many rows there are where it is none's; and the position of its first token, by pages."""
        places = jnp.arange(self.pages.shape[0])
        rows = jnp.searchsorted(self.first[1:], places, side="right").astype(jnp.int32)
        return rows, places - self.first[rows]

    def tokens(self, count: int) -> tuple[Int[Array, "tokens"], Int[Array, "tokens"]]:
        """Of each new token its row, or how many rows there are where it is none's; and its position, -1 where it has none."""
        places = jnp.arange(count, dtype=jnp.int32)
        rows = places
        if count > self.singles:  # a search is a loop, which decoding need not wait for
            rows = jnp.searchsorted(self.queries[1:], places, side="right").astype(jnp.int32)
            rows = jnp.where(places < self.singles, places, jnp.maximum(rows, self.singles))
        here = jnp.minimum(rows, self.lengths.shape[0] - 1)
        after = self.queries[here + 1] - places
        return rows, jnp.where(rows < self.lengths.shape[0], self.lengths[here] - after, -1)


def quantised(a: Float[Array, "... head_dim"]) -> tuple[Int[Array, "... head_dim"], Float[Array, "..."]]:
    """Vectors as int8 and a scale each: off by at most half a scale, which is the largest number's 127th part."""
    scale = jnp.max(jnp.abs(widened(a)), -1) / 127
    return jnp.round(widened(a) / jnp.where(scale > 0, scale, 1)[..., None]).astype(jnp.int8), scale


def write(
    cache: dict[str, Array],
    key: Float[Array, "tokens kv_heads head_dim"],
    value: Float[Array, "tokens kv_heads head_dim"],
    slots: Int[Array, "tokens"],
) -> dict[str, Array]:
    """A layer's cache with new keys and values at `slots`, counted through all pages.

    Values are finite there whatever they were: a page is read beside those of other texts, and 0 times NaN is none of their business. Where one
    is not, or is too large for the cache's type, its key is NaN: who sees it gets NaN.
    """
    page, at = jnp.divmod(slots, cache["key"].shape[2])
    finite = jnp.isfinite(value if "key_scale" in cache else value.astype(cache["value"].dtype))
    key, value = jnp.where(finite.all(-1, keepdims=True), key, jnp.nan), jnp.where(finite, value, 0)
    new = {"key": key, "value": value}
    if "key_scale" in cache:
        new = {name: part for n, a in new.items() for name, part in zip((n, f"{n}_scale"), quantised(a), strict=True)}
    return cache | {name: cache[name].at[page, :, at].set(a.astype(cache[name].dtype)) for name, a in new.items()}


def attention(
    q: Float[Array, "tokens heads head_dim"],
    cache: dict[str, Array],
    view: View,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Float[Array, "heads"] | None = None,
    bias: Bias | None = None,
    implementation: str = "auto",
) -> Float[Array, "tokens heads head_dim"]:
    """Attention of each new token to its own row's pages, up to itself or to the end of the view's prefix, if that comes later (`causal`), or to
    all of them (to an encoder's text).

    Args:
      window: a token sees only the last `window` up to and including itself; with a prefix there is none.
      scale, softcap, slopes: as of `lmx.kernels.attention.attention`.
      implementation: one of `IMPLEMENTATIONS`.

    A token that is no row's, or whose row is not there, gets zeros.

    Raises:
      ValueError: an unknown implementation, or one that cannot do what is asked.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"paged attention={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "gpu":
        from lmx.kernels import paged_gpu  # here, since Pallas takes a second to import

        if reason := paged_gpu.refusal(q, cache, bias=bias):
            raise ValueError(f"paged attention='gpu' {reason}; use auto or xla")
        return paged_gpu.attention(q, cache, view, scale=scale, causal=causal, window=window, softcap=softcap, slopes=slopes)
    rows, positions = view.tokens(q.shape[0])
    count = view.lengths.shape[0]
    ends = view.prefix if causal else view.lengths
    if ends is not None:  # ALiBi's slopes may count from there as well: that adds the same to all scores of a query
        positions = jnp.where(rows < count, jnp.maximum(positions, ends[jnp.minimum(rows, count - 1)] - 1), -1)
    queries = _Queries(widened(q) * scale, rows, positions)
    static = (window, softcap, slopes, bias)
    found = []
    if view.singles:
        found.append(_singles(queries, cache, view, view.first[view.singles], static))
    if q.shape[0] > view.singles:
        found.append(_chunks(queries, cache, view, static))
    return jnp.concatenate(found).astype(q.dtype)


@flax.struct.dataclass
class _Queries:
    """New tokens: `[tokens, heads, head_dim]`, scaled; their rows, and the last position that each may see."""

    vectors: Array
    rows: Array
    positions: Array


def _singles(queries: _Queries, cache: dict[str, Array], view: View, end: Array, static) -> Array:
    """Of one token a row: each page is multiplied with the query of its row, and what pages give is summed for each row."""
    count, (heads, dim), kind = view.singles, queries.vectors.shape[1:], queries.vectors.dtype
    size, kv_heads = cache["key"].shape[2], cache["key"].shape[1]
    most, few = (max(1, slots // size) for slots in (BLOCK, min(BLOCK, FEW * count)))
    pages, owners, starts = _padded(view, most)

    def see(carry, at, some):
        top, total, out = carry
        ids, owner, start = (jax.lax.dynamic_slice_in_dim(a, at, some) for a in (pages, owners, starts))
        mine = owner < count
        own = jnp.minimum(owner, count - 1)
        key, value, key_scale, value_scale = _read(cache, ids, kind)
        q = queries.vectors[own].reshape(some, kv_heads, -1, dim)
        scores = jnp.einsum("phgd,phsd->phgs", q, key)
        scores = scores if key_scale is None else scores * key_scale[:, :, None]
        last = jnp.where(mine, queries.positions[own], -1)[:, None]
        scores = _scored(scores[:, :, :, None], own[:, None], start[:, None] * size + jnp.arange(size), last, last, static)[:, :, :, 0]
        scores = scores.reshape(some, heads, size)
        owner = jnp.where(mine, owner, count)
        higher = jnp.maximum(top, jax.ops.segment_max(scores.max(-1), owner, count + 1))
        weights = jnp.where(scores <= NONE, 0, jnp.exp(scores - higher[owner][..., None]))
        shrink = jnp.exp(top - higher)
        total = total * shrink + jax.ops.segment_sum(weights.sum(-1), owner, count + 1)
        weights = weights.reshape(some, kv_heads, -1, size)
        weights = weights if value_scale is None else weights * value_scale[:, :, None]
        mixed = jnp.einsum("phgs,phsd->phgd", weights, value).reshape(some, heads, dim)
        return higher, total, out * shrink[..., None] + jax.ops.segment_sum(mixed, owner, count + 1)

    start = jnp.full((count + 1, heads), NONE, kind), jnp.zeros((count + 1, heads), kind), jnp.zeros((count + 1, heads, dim), kind)
    begin = 0
    if few < most:
        begin = jnp.maximum((end + most - 3 * few - 1) // most, 0) * most
        start = jax.lax.fori_loop(0, begin // most, lambda i, carry: see(carry, i * most, most), start)
    _, total, out = jax.lax.fori_loop(0, -((begin - end) // few), lambda i, carry: see(carry, begin + i * few, few), start)
    return (out / jnp.maximum(total, jnp.finfo(kind).tiny)[..., None])[:count]


def _chunks(queries: _Queries, cache: dict[str, Array], view: View, static) -> Array:
    """Of rows with several tokens: some tokens at a time, of whatever rows, by the pages from where the first of these rows has its first (that
    they see) to where the last has its last; what is another row's among them is hidden."""
    heads, dim = queries.vectors.shape[1:]
    kind, size, kv_heads = queries.vectors.dtype, cache["key"].shape[2], cache["key"].shape[1]
    some, rows_there, window = max(1, BLOCK // 2 // size), view.lengths.shape[0], static[0]
    pages, owners, starts = _padded(view, some)
    count = queries.vectors.shape[0] - view.singles
    tiles = -(-count // TILE)
    each = -(-count // tiles)

    def cut(a: Array, nothing: int = 0) -> Array:
        a = jnp.pad(a[view.singles :], ((0, tiles * each - count), *((0, 0),) * (a.ndim - 1)), constant_values=nothing)
        return a.reshape(tiles, each, *a.shape[1:])

    def tile(part: tuple[Array, ...]) -> Array:
        q, rows, last, index = part
        q, real = q.reshape(each, kv_heads, -1, dim), rows < rows_there
        low, high = jnp.where(real, rows, rows_there).min(), jnp.where(real, rows, 0).max()
        begin = view.first[jnp.minimum(low, high)]
        end = jnp.where(real.any(), view.first[high] + jnp.where(real & (rows == high), last, -1).max() // size + 1, begin)
        if window is not None:
            behind = jnp.where(real, last, jnp.iinfo(last.dtype).max).min() - window + 1
            begin += jnp.where(low == high, jnp.maximum(behind, 0) // size, 0)

        def see(carry, at):
            top, total, out = carry
            ids, owner, start = (jax.lax.dynamic_slice_in_dim(a, at, some) for a in (pages, owners, starts))
            key, value, key_scale, value_scale = (None if a is None else jnp.moveaxis(a, 1, 0) for a in _read(cache, ids, kind))
            key, value = (a.reshape(kv_heads, some * size, dim) for a in (key, value))  # [kv_heads, keys, head_dim]
            scores = jnp.einsum("qhgd,hkd->hgqk", q, key)[None]
            scores = scores if key_scale is None else scores * key_scale.reshape(1, kv_heads, 1, 1, -1)
            owner, positions = jnp.repeat(owner, size), (start[:, None] * size + jnp.arange(size)).reshape(-1)
            seen = jnp.where(rows[:, None] == owner, last[:, None], -1)
            scores = _scored(scores, index[None], positions[None], last[None], seen[None], static)[0]
            higher = jnp.maximum(top, scores.max(-1))
            weights = jnp.where(scores <= NONE, 0, jnp.exp(scores - higher[..., None]))  # NaN too, which a maximum may pass over
            shrink = jnp.exp(top - higher)
            total = total * shrink + weights.sum(-1)
            weights = weights if value_scale is None else weights * value_scale.reshape(kv_heads, 1, 1, -1)
            return higher, total, out * shrink[..., None] + jnp.einsum("hgqk,hkd->hgqd", weights, value)

        shape = (kv_heads, heads // kv_heads, each)
        start = jnp.full(shape, NONE, kind), jnp.zeros(shape, kind), jnp.zeros((*shape, dim), kind)
        _, total, out = jax.lax.fori_loop(0, -(-(end - begin) // some), lambda i, carry: see(carry, begin + i * some), start)
        out = out / jnp.maximum(total, jnp.finfo(kind).tiny)[..., None]
        return jnp.moveaxis(out, 2, 0).reshape(each, heads, dim)

    index = jnp.arange(queries.vectors.shape[0])
    parts = cut(queries.vectors), cut(queries.rows, rows_there), cut(queries.positions, -1), cut(index)
    return jax.lax.map(tile, parts).reshape(-1, heads, dim)[:count]


def _padded(view: View, some: int) -> tuple[Array, Array, Array]:
    """Pages, their rows and their places in them, with so many more behind that any block of them can be read."""
    owners, starts = view.owners()
    return jnp.pad(view.pages, (0, some)), jnp.pad(owners, (0, some), constant_values=view.lengths.shape[0]), jnp.pad(starts, (0, some))


def _read(cache: dict[str, Array], ids: Array, kind) -> tuple[Array, Array, Array | None, Array | None]:
    """Keys and values of pages in a type, and their scales where they have some."""
    key, value = (cache[name][ids].astype(kind) for name in ("key", "value"))
    return key, value, *(cache[name][ids].astype(kind) if name in cache else None for name in ("key_scale", "value_scale"))


def _scored(scores: Array, index: Array, keys: Array, last: Array, seen: Array, static) -> Array:
    """Scores `[some, kv_heads, group, queries, keys]`, soft-capped, biased, and hidden where a key is after what a query may see.

    index: of queries, `[some, queries]`; keys: positions `[some, keys]`; last: of queries, `[some, queries]`; seen: the same, `[some, queries]` or
    `[some, queries, keys]` where it depends on the key.
    """
    window, softcap, slopes, bias = static
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    behind = last[..., None] - keys[:, None]  # [some, queries, keys]
    if slopes is not None:
        scores -= slopes.reshape(1, *scores.shape[1:3], 1, 1).astype(scores.dtype) * behind[:, None, None]
    if bias is not None:
        scores += bias(index, keys).reshape(-1, *scores.shape[1:]).astype(scores.dtype)
    allowed = keys[:, None] <= (seen if seen.ndim == 3 else seen[..., None])
    if window is not None:
        allowed &= behind < window
    return jnp.where(allowed[:, None, None], scores, NONE)
