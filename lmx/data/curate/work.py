"""What a worker does: one unit's documents through one pass of a recipe, or their tokens into a shard. All results are files."""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lmx.data.clean.bias import count_terms
from lmx.data.clean.step import Drop, Ragged
from lmx.data.clean.urls import host
from lmx.data.curate.recipe import Recipe, files, passes
from lmx.data.curate.records import Arrays, Record, open_ragged, read_records
from lmx.data.curate.tally import EXCERPT, Event, Group, Tally
from lmx.data.documents import Document
from lmx.data.shards import write_shard
from lmx.data.sources.source import Omitted, Source, Unit
from lmx.data.tokenizers import load_tokenizer
from lmx.data.whole import file_hash, whole, write_json


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
    """A number below 2**64 for a document: a hash of its id and its source's name, wherever its files lie and whoever asks."""
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
        resolved = open_ragged(place.ragged(self.number - 1, "resolved")) if before else None
        names = open_ragged(place.ragged(self.number - 1, "ids")) if before else None
        with ExitStack() as stack:
            kept, dropped = (stack.enter_context(whole(place.of(self.number, unit, f"{kind}.jsonl"))) for kind in ("kept", "dropped"))
            if after:
                kinds = (("extracted", f"step {after.name}"), ("ids", "ids"))
                extracted, ids = (stack.enter_context(Arrays(place.of(self.number, unit, kind), what)) for kind, what in kinds)

            def judge(record: Record) -> None:
                if record := through(record, steps, source.name, tally, dropped):
                    kept.write(record.to_line())
                    if not after:  # the last pass
                        count_kept(record, source.name, tally)
                    else:
                        clock = time.process_time()
                        extracted.append(np.asarray(after.extract(record.document)))
                        ids.append(np.frombuffer(record.document.id.encode(), np.uint8))
                        tally.seconds[after.name] += time.process_time() - clock

            if before is None:
                for record in read(source, self.units[unit][1], tally, damaged=self.recipe.damaged):
                    judge(count_read(record, source.name, tally, terms=self.recipe.identity_terms))
            else:
                for number, record in enumerate(read_records(place.of(self.number - 1, unit, "kept.jsonl")), self.starts[unit]):
                    one = Resolved(before, resolved[number], names)
                    if record := through(record, (one,), source.name, tally, dropped):
                        judge(record)
        if before is None:
            write_json(place.of(0, unit, "files.json"), hashes(self.units[unit][1]))
        write_json(place.of(self.number, unit, "tally.json"), tally.to_json())


def hashes(unit: Unit) -> dict[str, str]:
    """SHA-256 (hex) of the files of a unit; of a file that was cut with its first part."""
    return {str(path): file_hash(path) for path in files([unit])} if not unit.start else {}


def read(source: Source, unit: Unit, tally: Tally, *, damaged: str) -> Iterator[Record]:
    """The documents of a unit, with what is read and left out counted. Raises ValueError for damage unless it is to be skipped."""
    clock = time.process_time()
    for item in source.read(unit):
        if isinstance(item, Document):
            try:
                size = len(item.text.encode())
                f"{item.source}{item.id}".encode()
            except UnicodeEncodeError as error:
                where = f"{item.source}: {item.id}".encode(errors="backslashreplace").decode()
                item = Omitted(where, f"half a surrogate pair in its text, id or path, at character {error.start}", damaged=True)
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


def count_read(record: Record, source: str, tally: Tally, *, terms: bool) -> Record:
    """Count a document as it was read: its length and domain; and its identity terms, which the record then has."""
    _group(record, "read", source, tally)
    if not terms:
        return record
    clock = time.process_time()
    found = tuple(sorted(count_terms([record.document.text]).having))
    tally.groups.update(Group("read", "term", source, term) for term in found)
    tally.seconds["identity terms"] += time.process_time() - clock
    return replace(record, terms=found)


def count_kept(record: Record, source: str, tally: Tally) -> None:
    """Count a document that has come to the end: its length now, and the terms and domain that it came with."""
    _group(record, "kept", source, tally)
    tally.groups.update(Group("kept", "term", source, term) for term in record.terms)
    language = str(record.document.metadata.get("language", ""))
    tally.count(Event("corpus", "kept", "", source, language), 1, len(record.document.text.encode()))


def _group(record: Record, what: str, source: str, tally: Tally) -> None:
    tally.groups[Group(what, "length", source, str(1 << len(record.document.text.encode()).bit_length()))] += 1
    if name := domain(record.document):
        tally.groups[Group(what, "domain", source, name)] += 1


def domain(document: Document) -> str:
    """Where on the web a document is from, or what is nearest to it: the subreddit, the language of code, the host of its address. May be
    empty."""
    about = document.metadata
    if about.get("subreddit"):
        return f"r/{about['subreddit']}"
    if "licenses" in about and about.get("language"):
        return str(about["language"])
    url = about.get("url")
    return host(url).removeprefix("www.") if isinstance(url, str) else ""


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
    rank, size = share(document.id, source), len(document.text.encode())  # once: this is done for all documents of a corpus
    for step in steps:
        clock = time.process_time()
        try:
            verdict = step(document)
            text = getattr(verdict, "text", None)
            length = size if text is None else len(text.encode())
        except Exception as error:
            raise RuntimeError(f"step {step.name} failed on document {document.id!r} of {document.source}: {error!r}") from error
        tally.seconds[step.name] += time.process_time() - clock
        language = str(document.metadata.get("language", ""))
        if isinstance(verdict, Drop):
            if verdict.reason == "language":
                language = str(verdict.value)  # which it is, as found by the step that drops it
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
        if verdict is not None and (text is not None or verdict.metadata):
            if text is not None:
                for kind, number in (verdict.counts or {"text": 1}).items():
                    event = Event(step.name, "changed", kind, source, language)
                    tally.count(event, number, size - length)
                    tally.show(event, rank, document.text, id=document.id, after=text[:EXCERPT])
            decision = {"step": step.name, "counts": dict(verdict.counts), "metadata": dict(verdict.metadata), "bytes": size}
            metadata = {**document.metadata, **verdict.metadata}
            document, size = replace(document, text=document.text if text is None else text, metadata=metadata), length
            record = replace(record, document=document, decisions=(*record.decisions, decision))
    return record


@dataclass(frozen=True)
class Tokenise:
    """Write the tokens of a unit's kept documents as shards of `train` and `validation`."""

    recipe: Recipe
    folder: Path
    units: tuple[tuple[int, Unit], ...]
    tokenizer: str
    roots: tuple[str, ...]
    """Of each source the folder that all its files lie in. Shards tell of documents by what comes below: they are the same wherever it is."""

    def __call__(self, unit: int) -> None:
        number, _ = self.units[unit]
        source, root = self.recipe.sources[number].name, self.roots[number]
        kept = Place(self.folder).of(len(passes(self.recipe)) - 1, unit, "kept.jsonl")
        border = int(self.recipe.held_out * 2**64)
        for split in reversed(splits(self.recipe)):  # that of `train` says that the unit is done
            records = (
                Record(replace(r.document, source=below(r.document.source, root)), r.decisions)
                for r in read_records(kept)
                if (share(r.document.id, source, "split") < border) == (split == "validation")
            )
            write_shard(records, _tokenizer(self.tokenizer), self.folder / split, unit, corpus=source)


def splits(recipe: Recipe) -> tuple[str, ...]:
    """The folders of shards that a recipe makes."""
    return ("train", "validation") if recipe.held_out else ("train",)


def below(path: str, root: str) -> str:
    """A path without the folder that it begins with, if it does."""
    return path[len(root) :].lstrip("/") if root and path.startswith(root.rstrip("/") + "/") else path


@cache
def _tokenizer(path: str) -> Any:
    return load_tokenizer(path)
