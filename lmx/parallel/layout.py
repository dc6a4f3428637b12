"""How a run is laid out over devices: a value, its checks, and the mesh made from it."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from lmx.core.execution import Remat, Site

AXES = ("pipeline", "data", "fsdp", "expert", "context", "tensor")
"""The mesh's axes, the one whose devices talk most last: neighbours on the mesh are neighbours on the machine."""
SHARDS = ("data", "fsdp", "expert")
"""The axes over which the batch is split."""


Offload = Literal["optimizer", "params", "activations"]


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism. Loss, gradients and updates do not depend on it. Their product is the number of devices used."""

    data: int = 1
    """Replicas: each takes its share of the batch and holds everything."""
    fsdp: int = 1
    """Devices that share the batch, and split what `zero` says among them."""
    zero: Literal[0, 1, 2, 3] = 3
    """What the fsdp devices split (ZeRO, Rajbhandari et al., 2020): 0 nothing, 1 the optimizer's state, 2 gradients too, 3 parameters too."""
    tensor: int = 1
    """Devices that split each layer's heads, feed-forward and vocabulary among them (Megatron-LM)."""
    sequence: bool = True
    """Whether the tensor devices also split what lies between those along the sequence (Korthikanti et al., 2022): less memory, no more
    communication."""
    collective_matmul: bool = False
    """Whether those devices gather and sum such sequences a part at a time, each on its way while another is multiplied (Wang et al., 2023)."""
    context: int = 1
    """Devices that split each sequence among them."""
    exchange: Literal["ring", "alltoall"] = "ring"
    """How attention sees the whole of a split sequence: ring (keys and values go round; Liu et al., 2023) or alltoall (heads are traded for
    positions; Jacobs et al., 2023; the heads of a tensor device must divide)."""
    attention: Literal["auto", "xla", "cudnn", "flash"] = "auto"
    """What computes attention: auto (the fastest that was measured on the chip), or one by name; flash is lmx's own kernel for Hopper GPUs,
    in bf16 or fp16. Raises where it cannot."""
    pipeline: int = 1
    """Stages into which the stack of layers is cut; microbatches flow through them."""
    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    """In which order stages work: 1f1b keeps the inputs of a number of microbatches bounded by the stages, gpipe of all."""
    rounds: int = 1
    """Stages that each pipeline device holds (interleaved virtual stages, Narayanan et al., 2021): the bubble shrinks by this factor."""
    expert: int = 1
    """Devices that share the batch, and split the experts of a mixture among them."""
    remat: Remat = "none"
    """What the backward pass recomputes instead of keeping: none, dots (keeps products with weights), sites (keeps layout.sites), full
    (keeps layer inputs)."""
    sites: tuple[Site, ...] = ()
    """What remat sites keeps beside layer inputs: query, key, value (as attention takes them), mixed (what it gives its output
    projection), hidden (the feed-forward's projections)."""
    offload: tuple[Offload, ...] = ()
    """What waits in the host's memory and is fetched a layer at a time (ZeRO-Offload, Ren et al., 2021): optimizer (its state), params
    (master parameters of layers), activations (what remat keeps). Saves the device's memory, costs transfers."""
    ordered: int = 0
    """Debugging: the number of virtual shards whose gradients are computed apart and summed in a fixed order, so that the state is
    bit-equal for any layout.data (fsdp and tensor must be 1). Slower, and takes that many times the gradients' memory. 0: off."""

    @property
    def devices(self) -> int:
        """How many devices the layout uses."""
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def shards(self) -> int:
        """Into how many parts the batch is split."""
        return math.prod(getattr(self, axis) for axis in SHARDS)

    @property
    def formed_again(self) -> bool:
        """Whether a backward pass begins a layer by forming its products again, of what remat keeps."""
        return self.remat in ("sites", "full")

    @property
    def ahead(self) -> bool:
        """Whether a layer's parameters are gathered while the layer before is computed: `lmx.parallel.overlap` says why not always."""
        return self.formed_again and self.zero == 3 and self.fsdp > 1 and self.tensor == self.pipeline == 1

    @property
    def streamed(self) -> bool:
        """Whether an update moves layers one at a time, since what it reads of them waits in the host's memory."""
        return "optimizer" in self.offload or "params" in self.offload


def check(layout: Layout, sizes: dict[str, dict[str, int]], rows: int, microbatches: int, available: int) -> None:
    """Refuses a layout that does not fit, before anything is compiled.

    Args:
      sizes: for each axis of the mesh (`"fsdp"`, `"tensor"`), the sizes it must divide, by the name of their knob.
      rows: rows of one microbatch.
      microbatches: of a step.
      available: devices at hand.

    Raises:
      ValueError: one line that names the value, what was expected and the knob.
    """
    for axis in AXES:
        if getattr(layout, axis) < 1:
            raise ValueError(f"layout.{axis}={getattr(layout, axis)} must be at least 1")
    if layout.devices > available:
        degrees = " x ".join(f"{axis} {getattr(layout, axis)}" for axis in AXES if getattr(layout, axis) > 1)
        raise ValueError(
            f"the layout needs {layout.devices} devices ({degrees}) but {available} are here; lower layout.*, or simulate more on a "
            f"CPU with JAX_NUM_CPU_DEVICES={layout.devices}"
        )
    for axis, knobs in sizes.items():
        degree = getattr(layout, axis)
        for knob, size in knobs.items():
            if size % degree:
                raise ValueError(
                    f"{knob}={size} is not divisible by layout.{axis}={degree}; use {_one_of(divisors(size))} for layout.{axis}"
                )
    if (layout.remat == "sites") != bool(layout.sites):
        raise ValueError(f"layout.remat={layout.remat} with layout.sites={layout.sites}: set sites with remat sites, and only with it")
    if layout.remat == "none" and set(layout.offload) - {"optimizer"}:
        raise ValueError(
            f"layout.offload={layout.offload} with layout.remat=none, which keeps on the device all that a layer computes and reads; use full, "
            "dots or sites, or offload the optimizer alone"
        )
    if layout.offload and layout.ordered:
        raise ValueError("layout.ordered keeps everything on the device; drop layout.offload")
    if layout.rounds > 1 and set(layout.offload) - {"optimizer"}:
        raise ValueError(
            f"layout.offload={layout.offload} with layout.rounds={layout.rounds}: one stage of several is cut out of its device's layers, which "
            "are there for that; offload the optimizer alone, or set layout.rounds to 1"
        )
    if layout.zero not in range(4):
        raise ValueError(f"layout.zero={layout.zero} must be 0, 1, 2 or 3")
    if layout.rounds < 1 or (layout.rounds > 1 and layout.pipeline == 1):
        raise ValueError(f"layout.rounds={layout.rounds} are stages of a pipeline's devices: set it to 1, or layout.pipeline above 1")
    if layout.rounds > 1 and microbatches % layout.pipeline:
        raise ValueError(
            f"microbatches={microbatches} is not divisible by layout.pipeline={layout.pipeline}, and with layout.rounds={layout.rounds} they "
            f"go in flights of that many; use a multiple, or layout.rounds=1"
        )
    if rows % layout.shards:
        raise ValueError(
            f"a microbatch of {rows} rows (batch / microbatches) is not divisible by layout.data x layout.fsdp x layout.expert = {layout.shards}; "
            f"use a batch that is a multiple of {layout.shards} x microbatches, or {_one_of(divisors(rows))} shards"
        )
    if layout.ordered < 0:
        raise ValueError(f"layout.ordered={layout.ordered} must be at least 0; 0 is off")
    if layout.ordered:
        if layout.devices != layout.data:
            raise ValueError(
                "layout.ordered sums over data replicas alone; set layout.fsdp, layout.tensor and the others to 1, or drop layout.ordered"
            )
        for name, whole, part in (("layout.ordered", layout.ordered, layout.data), ("a microbatch's rows", rows, layout.ordered)):
            if whole % part:
                raise ValueError(
                    f"{name}={whole} is not divisible by {part}; layout.ordered must be a multiple of layout.data and divide the rows"
                )


def make_mesh(layout: Layout, devices: list | None = None) -> Mesh:
    """The mesh of a layout over the first devices, or given ones. Axes of size 1 are kept, so the same code runs everywhere."""
    devices = jax.devices() if devices is None else devices
    shape = tuple(getattr(layout, axis) for axis in AXES)
    return Mesh(np.asarray(devices[: layout.devices]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _one_of(numbers: list[int]) -> str:
    head = numbers[:8]
    return f"{', '.join(map(str, head[:-1]))} or {head[-1]}" if len(head) > 1 else str(head[0])
