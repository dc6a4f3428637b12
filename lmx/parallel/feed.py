"""Batches onto the mesh: each process brings the rows that its own devices hold."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmx.parallel.layout import SHARDS

Batch = dict[str, np.ndarray]


def batch_sharding(mesh: Mesh, *, microbatches: bool) -> NamedSharding:
    """Where a batch is: its rows over data, fsdp and expert, behind a leading dimension of microbatches in training."""
    return NamedSharding(mesh, P(None, SHARDS) if microbatches else P(SHARDS))


def local_rows(sharding: NamedSharding, shape: tuple[int, ...]) -> np.ndarray:
    """Which rows of the global batch this process's devices hold, in order; `shape` is `(rows,)` or `(microbatches, rows)`."""
    held = np.zeros(shape, bool)
    for index in sharding.addressable_devices_indices_map(shape).values():
        held[index] = True
    return np.flatnonzero(held)


def place(batch: Batch, rows: np.ndarray, shape: tuple[int, ...], sharding: NamedSharding) -> dict[str, jax.Array]:
    """A process's rows of a batch (`[len(rows), ...]`, as `local_rows` says) as global arrays of `[*shape, ...]`."""
    where = np.full(int(np.prod(shape)), -1)
    where[rows] = np.arange(len(rows))
    where = where.reshape(shape)

    def globally(local: np.ndarray) -> jax.Array:
        lead = len(shape)
        return jax.make_array_from_callback((*shape, *local.shape[1:]), sharding, lambda index: local[where[index[:lead]]])

    return {name: globally(local) for name, local in batch.items()}
