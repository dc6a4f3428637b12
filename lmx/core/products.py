"""Products in the form that hardware computes fastest: the same mathematics, put in different ways.

The forms of CPUs are there because XLA:CPU is particular about how a product is put (measured in `experiments/bench/README.md`).
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from lmx.core.tree import Tree
from lmx.kernels import devices
from lmx.kernels.wide import wide

NARROW = 256
"""Up to this width of its output, a weight's gradient is computed transposed on a CPU."""
FEW = 64
"""Up to so many rows a CPU multiplies a matrix stored `[out, in]` faster with that as the left operand."""
TILE = 64
"""Rows that a CPU multiplies at once with one expert's weight; 8 where experts have fewer (decoding)."""


def dot(a: Array, b: Array, i: int, j: int, dtype=None) -> Array:
    """The product of two arrays over dimension i of one and j of the other, in `dtype` (theirs when None)."""
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=dtype)


def sum_rows(g: Array, dtype) -> Array:
    """The sum of `[..., columns]` over all rows. On a CPU it is a product: XLA:CPU turns the reduction into something slow."""
    lead = tuple(range(g.ndim - 1))

    def product(g: Array) -> Array:
        return jax.lax.dot_general(jnp.ones(g.shape[:-1], g.dtype), g, ((lead, lead), ((), ())), preferred_element_type=dtype)

    return jax.lax.platform_dependent(g, cpu=product, default=lambda g: g.sum(lead, dtype=dtype))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def shifted(y: Array, bias: Array, rest: bool) -> Array:
    """`y + b` of y `[..., columns]` and a bias in its own type, for what adds a product's bias where it reads the product; `rest`: whether
    y's gradient is to lie in memory before its rows are summed (`at_rest`), or the sum may ride on what forms it."""
    return y + bias.astype(y.dtype)


shifted.defvjp(
    lambda y, bias, rest: (shifted(y, bias, rest), bias),
    lambda rest, bias, g: (g, sum_rows(at_rest(g) if rest else g, bias.dtype)),
)


def at_rest(tree: Tree) -> Tree:
    """What lies in memory anyway, for what is to read it there: XLA:GPU would rather form it anew, and keep more of it."""
    return jax.lax.platform_dependent(tree, cpu=lambda tree: tree, default=jax.lax.optimization_barrier)


def weight_gradient(x: Array, g: Array, dtype) -> Array:
    """`x^T g` of x `[..., in]` and g `[..., out]`, in the form that is fastest for its shape."""
    lead = tuple(range(x.ndim - 1))
    over_rows = partial(jax.lax.dot_general, dimension_numbers=((lead, lead), ((), ())), preferred_element_type=dtype)
    if g.shape[-1] < x.shape[-1] and g.shape[-1] <= NARROW:
        # The narrow result is transposed, not the wide operand; the barrier keeps XLA from folding that back.
        return jax.lax.platform_dependent(x, g, cpu=lambda x, g: jax.lax.optimization_barrier(over_rows(g, x)).T, default=over_rows)
    return over_rows(x, g)


def against(x: Array, matrix: Array, dtype) -> Array:
    """x `[..., in]` times each row of a matrix `[out, in]`, in `dtype`. On a CPU the form of a product of a few rows decides how fast the
    matrix is read: fp32 wants it as the left operand, narrow types as the right one, two rows at least, and sums in fp32."""
    rows = math.prod(x.shape[:-1])
    if rows > FEW or not devices.on_cpu():
        return dot(x, matrix, x.ndim - 1, 1, dtype)
    flat = x.reshape(rows, -1)
    if x.dtype.itemsize < 4:
        flat = jnp.concatenate([flat, flat]) if rows == 1 else flat
        found = dot(flat, matrix, 1, 1, wide(x.dtype))[:rows].astype(dtype)
    else:  # without the barrier XLA turns the product round again
        found = jax.lax.optimization_barrier(dot(matrix, flat, 1, 1, dtype)).T
    return found.reshape(*x.shape[:-1], -1)


def by_expert(x: Array, weight: Array, sizes: Array | None) -> Array:
    """Rows times their expert's matrix, of shapes as `lmx.core.weights.ragged` says."""
    if sizes is None:
        return jax.lax.dot_general(x, weight, (((2,), (1,)), ((0,), (0,))))
    # XLA:CPU's ragged_dot multiplies every row with every expert.
    return jax.lax.platform_dependent(x, weight, sizes, cpu=in_tiles, default=jax.lax.ragged_dot)


def gradient_by_expert(x: Array, g: Array, sizes: Array | None, dtype) -> Array:
    """`x^T g` of each expert's rows, `[experts, in, out]`."""
    if sizes is None:
        return jax.lax.dot_general(x, g, (((1,), (1,)), ((0,), (0,))), preferred_element_type=dtype)
    numbers = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    grouped = partial(jax.lax.ragged_dot_general, ragged_dot_dimension_numbers=numbers, preferred_element_type=dtype)
    return jax.lax.platform_dependent(x, g, sizes, cpu=partial(gradient_in_tiles, dtype=dtype), default=grouped)


def in_tiles(x: Array, weight: Array, sizes: Array) -> Array:
    """`jax.lax.ragged_dot` as a loop over experts that have rows, and over tiles of their rows. A tile that reaches beyond its expert's
    rows writes over the next one's, whose turn is still to come."""
    tile, starts = _tile(x, sizes), jnp.cumsum(sizes) - sizes
    padded = jnp.pad(x, ((0, tile), (0, 0)))

    def expert(e: Array, y: Array) -> Array:
        matrix = weight[e]

        def step(i: Array, y: Array) -> Array:
            rows = jax.lax.dynamic_slice_in_dim(padded, starts[e] + i * tile, tile)
            return jax.lax.dynamic_update_slice_in_dim(y, rows @ matrix, starts[e] + i * tile, 0)

        return jax.lax.fori_loop(0, -(-sizes[e] // tile), step, y)

    y = _over_used(expert, sizes, jnp.zeros((padded.shape[0], weight.shape[2]), x.dtype))
    return jnp.where(jnp.arange(len(x))[:, None] < sizes.sum(), y[: len(x)], 0)


def gradient_in_tiles(x: Array, g: Array, sizes: Array, dtype) -> Array:
    """`x^T g` of each expert's rows, `[experts, in, out]`, in the same way."""
    tile, starts = _tile(x, sizes), jnp.cumsum(sizes) - sizes
    x, g = (jnp.pad(a, ((0, tile), (0, 0))) for a in (x, g))

    def expert(e: Array, gradients: Array) -> Array:
        def step(i: Array, gradient: Array) -> Array:
            a, b = (jax.lax.dynamic_slice_in_dim(z, starts[e] + i * tile, tile) for z in (x, g))
            own = jnp.arange(tile)[:, None] < sizes[e] - i * tile
            return gradient + dot(jnp.where(own, a, 0), b, 0, 0, dtype)

        return gradients.at[e].set(jax.lax.fori_loop(0, -(-sizes[e] // tile), step, jnp.zeros(gradients.shape[1:], dtype)))

    return _over_used(expert, sizes, jnp.zeros((len(sizes), x.shape[1], g.shape[1]), dtype))


def _tile(x: Array, sizes: Array) -> int:
    return TILE if len(x) >= TILE * len(sizes) else 8


def _over_used(expert: Callable[[Array, Array], Array], sizes: Array, found: Array) -> Array:
    """`found = expert(e, found)` for each expert that has rows, in order: the others' weights are not even read."""
    used = jnp.argsort(sizes == 0, stable=True)
    return jax.lax.fori_loop(0, (sizes > 0).sum(), lambda i, found: expert(used[i], found), found)
