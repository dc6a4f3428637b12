"""Devices that are not there: meshes of GPUs to compile for, on a machine that has none.

XLA's GPU compiler needs no GPU, only a description of one and the libraries of CUDA, which the wheels of the extra `cuda` bring. What it
compiles cannot be run here, but its text, its collectives and its bytes a device are those of the real thing.
"""

import ctypes
import os
import sysconfig
import threading
from importlib.util import find_spec
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from lmx.parallel.layout import Layout, make_mesh

PER_HOST = 8
HINT = "install the extra `cuda` (pip install 'lmx[cuda]'), which needs no GPU"

TARGETS = {
    "h100": """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
runtime_version { major: 13 } platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
}
"""What XLA needs to know of a chip to compile for it (`GpuTargetConfigProto`), by the chip's short name."""

_LIBRARIES = (
    *("libcudart", "libnvJitLink", "libcublasLt", "libcublas", "libcupti", "libnvrtc", "libcudnn", "libcufft", "libcusparse"),
    *("libcusolver", "libnccl", "libnvshmem_host"),
)

_PREPARED = threading.Event()


def installed() -> bool:
    """Whether the CUDA plugin's wheels are here."""
    return any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def prepared() -> bool:
    """Whether `prepare` has been called."""
    return _PREPARED.is_set()


def prepare() -> None:
    """Makes this process able to compile for absent GPUs. To be called before JAX starts its backend; a second call does nothing.

    The plugin is told not to look for a GPU, and the libraries of its wheels, which are on no loader's path, are loaded beforehand.

    Raises:
      ModuleNotFoundError: the wheels are not installed.
    """
    if not installed():
        raise ModuleNotFoundError(f"compiling for absent GPUs needs the CUDA plugin's wheels; {HINT}")
    if prepared():
        return
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if not Path("/dev/nvidiactl").exists():
        jax.config.update("jax_platforms", "cpu")
    wheels = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    for name in _LIBRARIES:
        for path in sorted(wheels.rglob(f"{name}.so*")):
            try:
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
                break
            except OSError:
                continue
    _PREPARED.set()


def devices(number: int, chip: str = "h100") -> list:
    """Absent GPUs, eight to a host, so that it is known what crosses hosts. `prepare` comes first.

    Raises:
      ValueError: a chip that there is no description of.
      RuntimeError: the plugin did not start.
    """
    if chip not in TARGETS:
        raise ValueError(f"chip={chip!r} cannot be compiled for in its absence; use one of {', '.join(TARGETS)}")
    jax.devices()  # registers the plugin
    hosts, rest = divmod(number, PER_HOST)
    shape = f"1x1x{number}" if rest or not hosts else f"1x{hosts}x{PER_HOST}"
    try:
        return list(topologies.get_topology_desc(platform="cuda", target_config=TARGETS[chip], topology=shape).devices)
    except (NotImplementedError, RuntimeError) as error:
        raise RuntimeError(f"the CUDA plugin gives no topology of absent GPUs ({error}); {HINT}") from error


def mesh(layout: Layout, chip: str = "h100") -> Mesh:
    """The mesh of a layout over absent GPUs."""
    return make_mesh(layout, devices(layout.devices, chip))


def compiled(function, mesh: Mesh, *args) -> jax.stages.Compiled:
    """A jitted function of arguments that are on the mesh's abstract form, compiled for the absent devices.

    Shardings are of the abstract mesh because absent devices have no memories: one over them forgets that something is in the host's.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = function.trace(*args).lower(lowering_platforms=("cuda",))
    # JAX would take the backend of the devices at hand, which an abstract mesh does not overrule.
    lowered._lowering.compile_args["backend"] = mesh.devices.flat[0].client
    return lowered.compile(device_assignment=tuple(mesh.devices.flat))
