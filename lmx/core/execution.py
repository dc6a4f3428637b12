"""How a forward is to run: one static, frozen value (decision 2 of the architecture)."""

from dataclasses import dataclass
from typing import Literal

from lmx.core.precision import Precision

Rules = tuple[tuple[str, tuple[str, ...]], ...]
Remat = Literal["none", "dots", "sites", "full"]
Site = Literal["query", "key", "value", "mixed", "hidden"]


@dataclass(frozen=True)
class Execution:
    """What does not change the mathematics of a forward, only how it is carried out.

    Attributes:
      rules: which mesh axes shard each logical axis, of activations and of weights where they multiply (`lmx.parallel.rules`), or None
        to constrain nothing.
      split: which mesh axes shard the gradient of each weight (ZeRO splits it further than `rules` does); None to leave that open.
      rest: which mesh axes shard each weight before it is gathered, where XLA is to be told: what comes from the host's memory, and what
        layers share (on GPUs), it would gather before it is in the type that it multiplies in.
      exchange: how attention sees the whole of a sequence that `rules` split: `"ring"` or `"alltoall"` (`lmx.parallel.context`).
      collective_matmul: whether products with what tensor devices split along the sequence gather and sum it a part at a time, each part
        on its way while another is multiplied (`lmx.parallel.collective`).
      precision: types of parameters and activations.
      attention: the attention implementation; `"auto"` picks (`lmx.kernels.attention`).
      remat: what the backward pass recomputes rather than keeps: `"none"` keeps all, `"dots"` keeps only products with
        weights, `"sites"` only what `sites` names, `"full"` only each layer's input. Of scanned layers.
      sites: what `"sites"` keeps: queries, keys and values as attention takes them, what it mixes, the feed-forward's
        projections.
      offload: whether what is kept waits in the host's memory.
      taps: names of what comes back with the output (`lmx.models.sites`).
      unroll: how many repeats of a group's pattern one trip of the scan runs; more is faster on a CPU, and longer to compile.
    """

    rules: Rules | None = None
    split: Rules | None = None
    rest: Rules | None = None
    exchange: Literal["ring", "alltoall"] = "ring"
    collective_matmul: bool = False
    precision: Precision = Precision()
    attention: str = "auto"
    remat: Remat = "none"
    sites: tuple[Site, ...] = ()
    offload: bool = False
    taps: tuple[str, ...] = ()
    unroll: int = 1
