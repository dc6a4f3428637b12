"""What happened to a corpus, in numbers and examples: sums that add up over units, whoever counted them."""

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lmx.data.clean.bias import TermCounts

EXCERPT = 1200  # characters of an example
DOMAINS = 1 << 16  # kept apart by name, of all sources
OTHERS = "(others)"


class Event(NamedTuple):
    """What is counted."""

    step: str
    """The step's name; `source` for what the reader did, `corpus` for what is kept at the end."""
    what: str
    """`read`, `omitted`, `damaged`, `passed`, `dropped`, `changed` or `kept`."""
    reason: str
    """The rule; empty for read, passed and kept."""
    source: str
    language: str
    """As a step found it; empty before."""


class Group(NamedTuple):
    """Documents that have something in common, as they were read and at the end: what is compared before and after."""

    what: str
    """`read`, or `kept` at the end."""
    kind: str
    """`domain` (host, subreddit, language of code), `length` (a power of two, which its bytes are below), `term` (of the text as it was read)."""
    source: str
    value: str


@dataclass
class Tally:
    """Counts and examples. `+=` of two units' tallies is the tally of both."""

    examples: int
    """Examples kept for each step, event, reason, source and language: those with the lowest rank, so that the choice does not depend on workers."""
    documents: Counter[Event] = field(default_factory=Counter)
    """Documents of each event (for `changed`: how many changes)."""
    bytes: Counter[Event] = field(default_factory=Counter)
    """UTF-8 bytes of them (for `changed`: by how many the text became shorter)."""
    damage: list[tuple[str, str]] = field(default_factory=list)
    """Where, and what is wrong."""
    shown: dict[Event, list[tuple[int, dict[str, Any]]]] = field(default_factory=dict)
    """Examples: `[(-rank, {id, value, text, after})]`."""
    groups: Counter[Group] = field(default_factory=Counter)
    """Documents of each group."""
    seconds: Counter[str] = field(default_factory=Counter)
    """CPU seconds by step. Not part of what a corpus is."""

    def count(self, event: Event, documents: int, size: int) -> None:
        self.documents[event] += documents
        self.bytes[event] += size

    def show(self, event: Event, rank: int, text: str, **example: Any) -> None:
        """Offer an example. `rank` is a hash of the document's id."""
        heap = self.shown.setdefault(event, [])
        if len(heap) < self.examples or (heap and -heap[0][0] > rank):
            self._push(heap, (-rank, {"text": text[:EXCERPT], **example}))

    def _push(self, heap: list, item: tuple[int, dict]) -> None:
        if any(rank == item[0] for rank, _ in heap):  # the same document, or an equal hash: dictionaries have no order
            return
        (heapq.heappush if len(heap) < self.examples else heapq.heappushpop)(heap, item)

    def __iadd__(self, other: "Tally") -> "Tally":
        for name in ("documents", "bytes", "seconds", "groups"):
            getattr(self, name).update(getattr(other, name))
        self._fold_domains()
        self.damage += other.damage
        for event, items in other.shown.items():
            heap = self.shown.setdefault(event, [])
            for item in items:
                self._push(heap, item)
        return self

    def _fold_domains(self) -> None:
        """Web pages have more hosts than memory has room for: the rarest become one."""
        if len(self.groups) < 4 * DOMAINS:
            return
        counts: Counter[tuple[str, str]] = Counter()
        for group, n in self.groups.items():
            if group.kind == "domain":
                counts[group.source, group.value] += n
        common = set(sorted(counts, key=lambda name: (-counts[name], name))[:DOMAINS])
        for group in [g for g in self.groups if g.kind == "domain" and (g.source, g.value) not in common]:
            self.groups[group._replace(value=OTHERS)] += self.groups.pop(group)

    def terms(self, what: str, source: str | None = None) -> TermCounts:
        """How many documents have each identity term, of `read` ones or of those `kept`; of one source, or of all."""
        having: Counter[str] = Counter()
        for group, n in self.groups.items():
            if (group.what, group.kind) == (what, "term") and source in (None, group.source):
                having[group.value] += n
        documents = sum(n for g, n in self.groups.items() if (g.what, g.kind) == (what, "length") and source in (None, g.source))
        return TermCounts(documents, dict(having))

    def rows(self, *, what: str | None = None) -> Iterator[tuple[Event, int, int]]:
        """Events with documents and bytes, sorted; `what` leaves only those."""
        for event in sorted(self.documents):
            if what in (None, event.what):
                yield event, self.documents[event], self.bytes[event]

    def to_json(self) -> dict[str, Any]:
        return {
            "examples": self.examples,
            "events": [[*event, documents, size] for event, documents, size in self.rows()],
            "damage": [list(item) for item in self.damage],
            "shown": [[*event, _by_rank(items)] for event, items in sorted(self.shown.items())],
            "groups": [[*group, n] for group, n in sorted(self.groups.items())],
            "seconds": dict(self.seconds),
        }


def from_json(data: Mapping[str, Any]) -> Tally:
    """The tally that `to_json` wrote."""
    tally = Tally(data["examples"], damage=[tuple(item) for item in data["damage"]], seconds=Counter(data["seconds"]))
    for *event, documents, size in data["events"]:
        tally.count(Event(*event), documents, size)
    for *group, n in data["groups"]:
        tally.groups[Group(*group)] = n
    for *event, items in data["shown"]:
        tally.shown[Event(*event)] = [(-rank, example) for rank, example in items]
        heapq.heapify(tally.shown[Event(*event)])
    return tally


def _by_rank(items: list[tuple[int, dict[str, Any]]]) -> list[list[Any]]:
    return sorted(([-rank, example] for rank, example in items), key=lambda item: item[0])
