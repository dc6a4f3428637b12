"""Perplexity as a filter: how well a language model of good text predicts a document (Wenzek et al. 2020, CCNet)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lmx.data.clean.step import Change, Drop, Verdict
from lmx.data.documents import Document

Bucket = Literal["head", "middle", "tail"]
BUCKETS: tuple[Bucket, ...] = ("head", "middle", "tail")


@dataclass(frozen=True)
class Perplexity:
    """Keeps documents by how well a model predicts them. The nats a byte and the bucket are added to their metadata.

    `head` is what the model predicts well, `tail` what it does not. All limits are in nats a byte, which do not depend on the tokenizer:
    the perplexity a token is exp(nats a byte * bytes a token).
    """

    scorer: Callable[[Sequence[str]], Sequence[float]]
    """Nats a byte of each text. It must pickle, and give a text the same number in any company: `lmx.interop.perplexity.NatsPerByte`."""
    head: float
    """The most that is `head`: for instance what a third of a good sample stays below (`limits`)."""
    tail: float
    """Above it is `tail`."""
    keep: tuple[Bucket, ...] = ("head", "middle")
    """Buckets that stay."""
    least: float = 0.0
    """Below it a document goes too: repetition and boilerplate are predicted too well."""
    name: str = "perplexity"

    def __post_init__(self):
        if not 0 <= self.least <= self.head <= self.tail:
            raise ValueError(f"least={self.least}, head={self.head} and tail={self.tail} must be in this order, and not negative")
        if not self.keep or not set(self.keep) <= set(BUCKETS):
            raise ValueError(f"keep={self.keep} must name some of {', '.join(BUCKETS)}")

    def __call__(self, document: Document) -> Verdict:
        if not document.text:
            return Drop("empty")
        value = round(float(self.scorer([document.text])[0]), 4)
        if not np.isfinite(value):
            raise ValueError(f"scorer gives {value} nats a byte to document {document.id!r}; expected a finite number")
        if value < self.least:
            return Drop("too_predictable", value)
        bucket = "head" if value <= self.head else "middle" if value <= self.tail else "tail"
        return Change(metadata={"nats_per_byte": value, "perplexity": bucket}) if bucket in self.keep else Drop(bucket, value)


def limits(
    scorer: Callable[[Sequence[str]], Sequence[float]], sample: Iterable[str], *, shares: Sequence[float] = (0.3, 0.6), batch: int = 64
) -> tuple[float, ...]:
    """The nats a byte below which these shares of a sample's texts lie: `head` and `tail` of `Perplexity`. CCNet takes 30 and 60 percent, by
    language. Raises ValueError for an empty sample, or shares that do not rise from 0 to 1.
    """
    texts = [text for text in sample if text]
    if not texts:
        raise ValueError("the sample has no text; give some that the limits are to be of")
    if not all(0 <= share <= 1 for share in shares) or list(shares) != sorted(shares):
        raise ValueError(f"shares={tuple(shares)} must rise, from 0 to 1 at most")
    values = [value for start in range(0, len(texts), batch) for value in scorer(texts[start : start + batch])]
    return tuple(float(limit) for limit in np.quantile(np.asarray(values, np.float64), shares))
