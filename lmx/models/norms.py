"""LayerNorm (Ba et al., 2016) and RMSNorm (Zhang and Sennrich, 2019); statistics in fp32."""

import jax
import jax.numpy as jnp
from jax import Array

from lmx.core.params import ONES, ZEROS, ParamSpec
from lmx.core.tree import Tree
from lmx.models.config import Norm


def specs(kind: Norm, size: int, axis: str, *, bias: bool) -> Tree:
    """A norm's parameters over one dimension: a scale, and for LayerNorm a bias where biases are on."""
    scale = {"scale": ParamSpec((size,), (axis,), init=ONES)}
    return scale | ({"bias": ParamSpec((size,), (axis,), init=ZEROS)} if bias and kind == "layernorm" else {})


def norm(x: Array, params: Tree, kind: Norm, epsilon: float) -> Array:
    """Normalises the last dimension of x; gives x's type."""
    y = x.astype(jnp.float32)
    if kind == "layernorm":
        y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + epsilon) * params["scale"]
    return (y + params["bias"] if "bias" in params else y).astype(x.dtype)
