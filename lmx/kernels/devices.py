"""For which devices a program is being traced, where its form depends on them."""

import jax


def kind() -> str:
    """JAX's name of the devices (`cpu`, `NVIDIA H100 80GB HBM3`): of the surrounding mesh, else of those at hand."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.devices()[0] if device is None else device).device_kind


def on_cpu() -> bool:
    return kind() == "cpu"


def on_nvidia() -> bool:
    return kind().startswith("NVIDIA")


def on_hopper() -> bool:
    """Whether the devices are NVIDIA's of compute capability 9.0, whose kernels no other chip runs."""
    return kind().startswith(("NVIDIA H100", "NVIDIA H200", "NVIDIA H800", "NVIDIA H20", "NVIDIA GH200"))


def alone() -> bool:
    """Whether what is being traced is one device's: no mesh, or within it none but manual axes. A kernel is opaque to the partitioner."""
    mesh = jax.sharding.get_abstract_mesh()
    return all(size == 1 or name in mesh.manual_axes for name, size in mesh.shape.items())
