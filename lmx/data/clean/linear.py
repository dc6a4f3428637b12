"""A linear classifier of texts over hashed n-grams of words and characters (Joulin et al. 2016; Weinberger et al. 2009).

Words are runs of letters and digits in lower case; each other sign but white space is a word too. Characters are UTF-8 bytes, so every
language has them. Features depend on the text and the settings alone: the hash is arithmetic on 32-bit integers, the same in any process and
version. One text is scored without Python loops over its words.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

FORMAT = 1
SPACE = b" \t\n\r\v\f"
INSIDE = np.array([i >= 128 or chr(i).isalnum() for i in range(256)])  # of bytes: whether they are part of words
STARTS = np.array([i not in SPACE for i in range(256)])
ONE_SPACE = bytes(32 if i in SPACE else i for i in range(256))
MIX = tuple(np.uint32(i) for i in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F))  # odd: the primes of xxHash and Murmur


def _table(salt: int) -> np.ndarray:
    """uint32 `[256]`: a random number for each byte, without NumPy's generators, whose numbers may change between versions."""
    return np.frombuffer(b"".join(hashlib.blake2b(bytes([salt, i]), digest_size=4).digest() for i in range(256)), "<u4").astype(np.uint32)


WORD_BYTES, TEXT_BYTES = np.where(STARTS, _table(0), np.uint32(0)), _table(1)
SALTS = np.arange(33, dtype=np.uint32) * MIX[3]
POWERS = np.cumprod(np.append(np.uint32(1), np.full(255, MIX[0], np.uint32)), dtype=np.uint32)
"""Of the place within a word; words of more than 256 bytes begin again."""


@dataclass(frozen=True)
class Features:
    """What is counted in a text. Each order (of words, of characters) is a block of about unit length, whatever the text's length."""

    words: tuple[int, ...] = (1, 2)
    """Orders of the n-grams of words."""
    characters: tuple[int, ...] = (4,)
    """Orders of the n-grams of bytes."""
    bits: int = 18
    """Hashes are of so many bits: 2 ** bits weights."""
    limit: int = 100_000
    """Characters of a text that are read, from its beginning."""

    def __post_init__(self):
        orders = (*self.words, *self.characters)
        if not orders or min(orders) < 1 or max(orders) > 16:
            raise ValueError(f"words={self.words} and characters={self.characters} must name at least one order, all of 1 to 16")
        if not 8 <= self.bits <= 28:
            raise ValueError(f"bits={self.bits} must be from 8 to 28")
        if self.limit < 1:
            raise ValueError(f"limit={self.limit} must be positive")

    def places(self, text: str) -> tuple[np.ndarray, list[int]]:
        """The hash of each n-gram of a text, ints `[n-grams]` below 2 ** bits, order by order, and how many each order has: 0 of a short text."""
        data = text[: self.limit].lower().encode("utf-8", "surrogatepass").translate(ONE_SPACE)
        read = np.frombuffer(data, np.uint8)
        grams = _grams(_words(read), self.words, MIX[1], 0) if self.words else []
        grams += _grams(TEXT_BYTES[read], self.characters, MIX[2], 16) if self.characters else []
        hashes = np.concatenate(grams)
        hashes ^= hashes >> 15
        hashes *= MIX[2]
        hashes >>= 32 - self.bits
        return hashes, [len(order) for order in grams]


def _words(read: np.ndarray) -> np.ndarray:
    """A hash of each word of a text's bytes, uint32 `[words]`."""
    inside = INSIDE[read]
    begins = STARTS[read]
    begins[1:] &= ~(inside[1:] & inside[:-1])
    starts = begins.nonzero()[0]
    if not len(starts):
        return np.zeros(0, np.uint32)
    # A blank counts 0, so what is summed from one start to the next is the word alone.
    first, lengths = starts[0], np.empty_like(starts)
    np.subtract(starts[1:], starts[:-1], out=lengths[:-1])
    lengths[-1] = len(read) - starts[-1]
    place = np.arange(first, len(read)) - starts.repeat(lengths)
    return np.add.reduceat(WORD_BYTES[read[first:]] * POWERS[place & 255], starts - first, dtype=np.uint32)


def _grams(items: np.ndarray, orders: Sequence[int], factor: np.uint32, salt: int) -> list[np.ndarray]:
    """Hashes of the n-grams of each order, of the items' uint32 `[n]`. Other orders, or another salt, give others."""
    found, hashes = {}, items
    for order in range(1, max(orders) + 1):
        if order > 1:
            hashes = hashes[: max(len(items) - order + 1, 0)] * factor + items[order - 1 :]
        found[order] = hashes
    return [found[order] + SALTS[salt + order] for order in orders]


@dataclass(frozen=True, eq=False)
class Linear:
    """A trained classifier: the probability that a text is of the first kind, where both kinds are as frequent."""

    features: Features
    weights: np.ndarray
    """float32 `[2 ** bits]`"""
    bias: float

    def __call__(self, text: str) -> float:
        """The probability, 0 to 1."""
        return float(_sigmoid(self.logit(text)))

    def logit(self, text: str) -> float:
        """Its log odds."""
        places, lengths = self.features.places(text)
        weights, total, start = self.weights[places], self.bias, 0
        for length in lengths:
            total += float(weights[start : start + length].sum(dtype=np.float64)) / max(length, 1) ** 0.5
            start += length
        return total

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the settings and weights."""
        settings = json.dumps([FORMAT, asdict(self.features), self.bias]).encode()
        return hashlib.sha256(settings + np.ascontiguousarray(self.weights, "<f4").tobytes()).hexdigest()

    def save(self, path: str | Path) -> None:
        """One file `*.npz`. The same classifier gives the same bytes. Raises ValueError for another suffix."""
        if Path(path).suffix != ".npz":
            raise ValueError(f"path={str(path)!r} must end in .npz")
        settings = json.dumps({"format": FORMAT, "features": asdict(self.features), "bias": self.bias, "fingerprint": self.fingerprint})
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, settings=np.array(settings), weights=self.weights)


@lru_cache(maxsize=16)
def load_linear(path: str, fingerprint: str = "") -> Linear:
    """A classifier that `Linear.save` wrote; a process reads a file once.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: it is no such file, it is damaged, or has another fingerprint than the one given.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"model={path!r} does not exist; expected a file that train_quality or train_toxicity wrote")
    try:
        with np.load(path, allow_pickle=False) as file:
            settings, weights = json.loads(str(file["settings"])), file["weights"]
        orders = {name: tuple(value) if isinstance(value, list) else value for name, value in settings["features"].items()}
        model = Linear(Features(**orders), weights, settings["bias"])
    except (OSError, KeyError, EOFError, TypeError, ValueError, BadZipFile, zlib.error) as error:
        raise ValueError(f"model={path!r} is no classifier of format {FORMAT} ({str(error)[:80]})") from error
    if settings["format"] != FORMAT or model.fingerprint != settings["fingerprint"] or len(weights) != 2**model.features.bits:
        raise ValueError(f"model={path!r} is damaged, or of another format than {FORMAT}; train it again")
    if fingerprint not in ("", model.fingerprint):
        raise ValueError(f"model={path!r} has fingerprint {model.fingerprint}, not {fingerprint}; it was trained again")
    return model


@dataclass(frozen=True)
class Training:
    """How a classifier is trained: logistic regression by AdaGrad (Duchi et al. 2011). Both kinds weigh the same, however many texts each has."""

    epochs: int = 5
    batch: int = 32
    """Texts an update."""
    rate: float = 0.2
    """Step size; it falls to 0 over the epochs, linearly."""
    l2: float = 1e-5
    """Times half the squared weights, beside the mean loss."""
    held_out: float = 0.1
    """The share of texts that is not trained on but evaluated. Which they are says a hash of the text: equal texts are on one side."""
    seed: int = 0
    """Decides the order of texts, and which are held out."""

    def __post_init__(self):
        if self.epochs < 1 or self.batch < 1 or self.rate <= 0 or self.l2 < 0 or not 0 < self.held_out < 1:
            raise ValueError(
                f"{self} is no training; epochs, batch and rate must be positive, l2 not negative and held_out between 0 and 1"
            )


class Evaluation(NamedTuple):
    """What a classifier is worth on texts that it has not seen, both kinds weighing the same."""

    texts: int
    auc: float
    """How often a text of the first kind scores higher than one of the second; ties count half."""
    accuracy: float
    """At 0.5."""
    calibration_error: float
    """The mean distance of the scores in ten bins of equal width from the share of the first kind there (Naeini et al. 2015)."""
    bins: tuple[tuple[float, float, float], ...]
    """Of each bin that is not empty: its weight, mean score, share of the first kind."""


def evaluate(scores: np.ndarray, labels: np.ndarray) -> Evaluation:
    """Of scores (probabilities of label 1) `[texts]` and labels 0 or 1 `[texts]`. Raises ValueError when a kind has none."""
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, bool)
    positives, negatives = np.sort(scores[labels]), np.sort(scores[~labels])
    if not len(positives) or not len(negatives):
        raise ValueError(f"there are {len(positives)} texts of the first kind and {len(negatives)} of the second; evaluating needs both")
    below, upto = (np.searchsorted(negatives, positives, side) for side in ("left", "right"))
    auc = float((below + upto).sum() / (2 * len(positives) * len(negatives)))
    weights = np.where(labels, 0.5 / len(positives), 0.5 / len(negatives))
    places = np.minimum((scores * 10).astype(int), 9)
    total, mean, share = (np.bincount(places, w, 10) for w in (weights, weights * scores, weights * labels))
    bins = tuple((float(w), float(s / w), float(p / w)) for w, s, p in zip(total, mean, share, strict=True) if w > 0)
    accuracy = float(weights[(scores >= 0.5) == labels].sum())
    return Evaluation(len(scores), auc, accuracy, sum(w * abs(s - p) for w, s, p in bins), bins)


def train(
    first: Iterable[str], second: Iterable[str], *, features: Features = Features(), training: Training = Training()
) -> tuple[Linear, Evaluation]:
    """A classifier that tells texts of the first kind from those of the second, and what it is worth on those held out.

    The same texts, settings and seed give the same classifier. All texts are held in memory, their features are not.
    Raises ValueError when one side has no text to train on, or none that is held out.
    """
    kinds = [[text for text in texts if text.strip()] for texts in (first, second)]
    texts = [text for kind in kinds for text in kind]
    labels = np.repeat([1.0, 0.0], [len(kind) for kind in kinds])
    held = np.array([_draw(text, training.seed) < training.held_out for text in texts], bool)
    counts = np.array([[np.count_nonzero(labels[held == side] == kind) for kind in (1, 0)] for side in (False, True)])
    if not counts.all():
        raise ValueError(
            f"of the first kind {counts[0, 0]} texts are trained on and {counts[1, 0]} held out, of the second {counts[0, 1]} and "
            f"{counts[1, 1]}; give more texts, or change held_out={training.held_out}"
        )
    model = _fit([texts[i] for i in np.flatnonzero(~held)], labels[~held], features, training)
    return model, evaluate(np.array([model(texts[i]) for i in np.flatnonzero(held)]), labels[held])


def _draw(text: str, seed: int) -> float:
    """Uniform in [0, 1), of a text and a seed."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") / 2**64


def _fit(texts: Sequence[str], labels: np.ndarray, features: Features, training: Training) -> Linear:
    share = labels.mean()
    importance = np.where(labels == 1, 0.5 / share, 0.5 / (1 - share))
    size = 2**features.bits
    # The last is the bias. Squares begin high enough that a feature seen once or twice moves little.
    weights, squares = np.zeros(size + 1), np.full(size + 1, 1e-4)
    generator = np.random.Philox(key=np.array([training.seed, 0], np.uint64))
    steps = -(-len(texts) // training.batch)
    for epoch in range(training.epochs):
        order = np.argsort(generator.random_raw(len(texts)), kind="stable")
        for step in range(steps):
            rows = order[step * training.batch : (step + 1) * training.batch]
            places, values, lengths = _sparse([texts[i] for i in rows], features)
            row = np.repeat(np.arange(len(rows)), lengths)
            logits = np.bincount(row, values * weights[places], len(rows)) + weights[-1]
            errors = importance[rows] * (_sigmoid(logits) - labels[rows]) / len(rows)
            gradient = np.bincount(places, values * errors[row], size + 1)
            gradient[-1] = errors.sum()
            gradient[:-1] += training.l2 * weights[:-1]
            squares += gradient**2
            left = 1 - (epoch * steps + step) / (training.epochs * steps)
            weights -= training.rate * left * gradient / np.sqrt(squares)
    return Linear(features, weights[:-1].astype(np.float32), float(weights[-1]))


def _sparse(texts: Sequence[str], features: Features) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Places and values of all n-grams of texts, and how many each text has."""
    found = [features.places(text) for text in texts]
    flat = np.array([length for _, lengths in found for length in lengths], np.int64)
    values = np.repeat(1 / np.sqrt(np.maximum(flat, 1)), flat)
    return np.concatenate([places for places, _ in found]), values, [sum(lengths) for _, lengths in found]


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))
