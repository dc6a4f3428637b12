"""Gradients summed in a fixed order: the same bits for any number of data replicas."""

from collections.abc import Callable

import jax
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
            parts = jax.lax.map(lambda shard: value_and_grad(params, shard, key, seed), cut)
            # The barrier keeps what follows from being fused into the loop, which would round differently for one trip than for two.
            parts = jax.lax.optimization_barrier(parts)
            return jax.tree.map(_tree_sum, jax.lax.all_gather(parts, "data", tiled=True))

        specs = (P(), P(None, "data"), P(), P())
        return jax.shard_map(local, in_specs=specs, out_specs=P(), check_vma=False)(params, batch, key, seed)

    return run


def _tree_sum(parts: Array) -> Array:
    """Sums the leading dimension pairwise, neighbours first."""
    while parts.shape[0] > 1:
        whole = parts.shape[0] // 2 * 2
        pairs = parts[0:whole:2] + parts[1:whole:2]
        parts = pairs if whole == parts.shape[0] else jax.numpy.concatenate([pairs, parts[whole:]])
    return parts[0]
