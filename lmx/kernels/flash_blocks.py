"""How the flash kernels cut their work."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Blocks:
    """Sizes of blocks of queries and of keys, how many of those that are walked over are in shared memory at a time, and whether a
    warpgroup of its own brings them (`lmx.kernels.flash_pipeline`)."""

    queries: int
    keys: int
    stages: int
    carrier: bool
