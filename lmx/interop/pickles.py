"""Tensors of `pytorch_model.bin`, without PyTorch and without running what a pickle may hold: a few names mean tensors, any other is refused."""

import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
CONVERT = "convert it to safetensors (in transformers: model.save_pretrained(path))"


def unpickled(path: Path) -> dict[str, np.ndarray]:
    """The tensors of one file that torch.save wrote (a zip archive, from PyTorch 1.6 on), mapped into memory, not read.

    Raises:
      ValueError: it is no such archive, or holds anything but a flat table of tensors.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        found = _table(path)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, OSError, EOFError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); was it downloaded whole?") from error
    for key in ("state_dict", "model"):  # what trainers wrap around it
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    strange = [name for name, value in found.items() if not isinstance(value, np.ndarray)] if isinstance(found, dict) else [type(found)]
    if strange:
        raise ValueError(f"{path} holds something else than tensors by name ({strange[0]}); {CONVERT}")
    return dict(found)


def _table(path: Path) -> Any:
    """What was saved."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no archive of PyTorch 1.6 or later (cut short, or older); {CONVERT}")
    with zipfile.ZipFile(path) as archive:
        table = next((entry for entry in archive.namelist() if entry.endswith("data.pkl")), None)
        if table is None:
            raise ValueError(f"{path} has no data.pkl; torch.save did not write it")
        folder = table.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError(f"{path} was written on a big-endian machine; {CONVERT}")
        entries = {entry.filename.removeprefix(folder): entry for entry in archive.infolist()}
        with archive.open(table) as file:
            try:
                return _Tensors(file, path, entries).load()
            except (pickle.UnpicklingError, EOFError, TypeError, ValueError, LookupError, AttributeError, MemoryError) as error:
                raise ValueError(f"{path}: {error}; {CONVERT}") from error


@dataclass(frozen=True)
class _Storage:
    """A class of storages, or of tensors' parts, that a pickle names."""

    dtype: Any


class _Tensors(pickle.Unpickler):
    def __init__(self, file, path: Path, entries: dict[str, zipfile.ZipInfo]):
        super().__init__(file)
        self._path, self._entries = path, entries

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in STORAGES:
            return _Storage(STORAGES[name])
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a tensor, and is not run")
        return known[module, name]

    def persistent_load(self, key: tuple) -> np.ndarray:
        """The numbers of a storage, where they lie in the file."""
        _, kind, name, _, count = key
        entry = self._entries[f"data/{name}"]
        if entry.compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError("its tensors are compressed")
        with self._path.open("rb") as file:
            file.seek(entry.header_offset)
            *_, name_length, extra_length = struct.unpack("<4s5H3L2H", file.read(30))
        dtype = np.dtype(kind.dtype)
        if count * dtype.itemsize > entry.file_size:
            raise pickle.UnpicklingError(f"storage {name} has {entry.file_size} bytes for {count} numbers of {dtype}")
        if count == 0:
            return np.zeros(0, dtype)
        start = entry.header_offset + 30 + name_length + extra_length
        if start + count * dtype.itemsize > self._path.stat().st_size:
            raise pickle.UnpicklingError(f"storage {name} reaches beyond the file's end")
        return np.memmap(self._path, np.uint8, "r", offset=start, shape=count * dtype.itemsize).view(dtype)


def _tensor(storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> np.ndarray:
    """A tensor over a storage, which several may share."""
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if 0 not in shape and not 0 <= min((offset, *strides)) <= last < len(storage):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} and strides {strides} reaches beyond its {len(storage)} numbers")
    size = storage.dtype.itemsize
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, [stride * size for stride in strides], writeable=False)
