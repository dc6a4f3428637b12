"""LayerNorm (Ba et al., 2016) and RMSNorm (Zhang and Sennrich, 2019); statistics in fp32 at least."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from lmx.core.params import ONES, ZEROS, ParamSpec
from lmx.core.products import at_rest, sum_rows
from lmx.core.tree import Tree
from lmx.core.weights import whole
from lmx.kernels.wide import widened
from lmx.models.config import Norm


def specs(kind: Norm, size: int, axis: str, *, bias: bool, offset: bool = False) -> Tree:
    """A norm's parameters over one dimension: a scale (less one, with an offset), and for LayerNorm a bias where biases are on."""
    scale = {"scale": ParamSpec((size,), (axis,), init=ZEROS if offset else ONES)}
    return scale | ({"bias": ParamSpec((size,), (axis,), init=ZEROS)} if bias and kind == "layernorm" else {})


def norm(x: Array, params: Tree, kind: Norm, epsilon: float, *, offset: bool = False) -> Array:
    """Normalises the last dimension of x; gives x's type. With an offset it multiplies by 1 + scale."""
    scale = whole(params["scale"])
    return _norm(kind, epsilon, x, scale + 1 if offset else scale, whole(params["bias"]) if "bias" in params else None)


def in_two(x: Array) -> tuple[Array, Array]:
    """The mean of the last dimension, which it keeps as one, and the mean square about it."""
    mean = x.mean(-1, keepdims=True)
    return mean, jnp.mean(jnp.square(x - mean), -1, keepdims=True)


def in_one(x: Array) -> tuple[Array, Array]:
    """`in_two` in one pass, which a GPU makes where it writes x: what two parts have is joined exactly (Chan et al., 1979)."""

    def both(a, b):
        (mean, square, count), (other, more, others) = a, b
        total, apart = count + others, other - mean
        share = others / jnp.maximum(total, 1)
        return mean + apart * share, square + more + apart * apart * (count * share), total

    zero = jnp.zeros((), x.dtype)
    mean, square, _ = jax.lax.reduce((x, jnp.zeros_like(x), jnp.ones_like(x)), (zero, zero, zero), both, (x.ndim - 1,))
    return mean[..., None], square[..., None] / x.shape[-1]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _norm(kind: Norm, epsilon: float, x: Array, scale: Array, bias: Array | None) -> Array:
    return _forward(kind, epsilon, x, scale, bias)[0]


def _forward(kind, epsilon, x, scale, bias):
    wide = widened(x)
    if kind == "layernorm":
        mean, square = jax.lax.platform_dependent(wide, cpu=in_two, default=in_one)
    else:
        mean, square = jnp.zeros((), wide.dtype), jnp.mean(jnp.square(wide), -1, keepdims=True)
    factor = jax.lax.rsqrt(square + epsilon)
    y = (wide - mean) * factor * scale
    return (y if bias is None else y + bias).astype(x.dtype), (x, mean, factor, scale, bias)


def _backward(kind, epsilon, saved, g):
    """Written out so that only x is kept, and two numbers of each row, and the sums over rows are `lmx.core.weights`'."""
    (x, mean, factor), (scale, bias) = at_rest(saved[:3]), saved[3:]
    y = (widened(x) - mean) * factor
    g = widened(g)
    h = g * scale
    dx = h - y * jnp.mean(h * y, -1, keepdims=True)
    if kind == "layernorm":
        dx = dx - h.mean(-1, keepdims=True)

    def summed(a: Array, like: Array) -> Array:
        return sum_rows(a, like.dtype)

    return (factor * dx).astype(x.dtype), summed(g * y, scale), None if bias is None else summed(g, bias)


_norm.defvjp(_forward, _backward)
