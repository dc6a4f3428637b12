"""A model's parameters in the form in which the engine reads them, and what tells two sets of them apart."""

import hashlib
from functools import partial
from itertools import accumulate

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmx.core.execution import Execution
from lmx.core.params import ParamSpec, is_spec
from lmx.core.tree import Tree, map_named, named_leaves
from lmx.core.weights import Adapted, Twofold, Weight, turned
from lmx.kernels import devices
from lmx.models import stack
from lmx.models.config import Model
from lmx.models.families import functions

ALIGNED = 64
"""Bytes at whose multiples XLA wants arrays to begin, if it is to take them as they are."""
MULTIPLY = ("weight", "embed", "head")
"""The names of parameters that multiply in the compute type."""


def decoding_params(params: Tree) -> Tree:
    """Parameters in the form that decoding runs on: each group of layers as a tuple. Does nothing to those that are."""
    if any(isinstance(group, dict) for group in params["layers"]):
        return _unrolled(params)
    return params


@jax.jit
def _unrolled(params: Tree) -> Tree:
    return params | {"layers": stack.unstack(params["layers"])}


def reading_params(model: Model, params: Tree, execution: Execution) -> Tree:
    """Parameters as the chip reads them fastest, token by token: layers as tuples, what multiplies in the compute type already, and on a CPU
    matrices `[out, in]`. Numbers are what they are without it."""
    turning = devices.on_cpu() and execution.rules is None and not execution.precision.fp8
    read = _all_read(model, execution.precision.compute, turning, decoding_params(params))
    return _in_large_pages(read) if turning else read


def _in_large_pages(tree: Tree) -> Tree:
    """Arrays of a CPU, one behind another in memory for which NumPy asks Linux for pages of 2 MB: every weight is read for every token, and with
    pages of 4 KB a tenth of that time goes into finding them. XLA reads what lies there; nothing is copied again."""
    leaves, shape = jax.tree.flatten(tree)
    starts = list(accumulate((-(-leaf.nbytes // ALIGNED) * ALIGNED for leaf in leaves), initial=0))
    memory = np.empty(starts[-1] + ALIGNED, np.uint8)
    first, found = -memory.ctypes.data % ALIGNED, []
    for start, leaf in zip(starts, leaves, strict=False):
        place = memory[first + start : first + start + leaf.nbytes].view(leaf.dtype).reshape(leaf.shape)
        place[...] = np.asarray(leaf)
        found.append(jax.device_put(place))
    return jax.tree.unflatten(shape, found)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _all_read(model: Model, compute: str, turning: bool, params: Tree) -> Tree:
    dtype = jnp.dtype(compute)

    def read(name: str, spec: ParamSpec, weight: Weight) -> Weight:
        if isinstance(weight, Adapted):
            # Of one with a magnitude the sum is formed, which wants the base as it is.
            return weight if weight.magnitude is not None else weight.replace(base=read(name, spec, weight.base))
        if isinstance(weight, Twofold):
            return Twofold(read(name, spec, weight.table), read(name, spec, weight.head))
        parts = name.split("/")
        if parts[-1] not in MULTIPLY or parts[-2:-1] in (["router"], ["shared_gate"]):
            return weight
        weight = weight.astype(dtype)
        return turned(weight, spec.inputs) if turning and spec.inputs and "experts" not in spec.axes else weight

    table = functions(model).specs(model)
    found = {name: read(name, table[name], params[name]) for name in ("embed", "head") if name in params}

    def group(specs: Tree, layers: Tree) -> Tree:
        return tuple(map_named(read, specs[str(i % len(specs))], layer, is_leaf=is_spec) for i, layer in enumerate(layers))

    return params | found | {"layers": tuple(group(*pair) for pair in zip(table["layers"], params["layers"], strict=True))}


def fingerprint(params: Tree) -> bytes:
    """16 bytes that stand for a tree's names, shapes, types and numbers. What sees the numbers is two sums, with other factors for every place,
    formed where the arrays are, by one program for each shape."""
    digest = hashlib.blake2b(digest_size=16)
    sums = jax.device_get(jax.tree.map(_sums, params))
    for (name, leaf), found in zip(named_leaves(params).items(), jax.tree.leaves(sums), strict=True):
        digest.update(f"{name} {leaf.shape} {leaf.dtype}".encode() + found.tobytes())
    return digest.digest()


@jax.jit
def _sums(a: Array) -> Array:
    """Two 32-bit sums of an array's bytes, each byte (or what it is part of) times an odd number that its place decides."""
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[a.dtype.itemsize]
    words = (a if a.dtype == bool else jax.lax.bitcast_convert_type(a, kind)).reshape(-1).astype(jnp.uint32)
    place = jnp.arange(words.size, dtype=jnp.uint32)

    def mixed(factor: int) -> Array:
        x = (place + jnp.uint32(1)) * jnp.uint32(factor)
        x = (x ^ (x >> 15)) * jnp.uint32(0x2C1B3C6D)
        return (x ^ (x >> 13)) | jnp.uint32(1)

    return jnp.stack([jnp.sum(words * mixed(f), dtype=jnp.uint32) for f in (0x9E3779B1, 0x85EBCA77)])
