"""Where a training example came from, and when a text was trained on.

A batch is a pure function of its number, so nothing is written down while training: what a row held is worked out again from the run's own
settings, and what is known of each document lies beside its tokens (`lmx.data.shards`). Lineage costs training nothing.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmx.data.pipeline import Numbered
from lmx.data.store import TokenStore
from lmx.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Piece:
    """A part of an example: some tokens of one document."""

    text: str
    """The tokens as text."""
    document: int
    """The document's number in its store."""
    start: int
    stop: int
    """Its tokens `start:stop`."""
    characters: tuple[int, int]
    """Where they begin and end in the document's (cleaned) text."""
    about: Mapping[str, Any]
    """What is known of the document: `id`; and of one from a recipe also `source`, `corpus`, `created`, `metadata`, `bytes` and `decisions`,
    what each step changed on the way."""


@dataclass(frozen=True)
class Sight:
    """One time that a text was trained on."""

    step: int
    """The training step, 1 for the first."""
    row: int
    """The row of its batch."""
    document: int
    id: str
    whole: bool
    """Whether the row holds all of it; else it was cut between examples."""


def trace(batches: Numbered, tokenizer: Tokenizer, step: int, row: int) -> list[Piece]:
    """What a row of a training step's batch was made of. Raises IndexError for a step (from 1) or row that is not there."""
    first, end = (batches.begin(0, k) for k in (step - 1, step)) if step > 0 else (0, 0)
    if not 0 <= row < end - first:
        raise IndexError(f"step {step}, row {row}: steps count from 1, rows from 0 to {max(end - first, 1) - 1}")
    pieces = []
    for store, start, stop in batches.spans(first + row):
        low, high = np.searchsorted(store.offsets, [start, stop - 1], side="right") - 1
        for document in range(int(low), int(high) + 1):
            begin = int(store.offsets[document])
            a, b = max(start, begin) - begin, min(stop, int(store.offsets[document + 1])) - begin
            if a < b:
                pieces.append(_piece(store, tokenizer, document, a, b))
    return pieces


def _piece(store: TokenStore, tokenizer: Tokenizer, document: int, start: int, stop: int) -> Piece:
    tokens = store.document(document)[:stop]
    before = len(tokenizer.decode(tokens[:start].tolist()))
    text = tokenizer.decode(tokens[start:].tolist())
    about = store.about[document] if hasattr(store, "about") else {"id": store.document_id(document)}
    return Piece(text, document, start, stop, (before, before + len(text)), about)


def seen(batches: Numbered, tokenizer: Tokenizer, text: str, *, steps: int) -> list[Sight]:
    """Each time that a text was in a batch of the first `steps` steps, in the order of training.

    All documents are searched, so it takes as long as decoding them does. Raises ValueError for an empty text.
    """
    if not text:
        raise ValueError("text='' is in every document; give the words to look for")
    sights = []
    for store in batches.stores:
        for document, start, stop in _found(store, tokenizer, text):
            at = int(store.offsets[document])
            for example in batches.holding(store, at + start, at + stop, batches.begin(0, steps)):
                whole = any(a <= at + start and at + stop <= b for s, a, b in batches.spans(example) if s is store)
                step, row = batches.place(example)
                sights.append(Sight(step + 1, row, document, store.document_id(document), whole))
    return sorted(sights, key=lambda sight: (sight.step, sight.row, sight.document))


def _found(store: TokenStore, tokenizer: Tokenizer, text: str) -> Iterator[tuple[int, int, int]]:
    """Where a text is: `(document, start, stop)`, in tokens."""
    for number in range(len(store)):
        tokens = store.document(number).tolist()
        whole = tokenizer.decode(tokens)
        at = whole.find(text)
        while at >= 0:
            # The first token that reaches past the text's beginning, and the first prefix that holds all of it.
            def length(n: int, tokens: list[int] = tokens) -> int:
                return len(tokenizer.decode(tokens[:n]))

            start = bisect_left(range(len(tokens) + 1), at + 1, key=length) - 1
            stop = bisect_left(range(len(tokens) + 1), at + len(text), key=length)
            yield number, start, stop
            at = whole.find(text, at + 1)
