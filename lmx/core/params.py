"""The parameter table: each parameter is described once, and everything else about it is derived.

A model is a function `specs(config) -> tree of ParamSpec` and a function `forward(params, config, ...)`. Initial values,
abstract shapes, shardings and counts come from the specs.
"""

import math
import zlib
from dataclasses import dataclass, replace
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array

from lmx.core.tree import Tree, map_named, named_leaves


class Init(Protocol):
    """How a parameter starts: a function of its key, its shape and how many leading dimensions a product contracts."""

    def __call__(self, key: Array, shape: tuple[int, ...], inputs: int) -> Array: ...


@dataclass(frozen=True)
class Normal:
    """Normal with a given standard deviation."""

    stddev: float

    def __call__(self, key: Array, shape: tuple[int, ...], inputs: int) -> Array:
        return self.stddev * jax.random.normal(key, shape, jnp.float32)


@dataclass(frozen=True)
class FanIn:
    """Normal with variance `gain / (product of the contracted dimensions)` (LeCun et al., 1998)."""

    gain: float = 1.0

    def __call__(self, key: Array, shape: tuple[int, ...], inputs: int) -> Array:
        return math.sqrt(self.gain / math.prod(shape[:inputs])) * jax.random.normal(key, shape, jnp.float32)


@dataclass(frozen=True)
class Constant:
    """Every number the same."""

    value: float

    def __call__(self, key: Array, shape: tuple[int, ...], inputs: int) -> Array:
        return jnp.full(shape, self.value, jnp.float32)


class OfLayer:
    """How a parameter starts that differs from layer to layer, but not by chance."""

    def at(self, layer: Array, shape: tuple[int, ...]) -> Array:
        """Values of the layer of an absolute index (traced)."""
        raise NotImplementedError


ZEROS, ONES = Constant(0.0), Constant(1.0)


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, the logical name of each dimension, what a product contracts, how it starts.

    Attributes:
      shape: sizes, the leading `layers` dimension included once stacked.
      axes: a logical name for each dimension (`"embed"`, `"heads"`, `"mlp"`, `"vocab"`, `"layers"`, ...) or None.
      inputs: how many dimensions a product contracts; they come first (after `layers`).
      init: initial values of one layer.
      layers: the absolute index of each layer of the leading `layers` dimension; empty when there is none.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    inputs: int = 0
    init: Init | OfLayer = ZEROS
    layers: tuple[int, ...] = ()

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"a parameter of shape {self.shape} needs {len(self.shape)} axis names, not {self.axes}")

    @property
    def sides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """One layer's (and expert's) parameter as a matrix: its rows' dimensions, which a product contracts, and its columns', the rest.

        A table has a row for each entry, and what a layer adds or multiplies by (a bias, a scale) is one column.
        """
        first = sum(axis in ("layers", "experts") for axis in self.axes)
        end = first + (self.inputs or (len(self.shape) - first if self.layers else 1))
        return tuple(range(first, end)), tuple(range(end, len(self.shape)))


def is_spec(x) -> bool:
    return isinstance(x, ParamSpec)


def stacked(specs: Tree, layers: tuple[int, ...]) -> Tree:
    """The specs of one layer, as those of several layers with the given absolute indices on a leading `layers` dimension."""

    def stack(spec: ParamSpec) -> ParamSpec:
        return replace(spec, shape=(len(layers), *spec.shape), axes=("layers", *spec.axes), layers=layers)

    return jax.tree.map(stack, specs, is_leaf=is_spec)


def adapted_specs(spec: ParamSpec, rank: int) -> tuple[ParamSpec, ParamSpec]:
    """What `lmx.core.weights.Adapted` adds to a weight of a spec (a table counts as one that contracts its rows): `down`, which starts as
    noise, and `up`, which starts at zero (Hu et al., 2021)."""
    lead = len(spec.layers) > 0
    split = lead + (spec.inputs or 1)
    of_layers = (spec.shape[:lead], spec.axes[:lead])
    down = replace(spec, shape=(*spec.shape[:split], rank), axes=(*spec.axes[:split], None), inputs=split - lead, init=FanIn(1 / 3))
    up_shape, up_axes = (*of_layers[0], rank, *spec.shape[split:]), (*of_layers[1], None, *spec.axes[split:])
    return down, replace(spec, shape=up_shape, axes=up_axes, inputs=1, init=ZEROS)


def initial_values(key: Array, specs: Tree, dtype=jnp.float32) -> Tree:
    """Initial values of every parameter.

    A leaf's key is derived from its name, and a layer's from its absolute index beside it (positions in the tree's tuples do
    not count): adding a parameter, a layer or another grouping of layers changes no other value, nor does the mesh.
    """

    def value(name: str, spec: ParamSpec) -> Array:
        words = [word for word in name.split("/") if not word.isdigit()]
        layers = jnp.array(spec.layers, jnp.int32)
        if isinstance(spec.init, OfLayer):
            return jax.vmap(lambda layer: spec.init.at(layer, spec.shape[1:]))(layers).astype(dtype)
        leaf_key = jax.random.fold_in(key, zlib.crc32("/".join(words).encode()))
        if not spec.layers:
            return spec.init(leaf_key, spec.shape, spec.inputs).astype(dtype)
        keys = jax.vmap(lambda layer: jax.random.fold_in(leaf_key, layer))(layers)
        return jax.vmap(lambda k: spec.init(k, spec.shape[1:], spec.inputs))(keys).astype(dtype)

    return map_named(value, specs, is_leaf=is_spec)


def abstract(specs: Tree, dtype=jnp.float32, shardings: Tree | None = None) -> Tree:
    """The parameters as `jax.ShapeDtypeStruct`, with shardings when given: to plan, compile and restore without memory."""
    if shardings is None:
        return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype), specs, is_leaf=is_spec)
    return jax.tree.map(lambda spec, s: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=s), specs, shardings, is_leaf=is_spec)


def count(specs: Tree) -> int:
    """Numbers in all parameters."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs, is_leaf=is_spec))


def table(specs: Tree) -> str:
    """The parameter table as text: name, shape with axis names, numbers, initial values."""
    rows = []
    for name, spec in named_leaves(specs, is_leaf=is_spec).items():
        shape = " ".join(f"{axis or '-'}={size}" for axis, size in zip(spec.axes, spec.shape, strict=True))
        rows.append((name, shape, f"{math.prod(spec.shape):,}", str(spec.init)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [f"{n:{widths[0]}}  {s:{widths[1]}}  {c:>{widths[2]}}  {i}" for n, s, c, i in rows]
    return "\n".join([*lines, f"{count(specs):,} parameters"])
