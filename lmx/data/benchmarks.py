"""Items of benchmarks, read from the files that they are released in, for a recipe to take out of what is trained on."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from lmx.data.clean.decontaminate import Decontaminate, Item
from lmx.data.clean.step import Verdict
from lmx.data.documents import Document
from lmx.data.sources.compressed import damage, opened
from lmx.data.sources.paths import found, suffix

KINDS = (".jsonl", ".csv", ".tsv")
csv.field_size_limit(1 << 27)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's files, and which of their fields hold text that must not be trained on."""

    task: str
    """What reports call it."""
    path: str
    """A file, a folder or a glob: .jsonl, .csv or .tsv, also compressed."""
    fields: tuple[str, ...]
    """What is searched for, each by itself: `question`, `instances.input` (in lists, of every member). Of tables without a head the columns'
    numbers, from 0."""
    id: str = ""
    """The field that names an item; without one it is `file:number`, from 0."""

    @property
    def files(self) -> list[Path]:
        """Raises FileNotFoundError where there is none."""
        return found(self.path, lambda path: suffix(path) in KINDS, ", ".join(KINDS), name=f"benchmark {self.task}")


def items(benchmarks: Iterable[Benchmark]) -> Iterator[Item]:
    """The texts of benchmarks as `(task, id, text)`; of several fields the id ends in the field's name.

    Raises FileNotFoundError where files are missing; ValueError, with file and record, for what is damaged, and a field that no record of a
    file has.
    """
    for benchmark in benchmarks:
        if not benchmark.fields:
            raise ValueError(f"benchmark {benchmark.task}: fields=() names nothing to search for; give the fields with text")
        for path in benchmark.files:
            yield from _of_file(benchmark, path)


def _of_file(benchmark: Benchmark, path: Path) -> Iterator[Item]:
    missing, record = set(benchmark.fields), {}
    for number, record in enumerate(_records(benchmark, path)):
        said = list(_values(record, benchmark.id.split("."))) if benchmark.id else []
        if len(said) != bool(benchmark.id):
            raise ValueError(f"{path}, record {number}: has no field id={benchmark.id!r}; it has {', '.join(record)}")
        id = said[0] if said else f"{path.name}:{number}"
        for field in benchmark.fields:
            for text in _values(record, field.split(".")):
                missing.discard(field)
                if text.strip():
                    yield benchmark.task, f"{id}:{field}" if len(benchmark.fields) > 1 else id, text
    if missing:
        raise ValueError(
            f"{path}: no record has the field {sorted(missing)[0]!r} of fields={benchmark.fields}; they have {', '.join(record)}"
        )


def _values(value: Any, path: list[str]) -> Iterator[str]:
    """Texts and numbers at a path of names, in all members of lists on the way."""
    if isinstance(value, list):
        for member in value:
            yield from _values(member, path)
    elif path and isinstance(value, dict):
        if path[0] in value:
            yield from _values(value[path[0]], path[1:])
    elif not path and isinstance(value, str | int | float) and not isinstance(value, bool):
        yield str(value)


def _records(benchmark: Benchmark, path: Path) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        with opened(path, benchmark.task) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
            if suffix(path) == ".jsonl":
                rows: Iterator[Any] = (json.loads(line) for line in text if line.strip())
            else:
                plain = all(field.isdecimal() for field in benchmark.fields)
                # Quotes in the tables of GLUE, XNLI and PAWS-X, which are .tsv, are just quotes.
                tabs = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if suffix(path) == ".tsv" else {}
                table = csv.reader(text, strict=True, **tabs)
                head = None if plain else next(table, [])
                rows = (dict(zip(head or map(str, range(len(row))), row, strict=True)) for row in table if row)
            for number, row in enumerate(rows, 1):  # noqa: B007 (said where one fails)
                if not isinstance(row, dict):
                    raise ValueError("is no object")
                yield row
    except (*damage(), OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path}, record {number}: is damaged ({error}); get the file again") from error


@dataclass(frozen=True)
class Uncontaminated:
    """`Decontaminate` by benchmarks' files, which are read when the first document comes, once in a process."""

    benchmarks: tuple[Benchmark, ...]
    rule: Decontaminate = Decontaminate(())
    """How long what is shared must be, and what happens then."""
    name: str = "decontaminate"

    @property
    def reads(self) -> list[str]:
        """The files: a run that finds them changed is refused, as with those of sources."""
        return [str(path) for benchmark in self.benchmarks for path in benchmark.files]

    def __call__(self, document: Document) -> Verdict:
        return _step(self)(document)


@cache
def _step(step: Uncontaminated) -> Decontaminate:
    return replace(step.rule, items=tuple(items(step.benchmarks)))
