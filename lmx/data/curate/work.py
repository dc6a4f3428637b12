"""What a worker does: one unit's documents through one pass of a recipe, or their tokens into a shard. All results are files."""

import hashlib
import json
import time
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lmx.data.clean.step import Drop, Ragged
from lmx.data.curate.recipe import Recipe, passes
from lmx.data.curate.records import Record, open_ragged, read_records, whole, write_json
from lmx.data.curate.tally import Event, Tally
from lmx.data.documents import Document
from lmx.data.shards import write_shard
from lmx.data.sources.source import Omitted, Source, Unit
from lmx.data.tokenizers import load_tokenizer


@dataclass(frozen=True)
class Place:
    """Where the files of a run lie: `work/PASS/UNIT.*`, and what corpus steps resolved in `work/PASS/resolved`."""

    folder: Path

    def of(self, number: int, unit: int, kind: str) -> Path:
        """A file of a unit in a pass."""
        return self.folder / "work" / str(number) / f"{unit:06d}.{kind}"

    def ragged(self, number: int, what: str) -> Path:
        """A folder with an array over all documents that a pass kept: `extracted`, `ids`, `resolved`."""
        return self.folder / "work" / str(number) / what


def share(id: str, source: str, salt: str = "") -> int:
    """A number below 2**64 for a document: a hash of its name, the same wherever it is asked."""
    return int.from_bytes(hashlib.blake2b(f"{salt}\0{source}\0{id}".encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Clean:
    """Take a unit through pass `number`: read or go on, apply what was resolved, judge, extract for the next."""

    recipe: Recipe
    folder: Path
    units: tuple[tuple[int, Unit], ...]
    """The source's number and the unit, for each unit."""
    number: int
    starts: tuple[int, ...] = ()
    """The number, among all documents of the pass before, of each unit's first."""

    def __call__(self, unit: int) -> None:
        place, source = Place(self.folder), self.recipe.sources[self.units[unit][0]]
        before, steps, after = passes(self.recipe)[self.number]
        tally = Tally(self.recipe.examples)
        extracted, ids = _Column(), _Column()
        resolved = open_ragged(place.ragged(self.number - 1, "resolved")) if before else None
        names = open_ragged(place.ragged(self.number - 1, "ids")) if before else None
        with ExitStack() as stack:
            kept, dropped = (stack.enter_context(whole(place.of(self.number, unit, f"{kind}.jsonl"))) for kind in ("kept", "dropped"))

            last = self.number == len(passes(self.recipe)) - 1

            def judge(record: Record) -> None:
                if record := through(record, steps, source.name, tally, dropped):
                    kept.write(record.to_line())
                    if last:
                        language = str(record.document.metadata.get("language", ""))
                        tally.count(Event("corpus", "kept", "", source.name, language), 1, len(record.document.text.encode()))
                    if after:
                        clock = time.process_time()
                        extracted.add(np.asarray(after.extract(record.document)))
                        ids.add(np.frombuffer(record.document.id.encode(), np.uint8))
                        tally.seconds[after.name] += time.process_time() - clock

            if before is None:
                for record in read(source, self.units[unit][1], tally, damaged=self.recipe.damaged):
                    judge(record)
            else:
                for number, record in enumerate(read_records(place.of(self.number - 1, unit, "kept.jsonl")), self.starts[unit]):
                    one = Resolved(before, resolved[number], names)
                    if record := through(record, (one,), source.name, tally, dropped):
                        judge(record)
        if after:
            extracted.save(place.of(self.number, unit, "extracted"))
            ids.save(place.of(self.number, unit, "ids"))
        write_json(place.of(self.number, unit, "tally.json"), tally.to_json())


def read(source: Source, unit: Unit, tally: Tally, *, damaged: str) -> Iterator[Record]:
    """The documents of a unit, with what is read and left out counted. Raises ValueError for damage unless it is to be skipped."""
    clock = time.process_time()
    for item in source.read(unit):
        if isinstance(item, Document):
            try:
                size = len(item.text.encode())
            except UnicodeEncodeError as error:
                item = Omitted(f"{item.source}: {item.id}", f"half a surrogate pair at character {error.start}", damaged=True)
        tally.seconds[source.name] += time.process_time() - clock
        if isinstance(item, Omitted):
            if item.damaged and damaged == "refuse":
                raise ValueError(f"{item.where}: {item.reason}; mend the file, or let the recipe skip it with damaged='skip'")
            what, reason = ("damaged", "damaged") if item.damaged else ("omitted", item.reason)
            tally.count(Event("source", what, reason, source.name, ""), 1, 0)
            if item.damaged:
                tally.damage.append((item.where, item.reason))
        else:
            tally.count(Event("source", "read", "", source.name, ""), 1, size)
            yield Record(item)
        clock = time.process_time()


@dataclass(frozen=True)
class Resolved:
    """A corpus step's verdict on one document, as a step."""

    step: Any
    resolved: np.ndarray
    names: Ragged

    @property
    def name(self) -> str:
        return self.step.name

    def __call__(self, document: Document) -> Any:
        verdict = self.step.apply(document, self.resolved)
        if isinstance(verdict, Drop) and isinstance(verdict.value, int | np.integer):
            return Drop(verdict.reason, bytes(self.names[int(verdict.value)]).decode())  # a name says more than a number
        return verdict


def through(record: Record, steps: tuple, source: str, tally: Tally, dropped: Any) -> Record | None:
    """A document through steps, with what happens counted, and written to `dropped`; None where one drops it."""
    document = record.document
    rank, size = share(document.id, document.source), len(document.text.encode())  # once: this is done for all documents of a corpus
    for step in steps:
        clock = time.process_time()
        try:
            verdict = step(document)
        except Exception as error:
            raise RuntimeError(f"step {step.name} failed on document {document.id!r} of {document.source}: {error!r}") from error
        tally.seconds[step.name] += time.process_time() - clock
        language = str(document.metadata.get("language", ""))
        if isinstance(verdict, Drop):
            event = Event(step.name, "dropped", verdict.reason, source, language)
            value = verdict.value.item() if isinstance(verdict.value, np.generic) else verdict.value
            tally.count(event, 1, size)
            tally.show(event, rank, document.text, id=document.id, value=value)
            gone = {
                "id": document.id,
                "source": document.source,
                "step": step.name,
                "reason": verdict.reason,
                "value": value,
                "bytes": size,
            }
            dropped.write(json.dumps({**gone, "decisions": record.decisions}, ensure_ascii=False).encode() + b"\n")
            return None
        event = Event(step.name, "passed", "", source, language)
        tally.count(event, 1, size)
        tally.show(event, rank, document.text, id=document.id)
        if verdict is not None and (verdict.text is not None or verdict.metadata):
            text, before = document.text if verdict.text is None else verdict.text, size
            if verdict.text is not None:
                size = len(text.encode())
                shorter = before - size
                for kind, number in (verdict.counts or {"text": 1}).items():
                    event = Event(step.name, "changed", kind, source, language)
                    tally.count(event, number, shorter)
                    tally.show(event, rank, document.text, id=document.id, after=text[:1200])
            metadata = {**document.metadata, **verdict.metadata}
            decision = {"step": step.name, "counts": dict(verdict.counts), "metadata": dict(verdict.metadata), "bytes": before}
            document = replace(document, text=text, metadata=metadata)
            record = Record(document, (*record.decisions, decision))
    return record


class _Column:
    """One array for each document. They are put together as they come: small arrays take several times the room of what is in them."""

    def __init__(self):
        self._whole: list[np.ndarray] = []
        self._last: list[np.ndarray] = []
        self._lengths = array("q")

    def add(self, values: np.ndarray) -> None:
        self._last.append(values)
        self._lengths.append(len(values))
        if len(self._last) == 1024:
            self._whole.append(np.concatenate(self._last))
            self._last = []

    def save(self, path: Path) -> None:
        """Write it into two files."""
        parts = self._whole + self._last
        values = np.concatenate(parts) if parts else np.zeros(0, np.uint64)
        for name, numbers in (("values", values), ("lengths", np.array(self._lengths, np.int64))):
            with whole(path.with_name(f"{path.name}.{name}.npy")) as file:
                np.save(file, numbers)


@dataclass(frozen=True)
class Tokenise:
    """Write the tokens of a unit's kept documents as shards of `train` and `validation`."""

    recipe: Recipe
    folder: Path
    units: tuple[tuple[int, Unit], ...]
    tokenizer: str

    def __call__(self, unit: int) -> None:
        source = self.recipe.sources[self.units[unit][0]].name
        kept = Place(self.folder).of(len(passes(self.recipe)) - 1, unit, "kept.jsonl")
        border = int(self.recipe.held_out * 2**64)
        for split in ("validation", "train") if border else ("train",):
            records = (
                r for r in read_records(kept) if (share(r.document.id, r.document.source, "split") < border) == (split == "validation")
            )
            write_shard(records, _tokenizer(self.tokenizer), self.folder / split, unit, corpus=source)


@cache
def _tokenizer(path: str) -> Any:
    return load_tokenizer(path)
