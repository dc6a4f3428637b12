"""Documents that are the same but for case, signs and spaces."""

from dataclasses import dataclass

import numpy as np

from lmx.data.clean.groups import duplicates, firsts
from lmx.data.clean.hashing import BLOCK, digest, fold, joined
from lmx.data.clean.step import Document, Drop, Ragged, Verdict


@dataclass(frozen=True)
class Exact:
    """Drops documents whose folded text an earlier document has.

    Compared are 64 bits of BLAKE2b of the words with one space between. Among n different documents two agree with odds of n² / 2^65: one in
    37 million for a million, 3% for a billion. A document without a word is nobody's duplicate.
    """

    lowercase: bool = True
    """Case does not tell documents apart."""
    punctuation: bool = True
    """Signs and symbols do not tell documents apart. (For code, where they do: False.)"""
    name: str = "exact"

    def extract(self, document: Document) -> np.ndarray:
        """uint64 `[1]`, or `[0]` for a document without a word."""
        folded = joined(fold(document.text, self.lowercase, self.punctuation))
        return np.array([digest(folded)] if folded else [], np.uint64)

    def resolve(self, extracted: Ragged) -> Ragged:
        """Of a duplicate the number of the first one."""
        holders = np.flatnonzero(np.diff(extracted.offsets))
        parts = ((holders[at : at + BLOCK], np.asarray(extracted.values[at : at + BLOCK])) for at in range(0, len(holders), BLOCK))
        before = firsts(parts, len(holders), len(extracted))
        return duplicates(np.where(before > 0, before - 1, np.arange(len(extracted))))

    def apply(self, document: Document, resolved: np.ndarray) -> Verdict:
        return Drop("duplicate", int(resolved[0])) if len(resolved) else None
