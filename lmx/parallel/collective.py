"""Products that talk while they multiply: tensor parallelism's gathers and sums taken apart (Wang et al., 2023, "Overlap communication with
dependent computation via decomposition").

Between sublayers a sequence is split over the tensor devices. A projection needs the whole of it: instead of gathering first, each device
multiplies the part that it has while that travels on and the next one comes. The projection back makes sums of which each device keeps a
part: instead of summing at the end, each adds its share to the part that comes by, and that travels on while the next is multiplied. The
backward passes are the same two ways round the ring.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from lmx.core.execution import Execution, Rules
from lmx.core.products import weight_gradient
from lmx.core.tree import Tree
from lmx.core.weights import PRODUCT, Split, Weight, adapted, again, based, gradient_of, linear, read, whole
from lmx.parallel.manual import axes, manual, names
from lmx.parallel.rules import partition

AXIS = "tensor"
BETWEEN, WITHIN = ("batch", "sequence", None), ("batch", "length")


def goes_round(shape: tuple[int, ...], execution: Execution) -> bool:
    """Whether hidden states `[batch, length, embed]` enter and leave a sublayer a part at a time."""
    if not execution.collective_matmul or execution.rules is None:
        return False
    return AXIS in names(partition(BETWEEN, shape, execution.rules, axes()))


def linears(x: Float[Array, "batch length embed"], layers: Sequence[Tree], output: str, execution: Execution) -> list[Array]:
    """`lmx.core.weights.linear` of one input through several layers `{"weight": [embed, *out], "bias": [*out]}`; `output` names the first
    dimension of `out`. Where it `goes_round`, x lies as between sublayers, else whole along the length."""
    if not goes_round(x.shape, execution):
        return [linear(x, layer["weight"], layer.get("bias")) for layer in layers]
    products = _into((execution.rules, output), x, tuple(based(layer["weight"]) for layer in layers))
    return [_finished(adapted(y, x, layer["weight"]), layer) for y, layer in zip(products, layers, strict=True)]


def linear_back(x: Array, layer: Tree, input: str, execution: Execution) -> Float[Array, "batch length embed"]:
    """`lmx.core.weights.linear` back to the hidden states, of x `[batch, length, *in]` through `{"weight": [*in, embed], "bias": [embed]}`;
    `input` names the first dimension of `in`. Where it `goes_round`, the result lies as between sublayers."""
    weight = layer["weight"]
    if not execution.collective_matmul or not goes_round((*x.shape[:2], weight.shape[-1]), execution):
        return linear(x, weight, layer.get("bias"), inputs=x.ndim - 2)
    y = adapted(_out_of((execution.rules, input), x, based(weight)), x, weight, inputs=x.ndim - 2)
    return _finished(y, layer)


def _finished(y: Array, layer: Tree) -> Array:
    return checkpoint_name(y + whole(layer["bias"]).astype(y.dtype) if "bias" in layer else y, PRODUCT)


def _parts(x: Array) -> Iterator[tuple[Array, Array]]:
    """Every device's part of x, the own one first, and which one it is."""
    n, me = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    for step in range(n):
        following = _on(x, n) if step < n - 1 else x
        yield (me - step) % n, x
        x = following


def _sum_of_parts(part) -> Array:
    """The sum over devices of `part(which)`, of the part that is this one's."""
    n, me = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    total = part((me - 1) % n)
    for step in range(2, n + 1):
        total = _on(total, n) + part((me - step) % n)
    return total


def _on(x: Array, n: int) -> Array:
    return jax.lax.ppermute(x, AXIS, [(i, (i + 1) % n) for i in range(n)])


def _cut(x: Array) -> Array:
    """`[batch, length, columns]` as `[parts, batch, length / parts, columns]`."""
    n = jax.lax.axis_size(AXIS)
    return x.reshape(x.shape[0], n, x.shape[1] // n, -1).swapaxes(0, 1)


def _joined(parts: Array) -> Array:
    return parts.swapaxes(0, 1).reshape(parts.shape[1], -1, parts.shape[-1])


def _taken(cut: Array, which: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(cut, which, keepdims=False)


def _put(cut: Array, which: Array, part: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(cut, part, which, 0)


def _times(g: Array, w: Array) -> Array:
    """`g w^T`."""
    return jax.lax.dot_general(g, w, (((g.ndim - 1,), (1,)), ((), ())))


class _Places:
    """Where a weight is whole as far as products go, and where its gradient is to be: as `Split` says, or as its names do."""

    def __init__(self, weight: Weight, axes_of: tuple[str | None, ...], rules: Rules):
        split = isinstance(weight, Split)
        self.whole = weight.whole if split else partition(axes_of, weight.shape, rules, axes())
        self.parts = weight.parts if split else self.whole

    def summed(self, gradient: Array, over: tuple[str, ...]) -> Array:
        """The gradient from those of the devices along mesh axes that split tokens."""
        for dimension, (multiplies, part) in enumerate(zip(self.whole, self.parts, strict=True)):
            for axis in names(P(part)):
                if axis not in names(P(multiplies)):
                    gradient = jax.lax.psum_scatter(gradient, axis, scatter_dimension=dimension, tiled=True)
                    over = tuple(a for a in over if a != axis)
        return jax.lax.psum(gradient, over) if over else gradient


def _into_places(static, x_shape, weights) -> tuple[P, tuple[P, ...], list[_Places]]:
    rules, output = static
    of_x = partition(BETWEEN, x_shape, rules, axes())
    shapes = [(*x_shape[:2], *w.shape[1:]) for w in weights]
    of_y = tuple(partition((*WITHIN, output, *(None,) * (len(s) - 3)), s, rules, axes()) for s in shapes)
    for place, shape in zip(of_y, shapes, strict=True):
        _require_part(place, output, shape[2])
    return of_x, of_y, [_Places(w, (None, output, *(None,) * (len(w.shape) - 2)), rules) for w in weights]


def _require_part(place: P, name: str, size: int) -> None:
    """Each device adds its share to what goes round: a share that all have would be added by all."""
    if AXIS not in names(place):
        raise ValueError(
            f"{name}={size} is not divisible by layout.tensor={axes()[AXIS]}, so layout.collective_matmul has no part of it to add"
        )


def _tokens(of_x: P) -> tuple[str, ...]:
    return tuple(axis for axis in names(of_x) if axis != AXIS)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _into(static, x: Array, weights: tuple[Weight, ...]) -> tuple[Array, ...]:
    return _into_forward(static, x, weights)[0]


def _into_forward(static, x, weights):
    of_x, of_y, places = _into_places(static, x.shape, weights)

    def local(x, numbers):
        found = [None] * len(numbers)
        for which, part in _parts(x):
            for k, w in enumerate(numbers):
                y = part @ w.reshape(w.shape[0], -1)
                found[k] = _put(jnp.zeros((jax.lax.axis_size(AXIS), *y.shape), y.dtype) if found[k] is None else found[k], which, y)
        return tuple(_joined(y).reshape(x.shape[0], -1, *w.shape[1:]) for y, w in zip(found, numbers, strict=True))

    numbers, kept = zip(*(read(w, x.dtype) for w in weights), strict=True)
    return manual(local, (of_x, tuple(p.whole for p in places)), of_y)(x, numbers), (x, kept)


def _into_backward(static, saved, gs):
    x, kept = saved
    numbers, weights = zip(*(again(one, x.dtype) for one in kept), strict=True)
    of_x, of_y, places = _into_places(static, x.shape, weights)

    def local(x, gs, numbers):
        cuts = [_cut(g.reshape(*g.shape[:2], -1)) for g in gs]
        flat = [w.reshape(w.shape[0], -1) for w in numbers]
        dx = _sum_of_parts(lambda which: sum(_times(_taken(g, which), w) for g, w in zip(cuts, flat, strict=True)))
        totals = [0] * len(numbers)
        for which, part in _parts(x):
            for k, g in enumerate(cuts):
                totals[k] += weight_gradient(part, _taken(g, which), weights[k].dtype)
        d_weights = (p.summed(t.reshape(w.shape), _tokens(of_x)) for p, t, w in zip(places, totals, numbers, strict=True))
        return dx, tuple(d_weights)

    wholes, parts = (tuple(getattr(p, name) for p in places) for name in ("whole", "parts"))
    dx, d_weights = manual(local, (of_x, of_y, wholes), (of_x, parts))(x, gs, numbers)
    return dx, tuple(gradient_of(w, d) for w, d in zip(weights, d_weights, strict=True))


_into.defvjp(_into_forward, _into_backward)


def _out_places(static, x: Array, weight: Weight) -> tuple[P, P, _Places]:
    rules, input = static
    of_x = partition((*WITHIN, input, *(None,) * (x.ndim - 3)), x.shape, rules, axes())
    of_y = partition(BETWEEN, (*x.shape[:2], weight.shape[-1]), rules, axes())
    _require_part(of_x, input, x.shape[2])
    return of_x, of_y, _Places(weight, (input, *(None,) * (len(weight.shape) - 1)), rules)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _out_of(static, x: Array, weight: Weight) -> Array:
    return _out_of_forward(static, x, weight)[0]


def _out_of_forward(static, x, weight):
    of_x, of_y, places = _out_places(static, x, weight)

    def local(x, w):
        cut, flat = _cut(x.reshape(*x.shape[:2], -1)), w.reshape(-1, w.shape[-1])
        return _sum_of_parts(lambda which: _taken(cut, which) @ flat)

    numbers, kept = read(weight, x.dtype)
    return manual(local, (of_x, places.whole), of_y)(x, numbers), (x, kept)


def _out_of_backward(static, saved, g):
    x, kept = saved
    numbers, weight = again(kept, x.dtype)
    of_x, of_y, places = _out_places(static, x, weight)

    def local(x, g, w):
        cut, flat = _cut(x.reshape(*x.shape[:2], -1)), w.reshape(-1, w.shape[-1])
        dx, total = jnp.zeros_like(cut), 0
        for which, part in _parts(g):
            dx = _put(dx, which, _times(part, flat))
            total += weight_gradient(_taken(cut, which), part, weight.dtype)
        return _joined(dx).reshape(x.shape), places.summed(total.reshape(w.shape), _tokens(of_y))

    dx, d_weight = manual(local, (of_x, of_y, places.whole), (of_x, places.parts))(x, g, numbers)
    return dx, gradient_of(weight, d_weight)


_out_of.defvjp(_out_of_forward, _out_of_backward)
