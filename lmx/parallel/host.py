"""What a CPU host needs to be told."""

import ctypes
import os
import sys
from pathlib import Path

import jax


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
