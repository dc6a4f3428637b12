"""A labelled sample of personal data, and how much of it a detector finds: `python -m experiments.data.make_private`.

Every item is a short text as people write them (mails, logs, code, forms, in several languages) with a value whose place and type are
known, among numbers that only look like one: ISBNs, order numbers, dates, versions, hashes. All values are drawn at random; phone numbers,
IBANs and ids are made valid by phonenumbers and python-stdnum. It does not know how `lmx.data.clean.privacy` looks for them.

Prints precision and recall by type; for each file or folder of real text given, findings per MB and MB per second.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from experiments.data.private_contexts import CONTEXTS, SENTENCES, negative
from experiments.data.private_values import credit_card, email, iban, ip, national_id, phone, secret
from lmx.data import documents

DRAWS: dict[str, Callable] = {
    "email": email,
    "phone": phone,
    "ip": ip,
    "credit_card": credit_card,
    "iban": iban,
    "national_id": national_id,
    "secret": secret,
}
Spans = Sequence[tuple[int, int, str]]


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text and the personal data in it."""

    text: str
    spans: Spans
    """`(start, stop, type)` in order."""


@dataclass(frozen=True, slots=True)
class Score:
    """How a detector did on one type. A finding is right if its type, beginning and end are."""

    type: str
    items: int
    found: int
    right: int

    @property
    def precision(self) -> float:
        return self.right / self.found if self.found else 1.0

    @property
    def recall(self) -> float:
        return self.right / self.items if self.items else 1.0


def sample(items: int, seed: int = 0) -> list[Labelled]:
    """`items` texts of each type, and as many of each seventh without any."""
    rng = random.Random(seed)
    texts = [_item(rng, type) for type in DRAWS for _ in range(items)]
    texts += [Labelled(_join(rng, [negative(rng) for _ in range(3)])[0], ()) for _ in range(items)]
    rng.shuffle(texts)
    return texts


def _item(rng: random.Random, type: str) -> Labelled:
    drawn = DRAWS[type](rng)
    before, value, after = ("", drawn, "") if isinstance(drawn, str) else (*drawn, "")[:3]
    head, tail = rng.choice(CONTEXTS[type]).replace("{{", "{").replace("}}", "}").split("{}", 1)
    around = [rng.choice(SENTENCES) if rng.random() < 0.5 else negative(rng) for _ in range(rng.randint(1, 3))]
    place = rng.randint(0, len(around))
    text, starts = _join(rng, [*around[:place], head + before + value + after + tail, *around[place:]])
    start = starts[place] + len(head) + len(before)
    return Labelled(text, ((start, start + len(value), type),))


def _join(rng: random.Random, pieces: list[str]) -> tuple[str, list[int]]:
    text, starts = "", []
    for piece in pieces:
        text += rng.choice(("\n", "\n\n", ". ")) if text else ""
        starts.append(len(text))
        text += piece
    return text, starts


def measure(
    find: Callable[[str], Iterable[tuple[int, int, str]]], texts: Iterable[Labelled]
) -> tuple[list[Score], list[tuple[str, str, str]]]:
    """Scores by type, and every error: `(missed or wrong, type, the text around)`."""
    items, found, right, errors = Counter(), Counter(), Counter(), []
    for one in texts:
        expected, got = set(one.spans), {tuple(span) for span in find(one.text)}
        items.update(span[2] for span in expected)
        found.update(span[2] for span in got)
        right.update(span[2] for span in expected & got)
        for what, spans in (("missed", expected - got), ("wrong", got - expected)):
            for start, stop, type in spans:
                around = f"{one.text[max(0, start - 40) : start]}[[{one.text[start:stop]}]]{one.text[stop : stop + 20]}"
                errors.append((what, type, around))
    return [Score(type, items[type], found[type], right[type]) for type in DRAWS], errors


def table(scores: Iterable[Score]) -> Table:
    """Precision and recall by type."""
    result = Table("type", "items", "found", "right", "precision", "recall")
    for s in scores:
        result.add_row(s.type, f"{s.items:,}", f"{s.found:,}", f"{s.right:,}", f"{s.precision:.4f}", f"{s.recall:.4f}")
    return result


def main(items: int = 3000, seed: int = 0, errors: Path | None = None, texts: tuple[str, ...] = (), field: str = "text") -> None:
    """Measure `Private` with its defaults.

    items: texts a type. errors: a file for every error, JSON lines. texts: sources of real text, whose `field` is read.
    """
    from lmx.data.clean.privacy import TYPES, Private

    find, console = Private().find, Console()
    scores, wrong = measure(find, sample(items, seed))
    console.print(table(scores))
    if errors:
        errors.write_text("".join(json.dumps(error, ensure_ascii=False) + "\n" for error in wrong))
    for source in texts:
        counts, size, seconds = Counter(), 0, 0.0
        for document in documents(source, field=field):
            start = time.process_time()
            counts.update(span.type for span in find(document.text))
            seconds += time.process_time() - start
            size += len(document.text.encode())
        rates = ", ".join(f"{type} {counts[type] / size * 1e6:.2f}" for type in TYPES if counts[type]) or "nothing found"
        console.print(f"{source}: {size / 1e6:.1f} MB at {size / 1e6 / seconds:.0f} MB/s; findings per MB: {rates}")


if __name__ == "__main__":
    tyro.cli(main)
