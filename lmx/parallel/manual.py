"""Code whose communication is its point: functions of the arrays that one device holds."""

from collections.abc import Callable

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


def axes() -> dict[str, int]:
    """Sizes of the mesh axes that the compiler still shards over; empty where there is no mesh, or one of a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return {}
    return {n: mesh.shape[n] for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}


def manual(function: Callable, in_specs, out_specs) -> Callable:
    """The function on each device's shares, over every axis of the surrounding mesh that is not manual already.

    Gradients taken through it from outside are right; of one taken inside with respect to something replicated, each device has its own
    part, to be summed by hand.
    """
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes()), check_vma=False)


def names(spec: P) -> tuple[str, ...]:
    """The mesh axes that a spec uses."""
    return tuple(n for entry in spec if entry is not None for n in ((entry,) if isinstance(entry, str) else entry))
