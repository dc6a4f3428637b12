"""Logical axes to mesh axes: where parameters live and where activations are."""

import jax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmx.core.execution import Rules
from lmx.core.params import is_spec
from lmx.core.tree import Tree, name_of

RULES: Rules = (
    ("batch", ("data", "fsdp")),
    ("vocab", ("tensor",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("mlp", ("tensor",)),
    ("embed", ("fsdp",)),
)
"""Which mesh axes shard each logical axis. An activation's embedding dimension is called None: it stays whole."""


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


def shardings(specs: Tree, mesh: Mesh, rules: Rules = RULES) -> Tree:
    """A `NamedSharding` for every parameter of a table."""
    sizes = dict(mesh.shape)
    return jax.tree.map(lambda spec: NamedSharding(mesh, partition(spec.axes, spec.shape, rules, sizes)), specs, is_leaf=is_spec)


def like_parameters(tree: Tree, specs: Tree, mesh: Mesh, rules: Rules = RULES) -> Tree:
    """Shardings for a tree that holds trees of parameters somewhere inside (an optimizer's state).

    A leaf whose name ends in a parameter's name and that has its shape is sharded as the parameter; every other is replicated.
    """
    by_name = {name_of(path): spec for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)}
    sizes = dict(mesh.shape)

    def sharding(path: tuple, leaf) -> NamedSharding:
        for start in range(len(path)):
            spec = by_name.get(name_of(path[start:]))
            if spec is not None and spec.shape == leaf.shape:
                return NamedSharding(mesh, partition(spec.axes, spec.shape, rules, sizes))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def constrain(x: Array, axes: tuple[str | None, ...], rules: Rules | None) -> Array:
    """Says where an activation is, by the logical names of its dimensions. Without a mesh or rules it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes, x.shape, rules, dict(mesh.shape)))
