"""Tokenised text as shards: ArrayRecord files of token blocks, what each document is beside them, and a manifest over all.

A shard's tokens are its documents one after another, cut into records of `BLOCK`, so any span is read by its place: nothing is copied to
train from them, and nothing but where documents begin is held in memory. `documents-*` has a JSON record for each document: where it came
from, and what was decided of it on the way.
"""

import hashlib
import json
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lmx.data.store import TokenStore, token_type, tokenised
from lmx.data.tokenizers import Tokenizer, load_tokenizer
from lmx.data.whole import file_hash, placed, whole, write_json

FORMAT = 1
BLOCK = 4096  # tokens in a record: about as long as an example, so that one needs few of them
BATCH_BYTES = 1 << 20
OPTIONS = "group_size:1,zstd:1"
READ = "readahead_buffer_size:0,max_parallelism:0"
KEPT_BLOCKS = 256  # blocks that stay in memory, about a megabyte
KINDS = ("tokens", "documents")
ARRAYS = ("lengths", "bytes")


def write_shard(records: Iterable[Any], tokenizer: Tokenizer, folder: Path, number: int, *, corpus: str) -> None:
    """Write documents (`lmx.data.curate.records.Record`) as shard `number` of a folder; its index file comes last, when all is there."""
    folder.mkdir(parents=True, exist_ok=True)
    lengths, sizes, rest = array("q"), array("q"), np.zeros(0, token_type(tokenizer))
    with _writers(folder, number) as writers:
        for batch, arrays in tokenised(records, tokenizer, lambda record: record.document.text):
            for record, tokens in zip(batch, arrays, strict=True):
                d = record.document
                size = len(d.text.encode())
                about = {"id": d.id, "source": d.source, "corpus": corpus, "created": d.created, "metadata": d.metadata, "bytes": size}
                writers["documents"].write(json.dumps({**about, "decisions": record.decisions}, ensure_ascii=False).encode())
                lengths.append(len(tokens))
                sizes.append(size)
            stream = np.concatenate([rest, *arrays])
            full = len(stream) // BLOCK * BLOCK
            for start in range(0, full, BLOCK):
                writers["tokens"].write(stream[start : start + BLOCK].tobytes())
            rest = stream[full:]
        if len(rest):
            writers["tokens"].write(rest.tobytes())
    index: dict[str, Any] = {"corpus": corpus, "documents": len(lengths), "tokens": sum(lengths), "bytes": sum(sizes)}
    if lengths:  # a shard without documents is none: no files but its index
        for kind, values in zip(ARRAYS, (lengths, sizes), strict=True):
            with whole(folder / f"{kind}-{number:06d}.npy") as file:
                np.save(file, np.asarray(values, "<i8"))
        files = [*(_file(folder, kind, number) for kind in KINDS), *(folder / f"{kind}-{number:06d}.npy" for kind in ARRAYS)]
        index["files"] = {path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in files}
    else:
        for kind in KINDS:
            _file(folder, kind, number).unlink()
    write_json(index_of(folder, number), index)


@contextmanager
def _writers(folder: Path, number: int) -> Iterator[dict[str, Any]]:
    """Of a shard's records by kind; its files are there when the block ends."""
    from array_record.python.array_record_module import ArrayRecordWriter

    with ExitStack() as stack:
        writers = {kind: ArrayRecordWriter(str(stack.enter_context(placed(_file(folder, kind, number)))), OPTIONS) for kind in KINDS}
        try:
            yield writers
        finally:
            for writer in writers.values():
                writer.close()


def _file(folder: Path, kind: str, number: int) -> Path:
    return folder / f"{kind}-{number:06d}.array_record"


def index_of(folder: Path, number: int) -> Path:
    """The file that says that a shard is done."""
    return folder / f"index-{number:06d}.json"


def write_manifest(folder: Path, numbers: Sequence[int], tokenizer: Tokenizer, about: dict[str, Any]) -> dict[str, Any]:
    """Join the shards' indices into `manifest.json`, the last file of a corpus: counts, hashes, and `about`. Raises ValueError where all
    shards are empty."""
    indices = {number: json.loads(index_of(folder, number).read_bytes()) for number in numbers}
    shards = [{"number": number, **index} for number, index in indices.items() if index["documents"]]
    if not shards:
        raise ValueError(f"{folder}: no document was kept")
    manifest = {
        "format": FORMAT,
        **{what: sum(shard[what] for shard in shards) for what in ("documents", "tokens", "bytes")},
        "dtype": token_type(tokenizer).str,
        "vocab": tokenizer.vocab,
        "eos_id": tokenizer.eos_id,
        "tokenizer": tokenizer.fingerprint,
        "content": hashlib.sha256(json.dumps([shard["files"] for shard in shards], sort_keys=True).encode()).hexdigest(),
        **about,
        "shards": shards,
    }
    write_json(folder / "manifest.json", manifest)
    return manifest


def is_shards(folder: str | Path) -> bool:
    """Whether a folder holds shards."""
    return (Path(folder) / "manifest.json").is_file()


def open_shards(folder: str | Path, *, hashes: bool = False) -> TokenStore:
    """The shards of a folder as a store that reads them where they lie.

    Sizes are checked; `hashes=True` reads and checks every byte too. Raises FileNotFoundError when there are none, ValueError, with the file,
    when they are damaged.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} holds no shards: it has no manifest.json; make them with a recipe") from error
    except ValueError as error:
        raise ValueError(f"{folder}/manifest.json is damaged ({error}); make the corpus again") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{folder} holds shards of format {manifest.get('format')}, expected {FORMAT}; make the corpus again")
    for shard in manifest["shards"]:
        for name, expected in shard["files"].items():
            path = folder / name
            size = path.stat().st_size if path.exists() else 0
            if size != expected["bytes"] or (hashes and file_hash(path) != expected["sha256"]):
                raise ValueError(f"{path} is not what was written ({size} bytes, expected {expected['bytes']}); make the corpus again")
    numbers = [shard["number"] for shard in manifest["shards"]]
    lengths, sizes = (np.concatenate([np.load(folder / f"{kind}-{n:06d}.npy") for n in numbers]) for kind in ARRAYS)
    counts = [shard["tokens"] for shard in manifest["shards"]]
    tokens, documents = (tuple(_file(folder, kind, number) for number in numbers) for kind in KINDS)
    blocks = Blocks(tokens, counts, np.dtype(manifest["dtype"]))
    about = Documents(documents, [shard["documents"] for shard in manifest["shards"]])
    return ShardStore(folder, manifest, blocks, np.append(0, np.cumsum(lengths)), sizes, about)


def corpus_tokenizer(split: Path) -> Tokenizer:
    """The tokenizer that the shards of a split were made with. Raises FileNotFoundError or ValueError where the corpus is not whole."""
    path = split.parent / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"{split} is not a split of a whole corpus: there is no {path}; run its recipe to the end")
    name = json.loads(path.read_bytes())["tokenizer"]["name"]
    return load_tokenizer(name if name == "bytes" else split.parent / name)


class ShardStore(TokenStore):
    """A store whose tokens lie in shards. Made by `open_shards`."""

    about: "Documents"

    def __init__(
        self, directory: Path, index: dict[str, Any], tokens: "Blocks", offsets: np.ndarray, sizes: np.ndarray, about: "Documents"
    ):
        nothing = np.zeros(0, np.int64)
        super().__init__(directory, index, tokens, offsets, sizes, nothing, nothing)
        object.__setattr__(self, "about", about)

    def __reduce__(self) -> tuple[Any, ...]:
        return open_shards, (self.directory.absolute(),)

    def document_id(self, number: int) -> str:
        return self.about[number]["id"]


class _Files:
    """Records of several ArrayRecord files, opened when first read. Threads may share it."""

    def __init__(self, paths: tuple[Path, ...]):
        self._paths, self._local = paths, threading.local()

    def __reduce__(self) -> tuple:
        return type(self), (self._paths,)

    def read(self, file: int, records: Sequence[int]) -> list[bytes]:
        from array_record.python.array_record_module import ArrayRecordReader

        readers = self._local.__dict__.setdefault("readers", {})
        if file not in readers:
            readers[file] = ArrayRecordReader(str(self._paths[file]), READ)
        return readers[file].read([int(r) for r in records])


class Documents(Sequence[dict[str, Any]]):
    """What is known of each document: `{id, source, corpus, created, metadata, bytes, decisions}`."""

    def __init__(self, paths: tuple[Path, ...], counts: Sequence[int]):
        self._files, self._ends = _Files(paths), np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} of {len(self)}")
        file = int(np.searchsorted(self._ends, number, side="right"))
        return json.loads(self._files.read(file, [number - (self._ends[file - 1] if file else 0)])[0])


class Blocks:
    """Tokens of all shards in a row, read as a NumPy array is: by a slice or by an array of places."""

    ndim = 1

    def __init__(self, paths: tuple[Path, ...], counts: Sequence[int], dtype: np.dtype):
        self._files, self._ends, self.dtype = _Files(paths), np.cumsum(counts), dtype
        self._begins = self._ends - np.asarray(counts)
        self._blocks = -(-np.asarray(counts) // BLOCK)
        self._first = np.cumsum(self._blocks) - self._blocks  # a shard's first block among all
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return Blocks, (self._files._paths, self._ends - self._begins, self.dtype)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)

    def __getitem__(self, at: Any) -> np.ndarray:
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            if step == 1:
                return self._span(start, stop)
            at = np.arange(start, stop, step)
        at = np.asarray(at)
        if at.size and not (at.min() >= 0 and at.max() < len(self)):
            raise IndexError(f"tokens {at.min()} to {at.max()} of {len(self)}")
        block, within = self._place(at)
        # What is asked for is a few runs of places, so runs of places in one block are told apart, not places.
        numbers = block.ravel()
        begins = np.flatnonzero(np.diff(numbers, prepend=-1))
        wanted, inverse = np.unique(numbers[begins], return_inverse=True)
        blocks = self._read(wanted)
        starts = np.cumsum([0, *map(len, blocks)])[:-1]
        start = np.repeat(starts[inverse], np.diff(begins, append=len(numbers))).reshape(at.shape)
        return (np.concatenate(blocks) if blocks else np.zeros(0, self.dtype))[start + within]

    def _place(self, at: Any) -> tuple[Any, Any]:
        """The block among all, and the place in it."""
        shard = np.searchsorted(self._ends, at, side="right")
        block, within = np.divmod(at - self._begins[shard], BLOCK)
        return self._first[shard] + block, within

    def _span(self, start: int, stop: int) -> np.ndarray:
        """Tokens in a row, at the cost of their own size: a document may be long."""
        if start >= stop:
            return np.zeros(0, self.dtype)
        (first, last), (skipped, _) = self._place(np.array([start, stop - 1]))
        return np.concatenate(self._read(np.arange(first, last + 1)))[skipped : skipped + stop - start]

    def _read(self, wanted: np.ndarray) -> list[np.ndarray]:
        with self._lock:
            have = {int(b): self._kept[int(b)] for b in wanted if int(b) in self._kept}
        missing = np.array([b for b in wanted.tolist() if b not in have], np.int64)
        shard = np.searchsorted(self._first, missing, side="right") - 1
        for file in np.unique(shard).tolist():
            these = missing[shard == file]
            for number, data in zip(these.tolist(), self._files.read(file, these - self._first[file]), strict=True):
                have[number] = np.frombuffer(data, self.dtype)
        with self._lock:
            self._kept.update((b, have[b]) for b in missing.tolist())
            while len(self._kept) > KEPT_BLOCKS:
                self._kept.popitem(last=False)
        return [have[b] for b in wanted.tolist()]
