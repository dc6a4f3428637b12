"""What is known of chips: peaks, memory, and the links between them. From the makers' data sheets; times made from it are bounds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One kind of accelerator, and the host that it comes in.

    Attributes:
      kind: what JAX calls it (`device_kind`).
      flops: dense FLOP/s by what products are of (`lmx.core.precision.Precision.multiplies`).
      memory: bytes of its memory.
      bandwidth: bytes a second of its memory.
      near: bytes a second that a device sends to others of its host (one direction; NVLink).
      far: bytes a second that it sends to another host (its share of the network).
      host_link: bytes a second to and from its host's memory (one direction; PCIe).
      per_host: devices of one host.
    """

    kind: str
    flops: dict[str, float]
    memory: int
    bandwidth: float
    near: float
    far: float
    host_link: float
    per_host: int = 8


def _rates(half: float, single: float) -> dict[str, float]:
    """From TFLOP/s of 16-bit products and of those of all fp32, which no matrix unit does."""
    return {"bfloat16": half * 1e12, "float16": half * 1e12, "tensorfloat32": half / 2 * 1e12, "float32": single * 1e12}


CHIPS: dict[str, Chip] = {
    "h100": Chip("NVIDIA H100 80GB HBM3", _rates(989, 67), 84_942_979_072, 3.35e12, 450e9, 50e9, 64e9),
    "h100-pcie": Chip("NVIDIA H100 PCIe", _rates(756, 51), 85_175_697_408, 2.0e12, 64e9, 50e9, 64e9),
    "h200": Chip("NVIDIA H200", _rates(989, 67), 150_121_545_728, 4.8e12, 450e9, 50e9, 64e9),
    "a100": Chip("NVIDIA A100-SXM4-80GB", _rates(312, 19.5), 85_175_697_408, 2.04e12, 300e9, 25e9, 32e9),
    "a100-40": Chip("NVIDIA A100-SXM4-40GB", _rates(312, 19.5), 42_297_786_368, 1.55e12, 300e9, 25e9, 32e9),
    "b200": Chip("NVIDIA B200", _rates(2250, 75), 191_503_138_816, 8.0e12, 900e9, 50e9, 64e9),
}
"""Known chips by the short name that `python -m lmx.plan --chip` takes."""

USABLE = 0.93
"""The share of a chip's memory that a step may fill: the rest is the context, the libraries' own buffers and fragmentation."""


def chip(name: str) -> Chip:
    """A chip by its short name.

    Raises:
      ValueError: it is not known.
    """
    if name not in CHIPS:
        raise ValueError(f"chip={name!r} is not known; use one of {', '.join(CHIPS)}")
    return CHIPS[name]


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """A chip's peak FLOP/s in a type, or None where it is not known (a CPU)."""
    return next((known.flops.get(dtype) for known in CHIPS.values() if known.kind == device_kind), None)
