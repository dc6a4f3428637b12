"""The mask language: which keys a query may attend to, as one small value that every attention implementation takes."""

from typing import Literal

import flax.struct
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int


@flax.struct.dataclass
class Mask:
    """Which keys a query may attend to. Every condition that is given must hold.

    Attributes:
      causal: a query sees no key after itself. Static.
      window: a query sees only the last `window` keys up to and including itself. Static.
      order: what "after" compares. `"index"`: places in the sequence (implementations may then skip blocks). `"positions"`:
        `query_positions` and `key_positions`. Static.
      query_segments, key_segments: int `[batch, queries]` and `[batch, keys]`; a query sees its own segment alone, and nothing
        belongs to segment 0 (padding, or an unused slot of a cache).
      query_positions, key_positions: int places of tokens in their own text; ALiBi needs them too.
      query_index, key_index: int `[queries]` and `[keys]`: places in the sequence, where the arrays hold only some of it or not in
        order; 0, 1, 2, ... when None.
      key_prefix: int `[batch, keys]`; a key where it is 1 is seen by every query of its segment, those before it too (a prefix that is read
        in both directions: Dong et al., 2019).
    """

    causal: bool = flax.struct.field(pytree_node=False, default=True)
    window: int | None = flax.struct.field(pytree_node=False, default=None)
    order: Literal["index", "positions"] = flax.struct.field(pytree_node=False, default="index")
    query_segments: Int[Array, "batch queries"] | None = None
    key_segments: Int[Array, "batch keys"] | None = None
    query_positions: Int[Array, "batch queries"] | None = None
    key_positions: Int[Array, "batch keys"] | None = None
    query_index: Int[Array, "queries"] | None = None
    key_index: Int[Array, "keys"] | None = None
    key_prefix: Int[Array, "batch keys"] | None = None

    def __post_init__(self):
        if self.window is not None and not self.causal:
            raise ValueError("a window counts back from the query, so it needs a causal mask")
        if self.window is not None and self.key_prefix is not None:
            raise ValueError("a window hides what a prefix shows; a mask has one of them")

    def dense(self, queries: int, keys: int) -> Bool[Array, "#batch queries keys"]:
        """The mask as an array: True where the query may attend."""
        by_place = self.order == "index"
        behind = self._behind(queries, keys) if by_place else self.query_positions[:, :, None] - self.key_positions[:, None, :]
        allowed = jnp.ones(behind.shape, bool)
        if self.causal:
            allowed &= behind >= 0
        if self.window is not None:
            allowed &= behind < self.window
        if self.key_prefix is not None:
            allowed = allowed | (self.key_prefix[:, None, :] == 1)
        if self.query_segments is not None:
            segments = self.query_segments[:, :, None]
            allowed = allowed & (segments == self.key_segments[:, None, :]) & (segments != 0)
        return allowed

    def distances(self, queries: int, keys: int) -> Int[Array, "#batch queries keys"]:
        """How far each key lies behind the query, by positions where they are given and by index otherwise."""
        if self.query_positions is None:
            return self._behind(queries, keys)
        return self.query_positions[:, :, None] - self.key_positions[:, None, :]

    def _behind(self, queries: int, keys: int) -> Int[Array, "1 queries keys"]:
        """How far each key lies behind the query in the sequence."""
        first = jnp.arange(queries) if self.query_index is None else self.query_index
        second = jnp.arange(keys) if self.key_index is None else self.key_index
        return (first[:, None] - second[None, :])[None]
