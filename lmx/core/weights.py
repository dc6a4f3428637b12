"""The weight door: layers multiply by anything that can multiply, through these functions and no other way.

A weight's contracted dimensions come first: a query projection is `[embed, heads, head_dim]` with one input, the output
projection `[heads, head_dim, embed]` with two. Weights are kept in the master type and multiply in their operand's; their
gradients come in the master type, without being rounded to the operand's on the way.

The backward passes are written out because XLA:CPU is particular about how a product is put (measured in
`experiments/bench/README.md`); they are the same mathematics, and no slower elsewhere.
"""

import math
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

PRODUCT = "product"
"""What a rematerialisation policy calls the result of a product with a weight."""
NARROW = 256
"""Up to this width of its output, a weight's gradient is computed transposed."""


@flax.struct.dataclass
class Split:
    """A weight that lies split over devices: gathered, in the type it multiplies in, where it is used, and its gradient split again.

    Attributes:
      value: the weight.
      whole: where it multiplies.
      parts: where its gradient goes.
    """

    value: Array
    whole: P = flax.struct.field(pytree_node=False)
    parts: P = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self):
        return self.value.dtype

    @property
    def T(self) -> "Split":  # noqa: N802, as of arrays
        return Split(self.value.T, P(*reversed(self.whole)), P(*reversed(self.parts)))


Weight = Array | Split


def values(weight: Weight, dtype) -> Array:
    """A weight's numbers as a product takes them."""
    if isinstance(weight, Split):
        return jax.lax.with_sharding_constraint(weight.value.astype(dtype), weight.whole)
    return weight.astype(dtype)


def gradient_of(weight: Weight, gradient: Array) -> Weight:
    """The cotangent of a weight from the gradient of its numbers."""
    if isinstance(weight, Split):
        return weight.replace(value=jax.lax.with_sharding_constraint(gradient, weight.parts))
    return gradient


def linear(x: Array, weight: Weight, bias: Weight | None = None, *, inputs: int = 1) -> Array:
    """`x W + b`, contracting the last `inputs` dimensions of x with the first `inputs` of the weight.

    Shapes: x `[..., *in]`, weight `[*in, *out]`, bias `[*out]`; gives `[..., *out]` in x's type, accumulated in fp32.
    """
    return checkpoint_name(_linear(inputs, x, weight, None if bias is None else whole(bias)), PRODUCT)


def lookup(tokens: Array, weight: Weight, dtype) -> Array:
    """Rows of a table: tokens int `[...]`, weight `[vocab, embed]`; gives `[..., embed]` in `dtype`."""
    return jnp.take(whole(weight), tokens, axis=0, mode="clip").astype(dtype)


def attend(x: Array, weight: Array) -> Array:
    """Logits of a tied head: x `[..., embed]` against each row of weight `[vocab, embed]`; fp32 `[..., vocab]`."""
    return dot(x, weight.astype(x.dtype), x.ndim - 1, 1, jnp.float32)


def dot(a: Array, b: Array, i: int, j: int, dtype=None) -> Array:
    """The product of two arrays over dimension i of one and j of the other, in `dtype` (theirs when None)."""
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=dtype)


def sum_rows(g: Array, dtype) -> Array:
    """The sum of `[..., columns]` over all rows, as a product: XLA:CPU turns the reduction into something slow."""
    lead = tuple(range(g.ndim - 1))
    return jax.lax.dot_general(jnp.ones(g.shape[:-1], g.dtype), g, ((lead, lead), ((), ())), preferred_element_type=dtype)


def weight_gradient(x: Array, g: Array, dtype) -> Array:
    """`x^T g` of x `[..., in]` and g `[..., out]`, in the form that is fastest for its shape."""
    lead = tuple(range(x.ndim - 1))
    over_rows = partial(jax.lax.dot_general, dimension_numbers=((lead, lead), ((), ())), preferred_element_type=dtype)
    if g.shape[-1] < x.shape[-1] and g.shape[-1] <= NARROW:
        # The narrow result is transposed, not the wide operand; the barrier keeps XLA from folding that back.
        return jax.lax.optimization_barrier(over_rows(g, x)).T
    return over_rows(x, g)


def whole(weight: Weight) -> Array:
    """A weight's numbers in its own type, for what is no product."""
    return _whole(weight) if isinstance(weight, Split) else weight


@jax.custom_vjp
def _whole(weight: Split) -> Array:
    return values(weight, weight.dtype)


_whole.defvjp(lambda weight: (_whole(weight), weight), lambda weight, g: (gradient_of(weight, g),))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(inputs: int, x: Array, weight: Weight, bias: Array | None) -> Array:
    y = _flat(x, inputs) @ _matrix(values(weight, x.dtype), inputs)
    y = y.reshape(*x.shape[: x.ndim - inputs], *weight.shape[inputs:])
    return y if bias is None else y + bias.astype(x.dtype)


def _linear_forward(inputs, x, weight, bias):
    return _linear(inputs, x, weight, bias), (x, weight, bias)


def _linear_backward(inputs, saved, g):
    x, weight, bias = saved
    flat, g = _flat(x, inputs), _flat(g, len(weight.shape) - inputs)
    dx = jax.lax.dot_general(g, _matrix(values(weight, g.dtype), inputs), (((g.ndim - 1,), (1,)), ((), ()))).reshape(x.shape)
    d_weight = weight_gradient(flat, g, weight.dtype).reshape(weight.shape)
    d_bias = None if bias is None else sum_rows(g, bias.dtype).reshape(bias.shape)
    return dx, gradient_of(weight, d_weight), d_bias


_linear.defvjp(_linear_forward, _linear_backward)


def _flat(x: Array, last: int) -> Array:
    """x with its last dimensions as one; the others are left as they are, since different mesh axes may shard them."""
    return x.reshape(*x.shape[: x.ndim - last], -1)


def _matrix(weight: Array, inputs: int) -> Array:
    return weight.reshape(math.prod(weight.shape[:inputs]), -1)
