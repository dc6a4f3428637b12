"""A small corpus and a recipe over it, for the tests of curation."""

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmx.data.clean.step import Change, Drop, Ragged, Verdict
from lmx.data.curate import Recipe
from lmx.data.documents import Document
from lmx.data.sources.source import Omitted, Unit


@dataclass(frozen=True)
class Lines:
    """A folder of files, a document a line; lines of `#` are left out, a line of `!` is damage."""

    folder: str
    name: str = "lines"

    def units(self, size: int = 0) -> list[Unit]:
        return [Unit(path.name, (str(path),)) for path in sorted(Path(self.folder).glob("*.txt"))]

    def read(self, unit: Unit) -> Iterator[Document | Omitted]:
        (path,) = unit.paths
        for number, line in enumerate(Path(path).read_text().splitlines()):
            if line.startswith(("#", "!")):
                yield Omitted(f"{path}, line {number}", "comment" if line[0] == "#" else "marked", damaged=line[0] == "!")
            else:
                yield Document(f"{unit.name}:{number}", line, path)


@dataclass(frozen=True)
class Long:
    """Drops short documents."""

    words: int = 3
    name: str = "long"

    def __call__(self, document: Document) -> Verdict:
        words = len(document.text.split())
        return Drop("words", words) if words < self.words else None


@dataclass(frozen=True)
class Upper:
    name: str = "upper"

    def __call__(self, document: Document) -> Verdict:
        return Change(document.text.capitalize(), {"letters": 1}, {"language": "en"})


@dataclass(frozen=True)
class Once:
    """Drops a document whose text was there before."""

    name: str = "once"

    def extract(self, document: Document) -> np.ndarray:
        return np.frombuffer(hashlib.blake2b(document.text.encode(), digest_size=8).digest(), np.uint64)

    def resolve(self, extracted: Ragged) -> Ragged:
        first: dict[int, int] = {}
        same = [first.setdefault(int(value), number) for number, value in enumerate(extracted.values)]
        which = [[] if one == number else [one] for number, one in enumerate(same)]
        return Ragged(np.array([n for part in which for n in part], np.int64), np.append(0, np.cumsum([len(part) for part in which])))

    def apply(self, document: Document, resolved: np.ndarray) -> Verdict:
        return Drop("duplicate", int(resolved[0])) if len(resolved) else None


LINE = "to be or not that is the question whether tis nobler in mind suffer slings and arrows of outrageous fortune"
WORDS = LINE.split()


def write_corpus(folder: Path, files: int = 6, lines: int = 40, damaged: bool = False) -> Path:
    """Files of lines, some short, some the same."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        draw = np.random.default_rng(number)
        texts = [" ".join(draw.choice(WORDS, draw.integers(1, 12))) for _ in range(lines)]
        texts += [f"this line is in every file {i % 5}" for i in range(7)] + ["# a comment"] + ["! bad"] * damaged
        (folder / f"{number}.txt").write_text("\n".join(texts) + "\n")
    return folder


def recipe(folder: Path, **settings) -> Recipe:
    return Recipe("small", (Lines(str(folder)),), (Long(), Once(), Upper()), **{"held_out": 0.2, **settings})


def contents(folder: Path) -> dict[str, str]:
    """Hashes of everything that a run made and that is to be the same whoever ran it."""
    kept = [
        p
        for p in sorted(folder.rglob("*"))
        if p.is_file() and "work" not in p.parts and p.name not in ("tally.json", "recipe.json", "report.html")
    ]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


def expected(folder: Path) -> list[str]:
    """What `recipe` keeps, worked out plainly."""
    seen: set[str] = set()
    out = []
    for path in sorted(folder.glob("*.txt")):
        for line in path.read_text().splitlines():
            if line[0] not in "#!" and len(line.split()) >= 3 and line not in seen:
                seen.add(line)
                out.append(line.capitalize())
    return out


def counts(folder: Path) -> dict:
    return json.loads((folder / "tally.json").read_bytes())


@dataclass(frozen=True)
class Killer:
    """Kills its process at a document, once: when the marker is not there yet."""

    marker: str
    at: str
    name: str = "killer"

    def __call__(self, document: Document) -> Verdict:
        if document.id == self.at and not Path(self.marker).exists():
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return None
