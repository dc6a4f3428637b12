"""What a CPU host needs to be told."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.sharding import AbstractMesh, Mesh


def keep_pages() -> None:
    """Keeps freed memory in the process, and gives simulated devices threads enough. To be called before JAX starts its backend; memory
    is left alone where the C library is not glibc, or where there is a GPU to compute on.

    XLA:CPU allocates its temporary buffer for each execution. Above 32 MB glibc maps it afresh each time, and every page is faulted in
    again: 10,000 faults a step for a small model, 300,000 for GPT-2 124M, a fifth to a third of the step. Told not to map and not to
    trim, it keeps them, in the arena of the main thread: so executions are dispatched from there. The price is that memory once used
    is not given back to the system.
    """
    if (devices := jax.config.jax_num_cpu_devices) > 1:  # with one XLA thread a device, collectives may wait for each other for ever
        os.environ.setdefault("NPROC", str(4 * devices))
    if not sys.platform.startswith("linux") or Path("/dev/nvidiactl").exists():
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def on_cpus(mesh: Mesh | AbstractMesh) -> bool:
    """Whether the mesh is of CPU devices that are here."""
    return isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"


@contextmanager
def compiled_here(mesh: Mesh | AbstractMesh) -> Iterator[None]:
    """What is compiled inside for several CPU devices is not written to the compilation cache, so that it is never read from there.

    XLA:CPU runs what does not depend on each other at once, but collectives in their order. A program that it has read from the cache
    has lost that order; and since all collectives inside `shard_map` share one channel, two that run at once take each other's data: wrong
    numbers, NaN, or an abort ("Id can't be larger than the number of participating threads"). Seen in jaxlib 0.12.0.
    """
    if mesh.size == 1 or not on_cpus(mesh):
        yield
        return
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    try:
        yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
