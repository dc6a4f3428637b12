"""Adam with moments in eight bits (Dettmers et al., 2022): 2.03 bytes a parameter in the place of 8.

Each block of 256 numbers is kept as the largest size among them, in fp32, and for each number one of 256 codes between -1 and 1 (0 and 1
for mean squares), which lie closer together near 0 ("dynamic": Dettmers, 2016). A block is a tile of a parameter's dimensions, so that
codes have the parameter's shape and both are sharded as it is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from lmx.core.params import ParamSpec
from lmx.core.tree import Tree
from lmx.parallel.layout import Layout
from lmx.parallel.rules import rules

BLOCK = 256
"""Numbers that share a scale."""
SMALL = 4096
"""A layer's matrix of fewer numbers keeps its moments in full, as in bitsandbytes."""
SHARDS = 64
"""A tile leaves so many of itself in a dimension where it can."""

Tile = tuple[int, ...]
"""A block's size in each dimension."""


def tile(spec: ParamSpec) -> Tile | None:
    """The blocks of a parameter, the same on every mesh; None where it is small, no matrix or does not divide: moments are kept in full.

    A block lies within one layer and expert. It takes what it can of dimensions that no mesh splits (a head's), and of others powers of two
    that are alike, so that shards hold whole blocks. One across shards would give the same numbers, more slowly.
    """
    split = dict(rules(Layout(), split=True))
    sizes = [1 if axis in ("layers", "experts") else n for axis, n in zip(spec.axes, spec.shape, strict=True)]
    if np.prod(sizes) < SMALL or not spec.sides[1]:
        return None
    found = [1] * len(sizes)
    while np.prod(found) < BLOCK:
        wider = [i for i, n in enumerate(sizes) if n % (2 * found[i]) == 0]
        if not wider:
            return None
        roomy = {i: min(sizes[i] // (2 * found[i]), SHARDS) if spec.axes[i] in split else SHARDS + 1 for i in wider}
        found[max(wider, key=lambda i: (roomy[i], -found[i], i))] *= 2
    return tuple(found)


def codes(*, signed: bool) -> np.ndarray:
    """The 256 numbers of dynamic quantisation in order, fp32: in each of seven decades the middles of twice as many intervals as in the one
    below, with both signs or twice over without, and 0 and 1."""
    found = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1.0, 2 ** (decade + (not signed)) + 1)
        middles = 10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2
        found += [*middles, *(-middles if signed else [])]
    return np.sort(np.float32(found))


def _edges(*, signed: bool) -> np.ndarray:
    """Above which fp32 number each code but the first is nearest: halfway from the one below, rounded down."""
    exact = codes(signed=signed).astype(np.float64)
    halfway = (exact[1:] + exact[:-1]) / 2
    rounded = np.float32(halfway)
    return np.where(rounded > halfway, np.nextafter(rounded, np.float32(-np.inf)), rounded)


def quantise(x: Array, tile: Tile, *, signed: bool) -> tuple[Array, Array]:
    """The nearest codes, uint8 in x's shape, and each block's scale, fp32 in x's shape over the tile's.

    Numbers below fp32's smallest normal one are zeros, whatever a device makes of them. A mean square that is none never becomes zero: a
    step divides by its root.
    """
    tiny = np.finfo(np.float32).tiny
    blocks = _blocks(jnp.where(jnp.abs(x) < tiny, 0, x.astype(jnp.float32)), tile)
    scales = jnp.abs(blocks).max(_within(tile), keepdims=True)
    shares = (blocks / jnp.where(scales == 0, 1, scales)).reshape(x.shape)
    edges, found = jnp.asarray(_edges(signed=signed)), jnp.zeros(x.shape, jnp.int32)
    for bit in reversed(range(8)):
        higher = found + 2**bit
        found = jnp.where(shares > edges[higher - 1], higher, found)
    if not signed:
        found = jnp.maximum(found, x >= tiny)
    return found.astype(jnp.uint8), scales.squeeze(_within(tile))


def dequantise(found: Array, scales: Array, tile: Tile, *, signed: bool) -> Array:
    """The fp32 numbers that codes and scales stand for."""
    shares = _blocks(jnp.asarray(codes(signed=signed))[found.astype(jnp.int32)], tile)
    return (shares * jnp.expand_dims(scales, _within(tile))).reshape(found.shape)


def _blocks(x: Array, tile: Tile) -> Array:
    """`[a, b]` as `[a / tile, tile, b / tile, tile]`."""
    return x.reshape([m for n, t in zip(x.shape, tile, strict=True) for m in (n // t, t)])


def _within(tile: Tile) -> tuple[int, ...]:
    return tuple(range(1, 2 * len(tile), 2))


class Moments(NamedTuple):
    """Adam's state: steps taken, and the mean and mean square of each parameter's gradient as codes and scales."""

    count: Array
    mean: Tree
    mean_scales: Tree
    square: Tree
    square_scales: Tree


def scale_by_adam(b1: float, b2: float, epsilon: float, tiles: Tree) -> optax.GradientTransformation:
    """`optax.scale_by_adam` for parameters with blocks, `tiles` in a tree of their own; computes in fp32."""

    def init(params: Tree) -> Moments:
        def zeros(*, signed: bool) -> tuple[Tree, Tree]:
            zero = np.searchsorted(codes(signed=signed), 0)
            scales = jax.tree.map(lambda a, tile: jnp.zeros(np.floor_divide(a.shape, tile), jnp.float32), params, tiles)
            return jax.tree.map(lambda a: jnp.full(a.shape, zero, jnp.uint8), params), scales

        return Moments(jnp.int32(0), *zeros(signed=True), *zeros(signed=False))

    def update(gradients: Tree, state: Moments, params: Tree | None = None) -> tuple[Tree, Moments]:
        count = state.count + 1

        def step(g, tile, mean, mean_scales, square, square_scales):
            wide = g.astype(jnp.float32)
            m = b1 * dequantise(mean, mean_scales, tile, signed=True) + (1 - b1) * wide
            v = b2 * dequantise(square, square_scales, tile, signed=False) + (1 - b2) * jnp.square(wide)
            moved = (m / (1 - b1**count)) / (jnp.sqrt(v / (1 - b2**count)) + epsilon)
            return moved.astype(g.dtype), *quantise(m, tile, signed=True), *quantise(v, tile, signed=False)

        places = jax.tree.structure(gradients)
        found = places.flatten_up_to(jax.tree.map(step, gradients, tiles, *state[1:]))
        updates, *moments = (places.unflatten([five[i] for five in found]) for i in range(5))
        return updates, Moments(count, *moments)

    return optax.GradientTransformation(init, update)
