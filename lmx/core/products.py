"""Products in the form that hardware computes fastest: the same mathematics, put in different ways.

The forms of CPUs are there because XLA:CPU is particular about how a product is put (measured in `experiments/bench/README.md`).
"""

import math
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
