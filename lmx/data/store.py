"""Tokenised text on disk with random access, built once and found again by the hash of what went into it."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from lmx.data.documents import Document
from lmx.data.sources import documents, source_hash
from lmx.data.tokenizers import Tokenizer
from lmx.data.whole import file_hash

FORMAT = 1  # raise it when what a store holds, or how, changes: older caches are then left alone and built again
BATCH_BYTES, BATCH_DOCUMENTS = 1 << 20, 1024  # how much text one call of the tokenizer gets

# The arrays of a store: raw, little-endian, written as the text streams by.
FILES = {"tokens": None, "offsets": "<i8", "document_bytes": "<i8", "ids": "|u1", "id_offsets": "<i8"}


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Tokens of all documents one after another, memory-mapped, and where each document lies. Made by `open_store`."""

    directory: Path
    index: dict[str, Any]
    """`index.json`: format, documents, tokens, bytes, vocab, eos_id, tokenizer (fingerprint), content (hash), files."""
    tokens: np.ndarray
    """uint16 or uint32 `[tokens]`; each document ends with the tokenizer's end-of-text token if it has one."""
    offsets: np.ndarray
    """int64 `[documents + 1]`: document d is `tokens[offsets[d]:offsets[d + 1]]`."""
    document_bytes: np.ndarray
    """int64 `[documents]`: UTF-8 bytes of each document's text."""
    ids: np.ndarray
    id_offsets: np.ndarray

    def __len__(self) -> int:
        """Documents."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 `[documents]`: tokens of each document."""
        return np.diff(self.offsets)

    @property
    def vocab(self) -> int:
        return self.index["vocab"]

    @property
    def fingerprint(self) -> str:
        """Hash (hex) of the tokens and where documents begin: two stores with the same one train the same model."""
        return self.index["content"]

    @property
    def targets(self) -> int:
        """Tokens that are predicted in one epoch: all but the first of each document."""
        return int(np.maximum(self.lengths - 1, 0).sum())

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per predicted token, so that `nats per byte = mean loss in nats / bytes_per_token`.

        The sum of all losses over all bytes, that is: for `ByteTokenizer` exactly 1 (the first byte is not predicted, the end of text is).
        """
        if not self.targets:
            raise ValueError(f"{self.directory} has no token to predict: every document is at most one token long")
        return self.index["bytes"] / self.targets

    def __reduce__(self) -> tuple[Any, ...]:
        """Where it lies, so that processes share it: pickled, a mapped array would be copied."""
        return _mapped, (self.directory.absolute(), self.index)

    def document(self, number: int) -> np.ndarray:
        """The tokens of one document. Raises IndexError outside 0..documents-1."""
        return self.tokens[slice(*self._span(self.offsets, number))]

    def document_id(self, number: int) -> str:
        """The id of one document. Raises IndexError outside 0..documents-1."""
        return self.ids[slice(*self._span(self.id_offsets, number))].tobytes().decode()

    def _span(self, offsets: np.ndarray, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} of a store of {len(self)}")
        return int(offsets[number]), int(offsets[number + 1])


def build_store(texts: Iterable[Document], tokenizer: Tokenizer, directory: str | Path) -> TokenStore:
    """Tokenise documents into a new store, in one pass with about a megabyte of text (or one document) in memory.

    Written beside `directory` and renamed at the end, so a store is whole or not there. Raises FileExistsError when `directory` exists, and
    ValueError when there is no document.
    """
    directory = Path(directory)
    if directory.exists():
        raise FileExistsError(f"{directory} exists; open it with open_store, or remove it to build the store again")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{uuid4().hex}")
    temporary.mkdir()
    try:
        _write(texts, tokenizer, temporary)
        try:
            os.rename(temporary, directory)
        except OSError:
            # Another process may have built the same store meanwhile: rename does not replace a folder with something in it.
            if not (directory / "index.json").exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_store(directory)


def _write(texts: Iterable[Document], tokenizer: Tokenizer, directory: Path) -> None:
    dtype = token_type(tokenizer)
    files = {name: (directory / f"{name}.bin").open("wb") for name in FILES}
    hashes = {name: hashlib.sha256() for name in FILES}

    def write(name: str, values: np.ndarray) -> None:
        data = values.tobytes()
        files[name].write(data)
        hashes[name].update(data)

    def offsets(start: int, lengths: list[int]) -> np.ndarray:
        return start + np.cumsum(lengths, dtype="<i8")

    count = tokens = text_bytes = id_bytes = 0
    for name in ("offsets", "id_offsets"):
        write(name, np.zeros(1, "<i8"))
    try:
        for batch, arrays in tokenised(texts, tokenizer, lambda document: document.text):
            ids = [document.id.encode() for document in batch]
            sizes = [len(document.text.encode()) for document in batch]
            write("offsets", offsets(tokens, list(map(len, arrays))))
            write("tokens", np.concatenate(arrays))
            write("document_bytes", np.asarray(sizes, "<i8"))
            write("id_offsets", offsets(id_bytes, list(map(len, ids))))
            write("ids", np.frombuffer(b"".join(ids), np.uint8))
            count += len(batch)
            tokens += sum(map(len, arrays))
            text_bytes += sum(sizes)
            id_bytes += sum(map(len, ids))
    finally:
        for file in files.values():
            file.close()
    if not count:
        raise ValueError("no documents to tokenise: the corpus is empty")
    index = {
        "format": FORMAT,
        "documents": count,
        "tokens": tokens,
        "bytes": text_bytes,
        "dtype": dtype.str,
        "vocab": tokenizer.vocab,
        "eos_id": tokenizer.eos_id,
        "tokenizer": tokenizer.fingerprint,
        "content": hashlib.sha256(dtype.str.encode() + hashes["tokens"].digest() + hashes["offsets"].digest()).hexdigest(),
        "files": {name: {"bytes": (directory / f"{name}.bin").stat().st_size, "sha256": hashes[name].hexdigest()} for name in FILES},
    }
    (directory / "index.json").write_text(json.dumps(index, indent=1) + "\n")


def token_type(tokenizer: Tokenizer) -> np.dtype:
    """What tokens are stored as."""
    return np.dtype("<u2" if tokenizer.vocab <= 1 << 16 else "<u4")


def tokenised[Item](
    items: Iterable[Item], tokenizer: Tokenizer, text: Callable[[Item], str]
) -> Iterator[tuple[list[Item], list[np.ndarray]]]:
    """Items in groups that one call of a tokenizer does well with, and what is stored of each: the tokens of its text and its end."""
    dtype = token_type(tokenizer)
    end = np.asarray([] if tokenizer.eos_id is None else [tokenizer.eos_id], dtype)
    items = iter(items)
    while batch := list(islice(items, 1)):
        size = len(text(batch[0]))
        while size < BATCH_BYTES and len(batch) < BATCH_DOCUMENTS and (item := next(items, None)) is not None:
            batch.append(item)
            size += len(text(item))
        rows = tokenizer.encode_batch([text(item) for item in batch])
        # np.asarray would keep a bytes object whole instead of reading its numbers
        arrays = [np.frombuffer(row, np.uint8) if isinstance(row, bytes) else np.asarray(row, np.int64) for row in rows]
        yield batch, [np.concatenate([row.astype(dtype), end]) for row in arrays]


def open_store(directory: str | Path) -> TokenStore:
    """Memory-map a store after checking every file's size and hash (reading it once, about a second a gigabyte).

    Raises FileNotFoundError when there is none, ValueError when it is damaged or of another format.
    """
    directory = Path(directory)
    try:
        index = json.loads((directory / "index.json").read_bytes())
        files = index["files"]
        if index["format"] != FORMAT:
            raise ValueError(
                f"{directory} is a token store of format {index['format']}, expected {FORMAT}; remove the folder, it will be built again"
            )
        np.dtype(index["dtype"])
        expected = {name: (files[name]["bytes"], files[name]["sha256"]) for name in FILES}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{directory} is no token store: it has no index.json; build one with build_store") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{directory}/index.json is damaged ({error}); remove the folder, it will be built again") from error
    for name, (size, digest) in expected.items():
        path = directory / f"{name}.bin"
        found = path.stat().st_size if path.exists() else 0
        if found != size:
            raise ValueError(f"{path} has {found} bytes, expected {size}: the store is damaged; remove the folder, it will be built again")
        if file_hash(path) != digest:
            raise ValueError(f"{path} does not have the contents it was written with: remove the folder, it will be built again")
    return _mapped(directory, index)


def _mapped(directory: Path, index: dict[str, Any]) -> TokenStore:
    """A store whose files have been checked."""
    arrays = {}
    for name, dtype in FILES.items():
        dtype = np.dtype(dtype or index["dtype"])
        # An empty file cannot be mapped.
        arrays[name] = np.memmap(directory / f"{name}.bin", dtype, mode="r") if index["files"][name]["bytes"] else np.zeros(0, dtype)
    return TokenStore(directory, index, **arrays)


def cached_store(source: str, tokenizer: Tokenizer, *, cache: str | Path, field: str = "text", name: str = "source") -> TokenStore:
    """The store of a source under `cache/stores`, built if it is not there yet.

    Its folder is named by the hash of the source's contents, the tokenizer's fingerprint, the field and the format, so nothing stale is
    ever found. Raises what `documents`, `build_store` and `open_store` raise.
    """
    parts = [FORMAT, source_hash(source, name=name), tokenizer.fingerprint, tokenizer.eos_id, field]
    directory = Path(cache) / "stores" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    if directory.exists():
        return open_store(directory)
    return build_store(documents(source, field=field, name=name), tokenizer, directory)
