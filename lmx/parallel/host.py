"""What a CPU host needs to be told."""

import ctypes
import sys


def keep_pages() -> None:
    """Keeps freed memory in the process, where the C library is glibc; elsewhere does nothing.

    XLA:CPU allocates its temporary buffer for each execution. Above 32 MB glibc maps it afresh each time, and every page is faulted in
    again: 10,000 faults a step for a small model, 300,000 for GPT-2 124M, a fifth to a third of the step. The price is that memory once
    used is not given back to the system.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        trim_threshold, mmap_max, arena_max = -1, -4, -8
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(arena_max, 1)
