"""Canaries: random secrets planted in a corpus, to measure later how much of it a model has memorised.

Carlini and others, "The Secret Sharer", 2019: a canary is a format with holes, `My locker code is {d}{d}{d}{d}`, filled at random. Planted r
times before training; after it, the model ranks the planted filling among all others by how likely it finds them. What scores them is not
here: `rank` and `exposure` take any array of scores.
"""

import hashlib
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from lmx.data.clean.step import Change, Ragged
from lmx.data.documents import Document

# What fills a hole.
HOLES = {
    "d": ("digits", "0123456789"),
    "l": ("letters", "abcdefghijklmnopqrstuvwxyz"),
    "x": ("hex", "0123456789abcdef"),
}
_HOLE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Canary:
    """A format, what its holes were filled with, and how often it goes into the corpus."""

    canary_id: str
    format: str
    """With holes: {d} a digit, {l} a small letter, {x} a hexadecimal digit."""
    secret: str
    """The characters of the holes, in order."""
    inserted: int
    """How many times."""

    def __post_init__(self) -> None:
        alphabets = _alphabets(self.format)
        if len(self.secret) != len(alphabets) or any(c not in alphabet for c, (_, alphabet) in zip(self.secret, alphabets, strict=True)):
            raise ValueError(f"canary {self.canary_id}: secret={self.secret!r} does not fill the holes of {self.format!r}")
        if self.inserted < 0:
            raise ValueError(f"canary {self.canary_id}: inserted={self.inserted}; expected 0 (a control) or more")

    @property
    def space(self) -> str:
        """Kinds of holes and their number: `digits:4`, or of several `letters:2+digits:4`."""
        names = [name for name, _ in _alphabets(self.format)]
        return "+".join(f"{name}:{names.count(name)}" for name in dict.fromkeys(names))

    @property
    def text(self) -> str:
        return fill(self.format, self.secret)


def fill(format: str, secret: str) -> str:
    """A format with its holes filled."""
    characters = iter(secret)
    return _HOLE.sub(lambda _: next(characters), format)


def draw_canaries(format: str, inserted: Sequence[int], seed: int) -> tuple[Canary, ...]:
    """A canary for each of the numbers of insertions (0: a control, never planted), all different. Deterministic for a seed.

    Raises ValueError for a format without holes or with others than {d}, {l}, {x}, or with fewer fillings than canaries.
    """
    alphabets = [alphabet for _, alphabet in _alphabets(format)]
    if (size := math.prod(map(len, alphabets))) < len(inserted):
        raise ValueError(f"format={format!r} has {size} fillings for {len(inserted)} canaries; give it more holes")
    rng, secrets = random.Random(f"canaries:{seed}:{format}"), dict[str, None]()
    while len(secrets) < len(inserted):
        secrets["".join(map(rng.choice, alphabets))] = None
    return tuple(Canary(f"{seed}-{n}", format, secret, times) for n, (secret, times) in enumerate(zip(secrets, inserted, strict=True)))


def fillings(format: str, count: int | None = None, seed: int = 0) -> Iterator[str]:
    """All secrets of a format in order, or `count` different ones at random: what a model is to score beside the canary's own."""
    alphabets = [alphabet for _, alphabet in _alphabets(format)]
    size = math.prod(map(len, alphabets))
    if count is not None and count > size:
        raise ValueError(f"count={count}, but {format!r} has only {size} fillings")
    for number in range(size) if count is None else random.Random(f"fillings:{seed}").sample(range(size), count):
        secret = ""
        for alphabet in reversed(alphabets):
            number, place = divmod(number, len(alphabet))
            secret = alphabet[place] + secret
        yield secret


def space_size(space: str | int) -> int:
    """|R|: how many fillings a space has. `digits:4` has 10,000."""
    if isinstance(space, int):
        return space
    sizes = {name: len(alphabet) for name, alphabet in HOLES.values()}
    parts = [part.partition(":") for part in space.split("+")]
    if wrong := [part for part in parts if part[0] not in sizes or not part[2].isdecimal()]:
        raise ValueError(f"space={space!r}: {''.join(wrong[0])!r} is none of {', '.join(f'{name}:N' for name in sizes)}")
    return math.prod(sizes[name] ** int(count) for name, _, count in parts)


def rank(scores: np.ndarray, score: float) -> float:
    """The place of a canary's score among those of the other fillings, from 1, lower scores first (perplexity, loss). Among equals: the
    middle place, so that a model that knows nothing gets no exposure from ties. Raises ValueError for NaN."""
    scores = np.asarray(scores)
    if np.isnan(scores).any() or math.isnan(score):
        raise ValueError("scores hold NaN, which has no rank; leave those fillings out or score them again")
    return 1 + int((scores < score).sum()) + int((scores == score).sum()) / 2


def exposure(rank: float, space: str | int) -> float:
    """log2 |R| - log2 rank, in bits: 0 for the least likely filling, log2 |R| for the likeliest.

    `space` is what the rank was taken among: of n random others and the canary itself, n + 1. Raises ValueError for a rank outside it.
    """
    size = space_size(space)
    if not 1 <= rank <= size:
        raise ValueError(f"rank={rank} is not within 1 and {size}, the size of space={space!r}")
    return math.log2(size) - math.log2(rank)


@dataclass(frozen=True, slots=True)
class Planted:
    """Plants canaries in a corpus: a corpus step, to come after filters and deduplication (which would take repeats out again).

    Each copy is a paragraph of its own in a document drawn by the seed: those with the smallest hashes of seed, id and first words. So the
    places do not depend on who reads what, and each canary is in exactly `inserted` times.
    """

    name: ClassVar[str] = "canaries"

    canaries: tuple[Canary, ...]
    seed: int = 0

    def extract(self, document: Document) -> np.ndarray:
        return np.array([self._hash(document)], np.uint64)

    def resolve(self, extracted: Ragged) -> Ragged:
        """For each document the numbers of the canaries that go into it."""
        copies = np.repeat(np.arange(len(self.canaries)), [canary.inserted for canary in self.canaries])
        if len(copies) and not len(extracted):
            raise ValueError(f"there is no document to plant {len(copies)} copies of canaries in")
        copies = np.random.default_rng(self.seed).permutation(copies)
        hashes = np.asarray(extracted.values)
        chosen = np.argsort(hashes, kind="stable")[: len(copies)]
        hosts = np.resize(chosen, len(copies))  # a corpus of fewer documents than copies takes several in each
        order = np.argsort(hosts, kind="stable")
        return Ragged(copies[order], np.concatenate([[0], np.cumsum(np.bincount(hosts, minlength=len(extracted)))]).astype(np.int64))

    def apply(self, document: Document, resolved: np.ndarray) -> Change | None:
        if not len(resolved):
            return None
        rng, text = random.Random(self._hash(document)), document.text
        for number in resolved:
            gaps = [match.start() for match in re.finditer("\n", text)]
            at = rng.choice([*gaps, len(text)])
            text = f"{text[:at]}\n{self.canaries[number].text}{text[at:]}"
        return Change(text, {"canary": len(resolved)}, {"canaries": [self.canaries[number].canary_id for number in resolved]})

    def _hash(self, document: Document) -> int:
        named = json.dumps([self.seed, document.id, document.text[:200]]).encode()
        return int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "little")


def write_canaries(path: str | Path, canaries: Sequence[Canary]) -> None:
    """The record of what was inserted, JSON lines: `{"canary_id", "format", "secret", "inserted", "space"}`. Keep it out of the corpus."""
    lines = [json.dumps({**asdict(canary), "space": canary.space}, ensure_ascii=False) + "\n" for canary in canaries]
    Path(path).write_text("".join(lines), encoding="utf-8")


def read_canaries(path: str | Path) -> tuple[Canary, ...]:
    """Canaries of a record. Raises ValueError, with the line, for one that is damaged or whose space is not its format's."""
    canaries = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            space = record.pop("space")
            canary = Canary(**record)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}, line {number} is no record of a canary ({error}): {line[:60]!r}") from error
        if space != canary.space:
            raise ValueError(f"{path}, line {number}: space={space!r}, but {canary.format!r} has {canary.space!r}")
        canaries.append(canary)
    return tuple(canaries)


def _alphabets(format: str) -> list[tuple[str, str]]:
    holes = _HOLE.findall(format)
    if not holes or any(hole not in HOLES for hole in holes):
        raise ValueError(f"format={format!r} has {'no holes' if not holes else 'unknown holes'}; use {{d}}, {{l}} and {{x}}")
    return [HOLES[hole] for hole in holes]
