"""How the kernel of paged attention cuts its work: new tokens into tiles of rows, and what each tile reads into items of like length.

A tile is what one product of the tensor cores has on its left: the query heads of one key head, of one token that decodes or of several tokens
of one row. An item is a tile and a stretch of its row's blocks of keys; there are enough of them to fill the chip however long each text is
(flash-decoding; Dao et al., 2023), and their number is bounded by shapes alone. All of this is a few small arrays, the same for all layers.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from lmx.kernels.paged import View

ROWS = 64
"""Of a tile: what a product of the tensor cores takes."""
KEYS = 64
"""Of a block: what is multiplied at once."""


@dataclass(frozen=True)
class Cut:
    """How finely texts are cut.

    Attributes:
      slots: items for each key head that are wanted where there is enough to read; shapes bound them by this and the number of tiles.
      least: blocks of an item, where its tile has so many; a shorter one is not worth its partial result.
    """

    slots: int
    least: int = 8


@dataclass(frozen=True)
class Tiles:
    """Tiles of new tokens of one kind.

    Attributes:
      per: tokens of a tile.
      rows: of a tile: per x group, rounded up to eight.
      tokens: which token each of a tile's are; any where there is none.
      last: the last position that each may see; -1 where there is no token.
      owner: each tile's row of the view.
      place: of each new token of this kind its tile, and which of the tile's tokens it is.
    """

    per: int
    rows: int
    tokens: Int[Array, "tiles per"]
    last: Int[Array, "tiles per"]
    owner: Int[Array, "tiles"]
    place: tuple[Int[Array, "tokens"], Int[Array, "tokens"]]

    def along_rows(self, a: Array, group: int, fill: int = 0) -> Array:
        """What is known of tokens, `[tiles, per]`, said of each row of the tile, `[tiles, rows]`."""
        a = jnp.repeat(a, group, axis=1)
        return jnp.pad(a, ((0, 0), (0, self.rows - a.shape[1])), constant_values=fill)

    def gathered(self, q: Float[Array, "tokens heads head_dim"], kv_heads: int) -> Float[Array, "tiles kv_heads rows head_dim"]:
        """Queries, tile by tile."""
        tiles, (_, heads, dim) = self.tokens.shape[0], q.shape
        q = q[self.tokens].reshape(tiles, self.per, kv_heads, heads // kv_heads, dim)
        q = jnp.moveaxis(q, 1, 2).reshape(tiles, kv_heads, -1, dim)
        return jnp.pad(q, ((0, 0), (0, 0), (0, self.rows - q.shape[2]), (0, 0)))

    def scattered(self, out: Float[Array, "tiles kv_heads rows head_dim"], group: int) -> Float[Array, "tokens heads head_dim"]:
        """Results, token by token again."""
        (tiles, kv_heads, _, dim), (tile, at) = out.shape, self.place
        out = out[:, :, : self.per * group].reshape(tiles, kv_heads, self.per, group, dim)
        return out[tile, :, at].reshape(tile.shape[0], kv_heads * group, dim)


@dataclass(frozen=True)
class Items:
    """Work items; those behind the last have no blocks.

    Attributes:
      table: of each item `[tile, first, end, pages, behind]`: its blocks of `KEYS` keys, counted from the text's begin, and where in the view's list
        of pages its row's begin and end.
      bounds: where each tile's items begin, and behind the last one's.
    """

    table: Int[Array, "items 5"]
    bounds: Int[Array, "tiles_and_one"]


def _rounded(rows: int) -> int:
    return -(-rows // 8) * 8


def _below(values: Int[Array, "n"], ends: Int[Array, "m"]) -> Int[Array, "n"]:
    """How many of the ends are not above each value: in which of the stretches that end there it is."""
    return jnp.sum(values[:, None] >= ends, 1, dtype=jnp.int32)


def single_tiles(view: View, group: int, causal: bool) -> Tiles:
    """Of the rows with one new token each."""
    del causal  # the only new token is the last of the text
    places = jnp.arange(view.singles, dtype=jnp.int32)
    last = view.lengths[: view.singles, None] - 1
    return Tiles(1, _rounded(group), places[:, None], last, places, (places, jnp.zeros_like(places)))


def chunk_tiles(view: View, count: int, group: int, causal: bool) -> Tiles:
    """Of the rows with several, which have `count` new tokens together, padding included."""
    begins, rows = view.queries[view.singles :], view.lengths.shape[0] - view.singles
    lengths = view.lengths[view.singles :]
    per = min(ROWS // group, count)
    new = jnp.where(lengths > 0, begins[1:] - begins[:-1], 0)
    ends = jnp.cumsum(-(-new // per))
    starts = ends - -(-new // per)
    tiles = jnp.arange((count + min(rows, count) * (per - 1)) // per, dtype=jnp.int32)
    row = _below(tiles, ends)
    here = jnp.minimum(row, rows - 1)
    tokens = (begins[here] + (tiles - starts[here]) * per)[:, None] + jnp.arange(per, dtype=jnp.int32)
    there = (row < rows)[:, None] & (tokens < begins[here + 1][:, None])
    last = lengths[here][:, None] - (begins[here + 1][:, None] - tokens if causal else 1)
    places = jnp.arange(view.singles, view.singles + count, dtype=jnp.int32)
    mine = jnp.minimum(_below(places, begins[1:]), rows - 1)
    place = starts[mine] + (places - begins[mine]) // per, (places - begins[mine]) % per
    tokens = jnp.clip(tokens, view.singles, view.singles + count - 1)
    return Tiles(per, _rounded(per * group), tokens, jnp.where(there, last, -1), view.singles + here, place)


def known(view: View, count: int) -> Bool[Array, "count"]:
    """Of the tokens behind the singles, whether each is that of a row that is there."""
    places = jnp.arange(view.singles, view.singles + count, dtype=jnp.int32)
    row = _below(places, view.queries[view.singles + 1 :]) + view.singles
    return (row < view.lengths.shape[0]) & (view.lengths[jnp.minimum(row, view.lengths.shape[0] - 1)] > 0)


def items(view: View, tiles: Tiles, window: int | None, cut: Cut) -> Items:
    """Each tile's blocks, from the first that its window shows, in stretches of about one length."""
    here = tiles.last >= 0
    end = jnp.where(here.any(1), jnp.max(tiles.last, 1) // KEYS + 1, 0)
    first = jnp.zeros_like(end)
    if window is not None:
        first = jnp.maximum(jnp.min(jnp.where(here, tiles.last, jnp.iinfo(jnp.int32).max - window), 1) - window + 1, 0) // KEYS
    blocks = jnp.maximum(end - first, 0)
    length = jnp.maximum(-(-jnp.sum(blocks) // cut.slots), cut.least)
    parts = -(-blocks // length)
    ends = jnp.cumsum(parts)
    places = jnp.arange(cut.slots + tiles.owner.shape[0], dtype=jnp.int32)
    tile = _below(places, ends)
    mine = jnp.minimum(tile, tiles.owner.shape[0] - 1)
    share = -(-blocks[mine] // jnp.maximum(parts[mine], 1))
    start = first[mine] + (places - (ends - parts)[mine]) * share
    stop = jnp.minimum(start + share, end[mine])
    row = tiles.owner[mine]
    table = jnp.stack([mine, start, stop, view.first[row], view.first[row + 1]], 1)
    return Items(jnp.where((tile < tiles.owner.shape[0])[:, None], table, 0), jnp.concatenate([jnp.zeros(1, jnp.int32), ends]))
