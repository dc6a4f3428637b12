"""Gradients summed in a fixed order: the same bits for any number of data replicas."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from lmx.core.tree import Tree


def ordered(value_and_grad: Callable, shards: int) -> Callable:
    """A `value_and_grad(params, batch, key, seed)` over `[microbatches, rows, ...]` whose result does not depend on the mesh.

    The rows are cut into a fixed number of virtual shards. Each is computed by the same program on arrays of the same shape, by
    whichever device has it; all results are gathered everywhere and summed as a fixed binary tree. Parameters must be replicated,
    and `value_and_grad` must not constrain shardings. It is called under a mesh whose only axis larger than 1 is `data`.
    """

    def run(params: Tree, batch: Tree, key: Array, seed: Array) -> Tree:
        def local(params, batch, key, seed):
            mine = shards // jax.lax.axis_size("data")
            cut = jax.tree.map(lambda a: a.reshape(a.shape[0], mine, -1, *a.shape[2:]).swapaxes(0, 1), batch)
            # One shard too many, never computed: a leading dimension of 1 would be simplified away, and the program be another.
            cut = jax.tree.map(lambda a: jnp.concatenate([a, a[:1]]), cut)
            shape = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda a: a[0], cut), key, seed)
            empty = jax.tree.map(lambda a: jnp.zeros((mine + 1, *a.shape), a.dtype), shape)

            def shard(i, parts):
                part = value_and_grad(params, jax.tree.map(lambda a: a[i], cut), key, seed)
                return jax.tree.map(lambda whole, a: whole.at[i].set(a), parts, part)

            # The compiler is not told how often the loop runs: one that runs once would be dissolved into its surroundings, and round
            # differently from one that runs twice.
            parts = jax.lax.fori_loop(0, jax.lax.optimization_barrier(jnp.int32(mine)), shard, empty)
            parts = jax.tree.map(lambda a: a[:mine], jax.lax.optimization_barrier(parts))
            return jax.tree.map(_tree_sum, jax.lax.all_gather(parts, "data", tiled=True))

        specs = (P(), P(None, "data"), P(), P())
        return jax.shard_map(local, in_specs=specs, out_specs=P(), check_vma=False)(params, batch, key, seed)

    return run


def _tree_sum(parts: Array) -> Array:
    """Sums the leading dimension pairwise, neighbours first."""
    while parts.shape[0] > 1:
        whole = parts.shape[0] // 2 * 2
        pairs = parts[0:whole:2] + parts[1:whole:2]
        parts = pairs if whole == parts.shape[0] else jnp.concatenate([pairs, parts[whole:]])
    return parts[0]
