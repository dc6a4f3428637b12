"""What filters do to whom: how many documents name each identity term or speak a dialect, before and after, and which lose most of theirs.

Word lists drop texts by and about minorities (Dodge et al. 2021), quality classifiers those of the less well off (Gururangan et al. 2022).
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from lmx.data.clean.identity_terms import TERMS

OTHER = re.compile(r"[^\w\x00-\x7f]+")
# Of bytes: those of words and apostrophes stay, a sign that parts phrases is a stop, all else a space.
SIGNS = bytes(i if i >= 128 or chr(i).isalnum() or i == 39 else 46 if chr(i) in '.,;:!?()[]{}"|<>' else 32 for i in range(256))


@dataclass(frozen=True)
class TermCounts:
    """How often a stream of documents has each term. Counts of parts add up: `+`."""

    documents: int = 0
    having: Mapping[str, int] = field(default_factory=dict)
    """Documents with a term, by `group/term`; with any of a group's, by `group`. Those of which there are none are left out."""
    mentions: Mapping[str, int] = field(default_factory=dict)
    """How often a term is there, all documents together, and those of a group."""

    def __add__(self, other: "TermCounts") -> "TermCounts":
        both = (dict(Counter(mine) + Counter(theirs)) for mine, theirs in ((self.having, other.having), (self.mentions, other.mentions)))
        return TermCounts(self.documents + other.documents, *both)


def count_terms(texts: Iterable[str], terms: Mapping[str, tuple[str, ...]] = TERMS) -> TermCounts:
    """Counts terms (`lmx.data.clean.identity_terms`) in texts.

    A text is read as words in lower case, hyphens parting them; a phrase does not go over other signs. Raises ValueError for terms that are not in
    lower case, and a form that two terms of a group share.
    """
    matcher = _matcher(tuple((group, tuple(entries)) for group, entries in terms.items()))
    documents, having, mentions = 0, Counter(), Counter()
    for text in texts:
        documents += 1
        found = matcher.count(text)
        having.update(found.keys())
        mentions.update(found)
    return TermCounts(documents, dict(having), dict(mentions))


def _words(text: str) -> list[bytes]:
    """The words in lower case, and stops; hyphens part words, apostrophes do not."""
    text = text.lower()
    if not text.isascii():
        text = OTHER.sub(" ", text.replace("\u2019", "'"))
    data = text.encode("utf-8", "surrogatepass").translate(SIGNS)
    return data.replace(b".", b" . ").replace(b"''", b" ").replace(b"' ", b" ").replace(b" '", b" ").strip(b"'").split()


class _Matcher:
    def __init__(self, terms: tuple[tuple[str, tuple[str, ...]], ...]):
        self.names: dict[bytes, list[str]] = {}
        self.phrases: dict[bytes, list[tuple[bytes, bytes]]] = {}
        for group, entries in terms:
            known: dict[bytes, str] = {}
            for entry in entries:
                dialect, _, listed = entry.rpartition(": ")
                first, *_ = forms = listed.split("|")
                name = f"{group}/{dialect + ': ' if dialect else ''}{first}"
                for words in map(_words, forms):
                    form = b" ".join(words)
                    if not form or b"." in form or entry != entry.lower():
                        raise ValueError(f"terms of {group!r} have {entry!r}; expected forms in lower case, of words alone, with | between")
                    if form in known:
                        raise ValueError(f"terms of {group!r} have {form.decode()!r} twice, in {known[form]!r} and {name!r}")
                    known[form] = name
                    self.names.setdefault(form, []).append(name)
                    if len(words) > 1:
                        self.phrases.setdefault(words[0], []).append((form, b" " + b"  ".join(words) + b" "))
        self.single = frozenset(form for form in self.names if b" " not in form)

    def count(self, text: str) -> Counter[str]:
        words = _words(text)
        present = set(words)
        forms: dict[bytes, int] = {}
        if some := self.single & present:
            forms = dict(Counter(filter(some.__contains__, words)))
        if begun := self.phrases.keys() & present:
            spaced = b" " + b"  ".join(words) + b" "  # a space on either side for each word, as in the phrase
            forms |= {form: spaced.count(phrase) for first in begun for form, phrase in self.phrases[first]}
        found = Counter()
        for form, times in forms.items():
            for name in self.names[form] if times else ():
                found[name] += times
                found[name.split("/")[0]] += times
        return found


_matcher = lru_cache(maxsize=8)(_Matcher)


@dataclass(frozen=True)
class Kept:
    """What of a term's documents is kept."""

    term: str
    before: int
    after: int
    rate: float
    low: float
    """Of the rate's interval (Wilson 1927)."""
    high: float
    p: float
    """How likely the term's documents would lose as much if documents were dropped whatever their terms, times the terms compared (Holm)."""
    loses: bool
    """Whether they lose significantly more than the others."""


@dataclass(frozen=True, repr=False)
class Losses:
    """The terms, the least probable losses first. As `str` a table."""

    before: int
    after: int
    level: float
    terms: tuple[Kept, ...]

    @property
    def losing(self) -> tuple[Kept, ...]:
        """Those that lose significantly more than the others."""
        return tuple(term for term in self.terms if term.loses)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        share = f", {self.after / self.before:.1%}" if self.before else ""
        lines = [
            f"{self.after:,} of {self.before:,} documents kept{share}; * loses more than the others (p < {self.level:g})",
            f"{'term':<40} {'before':>9} {'after':>9} {'kept':>7}  {1 - self.level:.0%} interval",
        ]
        for term in self.terms:
            star = "*" if term.loses else " "
            lines.append(f"{term.term:<40} {term.before:>9,} {term.after:>9,} {term.rate:>7.1%}{star} {term.low:>6.1%} to {term.high:.1%}")
        return "\n".join(lines)


def which_lose(before: TermCounts, after: TermCounts, *, level: float = 0.05) -> Losses:
    """Compares the share kept of the documents with each term to that of the documents without it (Fisher's exact test, one-sided, with Holm's
    correction for the number of terms).

    Args:
      before: counts of documents as they came.
      after: of those that stayed, as they came. (Where a step changes texts, count the ones before it changed them.)
      level: the chance of naming any term where none loses more; intervals of the rates, one by one, have confidence 1 - level.

    Raises:
      ValueError: more documents after than before, or a level that is none.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level} must be between 0 and 1; 0.05 say")
    for term in ("", *{**before.having, **after.having}):
        had, has = (counts.having.get(term, 0) if term else counts.documents for counts in (before, after))
        if has > had or has > after.documents or had - has > before.documents - after.documents:
            raise ValueError(f"{term or 'all'}: {has} documents after and {had} before; expected those after to be among those before")
    rows = []
    for term, had in before.having.items():
        has = after.having.get(term, 0)
        rows.append((lower_tail(has, had, after.documents, before.documents), term, had, has))
    rows.sort(key=lambda row: (row[0], row[3] / row[2], row[1]))
    kept, highest = [], 0.0
    for i, (p, term, had, has) in enumerate(rows):
        highest = max(highest, min(1.0, p * (len(rows) - i)))
        low, high = wilson(has, had, level)
        kept.append(Kept(term, had, has, has / had, low, high, highest, highest < level))
    return Losses(before.documents, after.documents, level, tuple(kept))


def wilson(successes: float, trials: float, level: float = 0.05) -> tuple[float, float]:
    """The score interval of a proportion, of confidence 1 - level (Wilson 1927). Raises ValueError for no trials, or other successes.

    Numbers that are not whole are of a sample that is worth so many trials.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} of {trials} is no proportion")
    z = NormalDist().inv_cdf(1 - level / 2)
    share, extra = successes / trials, z * z / trials
    middle, half = share + extra / 2, z * math.sqrt(share * (1 - share) / trials + extra / (4 * trials))
    return max(0.0, (middle - half) / (1 + extra)), min(1.0, (middle + half) / (1 + extra))


def lower_tail(hits: int, draws: int, marked: int, total: int) -> float:
    """The probability that of `draws` without replacement from `total`, `marked` of them, at most `hits` are marked (hypergeometric)."""
    lowest = max(0, draws + marked - total)
    if hits >= min(draws, marked):
        return 1.0
    mean = draws * marked / total
    far = 40 * math.sqrt(max(mean * (1 - marked / total) * (total - draws) / max(total - 1, 1), 0)) + 100
    # Further than 40 deviations from the mean, or below the hits, there is nothing that a sum of floats would notice.
    hits = min(hits, int(mean + far))
    x = np.arange(hits, max(lowest, int(min(hits, mean) - far)), -1, dtype=np.float64)
    falls = np.log(x) + np.log(total - marked - draws + x) - np.log(draws - x + 1) - np.log(marked - x + 1)
    at = _log_choose(marked, hits) + _log_choose(total - marked, draws - hits) - _log_choose(total, draws)
    return float(min(1.0, np.exp(at + np.concatenate([[0.0], np.cumsum(falls)])).sum()))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
