"""What a cleaning step is: of one document, or of a whole corpus.

A step is a frozen dataclass (its fields are the paper's thresholds, as defaults) with a `name`; it can be pickled, and the same arguments
give the same answer in any process. What needs tables or models builds them once a process (`functools.cache` on a function of its fields).
One that reads files names them as `reads`, paths: a run that goes on after they changed is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lmx.data.documents import Document


@dataclass(frozen=True, slots=True)
class Drop:
    """The document goes. A verdict."""

    reason: str
    """A short fixed name within the step, `mean_word_length`: reports count by it."""
    value: float | str | None = None
    """What was measured, or found."""


@dataclass(frozen=True, slots=True)
class Change:
    """The document stays, changed. A verdict. (None, the third, keeps it as it is.)"""

    text: str | None = None
    """Its new text; None where only metadata are added."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What was changed, and how often: `{"email": 2}`."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Added to the document's: `{"language": "en"}`. What JSON can hold."""


Verdict = Drop | Change | None


class Step(Protocol):
    """Judges documents one by one."""

    @property
    def name(self) -> str:
        """As reports and lineage have it: `gopher_quality`."""
        ...

    def __call__(self, document: Document) -> Verdict: ...


@dataclass(frozen=True, eq=False)
class Ragged:
    """An array for each document of a corpus, in its order: document d has `values[offsets[d]:offsets[d + 1]]`. May be memory-mapped."""

    values: np.ndarray
    offsets: np.ndarray
    """int64 `[documents + 1]`"""

    def __len__(self) -> int:
        """Documents."""
        return len(self.offsets) - 1

    def __getitem__(self, document: int) -> np.ndarray:
        return self.values[self.offsets[document] : self.offsets[document + 1]]


class CorpusStep(Protocol):
    """Judges documents by what the rest of the corpus holds: deduplication.

    `extract` runs on all documents, in parallel; `resolve` once, over what it gave; `apply` on all documents, in parallel. Of equals the first
    in the corpus's order stays: that does not depend on who extracted what.
    """

    @property
    def name(self) -> str: ...

    def extract(self, document: Document) -> np.ndarray:
        """What of it must be known, `[n]` of the step's dtype: hashes (uint64) of the document, of its bands or paragraphs; its bytes."""
        ...

    def resolve(self, extracted: Ragged) -> Ragged:
        """int64 a document: what `apply` needs. Memory does not grow with the values, only (by a few dozen bytes) with the documents."""
        ...

    def apply(self, document: Document, resolved: np.ndarray) -> Verdict:
        """The verdict on a document, from its part of what was resolved. `Drop.value` of a duplicate is the number of the one that stays."""
        ...
