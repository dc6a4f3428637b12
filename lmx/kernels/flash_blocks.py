"""How the flash kernels cut their work."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Blocks:
    """Sizes of blocks of queries and keys, and how many of what is walked over are in shared memory at a time."""

    queries: int
    keys: int
    stages: int
