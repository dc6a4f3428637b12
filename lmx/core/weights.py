"""The weight door: layers multiply by anything that can multiply, through these functions and no other way.

A weight's contracted dimensions come first: a query projection is `[embed, heads, head_dim]` with one input, the output
projection `[heads, head_dim, embed]` with two. Weights are kept in the master type and multiply in their operand's; their
gradients come in the master type, without being rounded to the operand's on the way.

The backward passes are written out, in the forms of `lmx.core.products`.
"""

import math
from collections.abc import Callable
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from lmx.core.products import against, by_expert, gradient_by_expert, sum_rows, weight_gradient
from lmx.kernels.wide import wide

PRODUCT = "product"
"""What a rematerialisation policy calls the result of a product with a weight."""
WHOLE = "whole"
"""What a policy calls a weight's numbers that stay for the backward pass (`Split.stays`)."""
KEPT = jax.checkpoint_policies.save_only_these_names(WHOLE)
"""What a `jax.checkpoint` within a layer keeps: without those it would gather them once more."""
E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


@flax.struct.dataclass
class Split:
    """A weight on a mesh: gathered, in the type it multiplies in, where it is used, and its gradient summed and split again.

    Attributes:
      value: the weight.
      whole: where it multiplies.
      parts: where its gradient goes.
      rest: where its numbers are before they are gathered, if that is to be said.
      stays: whether what a forward pass gathered is there for the backward pass. In a layer that is formed again, these two follow each
        other: otherwise XLA:GPU gathers twice. In others, all layers would stay whole.
    """

    value: Array
    whole: P = flax.struct.field(pytree_node=False)
    parts: P = flax.struct.field(pytree_node=False)
    rest: P | None = flax.struct.field(pytree_node=False, default=None)
    stays: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self):
        return self.value.dtype

    @property
    def T(self) -> "Split":  # noqa: N802, as of arrays
        whole, parts, rest = (None if place is None else P(*reversed(place)) for place in (self.whole, self.parts, self.rest))
        return Split(self.value.T, whole, parts, rest, self.stays)


@flax.struct.dataclass
class Part:
    """One device's part of a weight, as a manual region holds it: what `Split` is outside of one, by collectives of its own.

    Attributes:
      value: the part.
      over: pairs of a dimension and the mesh axis that splits it.
      stays: as of `Split`.
    """

    value: Array
    over: tuple[tuple[int, str], ...] = flax.struct.field(pytree_node=False)
    stays: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def dtype(self):
        return self.value.dtype


@flax.struct.dataclass
class Narrow:
    """A weight whose products are of float8 numbers (Micikevicius et al., 2022): e4m3 of operands, e5m2 of the gradients that come back.

    A tensor is divided by one power of two, such that its largest number, over all devices, just fits: scaling then rounds nothing, and
    products are those of float8 numbers, accumulated in fp32, wherever they are computed. What the backward pass needs of the input is
    kept as float8. On a mesh, weights travel as float8.

    Attributes:
      value: the weight.
    """

    value: Array | Split


@flax.struct.dataclass
class Adapted:
    """A weight and what an adapter adds to it: `base + (down scale) up` (LoRA, Hu et al., 2021); with a magnitude, each of that sum's
    columns at that length (DoRA, Liu et al., 2024, to whose gradients the length that it has of itself is a constant).

    Attributes:
      base: the weight, `[*in, *out]`.
      down: `[*in, rank]`.
      up: `[rank, *out]`.
      scale: of each rank, `[rank]`; zeros past a layer's own rank where others of its stack have more, all zeros where it has none.
      magnitude: `[*out]`.
    """

    base: "Weight"
    down: Array | Split
    up: Array | Split
    scale: Array
    magnitude: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    @property
    def T(self) -> "Weight":  # noqa: N802, as of arrays
        return merged(self).T if self.magnitude is not None else Adapted(self.base.T, self.up.T, self.down.T, self.scale)


@flax.struct.dataclass
class Twofold:
    """A tied table of which an adapter has changed one use: rows are looked up in `table`, and `head` gives the logits."""

    table: "Weight"
    head: "Weight"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.table.shape

    @property
    def dtype(self):
        return self.table.dtype


@flax.struct.dataclass
class Turned:
    """A weight for reading only, stored `[*out, *in]`: a CPU that multiplies a few rows with it reads it as fast as its memory is.

    Attributes:
      value: the weight.
      inputs: how many of its last dimensions a product contracts.
    """

    value: Array
    inputs: int = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        outputs = self.value.ndim - self.inputs
        return (*self.value.shape[outputs:], *self.value.shape[:outputs])

    @property
    def dtype(self):
        return self.value.dtype

    @property
    def T(self) -> Array:  # noqa: N802, as of arrays
        if self.value.ndim != 2:
            raise ValueError(f"only a matrix is transposed, not a weight of shape {self.shape}")
        return self.value


def turned(weight: Array, inputs: int) -> Turned:
    """A weight `[*in, *out]` as it is read fastest, its first `inputs` dimensions being contracted."""
    return Turned(jnp.moveaxis(weight, range(inputs), range(-inputs, 0)), inputs)


Weight = Array | Split | Part | Narrow | Adapted | Twofold | Turned
Numbers = Array | tuple[Array, Array]
"""Of a `Narrow` weight its float8 numbers and their scale."""
Read = tuple[Weight, Numbers | None]
STAND_INS = (Split, Part, Narrow, Adapted, Twofold, Turned)


def values(weight: Weight, dtype) -> Array:
    """A weight's numbers as a product takes them."""
    if isinstance(weight, Split):
        return _gathered(weight.value.astype(dtype), weight)
    if isinstance(weight, Part):
        numbers = weight.value.astype(dtype)
        for dimension, axis in weight.over:
            numbers = jax.lax.all_gather(numbers, axis, axis=dimension, tiled=True)
        return numbers
    return weight.astype(dtype)


def _gathered(numbers: Array, weight: Split) -> Array:
    if weight.rest is not None:
        numbers = jax.lax.with_sharding_constraint(numbers, weight.rest)
    return jax.lax.with_sharding_constraint(numbers, weight.whole)


def read(weight: Weight, dtype) -> tuple[Numbers, Read]:
    """A weight's numbers as a forward pass takes them, and what it keeps for its backward pass to take them from (`again`)."""
    numbers, placed = _numbers(weight, dtype), weight.value if isinstance(weight, Narrow) else weight
    if not (isinstance(placed, Split | Part) and placed.stays):
        return numbers, (weight, None)
    numbers = checkpoint_name(numbers, WHOLE)
    return numbers, (weight, numbers)


def again(kept: Read, dtype) -> tuple[Numbers, Weight]:
    """The numbers that a forward pass has `read`, for its backward pass, and the weight."""
    weight, numbers = kept
    return _numbers(weight, dtype) if numbers is None else numbers, weight


def _numbers(weight: Weight, dtype) -> Numbers:
    return _narrow_values(weight.value) if isinstance(weight, Narrow) else values(weight, dtype)


def gradient_of(weight: Weight, gradient: Array) -> Weight:
    """The cotangent of a weight from the gradient of its numbers."""
    if isinstance(weight, Split):
        return weight.replace(value=jax.lax.with_sharding_constraint(gradient, weight.parts))
    if isinstance(weight, Part):
        for dimension, axis in weight.over:
            gradient = jax.lax.psum_scatter(gradient, axis, scatter_dimension=dimension, tiled=True)
        return weight.replace(value=gradient)
    return gradient


def linear(x: Array, weight: Weight, bias: Weight | None = None, *, inputs: int = 1) -> Array:
    """`x W + b`, contracting the last `inputs` dimensions of x with the first `inputs` of the weight.

    Shapes: x `[..., *in]`, weight `[*in, *out]`, bias `[*out]`; gives `[..., *out]` in x's type, accumulated in fp32 at least.
    """
    if isinstance(weight, Adapted):
        y = adapted(linear(x, based(weight), inputs=inputs), x, weight, inputs=inputs)
        return y if bias is None else y + whole(bias).astype(y.dtype)
    if isinstance(weight, Turned):
        y = against(_flat(x, inputs), weight.value.reshape(math.prod(weight.shape[inputs:]), -1).astype(x.dtype), x.dtype)
        y = y.reshape(*x.shape[: x.ndim - inputs], *weight.shape[inputs:])
        return y if bias is None else y + whole(bias).astype(y.dtype)
    product = _narrow_linear if isinstance(weight, Narrow) else _linear
    return checkpoint_name(product(inputs, x, weight, None if bias is None else whole(bias)), PRODUCT)


def based(weight: Weight) -> Weight:
    """A weight without the adapters over it."""
    return based(weight.base) if isinstance(weight, Adapted) else weight


def adapted(y: Array, x: Array, weight: Weight, *, inputs: int = 1) -> Array:
    """What adapters make of y, the product of x and the weight that they are over (`based`)."""
    if not isinstance(weight, Adapted):
        return y
    return _scaled(adapted(y, x, weight.base, inputs=inputs) + _low(linear(x, weight.down, inputs=inputs), weight), weight)


def lookup(tokens: Array, weight: Weight, dtype) -> Array:
    """Rows of a table: tokens int `[...]`, weight `[vocab, embed]`; gives `[..., embed]` in `dtype`."""
    return looked_up(lambda table: jnp.take(whole(table), tokens, axis=0, mode="clip").astype(dtype), weight)


def looked_up(rows: Callable[[Array | Split], Array], weight: Weight) -> Array:
    """What `rows` finds in a table of arrays, as it is in one of any weight."""
    if isinstance(weight, Twofold):
        return looked_up(rows, weight.table)
    if isinstance(weight, Adapted):
        return _scaled(looked_up(rows, weight.base) + _low(rows(weight.down), weight), weight)
    return rows(weight)


def attend(x: Array, weight: Weight) -> Array:
    """Logits of a tied head: x `[..., embed]` against each row of weight `[vocab, embed]`; fp32 at least, `[..., vocab]`."""
    if isinstance(weight, Twofold):
        return attend(x, weight.head)
    if isinstance(weight, Adapted) and weight.magnitude is None:
        low = attend(x, weight.up) * weight.scale
        return attend(x, weight.base) + attend(low.astype(x.dtype), weight.down)
    if isinstance(weight, Adapted):
        weight = merged(weight)
    return against(x, weight.astype(x.dtype), wide(x.dtype))


def ragged(x: Array, weight: Weight, sizes: Array | None = None) -> Array:
    """Rows times the matrix of the expert that each belongs to.

    Shapes: weight `[experts, in, out]`; x `[rows, in]`, expert after expert, `sizes` (int `[experts]`) rows of each and any rest, which
    gives zeros; or, without sizes, x `[experts, rows, in]`. Gives x's shape with `out` in place of `in`, in x's type, accumulated in fp32 at least.
    """
    return checkpoint_name(_ragged(x, weight, sizes), PRODUCT)


def whole(weight: Weight) -> Array:
    """A weight's numbers in its own type, for what is no product."""
    if isinstance(weight, Adapted):
        return merged(weight)
    return _whole(weight) if isinstance(weight, Split) else weight


def merged(weight: Adapted) -> Array:
    """An adapted weight as one array, in its base's type; the sum is formed in fp32 at least."""
    full = _sum(weight)
    return (full if weight.magnitude is None else full * _stretch(weight, full)).astype(weight.dtype)


def _sum(weight: Adapted) -> Array:
    base, down, up = (whole(part) for part in (weight.base, weight.down, weight.up))
    kind = wide(weight.dtype)
    added = jnp.tensordot(down.astype(kind) * weight.scale.astype(kind), up.astype(kind), 1, precision=jax.lax.Precision.HIGHEST)
    return base.astype(kind) + added


def _low(x: Array, weight: Adapted) -> Array:
    return linear(x * weight.scale.astype(x.dtype), weight.up)


def _stretch(weight: Adapted, full: Array) -> Array:
    """By what each column is multiplied, `[*out]`."""
    lengths = jnp.sqrt(jnp.sum(jnp.square(full), tuple(range(full.ndim - weight.magnitude.ndim))))
    return jnp.where(jnp.any(weight.scale != 0), weight.magnitude / jax.lax.stop_gradient(lengths), 1)


def _scaled(y: Array, weight: Adapted) -> Array:
    return y if weight.magnitude is None else y * _stretch(weight, _sum(weight)).astype(y.dtype)


@jax.custom_vjp
def _whole(weight: Split) -> Array:
    return values(weight, weight.dtype)


_whole.defvjp(lambda weight: (_whole(weight), weight), lambda weight, g: (gradient_of(weight, g),))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(inputs: int, x: Array, weight: Weight, bias: Array | None) -> Array:
    return _linear_forward(inputs, x, weight, bias)[0]


def _linear_forward(inputs, x, weight, bias):
    numbers, kept = read(weight, x.dtype)
    y = _flat(x, inputs) @ _matrix(numbers, inputs)
    y = y.reshape(*x.shape[: x.ndim - inputs], *weight.shape[inputs:])
    return y if bias is None else y + bias.astype(x.dtype), (x, kept, bias)


def _linear_backward(inputs, saved, g):
    x, kept, bias = saved
    numbers, weight = again(kept, g.dtype)
    flat, g = _flat(x, inputs), _flat(g, len(weight.shape) - inputs)
    dx = jax.lax.dot_general(g, _matrix(numbers, inputs), (((g.ndim - 1,), (1,)), ((), ()))).reshape(x.shape)
    d_weight = weight_gradient(flat, g, weight.dtype).reshape(weight.shape)
    d_bias = None if bias is None else sum_rows(g, bias.dtype).reshape(bias.shape)
    return dx, gradient_of(weight, d_weight), d_bias


_linear.defvjp(_linear_forward, _linear_backward)


def narrowed(sublayer: dict) -> dict:
    """A sublayer's parameters, its linears' weights made `Narrow`; of adapted ones what the adapter is over."""

    def narrow(weight: Weight) -> Weight:
        return weight.replace(base=narrow(weight.base)) if isinstance(weight, Adapted) else Narrow(weight)

    return {name: one | {"weight": narrow(one["weight"])} if "weight" in one else one for name, one in sublayer.items()}


def quantised(a: Array, dtype) -> tuple[Array, Array]:
    """An array as float8 numbers, and the power of two, fp32, that they are to be multiplied by."""
    largest = jnp.max(jnp.abs(a)).astype(jnp.float32) / float(jnp.finfo(dtype).max)
    scale = jnp.ldexp(jnp.float32(1), jnp.where(largest > 0, jnp.frexp(largest)[1], 0))
    return (a.astype(jnp.float32) / jnp.where(jnp.isfinite(largest), scale, largest)).astype(dtype), scale


def _narrow_values(weight: Array | Split) -> tuple[Array, Array]:
    if not isinstance(weight, Split):
        return quantised(weight, E4M3)
    numbers, scale = quantised(weight.value, E4M3)
    return _gathered(numbers, weight), scale


def _scaled_dot(a: tuple[Array, Array], b: tuple[Array, Array], over, dtype, precision=None) -> Array:
    y = jax.lax.dot_general(a[0], b[0], (over, ((), ())), precision=precision, preferred_element_type=dtype)
    return y * (a[1] * b[1]).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _narrow_linear(inputs: int, x: Array, weight: Narrow, bias: Array | None) -> Array:
    return _narrow_forward(inputs, x, weight, bias)[0]


def _narrow_forward(inputs, x, weight, bias):
    flat, ((numbers, scale), kept) = quantised(_flat(x, inputs), E4M3), read(weight, x.dtype)
    y = _scaled_dot(flat, (_matrix(numbers, inputs), scale), ((flat[0].ndim - 1,), (0,)), x.dtype)
    y = y.reshape(*x.shape[: x.ndim - inputs], *weight.value.shape[inputs:])
    return y if bias is None else y + bias.astype(x.dtype), (flat, jnp.zeros((0, *x.shape[x.ndim - inputs :]), x.dtype), kept, bias)


def _narrow_backward(inputs, saved, g):
    flat, like, kept, bias = saved
    (numbers, scale), weight = again(kept, g.dtype)
    g = _flat(g, len(weight.value.shape) - inputs)
    narrow = quantised(g, E5M2)
    # Gradients are accumulated in all of fp32: by default the units that multiply float8 keep fewer bits.
    product = partial(_scaled_dot, precision=jax.lax.Precision.HIGHEST)
    dx = product(narrow, (_matrix(numbers, inputs), scale), ((g.ndim - 1,), (1,)), like.dtype).reshape(*g.shape[:-1], *like.shape[1:])
    lead = tuple(range(g.ndim - 1))
    d_weight = product(flat, narrow, (lead, lead), weight.value.dtype).reshape(weight.value.shape)
    d_bias = None if bias is None else sum_rows(g, bias.dtype).reshape(bias.shape)
    return dx, Narrow(gradient_of(weight.value, d_weight)), d_bias


_narrow_linear.defvjp(_narrow_forward, _narrow_backward)


@jax.custom_vjp
def _ragged(x: Array, weight: Weight, sizes: Array | None) -> Array:
    return _ragged_forward(x, weight, sizes)[0]


def _ragged_forward(x, weight, sizes):
    numbers, kept = read(weight, x.dtype)
    return by_expert(x, numbers, sizes), (x, kept, sizes)


def _ragged_backward(saved, g):
    x, kept, sizes = saved
    numbers, weight = again(kept, g.dtype)
    dx = by_expert(g, numbers.swapaxes(1, 2), sizes)
    return dx, gradient_of(weight, gradient_by_expert(x, g, sizes, weight.dtype)), None


_ragged.defvjp(_ragged_forward, _ragged_backward)


def _flat(x: Array, last: int) -> Array:
    """x with its last dimensions as one; the others are left as they are, since different mesh axes may shard them."""
    return x.reshape(*x.shape[: x.ndim - last], -1)


def _matrix(weight: Array, inputs: int) -> Array:
    return weight.reshape(math.prod(weight.shape[:inputs]), -1)
