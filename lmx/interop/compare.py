"""A doctor for two checkpoints: which tensors are the same, and of those that are not, in words, what happened to them.

Peers lose weeks to a transposed matrix, a rotary layout permuted or not, a fused projection in another order: each still loads, runs, and
gives text that is almost right.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmx.core.config import flatten, from_json
from lmx.core.tree import named_leaves
from lmx.interop.checkpoint import tensors
from lmx.interop.compare_adapters import differences
from lmx.interop.files import mapped, open_tensors, read_json
from lmx.interop.runs import imported, is_run, load_run, run_params
from lmx.train.experiment import Experiment
from lmx.train.logging import read_record

CLOSE = 1e-6
"""max|a - b| / max|b| up to which values are said to be rounded alike."""
TABLES = ("embed_tokens", "wte", "word_embeddings", "shared")
HEADS = ("lm_head.weight", "embed_out.weight", "output_projection.weight")


@dataclass(frozen=True)
class Opened:
    """A checkpoint as it lies: its config (or an adapter's) and its tensors by name."""

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, np.ndarray]

    @property
    def adapter(self) -> bool:
        return "peft_type" in self.config


@dataclass(frozen=True)
class Finding:
    """One difference: of which tensors, in words, and how many tensors it is said of."""

    what: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        shown = ", ".join(self.names[:3]) + (f" and {len(self.names) - 3} more" if len(self.names) > 3 else "")
        return f"{self.what}: {shown}" if self.names else self.what


@dataclass(frozen=True)
class Report:
    """What `compare` found.

    Attributes:
      same: tensors that agree to the last bit.
      findings: what differs, most tensors first.
    """

    same: int
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        head = f"{self.same} tensors are the same to the last bit"
        return "\n".join([head + ("." if self.findings else ", and nothing else is there."), *map(str, self.findings)])


def open_checkpoint(folder: str | Path) -> Opened:
    """A Hugging Face checkpoint, a run (one that was imported by the checkpoint's names) or a PEFT adapter. Raises ValueError for what is
    none."""
    folder = Path(folder)
    if imported(folder):
        model, params = load_run(folder)
        return Opened(folder, model.hub, tensors(model, params))
    if is_run(folder):
        config = from_json(Experiment, read_record(folder)["config"]).model
        leaves = named_leaves(run_params(folder, config))
        return Opened(folder, flatten(config), {name: np.asarray(leaf) for name, leaf in leaves.items()})
    adapter = folder / "adapter_model.safetensors"
    if adapter.exists():
        return Opened(folder, read_json(folder / "adapter_config.json"), mapped(adapter))
    config = folder / "config.json"
    return Opened(folder, read_json(config) if config.exists() else {}, open_tensors(folder))


def compare(first: str | Path | Opened, second: str | Path | Opened) -> Report:
    """What differs between two checkpoints. Tensors are aligned by name, prefixes such as `model.` left out."""
    a, b = (one if isinstance(one, Opened) else open_checkpoint(one) for one in (first, second))
    ours, theirs = ({_bare(name): (name, tensor) for name, tensor in one.tensors.items()} for one in (a, b))
    same, found = 0, {}

    def say(what: str, name: str) -> None:
        found.setdefault(what, []).append(name)

    heads = a.config.get("num_attention_heads") or a.config.get("n_head")
    key_heads = a.config.get("num_key_value_heads") or heads
    for bare, (name, left) in ours.items():
        if bare not in theirs:
            continue
        right = theirs[bare][1]
        if left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes():
            same += 1
            continue
        say(_difference(bare, left, right, heads, key_heads), name)
    for own, other, where in ((ours, theirs, "first"), (theirs, ours, "second")):
        for bare, (name, tensor) in own.items():
            if bare not in other:
                say(_alone(bare, tensor, own, other, where), name)
    if a.adapter and b.adapter:
        found |= differences((a.config, a.tensors), (b.config, b.tensors))
    elif a.adapter != b.adapter:
        found["an adapter is compared with what is none"] = []
    findings = [Finding(what, tuple(names)) for what, names in found.items()]
    file = "adapter_config.json" if a.adapter and b.adapter else "config.json"
    findings += [Finding(f"{file}: {what}", ()) for what in _configs(a.config, b.config)]
    return Report(same, tuple(sorted(findings, key=lambda finding: -len(finding.names))))


def _bare(name: str) -> str:
    for prefix in ("base_model.model.", "model.", "transformer.", "bert.", "roberta."):
        name = name.removeprefix(prefix)
    return name


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape:
        return False
    largest = float(np.abs(b).max(initial=0.0))
    return float(np.abs(a - b).max(initial=0.0)) <= CLOSE * max(largest, 1e-30)


def _difference(name: str, left: np.ndarray, right: np.ndarray, heads: int | None, key_heads: int | None) -> str:
    a, b = left.astype(np.float64), right.astype(np.float64)
    if a.shape == b.shape:
        if np.array_equal(a, b):
            return f"the same values as {left.dtype} in the first and {right.dtype} in the second"
        for kind in {left.dtype, right.dtype} if left.dtype != right.dtype else ():
            if np.array_equal(a.astype(kind), b.astype(kind)):
                return f"the same values, {left.dtype} in the first and {right.dtype} in the second, rounded to {kind}"
    if a.ndim == 2 and _close(a.T, b):
        return "transposed"
    if a.ndim == b.ndim and a.shape != b.shape:
        if a.shape[1:] == b.shape[1:]:
            rows = min(len(a), len(b))
            if _close(a[:rows], b[:rows]):
                return f"the second has {len(b)} rows for the first's {len(a)}, and the {rows} that both have are the same (a grown vocabulary)"
        return f"of shape {list(left.shape)} in the first and {list(right.shape)} in the second"
    if a.shape != b.shape:
        if a.size == b.size and _close(a.reshape(b.shape), b):
            return f"the same values as {list(left.shape)} in the first and {list(right.shape)} in the second"
        return f"of shape {list(left.shape)} in the first and {list(right.shape)} in the second"
    for what, candidate in _rearranged(a, heads, key_heads):
        if _close(candidate, b):
            return what
    if _close(a + 1, b) or _close(a, b + 1):
        return "off by one (a norm's scale stored less one)"
    factor = float((a * b).sum() / max((a * a).sum(), 1e-300))
    if _close(factor * a, b):
        return f"multiplied by {factor:.6g}"
    if _close(a, b):
        return "the same but for rounding"
    moved = float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
    similar = float((a * b).sum() / max(np.sqrt((a * a).sum() * (b * b).sum()), 1e-300))
    most = next((f"at most {bound:.1%}" for bound in (0.001, 0.01, 0.1) if moved <= bound), "more than 10%")
    return f"of other values (by {most} of the largest)" if similar > 0.9 else "of values that have nothing to do with each other"


def _rearranged(a: np.ndarray, heads: int | None, key_heads: int | None) -> Iterator[tuple[str, np.ndarray]]:
    """What a matrix or bias could have become by a permutation of its rows, with its name."""
    rows = len(a)
    for count in dict.fromkeys(n for n in (heads, key_heads) if n):
        if rows % count == 0 and (dim := rows // count) % 2 == 0:
            split = a.reshape(count, dim, *a.shape[1:])
            halves = split.reshape(count, 2, dim // 2, *a.shape[1:])
            yield "in the interleaved layout of RoPE in the second, in halves in the first", halves.swapaxes(1, 2).reshape(a.shape)
            pairs = split.reshape(count, dim // 2, 2, *a.shape[1:])
            yield "in the halves of RoPE in the second, interleaved in the first", pairs.swapaxes(1, 2).reshape(a.shape)
    if rows % 3:
        return
    parts = a.reshape(3, rows // 3, *a.shape[1:])
    for order in itertools.permutations(range(3)):
        if order != (0, 1, 2):
            names = ", ".join(["query", "key", "value"][i] for i in order)
            yield (
                f"a fused projection in another order (the second has, of the first's query, key, value: {names})",
                parts[list(order)].reshape(a.shape),
            )
    if heads and rows % (3 * heads) == 0:
        by_head = a.reshape(3, heads, -1, *a.shape[1:]).swapaxes(0, 1).reshape(a.shape)
        yield "a fused projection by heads in the second, query, key and value one after another in the first", by_head
        whole = a.reshape(heads, 3, -1, *a.shape[1:]).swapaxes(0, 1).reshape(a.shape)
        yield "a fused projection with query, key and value one after another in the second, by heads in the first", whole


def _alone(name: str, tensor: np.ndarray, own: Mapping, other: Mapping, where: str) -> str:
    if name in HEADS:
        table = next((t for n, (_, t) in own.items() if any(part in n for part in TABLES) and t.shape == tensor.shape), None)
        if table is not None and np.array_equal(table, tensor):
            return f"only in the {where}, where it is a copy of the embedding: the other ties them"
        return f"only in the {where}, whose head is its own: the other ties it to the embedding, or lacks it"
    if name.endswith(".bias") and name.removesuffix("bias") + "weight" in other:
        return f"a bias that only the {where} has"
    return f"only in the {where}"


def _configs(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    silent = {"transformers_version", "_name_or_path", "architectures", "torch_dtype", "dtype"}
    for name in sorted({*a, *b} - silent):
        if a.get(name) != b.get(name):
            yield f"{name} is {a.get(name, 'absent')!r} in the first and {b.get(name, 'absent')!r} in the second"
