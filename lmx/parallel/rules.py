"""Logical axes to mesh axes: where parameters live and where activations are."""

from dataclasses import replace
from functools import partial

import jax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmx.core.execution import Execution, Rules
from lmx.core.params import ParamSpec, adapted_specs, is_spec
from lmx.core.tree import Tree, name_of
from lmx.core.weights import Adapted, Split, Twofold, Weight
from lmx.parallel.layout import SHARDS, Layout
from lmx.parallel.manual import axes
from lmx.parallel.offload import HOST


def rules(layout: Layout, *, split: bool = False) -> Rules:
    """Which mesh axes shard each logical axis: of activations and of weights where they multiply; `split`: of what ZeRO splits.

    `length` is the sequence inside a sublayer, `sequence` between sublayers. An activation's embedding dimension is called None: it stays
    whole.
    """
    found: Rules = (
        ("batch", SHARDS),
        ("length", ("context",)),
        ("sequence", ("context", "tensor") if layout.sequence else ("context",)),
        ("vocab", ("tensor",)),
        ("heads", ("tensor",)),
        ("kv_heads", ("tensor",)),
        ("mlp", ("tensor",)),
        ("experts", ("expert",)),
        ("layers", ("pipeline",)),
    )
    return (*found, ("embed", ("fsdp",))) if split else found


def partition(axes: tuple[str | None, ...], shape: tuple[int, ...], rules: Rules, sizes: dict[str, int]) -> P:
    """The `PartitionSpec` of one array. A mesh axis is used once, and dropped where it does not divide the dimension.

    What must divide is refused by `lmx.parallel.layout.check`; what remains (few key heads under many tensor shards, a norm over a
    small dimension) is replicated.
    """
    table, used, spec = dict(rules), set(), []
    for axis, size in zip(axes, shape, strict=True):
        names, degree = [], 1
        for name in table.get(axis, ()):
            if name in sizes and sizes[name] > 1 and name not in used and size % (degree * sizes[name]) == 0:
                names.append(name)
                degree *= sizes[name]
        used.update(names)
        spec.append(None if not names else names[0] if len(names) == 1 else tuple(names))
    return P(*spec)


def shardings(specs: Tree, mesh: Mesh, rules: Rules, *, in_host: bool = False) -> Tree:
    """A `NamedSharding` for every parameter of a table; `in_host`: layers' in the host's memory."""
    return jax.tree.map(lambda spec: _sharding(spec, mesh, rules, HOST if in_host and spec.layers else None), specs, is_leaf=is_spec)


def _sharding(spec: ParamSpec, mesh: Mesh, rules: Rules, memory: str | None) -> NamedSharding:
    return NamedSharding(mesh, partition(spec.axes, spec.shape, rules, dict(mesh.shape)), memory_kind=memory)


def like_parameters(tree: Tree, specs: Tree, mesh: Mesh, rules: Rules, *, in_host: bool = False) -> Tree:
    """Shardings for a tree that holds trees of parameters somewhere inside (an optimizer's state).

    A leaf whose name ends in a parameter's name, and that has its dimensions or some number of each's parts (a mean over them, a scale for
    each block), is sharded as the parameter (`in_host`: and in the host's memory); every other is replicated, on the device.
    """
    by_name = {name_of(path): spec for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)}

    def sharding(path: tuple, leaf) -> NamedSharding:
        for start in range(len(path)):
            spec = by_name.get(name_of(path[start:]))
            if spec is not None and _parts(leaf.shape, spec.shape):
                return _sharding(replace(spec, shape=leaf.shape), mesh, rules, HOST if in_host else None)
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _parts(some: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    return len(some) == len(whole) and all(n % m == 0 for m, n in zip(some, whole, strict=True))


def placed(params: Tree, specs: Tree, execution: Execution) -> Tree:
    """Parameters as `Split`: gathered by the execution's `rules` where they multiply, their gradients placed by its `split`."""
    sizes = axes()
    if execution.split is None or not sizes:
        return params

    def place(spec: ParamSpec, value: Weight) -> Weight:
        if isinstance(value, Twofold):
            return Twofold(place(spec, value.table), place(spec, value.head))
        if isinstance(value, Adapted):
            down, up = adapted_specs(spec, value.scale.shape[-1])
            return value.replace(base=place(spec, value.base), down=place(down, value.down), up=place(up, value.up))
        whole, parts, rest = (
            None if rules is None else partition(spec.axes, spec.shape, rules, sizes)
            for rules in (execution.rules, execution.split, execution.rest)
        )
        return Split(value, whole, parts, rest, stays=execution.remat != "none")

    return jax.tree.map(place, specs, params, is_leaf=is_spec)


def placed_outside(params: Tree, specs: Tree, execution: Execution) -> Tree:
    """The parameters outside a model's stacks of layers, `placed`; of the table, those that are there."""
    own = {name: spec for name, spec in specs.items() if name not in ("layers", "encoder") and name in params}
    return placed({name: params[name] for name in own}, own, execution)


def constrain(x: Array, names: tuple[str | None, ...], rules: Rules | None) -> Array:
    """Says where an activation, and its cotangent, is by the logical names of its dimensions. Without a mesh or rules it does nothing."""
    return move(x, names, names, rules)


def move(x: Array, to: tuple[str | None, ...], back: tuple[str | None, ...], rules: Rules | None) -> Array:
    """Says where an activation is to be, and where its cotangent comes back to."""
    sizes = axes()
    if rules is None or not sizes:
        return x
    there, here = (partition(names, x.shape, rules, sizes) for names in (to, back))
    return _move(there, here, x)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _move(there: P, here: P, x: Array) -> Array:
    if here != there:  # said at both ends, or XLA gathers what a norm computes in fp32 and rounds it only then
        x = jax.lax.with_sharding_constraint(x, here)
    return jax.lax.with_sharding_constraint(x, there)


_move.defvjp(lambda there, here, x: (_move(there, here, x), None), lambda there, here, _, g: (jax.lax.with_sharding_constraint(g, here),))
