"""Virtual tokens before a text: embeddings in place of tokens' (soft prompts) or keys and values before the cache's (prefixes).

They are an entry `virtual` of a model's parameters: `{"embeddings": [tokens, embed]}`, or `{"key", "value"}` of `[layers, kv_heads, tokens,
head_dim]`, put there by `lmx.models.adapters.over`. What calls a model asks here what they are in its terms.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from lmx.core.tree import Tree
from lmx.models import stack
from lmx.models.config import Transformer
from lmx.models.transformer import Cache, Embedded, empty_cache


def prompt(params: Tree) -> int:
    """How many virtual tokens stand before a text's own, as tokens."""
    return params.get("virtual", {}).get("embeddings", jnp.zeros((0,))).shape[0]


def prefix(params: Tree) -> int:
    """How many are keys and values alone."""
    return params.get("virtual", {}).get("key", jnp.zeros((0, 0, 0))).shape[2]


def embedded(params: Tree, places: Int[Array, "batch length"]) -> Embedded | None:
    """What stands in place of tokens; `places`: which virtual token is there, anything outside of them where a token's own is."""
    count = prompt(params)
    if not count:
        return None
    rows = jnp.take(params["virtual"]["embeddings"], jnp.clip(places, 0, count - 1), axis=0)
    return Embedded(rows, (places >= 0) & (places < count))


def cache(params: Tree, config: Transformer, batch: int, slots: int, dtype) -> Cache:
    """An empty cache in the form of the parameters' layers, with the prefix in the first of its slots."""
    unrolled = not any(isinstance(group, dict) for group in params["layers"])
    empty, count = empty_cache(config, batch, slots, dtype, unrolled=unrolled), prefix(params)
    if not count:
        return empty
    virtual = {name: params["virtual"][name].astype(dtype) for name in ("key", "value")}

    def of(group: stack.Group, kept: Tree) -> Tree:
        period = len(group.pattern)

        def put(slots: dict[str, Array], which: Array | int) -> dict[str, Array]:
            """Layers `which` of the prefix, for every row."""
            return {n: a.at[..., :count, :].set(jnp.expand_dims(virtual[n][which], -4)) for n, a in slots.items()}

        if unrolled:
            return tuple(put(slots, group.first + i) for i, slots in enumerate(kept))
        return {str(p): put(kept[str(p)], group.first + period * jnp.arange(group.repeats) + p) for p in range(period)}

    layers = tuple(of(group, kept) for group, kept in zip(stack.groups(config), empty.layers, strict=True))
    slots = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (batch, slots))
    here = slots < count
    return Cache(layers, jnp.where(here, slots, 0), here.astype(jnp.int32), jnp.int32(count))
