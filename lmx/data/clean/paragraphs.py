"""Paragraphs that occur again in a corpus (CCNet, Wenzek et al. 2020; Dolma, Soldaini et al. 2024)."""

from dataclasses import dataclass

import numpy as np

from lmx.data.clean.hashing import digest, fold, joined
from lmx.data.clean.runs import repeated_runs
from lmx.data.clean.step import Change, Document, Drop, Ragged, Verdict


@dataclass(frozen=True)
class Paragraphs:
    """Cuts paragraphs that have occurred before in the corpus, the same but for case, signs and spaces: menus, notices, boilerplate.

    Compared are 64 bits of BLAKE2b of the folded words: among n different paragraphs two agree with odds of n² / 2^65. Paragraphs without a
    word are never compared; they go with the one before them.
    """

    separator: str = "\n"
    """What stands between paragraphs: a line each, or with `"\\n\\n"` those between empty lines."""
    span: int = 1
    """So many paragraphs after each other must have occurred before (C4: three sentences)."""
    shortest: int = 300
    """A document of which fewer characters are left, where something was cut, is dropped (CCNet)."""
    lowercase: bool = True
    punctuation: bool = True
    name: str = "paragraphs"

    def __post_init__(self) -> None:
        if self.span < 1 or not self.separator:
            raise ValueError(f"span={self.span} must be positive and separator={self.separator!r} not empty")

    def _folded(self, text: str) -> list[bytes]:
        """Of each paragraph its words."""
        return [joined(fold(part, self.lowercase, self.punctuation)) for part in text.split(self.separator)]

    def extract(self, document: Document) -> np.ndarray:
        """uint64 `[paragraphs]`: of those that have words."""
        return np.array([digest(part) for part in self._folded(document.text) if part], np.uint64)

    def resolve(self, extracted: Ragged) -> Ragged:
        """Runs of paragraphs to cut: first, end, and the document where they stay."""
        return repeated_runs(extracted, self.span)

    def apply(self, document: Document, resolved: np.ndarray) -> Verdict:
        if not len(resolved):
            return None
        parts = document.text.split(self.separator)
        worded = [place for place, part in enumerate(self._folded(document.text)) if part]
        runs = resolved.reshape(-1, 3)
        cut = np.zeros(len(parts), bool)
        for first, end, _ in runs:
            # Rules and empty lines go with the paragraphs before them; those at the text's beginning with the first.
            begin = worded[first] if first else 0
            cut[begin : worded[end] if end < len(worded) else len(parts)] = True
        left = self.separator.join(part for part, gone in zip(parts, cut, strict=True) if not gone)
        if len(left.strip()) < self.shortest:
            return Drop("repeated_paragraphs", int(runs[0, 2]))
        return Change(left, {"repeated_paragraphs": int((runs[:, 1] - runs[:, 0]).sum())})
