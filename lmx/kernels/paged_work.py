"""How the kernels of paged attention cut their work: new tokens into tiles of rows, and what each tile reads into items of like length.

A tile is what keys are multiplied with at once: the query heads of one key head, of one token that decodes or of several tokens of one row. An
item is a tile and a stretch of its row's blocks of keys; there are enough of them to fill the chip however long each text is (flash-decoding;
Dao et al., 2023), and their number is bounded by shapes alone. All of this is a few small arrays, the same for all layers.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from lmx.kernels.paged import View

KEYS = 64
"""Of a block: what a product of the tensor cores takes on its left."""


@dataclass(frozen=True)
class Cut:
    """How finely texts are cut.

    Attributes:
      slots: items for each key head that are wanted where there is enough to read; there are at most this many and one for each tile.
      least: blocks of an item, where its tile has so many; fewer are not worth a partial result.
    """

    slots: int
    least: int = 8


@dataclass(frozen=True)
class Tiles:
    """Tiles of new tokens of one kind.

    Attributes:
      rows: of a tile: tokens times query heads of a key head, rounded up to eight.
      last: the last position that each of a tile's tokens may see; -1 where there is no token.
      owner: each tile's row of the view.
      tokens: which token each of a tile's is, any where there is none; None where each tile has one and they are in order.
      place: of each token its tile, and which of that tile's it is, or -1 of a token that is no row's; None as above.
    """

    rows: int
    last: Int[Array, "tiles per"]
    owner: Int[Array, "tiles"]
    tokens: Int[Array, "tiles per"] | None = None
    place: tuple[Int[Array, "tokens"], Int[Array, "tokens"]] | None = None

    @property
    def per(self) -> int:
        """Tokens of a tile."""
        return self.last.shape[1]

    def along_rows(self, a: Array, fill: int = 0) -> Array:
        """What is known of each token and query head of a tile, `[n, per, group]`, said of each of its rows, `[n, rows]`."""
        a = a.reshape(a.shape[0], -1)
        return jnp.pad(a, ((0, 0), (0, self.rows - a.shape[1])), constant_values=fill)

    def gathered(self, q: Float[Array, "tokens heads head_dim"], kv_heads: int) -> Float[Array, "tiles kv_heads rows head_dim"]:
        """Queries, tile by tile."""
        q = q.reshape(q.shape[0], kv_heads, -1, q.shape[-1])
        if self.tokens is not None:
            q = jnp.moveaxis(q[self.tokens], 1, 2).reshape(self.tokens.shape[0], kv_heads, -1, q.shape[-1])
        return jnp.pad(q, ((0, 0), (0, 0), (0, self.rows - q.shape[2]), (0, 0)))

    def scattered(self, out: Float[Array, "tiles kv_heads rows head_dim"], group: int) -> Float[Array, "tokens heads head_dim"]:
        """Results, token by token; zeros of tokens that are no row's."""
        tiles, kv_heads, _, dim = out.shape
        out = out[:, :, : self.per * group]
        if self.place is not None:
            tile, at = self.place
            found = out.reshape(tiles, kv_heads, self.per, group, dim)[tile, :, at]
            out = jnp.where((at >= 0)[:, None, None, None], found, 0)
        return out.reshape(out.shape[0], kv_heads * group, dim)


@dataclass(frozen=True)
class Items:
    """Work items; those behind the last have no blocks.

    Attributes:
      table: of each item `[tile, first, end, pages, behind, clear, unclear]`: its blocks of `KEYS` keys, counted from the text's begin; where in the
        view's list of pages its row's begin and end; and from which to which block nothing is hidden from any of the tile's tokens.
      bounds: where each tile's items begin, and behind the last one's.
    """

    table: Int[Array, "items 7"]
    bounds: Int[Array, "tiles_and_one"]


def single_tiles(view: View, group: int) -> Tiles:
    """Of the rows with one new token each, which sees all of its text."""
    return Tiles(_rounded(group), view.lengths[: view.singles, None] - 1, jnp.arange(view.singles, dtype=jnp.int32))


def chunk_tiles(view: View, count: int, group: int, most: int, causal: bool) -> Tiles:
    """Of the other rows, which have `count` new tokens together, padding included, in tiles of up to `most` rows.

    Tokens are counted from the first of these.
    """
    begins, lengths = view.queries[view.singles :] - view.singles, view.lengths[view.singles :]
    rows, per = lengths.shape[0], max(1, min(most // group, count))
    number = jnp.where(lengths > 0, -(-(begins[1:] - begins[:-1]) // per), 0)  # of tiles
    ends = jnp.cumsum(number)
    tiles = jnp.arange((count + min(rows, count) * (per - 1)) // per, dtype=jnp.int32)
    row, there = _stretch(tiles, ends)
    tokens = (begins[row] + (tiles - (ends - number)[row]) * per)[:, None] + jnp.arange(per, dtype=jnp.int32)
    there = there[:, None] & (tokens < begins[row + 1][:, None])
    last = lengths[row][:, None] - ((begins[row + 1][:, None] - tokens) if causal else 1)
    if view.prefix is not None:
        last = jnp.maximum(last, view.prefix[view.singles + row][:, None] - 1)
    places = jnp.arange(count, dtype=jnp.int32)
    mine, owned = _stretch(places, begins[1:])
    tile, at = jnp.divmod(places - begins[mine], per)
    at = jnp.where(owned & (number[mine] > 0), at, -1)
    return Tiles(
        _rounded(per * group),
        jnp.where(there, last, -1),
        view.singles + row,
        jnp.clip(tokens, 0, count - 1),
        ((ends - number)[mine] + tile, at),
    )


def items(view: View, tiles: Tiles, window: int | None, cut: Cut) -> Items:
    """Each tile's blocks, from the first that its window shows, in stretches of about one length."""
    there, count = tiles.last >= 0, tiles.owner.shape[0]
    highest, lowest = jnp.max(tiles.last, 1), jnp.min(jnp.where(there, tiles.last, jnp.iinfo(jnp.int32).max), 1)
    end, unclear = highest // KEYS + 1, (lowest + 1) // KEYS
    first = clear = jnp.zeros_like(end)
    if window is not None:
        first, clear = (jnp.maximum(a - window + 1 + up, 0) // KEYS for a, up in ((lowest, 0), (highest, KEYS - 1)))
    blocks = jnp.where(there.any(1), end - first, 0)
    length = jnp.maximum(-(-jnp.sum(blocks) // cut.slots), cut.least)
    parts = -(-blocks // length)
    ends = jnp.cumsum(parts)
    places = jnp.arange(cut.slots + count, dtype=jnp.int32)
    tile, real = _stretch(places, ends)
    share = -(-blocks[tile] // jnp.maximum(parts[tile], 1))
    start = first[tile] + (places - (ends - parts)[tile]) * share
    stop, row = jnp.minimum(start + share, end[tile]), tiles.owner[tile]
    table = jnp.stack([tile, start, stop, view.first[row], view.first[row + 1], clear[tile], unclear[tile]], 1)
    return Items(jnp.where(real[:, None], table, 0), jnp.concatenate([jnp.zeros(1, jnp.int32), ends]))


def _rounded(rows: int) -> int:
    return -(-rows // 8) * 8


def _stretch(places: Int[Array, "n"], ends: Int[Array, "m"]) -> tuple[Array, Array]:
    """In which of the stretches that end there each place is, the last where it is behind all, and whether it is not."""
    number = jnp.sum(places[:, None] >= ends, 1, dtype=jnp.int32)
    return jnp.minimum(number, ends.shape[0] - 1), number < ends.shape[0]
