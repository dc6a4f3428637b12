"""Muon's updates (Jordan et al., 2024): momentum with its singular values brought near 1, every matrix whole on one device meanwhile.

Each layer's (and expert's) weight is a matrix. Where devices have parts of it, they trade before and after: parts of all matrices for all of
some, by one all-to-all over each axis, as heads are traded for positions in attention. XLA by itself would gather every matrix for each
product. Replicas (over data, context and so on) all do the same.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from lmx.core.params import ParamSpec, is_spec
from lmx.core.tree import Tree
from lmx.parallel.layout import AXES, Layout
from lmx.parallel.manual import axes, manual, names
from lmx.parallel.rules import partition, rules
from lmx.parallel.traffic import Traffic

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x, x^3 and x^5 in an iteration that takes singular values between 0 and 1 to about 1."""
ITERATIONS = 5
EPSILON = 1e-8
"""Added to a matrix's norm."""
SIZE = 0.2
"""Root mean square of AdamW's updates, to which an update is scaled (Liu et al., 2025)."""


class Momentum(NamedTuple):
    """Steps taken, and the mean of gradients."""

    count: Array
    mu: Tree


def scale_by_muon(specs: Tree, beta: float) -> optax.GradientTransformation:
    """`optax.contrib.scale_by_muon` (Nesterov's form, both means unbiased) of a table of matrices, scaled to AdamW's size of step."""

    def init(params: Tree) -> Momentum:
        return Momentum(jnp.int32(0), jax.tree.map(jnp.zeros_like, params))

    def update(gradients: Tree, state: Momentum, params: Tree | None = None) -> tuple[Tree, Momentum]:
        count, mu = state.count + 1, optax.tree.update_moment(gradients, state.mu, beta, 1)
        ahead, now = optax.tree.bias_correction(mu, beta, count + 1), optax.tree.bias_correction(gradients, beta, count)

        def moved(spec: ParamSpec, m: Array, g: Array) -> Array:
            rows, columns = (math.prod(spec.shape[d] for d in side) for side in spec.sides)
            return SIZE * math.sqrt(max(rows, columns)) * orthogonal(spec, beta * m + (1 - beta) * g)

        return jax.tree.map(moved, specs, ahead, now, is_leaf=is_spec), Momentum(count, mu)

    return optax.GradientTransformation(init, update)


def orthogonal(spec: ParamSpec, x: Array) -> Array:
    """Every layer's (and expert's) matrix of a parameter by Newton and Schulz's iteration, on any mesh."""
    sizes = axes()
    place = partition(spec.axes, x.shape, rules(Layout(), split=True), sizes)
    run = partial(_of_shards, spec, place)
    return manual(run, place, place)(x) if sizes else run(x)


def newton_schulz(x: Float[Array, "matrices rows columns"]) -> Float[Array, "matrices rows columns"]:
    """About `U V^T` of each `U S V^T`."""
    if x.shape[-2] > x.shape[-1]:
        return newton_schulz(x.mT).mT
    x, (first, third, fifth) = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + EPSILON), COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = first * x + (third * square + fifth * square @ square) @ x
    return x


def traffic(specs: Tree, layout: Layout, *, width: int, streamed: bool) -> list[Traffic]:
    """What an update's trades send, of numbers of a width in bytes; `streamed`: a layer at a time."""
    sizes, found = {a: getattr(layout, a) for a in AXES}, []
    for spec in filter(is_matrix, jax.tree.leaves(specs, is_leaf=is_spec)):
        place = partition(spec.axes, spec.shape, rules(Layout(), split=True), sizes)
        local = [n // math.prod(sizes[a] for a in names(P(entry))) for n, entry in zip(spec.shape, place, strict=True)]
        times = local[0] if streamed else 1
        size, matrices = math.prod(local) // times * width, math.prod(local[: spec.sides[0][0]]) // times
        across = [axis for axis, _ in _split(spec, place)]
        sent = size // matrices * _whole(matrices, math.prod(sizes[a] for a in across))
        found += [Traffic("all-to-all", (axis,), sent, times, what) for axis in across for what in ("matrices to Muon", "and back")]
        if layout.zero == 0 and "fsdp" in across:  # all of them on every device: XLA forms both in part
            found += [Traffic("all-gather", ("fsdp",), size * layout.fsdp, times, what) for what in ("Muon's updates", "and momentum")]
    return found


def is_matrix(spec: ParamSpec) -> bool:
    """Whether Muon moves a parameter: weights of layers."""
    return spec.inputs > 0 and bool(spec.layers)


def _split(spec: ParamSpec, place: P) -> Sequence[tuple[str, int]]:
    """The mesh axes that a matrix is split over, and which dimension; of one dimension's the minor first."""
    return [(axis, d) for side in spec.sides for d in side for axis in reversed(names(P(place[d])))]


def _whole(matrices: int, devices: int) -> int:
    """So many matrices that each device has as many."""
    return -(-matrices // devices) * devices


def _of_shards(spec: ParamSpec, place: P, x: Array) -> Array:
    first = spec.sides[0][0]  # the first dimension of a matrix: layers (and experts) come before
    shape, trades = x.shape, [(axis, d - first + 1) for axis, d in _split(spec, place)]
    x = x.reshape(-1, *shape[first:])
    matrices = len(x)
    x = jnp.pad(x, [(0, _whole(matrices, math.prod(jax.lax.axis_size(axis) for axis, _ in trades)) - matrices)] + [(0, 0)] * (x.ndim - 1))
    for axis, d in trades:
        x = jax.lax.all_to_all(x, axis, 0, d, tiled=True)
    rows = math.prod(x.shape[1 : 1 + len(spec.sides[0])])
    x = newton_schulz(x.reshape(len(x), rows, -1)).reshape(x.shape)
    for axis, d in reversed(trades):
        x = jax.lax.all_to_all(x, axis, d, 0, tiled=True)
    return x[:matrices].reshape(shape)
