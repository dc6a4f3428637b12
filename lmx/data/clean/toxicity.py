"""Offensive text: words of a list, however they are disguised, and a classifier trained on examples."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lmx.data.clean.disguise import finder, fold
from lmx.data.clean.linear import Evaluation, Features, Training, load_linear, train
from lmx.data.clean.step import Change, Drop, Verdict
from lmx.data.documents import Document

MILD = ("bastard", "bloody", "bollocks", "bugger", "crap", "damn", "goddamn", "idiot", "moron", "stupid", "wanker")
"""A few mild words of English, to try things with. A list for use is the user's: by language, and by what the corpus is for."""


@dataclass(frozen=True)
class ToxicWords:
    """Drops documents with many words of a list; `rate=0` drops those with any, as C4 does (Raffel et al. 2020).

    What is kept with a few says so in its metadata `toxic_words`.
    """

    lists: tuple[str, ...] = ()
    """Files of words and phrases, UTF-8, one a line; lines that begin with # are none. None: `MILD`."""
    rate: float = 0.01
    """Listed words in all words, above which a document goes. A word is what stands between white space."""
    least: int = 1
    """With fewer listed words it stays, whatever their rate."""
    name: str = "toxic_words"

    def __post_init__(self):
        if not 0 <= self.rate < 1 or self.least < 1:
            raise ValueError(f"rate={self.rate} must be at least 0 and below 1, and least={self.least} at least 1")

    @property
    def reads(self) -> tuple[str, ...]:
        return self.lists

    def __call__(self, document: Document) -> Verdict:
        found = finder(_listed(self.lists)).find(document.text).total()
        if not found:
            return None
        rate = found / len(document.text.split())
        if found >= self.least and rate > self.rate:
            return Drop("listed_words", rate)
        return Change(metadata={"toxic_words": found})


@lru_cache(maxsize=16)
def _listed(lists: tuple[str, ...]) -> tuple[str, ...]:
    if not lists:
        return MILD
    words = {}
    for path in lists:
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"lists has {path!r}, which does not exist; expected a file with a word a line") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"lists has {path!r}, which cannot be read as UTF-8 text ({error})") from error
        words |= dict.fromkeys(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not words:
        raise ValueError(f"lists={lists} have no words")
    return tuple(words)


@dataclass(frozen=True)
class Toxicity:
    """Drops documents that a classifier takes for toxic. The score, 0 to 1, is added to the others' metadata as `toxicity`."""

    model: str
    """A file that `train_toxicity` wrote."""
    threshold: float = 0.9
    """A score of it or more drops a document."""
    fingerprint: str = ""
    """That of the classifier which is meant; empty: whichever the file holds."""
    name: str = "toxicity"

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} must be above 0 and at most 1")

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.model,)

    def __call__(self, document: Document) -> Verdict:
        score = round(load_linear(self.model, self.fingerprint)(fold(document.text)), 6)
        return Drop("classifier", score) if score >= self.threshold else Change(metadata={"toxicity": score})


def train_toxicity(
    toxic: Iterable[str],
    other: Iterable[str],
    path: str | Path,
    *,
    features: Features = Features(words=(1, 2), characters=(3, 5)),
    training: Training = Training(),
) -> Evaluation:
    """Trains a classifier, writes it to `path` (*.npz), and gives what it is worth on the texts held out.

    Texts are read as `Toxicity` reads them: letters that look alike are the same, invisible signs are gone. Short n-grams of characters know
    respelt words by what is left of them. Raises ValueError as `train` does.
    """
    model, evaluation = train(map(fold, toxic), map(fold, other), features=features, training=training)
    model.save(path)
    return evaluation
