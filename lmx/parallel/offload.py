"""What waits in the host's memory until it is used (ZeRO-Offload, Ren et al., 2021): fetched a layer at a time, inside the step's loops.

An array's memory is part of its type, so what is fetched is told by what is in host memory, not by a setting. The gradient of a parameter
that lives there is formed on the device: differentiation is with respect to a stand-in on the device, zeros that nothing reads and that XLA
therefore never makes.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from lmx.core.tree import Tree

Space = jax.memory.Space
HOST = "pinned_host"
"""What JAX calls the memory."""


@flax.struct.dataclass
class Hosted:
    """A parameter in host memory, and the stand-in that takes its gradient."""

    value: Array
    stand_in: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape


def in_host(x) -> bool:
    """Whether an array, traced or not, is in host memory."""
    return getattr(jax.typeof(x), "memory_space", None) == Space.Host


def stand_ins(params: Tree) -> Tree:
    """What is to be differentiated by: the parameters, those in host memory replaced."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if in_host(x) else x, params)


def joined(params: Tree, stand_ins: Tree) -> Tree:
    """What the forward reads."""
    return jax.tree.map(lambda x, s: Hosted(x, s) if in_host(x) else s, params, stand_ins)


def fetched(tree: Tree) -> Tree:
    """The tree on the device."""

    def of(x):
        if isinstance(x, Hosted):
            return _fetch(x.value, x.stand_in)
        return jax.device_put(x, Space.Device) if in_host(x) else x

    return jax.tree.map(of, tree, is_leaf=lambda x: isinstance(x, Hosted))


def stored(x: Array, like: Array) -> Array:
    """The array in the memory that another is in."""
    return jax.device_put(x, Space.Host) if in_host(like) else x


@jax.custom_vjp
def _fetch(value: Array, stand_in: Array) -> Array:
    return jax.device_put(value, Space.Device)


_fetch.defvjp(lambda value, stand_in: (_fetch(value, stand_in), None), lambda _, gradient: (None, gradient))


def copied(tree: Tree) -> Tree:
    """What is in the host's memory as copies, the rest as it is: NumPy reads such an array where it lies, and on a GPU what is being read
    cannot be donated to the next step."""
    return jax.tree.map(lambda a: a.copy() if in_host(a) else a, tree)
