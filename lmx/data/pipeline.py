"""Batches as a pure function of (seed, k), and a Grain pipeline over them that starts anywhere at once.

Everything is counted in global examples. Epochs of N examples follow each other without a seam: example j is number j mod N in the order of
epoch j // N, batch k is examples k * rows to (k + 1) * rows. So the cursor of a run is one number, which means the same for any batch size,
any number of processes and any mesh.
"""

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np

from lmx.data.packing import Packing, Plan, permutation, plan
from lmx.data.store import TokenStore

Batch = dict[str, np.ndarray]
"""`tokens`, `targets`, `segments`, `positions` int32 `[rows, length]`; `weights` float32 `[rows, length]`; `example_id` uint32 `[rows]`.

`segments` are 1, 2, .. for the spans of a row and 0 on padding; `positions` start at 0 in each span; `weights` are 1 where `targets` is to
be predicted and 0 on padding, where tokens and targets are 0. `example_id` is the global example. A `"stream"` has no `segments`: a row is
one text to attention, and padding, if there is any, its end."""

Rows = Sequence[int] | slice | Callable[[int], Sequence[int] | np.ndarray]
"""Some rows of a global batch; a function is told how many that has."""

EXAMPLES = 2**32  # what example_id can count


class Numbered(ABC):
    """What all kinds of batches have in common: they are asked for by number, and the same whenever, wherever and by whomever that is.

    Attributes:
      rows_per_batch, length: the shape of a global batch; of the last ones where it changes.
      total: global examples in all; for a run without end, as many as `example_id` can name.
    """

    rows_per_batch: int
    length: int
    total: int

    @abstractmethod
    def examples(self, ids: np.ndarray) -> Batch:
        """Global examples by number, int64 `[rows]`, as a batch. Those past the end of a finite run are padding.

        Raises ValueError, with its number, for an example with nothing to predict.
        """

    @property
    @abstractmethod
    def stores(self) -> list[TokenStore]:
        """What the batches are made from."""

    @abstractmethod
    def spans(self, example: int) -> list[tuple[TokenStore, int, int]]:
        """What a global example is made of, in its order: a store and `tokens[start:stop]` of it. Raises IndexError outside the run."""

    @abstractmethod
    def holding(self, store: TokenStore, start: int, stop: int, until: int) -> list[int]:
        """The global examples below `until`, in order, that hold any of `tokens[start:stop]` of a store."""

    def place(self, example: int) -> tuple[int, int]:
        """The batch of a global example, and its row there."""
        return divmod(example, self.rows_per_batch)

    def begin(self, cursor: int, j: int) -> int:
        """The global example that the j-th batch after a cursor begins with: the cursor itself for 0."""
        return cursor + j * self.rows_per_batch

    def __len__(self) -> int:
        return self.left(0)

    def left(self, cursor: int) -> int:
        """Batches from a cursor on."""
        return max(0, -(-(self.total - cursor) // self.rows_per_batch))

    def __getitem__(self, k: int) -> Batch:
        """Global batch k. Raises IndexError outside 0..len-1."""
        return self.rows(k, slice(None))

    def rows(self, k: int, which: Rows) -> Batch:
        """Only some rows of global batch k, in the order given: what one process needs. Raises IndexError for one that is not there."""
        if not 0 <= k < len(self):
            raise IndexError(f"batch {k} of {len(self)}")
        return self.after(0, k, which)

    def after(self, cursor: int, j: int, which: Rows) -> Batch:
        """Some rows of the j-th batch after a cursor."""
        ids = np.arange(self.begin(cursor, j), self.begin(cursor, j + 1))
        if callable(which):
            which = which(len(ids))
        return self.examples(ids[which if isinstance(which, slice) else np.asarray(which, np.int64)])


class Batches(Numbered):
    """The batches of a run, by number: `batches[k]` is the same whenever, wherever and by whomever it is asked for.

    A class, for it keeps the plans of the last two epochs. Threads may share it.

    - `rows`, `length`: the shape of a global batch.
    - `packing`: as in `lmx.data.packing.plan`.
    - `shuffle`: a permutation of all examples for each epoch; with `"concatenate"` documents too change their order, so that cuts fall
      elsewhere. Without it examples come in the order of the store, the same in each epoch.
    - `epochs`: None goes on for ever. Else `len` counts the batches that hold them, and the rows of the last that have no example left are
      padding (weights 0): for evaluation, `shuffle=False, epochs=1` visits each target exactly once.

    Raises ValueError for a bad argument, or a store in which nothing can be predicted.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        rows: int,
        length: int,
        seed: int,
        packing: Packing = "concatenate",
        shuffle: bool = True,
        epochs: int | None = None,
    ):
        if rows < 1:
            raise ValueError(f"rows={rows} is not positive; use the number of examples in a global batch")
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs={epochs} is not positive; use None to go on for ever")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed} is outside 0..2**64-1")
        self.store, self.rows_per_batch, self.length, self.seed = store, rows, length, seed
        self.packing, self.shuffle, self.epochs = packing, shuffle, epochs
        one = packing == "stream"
        self._lengths = np.array([store.offsets[-1]]) if one else store.lengths
        self._begins = np.zeros(1, np.int64) if one else store.offsets[:-1]
        self._plans: dict[int, Plan] = {}
        self._orders: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()
        self.examples_per_epoch = len(self._epoch(0)[0])
        self.total = EXAMPLES if epochs is None else epochs * self.examples_per_epoch
        """Examples in all; for a run without end, as many as `example_id` can name."""
        if self.total > EXAMPLES:
            raise ValueError(
                f"epochs={epochs} of {self.examples_per_epoch} examples are more than example_id can count (2**32); use fewer epochs"
            )

    def examples(self, ids: np.ndarray) -> Batch:
        ids = np.asarray(ids, np.int64)
        shape = (len(ids), self.length)
        batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segments", "positions")}
        batch |= {"weights": np.zeros(shape, np.float32), "example_id": ids.astype(np.uint32)}
        epochs, within = np.divmod(ids, self.examples_per_epoch)
        real = ids < self.total
        for epoch in np.unique(epochs[real]):
            rows = np.flatnonzero(real & (epochs == epoch))
            spans, order = self._epoch(int(epoch))
            self._fill(batch, rows, spans, within[rows] if order is None else order[within[rows]])
        if self.packing == "stream":
            del batch["segments"]
        empty = real & ~batch["weights"].any(axis=1)
        if empty.any():
            raise ValueError(
                f"example {ids[empty][0]} (batch {ids[empty][0] // self.rows_per_batch}) has nothing to predict: every weight is 0"
            )
        return batch

    @property
    def stores(self) -> list[TokenStore]:
        return [self.store]

    def spans(self, example: int) -> list[tuple[TokenStore, int, int]]:
        if not 0 <= example < self.total:
            raise IndexError(f"example {example} of {self.total}")
        epoch, within = divmod(example, self.examples_per_epoch)
        spans, order = self._epoch(epoch)
        nth = within if order is None else order[within]
        which = slice(spans.first[nth], spans.first[nth + 1])
        begins = self._begins[spans.document[which]]
        return [
            (self.store, int(begin + start), int(begin + stop))
            for begin, start, stop in zip(begins, spans.start[which], spans.stop[which], strict=True)
        ]

    def holding(self, store: TokenStore, start: int, stop: int, until: int) -> list[int]:
        if store is not self.store:
            return []
        found: list[int] = []
        for epoch in range(-(-min(until, self.total) // self.examples_per_epoch)):
            spans, order = self._epoch(epoch)
            begins = self._begins[spans.document]
            touched = np.flatnonzero((begins + spans.start < stop) & (begins + spans.stop > start))
            nth = np.unique(np.searchsorted(spans.first, touched, side="right") - 1)
            within = nth if order is None else np.argsort(order)[nth]
            found += np.sort(epoch * self.examples_per_epoch + within).tolist()
        return [example for example in found if example < until]

    def __getstate__(self) -> dict[str, Any]:
        """For other processes, which make their own plans."""
        return {name: value for name, value in vars(self).items() if name != "_lock"} | {"_plans": {}, "_orders": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def _fill(self, batch: Batch, rows: np.ndarray, spans: Plan, examples: np.ndarray) -> None:
        """Write examples of an epoch's plan into rows of a batch, all spans and tokens at once."""
        first = spans.first[examples]
        count = spans.first[examples + 1] - first
        nth = _ranges(count)
        span = np.repeat(first, count) + nth
        pairs = spans.stop[span] - spans.start[span] - 1
        before = np.cumsum(pairs) - pairs
        row_begin = before[np.cumsum(count) - count]
        position = _ranges(pairs)
        column = np.repeat(before - np.repeat(row_begin, count), pairs) + position
        row = np.repeat(np.repeat(rows, count), pairs)
        at = np.repeat(self._begins[spans.document[span]] + spans.start[span], pairs) + position
        batch["tokens"][row, column], batch["targets"][row, column] = self.store.tokens[np.stack([at, at + 1])]
        batch["segments"][row, column] = np.repeat(nth + 1, pairs)
        batch["positions"][row, column] = position
        batch["weights"][row, column] = 1

    def _epoch(self, epoch: int) -> tuple[Plan, np.ndarray | None]:
        """An epoch's plan and the order of its examples."""
        # Where the order of documents makes no difference from epoch to epoch, one plan serves all.
        key = epoch if self.shuffle and self.packing == "concatenate" else 0
        with self._lock:
            if key not in self._plans:
                order = permutation(len(self._lengths), self.seed, key, stream=1) if self.shuffle else None
                self._plans[key] = self._plan(order)
                self._forget(self._plans)
            spans = self._plans[key]
            if self.shuffle and epoch not in self._orders:
                self._orders[epoch] = permutation(len(spans), self.seed, epoch)
                self._forget(self._orders)
            return spans, self._orders.get(epoch)

    def _plan(self, order: np.ndarray | None) -> Plan:
        """The plan of an epoch that has its documents in this order."""
        return plan(self._lengths, self.length, packing=self.packing, order=order)

    @staticmethod
    def _forget(epochs: dict[int, Any]) -> None:
        """Keep two: prefetching threads read the end of one epoch and the beginning of the next by turns."""
        while len(epochs) > 2:
            del epochs[next(iter(epochs))]


def _ranges(counts: np.ndarray) -> np.ndarray:
    """`[0..counts[0]), [0..counts[1]), ..` in one array."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


class _Window:
    """Batches from a global example on, as Grain wants a source: `len` and `[j]`."""

    def __init__(self, batches: Numbered, start: int, which: Rows):
        self._batches, self._start, self._which = batches, start, which

    def __len__(self) -> int:
        return self._batches.left(self._start)

    def __getitem__(self, j: int) -> Batch:
        return self._batches.after(self._start, j, self._which)


class BatchIterator(Iterator[Batch]):
    """Batches one after another, read ahead by Grain's threads or processes. Made by `iterate`; `close` (or leaving a `with`) stops them."""

    def __init__(self, batches: Numbered, start_example: int, which: Rows, prefetch: int, workers: int):
        self._batches, self._which, self._prefetch, self._workers = batches, which, prefetch, workers
        self._reader = None
        self.set_state({"example": start_example})

    def __next__(self) -> Batch:
        if self._reader is None:
            raise ValueError("this iterator is closed; set_state opens it again")
        batch = next(self._reader)
        self._read += 1
        return batch

    @property
    def size(self) -> int:
        """Rows of the whole global batch that was returned last."""
        return self._batches.begin(self._start, self._read) - self._batches.begin(self._start, self._read - 1)

    def get_state(self) -> dict[str, int]:
        """`{"example": n}`: the global example that the next batch begins with. Batches read ahead but not yet returned do not count."""
        return {"example": self._batches.begin(self._start, self._read)}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Go on from a state, in a time that does not depend on where it is. It may come from a run with another batch size.

        Raises ValueError when the state is none.
        """
        import grain

        example = state.get("example")
        if not isinstance(example, int) or isinstance(example, bool) or example < 0:
            raise ValueError(f"data position {dict(state)!r} is not understood; expected {{'example': n}} with n >= 0")
        self._batches.begin(example, 0)  # raises where no batch can begin
        self.close()
        self._start, self._read = example, 0
        # Grain's own state counts batches: it is never saved, and each window begins at the cursor.
        source = grain.MapDataset.source(_Window(self._batches, example, self._which))
        options = grain.ReadOptions(num_threads=min(2, self._prefetch), prefetch_buffer_size=self._prefetch)
        reader = source.to_iter_dataset(options)
        if self._workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # Grain's processes ask for flags of its own
                flags.FLAGS.mark_as_parsed()
            each = max(1, self._prefetch // self._workers)
            reader = reader.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=each))
        self._reader = iter(reader)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def iterate(batches: Numbered, *, start_example: int = 0, rows: Rows | None = None, prefetch: int = 4, workers: int = 0) -> BatchIterator:
    """Batches from a global example on, in order: the first holds examples `start_example` to `start_example + rows_per_batch`.

    `rows` are those of each batch to build (all if None); `prefetch` is how many batches are read ahead by up to two threads, 0 for none;
    `workers` is how many processes build them, 0 for none but this one. A run that changed its batch size goes on with the cursor it had.
    Raises ValueError for a bad argument, IndexError for a missing row.
    """
    if prefetch < 0:
        raise ValueError(f"prefetch={prefetch} is negative; use 0 to read no batch ahead")
    if workers < 0:
        raise ValueError(f"workers={workers} is negative; use 0 to read in this process")
    which = slice(None) if rows is None else rows
    if not callable(which) and not isinstance(which, slice):
        which = np.asarray(which, np.int64)
        np.arange(batches.rows_per_batch)[which]  # raises for a row that is not there
    return BatchIterator(batches, start_example, which, prefetch, workers)


def require_supervised(batch: Batch, what: str = "the batch") -> None:
    """Raise ValueError, naming it, when a batch has no target with a weight: its loss would be 0 / 0."""
    if not np.any(batch["weights"]):
        raise ValueError(f"{what} has nothing to predict: every weight is 0; check what is masked, and data.length")


def batch_hash(batch: Mapping[str, np.ndarray]) -> str:
    """SHA-256 (hex) of a batch: names, types, shapes and contents."""
    digest = hashlib.sha256()
    for name in sorted(batch):
        array = np.ascontiguousarray(batch[name])
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
