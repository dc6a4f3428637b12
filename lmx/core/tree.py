"""Trees of arrays: the names of leaves, and how two trees agree."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Tree = Any


def name_of(path: tuple) -> str:
    """The name of a leaf from JAX's key path: `("layers", "0", "query")` -> `"layers/0/query"`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def named_leaves(tree: Tree, is_leaf: Callable | None = None) -> dict[str, Any]:
    """Leaves by name, in the tree's order. `None` is no leaf, as everywhere in JAX."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}


def map_named(function: Callable, tree: Tree, *rest: Tree, is_leaf: Callable | None = None) -> Tree:
    """`jax.tree.map` whose function is given the leaf's name first."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(name_of(path), *leaves), tree, *rest, is_leaf=is_leaf)


def size(tree: Tree) -> int:
    """Numbers in a tree of arrays, specs or abstract arrays."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "shape")))


def disagreement(tree: Tree, reference: Tree) -> dict[str, float]:
    """How far each leaf is from its reference: `max|a-b| / max(max|b|, 0.001 of the largest in the tree)`.

    The second term keeps leaves that are zero but for rounding (a key bias's gradient) from dominating.
    What is not finite never agrees. Compares on the host, so the two trees may live on different meshes.
    Raises ValueError when names or shapes differ.
    """
    ours, theirs = ({name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(t).items()} for t in (tree, reference))
    if ours.keys() != theirs.keys():
        raise ValueError(f"the trees differ in their leaves: {sorted(ours.keys() ^ theirs.keys())}")
    for name in ours:
        if ours[name].shape != theirs[name].shape:
            raise ValueError(f"{name} has shape {ours[name].shape}, the reference {theirs[name].shape}")
    largest = max((np.abs(b).max(initial=0.0) for b in theirs.values()), default=0.0)
    floor = max(1e-3 * largest, np.finfo(np.float64).tiny)

    def far(a: np.ndarray, b: np.ndarray) -> float:
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return float("inf")
        return float(np.abs(a - b).max(initial=0.0) / max(np.abs(b).max(initial=0.0), floor))

    return {name: far(a, theirs[name]) for name, a in ours.items()}
