"""What the doctor says of two adapters beyond what it says of any tensors: ranks, and products, which are what counts."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lmx.interop.adapter_settings import Settings
from lmx.interop.peft import ENDS, parsed

CLOSE = 1e-5
"""max|a - b| / max|b| up to which two products are the same."""


def products(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """Each module's two factors, `[rank, in]` and `[out, rank]`, and what their product is multiplied by, by the settings."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        module, end = parsed(name)
        if end is not None:
            found.setdefault(module, {})[ENDS[end]] = tensor.astype(np.float64)
    settings = Settings(config)
    return {
        module: (factors["down"], factors["up"], settings.scale(module))
        for module, factors in found.items()
        if factors.keys() >= {"down", "up"}
    }


def differences(
    a: tuple[Mapping[str, Any], Mapping[str, np.ndarray]], b: tuple[Mapping[str, Any], Mapping[str, np.ndarray]]
) -> dict[str, list[str]]:
    """In words, and of which modules: what differs between two adapters' low-rank sums, each given as its settings and its tensors."""
    ours, theirs = (products(*one) for one in (a, b))
    found: dict[str, list[str]] = {}
    for module in ours.keys() & theirs.keys():
        for what in _of(ours[module], theirs[module]):
            found.setdefault(what, []).append(module)
    for one, other, where in ((ours, theirs, "first"), (theirs, ours, "second")):
        if one and other and (alone := sorted(one.keys() - other.keys())):
            found[f"adapted in the {where} alone"] = alone
    return {what: sorted(modules) for what, modules in found.items()}


def _of(a: tuple[np.ndarray, np.ndarray, float], b: tuple[np.ndarray, np.ndarray, float]) -> list[str]:
    (down, up, scale), (other_down, other_up, other_scale) = a, b
    said = []
    ranks = [_rank(one) for one in (a, b)]
    if None in ranks:
        where = "first" if ranks[0] is None else "second"
        return [f"factors that do not multiply in the {where}: lora_A should be [rank, in], lora_B [out, rank]"]
    if ranks[0] != ranks[1]:
        said.append(f"of rank {ranks[0]} in the first and {ranks[1]} in the second")
    if scale != other_scale:
        said.append(f"multiplied by {scale:.4g} in the first and {other_scale:.4g} in the second (alpha and rank)")
    if up.shape[0] == other_up.shape[0] and down.shape[1] == other_down.shape[1]:
        same = np.array_equal(down, other_down) and np.array_equal(up, other_up)
        if not same and _close(scale * up @ down, other_scale * other_up @ other_down):
            said.append("other factors of the same sum")
    return said


def _rank(one: tuple[np.ndarray, np.ndarray, float]) -> int | None:
    down, up, _ = one
    return len(down) if down.ndim == up.ndim == 2 and up.shape[1] == len(down) else None


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max() <= CLOSE * max(np.abs(b).max(), 1e-30))
