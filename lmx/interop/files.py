"""Folders of tensors by name, each where it lies on disk until it is read; and written back as safetensors."""

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lmx.interop.pickles import unpickled

TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(kind): name for name, kind in TYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHARD = 5 * 10**9
"""Bytes from which a checkpoint is written as several files."""


def has_tensors(folder: Path) -> bool:
    """Whether a folder has a checkpoint of this kind."""
    return any((folder / name).exists() for name in (INDEX, SINGLE, PICKLED_INDEX, PICKLED))


def open_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint, mapped into memory, not read.

    Raises:
      ValueError: there is no checkpoint of this kind, or its files contradict each other.
    """
    for index, single, read in ((folder / INDEX, folder / SINGLE, mapped), (folder / PICKLED_INDEX, folder / PICKLED, unpickled)):
        if index.exists():
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
                raise ValueError(f"{index} has no weight_map, which says in which file each tensor is")
            shards = {name: read(folder / name) for name in sorted(set(places.values()))}
            for tensor, name in places.items():
                if tensor not in shards[name]:
                    raise ValueError(f"{index} says that {name} has {tensor}, but it has not")
            return {tensor: shards[name][tensor] for tensor, name in places.items()}
        if single.exists():
            return read(single)
    there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise ValueError(f"{folder} has none of {SINGLE}, {INDEX}, {PICKLED}, {PICKLED_INDEX}; it has {there}")


def read_json(path: Path) -> dict[str, Any]:
    """A file that is one JSON object. Raises ValueError, by its name, for any other."""
    return _object(path, path.read_bytes())


def _object(path: Path, data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path} should hold JSON: it is cut short, or is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} should hold a JSON object, and holds a {type(found).__name__}; expected a JSON object of names and values"
        )
    return found


def mapped(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one file (https://github.com/huggingface/safetensors, its format)."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8)) if size >= 8 else (size,)
        if length + 8 > size:
            raise ValueError(f"{path} is cut short: its header alone should have {length} bytes, and the file has {size}")
        header = _object(path, file.read(length))
    header.pop("__metadata__", None)
    if strange := [name for name, entry in header.items() if not _says_where(entry)]:
        raise ValueError(f"{path} is no safetensors file: of {strange[0]} it does not say dtype, shape and data_offsets")
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise ValueError(f"{path} should have {end} bytes and has {size}; was it downloaded whole?")
    whole = np.memmap(path, np.uint8, "r", offset=8 + length) if end > 8 + length else np.zeros(0, np.uint8)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in TYPES:
            raise ValueError(f"{path}: {name} is of type {entry['dtype']}; known are {', '.join(TYPES)}")
        (start, stop), dtype = entry["data_offsets"], np.dtype(TYPES[entry["dtype"]])
        if (wanted := math.prod(entry["shape"]) * dtype.itemsize) != stop - start:
            raise ValueError(f"{path}: {name} of shape {entry['shape']} in {entry['dtype']} takes {wanted} bytes, and has {stop - start}")
        tensors[name] = whole[start:stop].view(dtype).reshape(entry["shape"])
    return tensors


def _says_where(entry: Any) -> bool:
    """Whether an entry of a header has what a tensor's has."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    numbers = entry.get("shape"), entry.get("data_offsets")
    whole = all(isinstance(some, list) and all(type(n) is int and n >= 0 for n in some) for some in numbers)
    return whole and len(numbers[1]) == 2


def write_tensors(
    folder: Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]], shard: int = SHARD
) -> None:
    """Writes tensors, given as shape, type and what makes each, one at a time; as several files and an index where they are many bytes."""
    sizes = {name: int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize for name, (shape, dtype, _) in tensors.items()}
    parts: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if parts[-1] and filled + size > shard:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    names = [SINGLE] if len(parts) == 1 else [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    for file, part in zip(names, parts, strict=True):
        _write(folder / file, {name: tensors[name] for name in part}, sizes)
    if len(parts) > 1:
        places = {name: file for file, part in zip(names, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as one file."""
    _write(path, {name: (a.shape, a.dtype, lambda a=a: a) for name, a in tensors.items()}, {name: a.nbytes for name, a in tensors.items()})


def _write(path: Path, tensors: Mapping, sizes: Mapping[str, int]) -> None:
    """In the order, and with the header, of the format's own library, so that a file that is read and written is the same file."""
    tensors = dict(sorted(tensors.items(), key=lambda pair: (-np.dtype(pair[1][1]).itemsize, pair[0])))

    def entries() -> Iterator[tuple[str, dict]]:
        start = 0
        for name, (shape, dtype, _) in tensors.items():
            yield name, {"dtype": NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [start, start + sizes[name]]}
            start += sizes[name]

    header = json.dumps({"__metadata__": {"format": "pt"}} | dict(entries()), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for shape, dtype, make in tensors.values():
            array = np.asarray(make(), dtype, order="C")
            assert array.shape == tuple(shape), (array.shape, shape)
            file.write(array.tobytes())
