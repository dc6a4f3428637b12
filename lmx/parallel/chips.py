"""Peaks of known chips."""

PEAK_FLOPS: dict[str, dict[str, float]] = {
    "NVIDIA H100 80GB HBM3": {"bfloat16": 989e12, "float16": 989e12, "float32": 495e12},
    "NVIDIA H100 PCIe": {"bfloat16": 756e12, "float16": 756e12, "float32": 378e12},
    "NVIDIA H200": {"bfloat16": 989e12, "float16": 989e12, "float32": 495e12},
    "NVIDIA A100-SXM4-80GB": {"bfloat16": 312e12, "float16": 312e12, "float32": 156e12},
    "NVIDIA A100-SXM4-40GB": {"bfloat16": 312e12, "float16": 312e12, "float32": 156e12},
    "NVIDIA B200": {"bfloat16": 2250e12, "float16": 2250e12, "float32": 1125e12},
}
"""Dense FLOP/s by `device_kind` and compute type, from the makers' data sheets; float32 is TF32, what a product of floats runs at."""


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """A chip's peak FLOP/s in a type, or None where it is not known (a CPU)."""
    return PEAK_FLOPS.get(device_kind, {}).get(dtype)
