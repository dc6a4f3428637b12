"""Tables of a vocabulary under a mesh (Megatron-LM, Shoeybi et al., 2019): each device has the part of its rows, for embedding and head."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from lmx.core import weights
from lmx.core.execution import Rules
from lmx.core.weights import Split, Weight
from lmx.parallel import manual
from lmx.parallel.rules import partition

CHUNKS = {"cpu": 2**22, "gpu": 2**28}
"""How many logits exist at once on each device that holds a share of them: 16 MB in fp32, which stay in a CPU's caches; a gigabyte on a
GPU, whose products want thousands of rows, and whose memory the head's gradient crosses once for each part."""


def chunks(rows: int, length: int, vocab: int, *, cpu: bool) -> int:
    """Into how many parts a length is cut, so that a part's logits are no more than `CHUNKS` says."""
    room = CHUNKS["cpu" if cpu else "gpu"]
    return next(n for n in range(1, length + 1) if length % n == 0 and (rows * length // n * vocab <= room or n == length))


class Places(NamedTuple):
    """Where a table `[vocab, embed]` is, and the tokens and vectors that go through it; and inside a manual region, what travels.

    Attributes:
      tokens: of `[batch, length]`.
      vectors: of `[batch, length, embed]`, outside the region.
      split: the mesh axis that splits the table's rows, or None.
      scatter: whether that axis splits the vectors too, along the sequence.
      parts: the axis over which ZeRO splits the embedding of the table's gradient, or None.
    """

    tokens: P
    vectors: P
    split: str | None
    scatter: bool
    parts: str | None

    @property
    def table(self) -> P:
        """Of the table where it is used."""
        return P(self.split, None)

    @property
    def gradient(self) -> P:
        """Of the table's gradient."""
        return P(self.split, self.parts)

    def gathered(self, vectors: Array) -> Array:
        """Vectors of all of this device's tokens."""
        return jax.lax.all_gather(vectors, self.split, axis=1, tiled=True) if self.scatter else vectors

    def reduced(self, vectors: Array) -> Array:
        """The sum of what each part of the table gives of them; the inverse of `gathered` as to where it is."""
        if self.scatter:
            return jax.lax.psum_scatter(vectors, self.split, scatter_dimension=1, tiled=True)
        return jax.lax.psum(vectors, self.split) if self.split else vectors

    def summed(self, gradient: Array) -> Array:
        """The table's gradient over all tokens, from that of this device's."""
        if self.parts:
            gradient = jax.lax.psum_scatter(gradient, self.parts, scatter_dimension=1, tiled=True)
        return jax.lax.psum(gradient, tuple(n for n in manual.names(self.tokens) if n != self.parts))


def places(tokens: tuple[int, ...], table: Weight, rules: Rules, axis: str | None = "vocab") -> Places:
    """The places on the surrounding mesh of tokens of a shape `(batch, length)` and a table `[axis, embed]`."""
    place = partial(partition, rules=rules, sizes=manual.axes())
    of_tokens, between = place(("batch", "length"), tokens), place(("batch", "sequence"), tokens)
    split = place((axis, None), table.shape)[0]
    scatter = split in manual.names(between)
    parts = table.parts[1] if isinstance(table, Split) else None
    return Places(of_tokens, P(*(between if scatter else of_tokens), None), split, scatter, parts)


def lookup(
    tokens: Int[Array, "batch length"], weight: Weight, dtype, rules: Rules | None, axis: str | None = "vocab"
) -> Float[Array, "batch length embed"]:
    """Rows of a table `[axis, embed]`, as `lmx.core.weights.lookup`; rows beyond the table are those at its ends."""
    if rules is None or not manual.axes():
        return weights.lookup(tokens, weight, dtype)
    return weights.looked_up(partial(_lookup, (dtype, rules, axis), tokens), weight)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(static, tokens: Array, weight: Weight) -> Array:
    dtype, rules, axis = static
    at = places(tokens.shape, weight, rules, axis)

    def local(tokens, table):
        place, here = _rows(tokens, table, weight.shape[0], at.split)
        return at.reduced(jnp.where(here[..., None], jnp.take(table, place, axis=0, mode="clip"), 0))

    return manual.manual(local, (at.tokens, at.table), at.vectors)(tokens, weights.values(weight, dtype))


def _forward(static, tokens, weight):
    return _lookup(static, tokens, weight), (tokens, weight)


def _backward(static, saved, g):
    tokens, weight = saved
    _, rules, axis = static
    at = places(tokens.shape, weight, rules, axis)
    size = weight.shape[0] // (manual.axes()[at.split] if at.split else 1)

    def local(tokens, g):
        g = at.gathered(g)
        table = jnp.zeros((size, g.shape[-1]), weight.dtype)
        place, here = _rows(tokens, table, weight.shape[0], at.split)
        return at.summed(table.at[place].add(jnp.where(here[..., None], g, 0).astype(table.dtype), mode="clip"))

    return None, weights.gradient_of(weight, manual.manual(local, (at.tokens, at.vectors), at.gradient)(tokens, g))


_lookup.defvjp(_forward, _backward)


def _rows(tokens: Array, table: Array, rows: int, split: str | None) -> tuple[Array, Array]:
    """Each token's row in this device's part of the table, and whether it is there."""
    tokens = jnp.clip(tokens, 0, rows - 1)
    place = tokens - (jax.lax.axis_index(split) * table.shape[0] if split else 0)
    return place, (place >= 0) & (place < table.shape[0])
