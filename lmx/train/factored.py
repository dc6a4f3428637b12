"""Adafactor's second moments (Shazeer and Stern, 2018), of each layer's matrices on their own."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lmx.core.params import ParamSpec, is_spec
from lmx.core.tree import Tree
from lmx.kernels.wide import wide, widened

SHORTEST = 128
"""A matrix with a shorter side keeps all of its mean squares."""
EPSILON = 1e-30
"""Added to each square."""


class MeanSquares(NamedTuple):
    """Adafactor's state, fp32 at least: steps taken; of a factored matrix the means of its rows and of its columns, with dimensions of 1 in
    the place of what they are over; of any other parameter all mean squares as `rows`, and no `columns`."""

    count: Array
    rows: Tree
    columns: Tree


def scale_by_factored_rms(specs: Tree) -> optax.GradientTransformation:
    """Divides gradients by the roots of their mean squares, which decay by `1 - step^-0.8`.

    This is `optax.scale_by_factored_rms` of each layer's (and expert's) weight as a matrix of what it contracts against the rest, where that
    would factor the two largest dimensions, be they layers or heads.
    """

    def init(params: Tree) -> MeanSquares:
        def rows(spec: ParamSpec, a: Array) -> Array:
            return jnp.zeros(_without(spec, spec.sides[1]) if _factored(spec) else spec.shape, wide(a.dtype))

        def columns(spec: ParamSpec, a: Array) -> Array | None:
            return jnp.zeros(_without(spec, spec.sides[0]), wide(a.dtype)) if _factored(spec) else None

        return MeanSquares(jnp.int32(0), *(jax.tree.map(of, specs, params, is_leaf=is_spec) for of in (rows, columns)))

    def update(gradients: Tree, state: MeanSquares, params: Tree | None = None) -> tuple[Tree, MeanSquares]:
        count = state.count + 1
        decay = 1 - count.astype(jnp.float32) ** -0.8

        def step(spec: ParamSpec, g: Array, rows: Array, columns: Array | None) -> tuple[Array, Array, Array | None]:
            x = widened(g)
            squares = jnp.square(x) + EPSILON
            if not _factored(spec):
                rows = decay * rows + (1 - decay) * squares
                return (x * jax.lax.rsqrt(rows)).astype(g.dtype), rows, None
            of_rows, of_columns = spec.sides
            rows = decay * rows + (1 - decay) * squares.mean(of_columns, keepdims=True)
            columns = decay * columns + (1 - decay) * squares.mean(of_rows, keepdims=True)
            shares = rows / rows.mean(of_rows, keepdims=True)
            return (x * jax.lax.rsqrt(shares) * jax.lax.rsqrt(columns)).astype(g.dtype), rows, columns

        found = jax.tree.map(step, specs, gradients, state.rows, state.columns, is_leaf=is_spec)
        updates, rows, columns = (jax.tree.map(lambda _, three: three[i], specs, found, is_leaf=is_spec) for i in range(3))  # noqa: B023
        return updates, MeanSquares(count, rows, columns)

    return optax.GradientTransformation(init, update)


def clip_by_matrix_rms(specs: Tree, most: float) -> optax.GradientTransformation:
    """`optax.clip_by_block_rms` with each layer's (and expert's) parameter as a block: updates are scaled down to a root mean square."""

    def clipped(spec: ParamSpec, update: Array) -> Array:
        rms = jnp.sqrt(jnp.square(update).mean([d for side in spec.sides for d in side], keepdims=True))
        return update / jnp.maximum(1.0, rms / most)

    return optax.stateless(lambda updates, _: jax.tree.map(clipped, specs, updates, is_leaf=is_spec))


def _factored(spec: ParamSpec) -> bool:
    return all(math.prod(spec.shape[d] for d in side) >= SHORTEST for side in spec.sides)


def _without(spec: ParamSpec, dimensions: tuple[int, ...]) -> list[int]:
    return [1 if d in dimensions else n for d, n in enumerate(spec.shape)]
