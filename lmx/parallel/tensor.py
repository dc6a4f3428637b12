"""Embedding rows under a mesh (Megatron-LM, Shoeybi et al., 2019): each device looks up what its part of the vocabulary holds."""

from functools import partial

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


def lookup(
    tokens: Int[Array, "batch length"], weight: Weight, dtype, rules: Rules | None, axis: str | None = "vocab"
) -> Float[Array, "batch length embed"]:
    """Rows of a table `[axis, embed]`, as `lmx.core.weights.lookup`; rows beyond the table are those at its ends."""
    if rules is None or not manual.axes():
        return weights.lookup(tokens, weight, dtype)
    return _lookup((dtype, rules, axis), tokens, weight)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(static, tokens: Array, weight: Weight) -> Array:
    def local(tokens, table):
        place, here = _rows(tokens, table, weight.shape[0], split)
        rows = jnp.where(here[..., None], jnp.take(table, place, axis=0, mode="clip"), 0)
        if scatter:
            return jax.lax.psum_scatter(rows, split, scatter_dimension=1, tiled=True)
        return jax.lax.psum(rows, split) if split else rows

    of_tokens, of_rows, split, scatter = _places(static, tokens, weight)
    return manual.manual(local, (of_tokens, P(split, None)), of_rows)(tokens, weights.values(weight, static[0]))


def _forward(static, tokens, weight):
    return _lookup(static, tokens, weight), (tokens, weight)


def _backward(static, saved, g):
    tokens, weight = saved
    of_tokens, of_rows, split, scatter = _places(static, tokens, weight)
    parts = weight.parts[1] if isinstance(weight, Split) else None
    size = weight.shape[0] // (manual.axes()[split] if split else 1)

    def local(tokens, g):
        if scatter:
            g = jax.lax.all_gather(g, split, axis=1, tiled=True)
        table = jnp.zeros((size, g.shape[-1]), weight.dtype)
        place, here = _rows(tokens, table, weight.shape[0], split)
        table = table.at[place].add(jnp.where(here[..., None], g, 0).astype(table.dtype), mode="clip")
        over = manual.names(of_tokens)
        if parts:
            table = jax.lax.psum_scatter(table, parts, scatter_dimension=1, tiled=True)
        return jax.lax.psum(table, tuple(n for n in over if n != parts))

    d_table = manual.manual(local, (of_tokens, of_rows), P(split, parts))(tokens, g)
    return None, weight.replace(value=d_table) if isinstance(weight, Split) else d_table


_lookup.defvjp(_forward, _backward)


def _places(static, tokens: Array, weight: Weight) -> tuple[P, P, str | None, bool]:
    """Where tokens and rows are, the axis that splits the table, and whether rows are split over it along the sequence."""
    _, rules, axis = static
    place = partial(partition, rules=rules, sizes=manual.axes())
    of_tokens, between = place(("batch", "length"), tokens.shape), place(("batch", "sequence"), tokens.shape)
    split = place((axis, None), weight.shape)[0]
    scatter = split in manual.names(between)
    return of_tokens, P(*(between if scatter else of_tokens), None), split, scatter


def _rows(tokens: Array, table: Array, rows: int, split: str | None) -> tuple[Array, Array]:
    """Each token's row in this device's part of the table, and whether it is there."""
    tokens = jnp.clip(tokens, 0, rows - 1)
    place = tokens - (jax.lax.axis_index(split) * table.shape[0] if split else 0)
    return place, (place >= 0) & (place < table.shape[0])
