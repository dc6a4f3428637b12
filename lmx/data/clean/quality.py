"""Quality as a classifier sees it that was trained on good texts against a crawl (Brown et al. 2020, appendix A)."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lmx.data.clean.linear import Evaluation, Features, Training, load_linear, train
from lmx.data.clean.step import Change, Drop, Verdict
from lmx.data.documents import Document


@dataclass(frozen=True)
class Quality:
    """Keeps documents that look like the good ones. The score, 0 to 1, is added to their metadata as `quality`."""

    model: str
    """A file that `train_quality` wrote."""
    keep: Literal["pareto", "threshold"] = "pareto"
    """`pareto`: where a number of the Lomax distribution is above 1 - score, as for GPT-3, so that a few of the worst stay too."""
    alpha: float = 9.0
    """Of that distribution: a document stays with probability (2 - score) ** -alpha."""
    threshold: float = 0.5
    """The lowest score that stays, of `threshold`."""
    seed: int = 0
    """With the document's id it decides what is drawn: no matter where and in what order."""
    fingerprint: str = ""
    """That of the classifier which is meant; empty: whichever the file holds."""
    name: str = "quality"

    def __post_init__(self):
        if self.keep not in ("pareto", "threshold"):
            raise ValueError(f"keep={self.keep!r} must be 'pareto' or 'threshold'")
        if self.alpha <= 0 or not 0 <= self.threshold <= 1:
            raise ValueError(f"alpha={self.alpha} must be positive, and threshold={self.threshold} from 0 to 1")

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.model,)

    def __call__(self, document: Document) -> Verdict:
        score = round(load_linear(self.model, self.fingerprint)(document.text), 6)
        stays = score >= self.threshold if self.keep == "threshold" else pareto(document.id, self.alpha, self.seed) > 1 - score
        return Change(metadata={"quality": score}) if stays else Drop(self.keep, score)


def pareto(id: str, alpha: float, seed: int = 0) -> float:
    """A number of the Lomax distribution, as `numpy.random.pareto(alpha)` draws, that depends on the id and seed alone."""
    digest = hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8, key=b"pareto", salt=seed.to_bytes(8, "little")).digest()
    below = (int.from_bytes(digest, "little") >> 11) / 2**53
    return (1 - below) ** (-1 / alpha) - 1


def train_quality(
    good: Iterable[str], other: Iterable[str], path: str | Path, *, features: Features = Features(), training: Training = Training()
) -> Evaluation:
    """Trains a classifier of good texts (books, an encyclopedia, pages that people recommend) against others (a crawl), writes it to `path`
    (*.npz), and gives what it is worth on the texts held out. Raises ValueError as `train` does.
    """
    model, evaluation = train(good, other, features=features, training=training)
    model.save(path)
    return evaluation
