"""How the flash kernels cut their work: a table by kernel, head dimension and kind of mask, in `flash_blocks.json`.

`python -m experiments.bench.tune_attention` measures on the GPU at hand and writes it. Until then it holds the sizes that the best Pallas
kernels in public were tuned to on an H100 (openxla/tokamax), changed where those spilled registers.
"""

import functools
import json
from dataclasses import astuple, dataclass
from pathlib import Path

PATH = Path(__file__).with_suffix(".json")
KERNELS = ("forward", "queries", "keys")
"""The forward pass, and the gradients of queries and of keys and values."""
KINDS = ("plain", "reading")
"""Masks of order alone; and those with arrays that kernels must read (segments, positions, ALiBi), which take more registers."""


@dataclass(frozen=True)
class Blocks:
    """Sizes of blocks of queries and of keys, how many of those that are walked over are in shared memory at a time, and whether a
    warpgroup of its own brings them (`lmx.kernels.flash_pipeline`)."""

    queries: int
    keys: int
    stages: int
    carrier: bool

    def __post_init__(self):
        # With one stage, a worker that brings blocks would wait for the next before it has sent for it.
        if self.queries % 64 or self.keys % 64 or min(self.queries, self.keys) < 64 or self.stages < 2:
            raise ValueError(f"blocks={astuple(self)} want queries and keys in multiples of 64, and at least two stages")


@functools.cache
def table(path: Path = PATH) -> dict[tuple[str, int, str], Blocks]:
    """All entries, by kernel, head dimension and kind."""
    written = json.loads(path.read_text())
    return {
        (kernel, int(head_dim), kind): Blocks(*cut)
        for kernel in KERNELS
        for head_dim, kinds in written[kernel].items()
        for kind, cut in kinds.items()
    }


def write(entries: dict[tuple[str, int, str], Blocks], measured: str, path: Path = PATH) -> None:
    """Writes the table; `measured`: on what and when."""
    lines = []
    for kernel in KERNELS:
        rows = []
        for head_dim in sorted({h for k, h, _ in entries if k == kernel}):
            kinds = {kind: list(astuple(entries[kernel, head_dim, kind])) for kind in KINDS}
            rows.append(f'    "{head_dim}": {json.dumps(kinds)}')
        lines.append(f'  "{kernel}": {{\n' + ",\n".join(rows) + "\n  }")
    path.write_text("{\n" + ",\n".join([f'  "measured": {json.dumps(measured)}', *lines]) + "\n}\n")
    table.cache_clear()
