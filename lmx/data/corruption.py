"""What a denoising objective does to one text: which tokens are taken out, what the model reads instead, what it predicts.

All chance comes from `Draws`, raw numbers of a counter-based generator, so that a text is corrupted the same way wherever, whenever and with
whichever version of NumPy.
"""

import math
from typing import Literal

import numpy as np

from lmx.data.denoising import BlankInfilling, MaskedLM, Mixture, Objective, PrefixLM, SpanCorruption, TextInfilling, require_sentinels
from lmx.data.tokenizers import Tokenizer

Columns = dict[str, np.ndarray]


class Draws:
    """Random numbers of the nth text of an example: a function of (seed, example id, nth), taken in the order of the calls.

    Of Philox's raw numbers, which are promised to stay the same across NumPy's versions, as its distributions are not.
    """

    def __init__(self, seed: int, example_id: int, nth: int = 0):
        # The last word tells these numbers from those of permutations, which use 0 and 1.
        self._bits = np.random.Philox(key=np.array([seed, example_id], np.uint64), counter=np.array([0, 0, nth, 2], np.uint64))

    def uniform(self, size: int) -> np.ndarray:
        """float64 `[size]` in [0, 1)."""
        return (self._bits.random_raw(size) >> np.uint64(11)) * 2.0**-53

    def below(self, bound: int, size: int) -> np.ndarray:
        """int64 `[size]` in 0..bound-1."""
        return (self.uniform(size) * bound).astype(np.int64)

    def permutation(self, size: int) -> np.ndarray:
        """0..size-1 in random order."""
        return np.argsort(self._bits.random_raw(size), kind="stable")

    def subset(self, count: int, size: int) -> np.ndarray:
        """`count` of 0..size-1, sorted."""
        return np.sort(self.permutation(size)[:count])


def corrupt(objective: Objective, text: np.ndarray, draws: Draws, *, words: np.ndarray | None = None) -> Columns:
    """One text, int `[tokens]`, as columns of a row: fields as in `lmx.data.denoised.denoise`, but for segments.

    `words`, bool `[vocab]`, says which tokens begin a word, for `MaskedLM.whole_word`. Raises ValueError where that is missing, or for more
    spans than sentinels.
    """
    text = np.asarray(text, np.int64)
    match objective:
        case MaskedLM():
            return _masked(objective, text, draws, words)
        case BlankInfilling():
            return _blanks(objective, text, draws)
    source, target = _pair(objective, text, draws)
    target = np.append(target, _ids(objective.eos))
    if objective.form == "prefix":
        line, known = np.concatenate([source, target]), np.arange(len(source) + len(target) - 1)
        return {
            "tokens": line[:-1],
            "targets": line[1:],
            "weights": known >= len(source) - 1,
            "positions": known,
            "prefix": known < len(source),
        }
    source = np.append(source, _ids(objective.eos))
    return {
        "tokens": source,
        "positions": np.arange(len(source)),
        "decoder_tokens": np.append(objective.start, target[:-1]),
        "decoder_positions": np.arange(len(target)),
        "targets": target,
        "weights": np.ones(len(target)),
    }


def _pair(objective: PrefixLM | SpanCorruption | TextInfilling | Mixture, text: np.ndarray, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """What is read and what is predicted, without what stands at their ends."""
    match objective:
        case PrefixLM():
            least, most = objective.prefixes(len(text))
            cut = least + int(draws.below(most - least + 1, 1)[0])
            return text[:cut], text[cut:]
        case SpanCorruption():
            require_sentinels(objective, len(text))
            noise, spans = objective.counts(len(text))
            lengths = composition(noise, spans, draws)
            before = np.cumsum(composition(len(text) - noise, spans, draws))
            sentinels = np.array(objective.sentinels[:spans])
            taken = text[_inside(before, lengths, len(text))]
            return cut_out(text, before, lengths, sentinels), np.insert(taken, np.cumsum(lengths) - lengths, sentinels)
        case TextInfilling():
            permuted = _permuted(text, objective.sentence_ends, draws)
            before, lengths = poisson_spans(*objective.counts(len(text)), len(text), objective.mean_span, draws, shortest=0)
            source = cut_out(permuted, before, lengths, np.full(len(lengths), objective.mask))
            return np.append(_ids(objective.begin), source), np.append(_ids(objective.begin), text)
        case Mixture():
            rates = np.cumsum([part.rate for part in objective.denoisers])
            part = objective.denoisers[int(np.searchsorted(rates, draws.uniform(1)[0] * rates[-1], side="right"))]
            source, target = _pair(part.objective, text, draws)
            return np.append(_ids(part.mode), source), target


def _ids(id: int | None) -> np.ndarray:
    """A special token, or none."""
    return np.array([] if id is None else [id], np.int64)


def _permuted(text: np.ndarray, sentence_ends: tuple[int, ...], draws: Draws) -> np.ndarray:
    """The text with its sentences in random order; what follows the last end is one too."""
    sentences = np.split(text, np.flatnonzero(np.isin(text[:-1], sentence_ends)) + 1)
    return np.concatenate([sentences[i] for i in draws.permutation(len(sentences))])


def _masked(objective: MaskedLM, text: np.ndarray, draws: Draws, words: np.ndarray | None) -> Columns:
    if objective.whole_word and words is None:
        raise ValueError(
            "objective.whole_word needs words, which say for each id whether it begins a word; use lmx.data.corruption.word_starts"
        )
    begins = words[text] if objective.whole_word else np.ones(len(text), bool)
    word = np.cumsum(begins) - begins[0]
    lengths, budget, chosen = np.bincount(word), objective.masked(len(text)), []
    order = draws.permutation(len(lengths))
    for i in order:
        if lengths[i] <= budget:
            chosen.append(i)
            budget -= lengths[i]
        if not budget:
            break
    masked = np.flatnonzero(np.isin(word, chosen or order[:1]))
    fate, others = draws.uniform(len(masked)), draws.below(objective.vocab, len(masked))
    tokens = text.copy()
    tokens[masked] = np.select([fate < objective.random, fate < objective.random + objective.keep], [others, text[masked]], objective.mask)
    begin, end = _ids(objective.begin), _ids(objective.eos)
    tokens, targets = (np.concatenate([begin, line, end]) for line in (tokens, text))
    weights = np.zeros(len(tokens))
    weights[len(begin) + masked] = 1
    return {"tokens": tokens, "targets": targets, "weights": weights, "positions": np.arange(len(tokens))}


def _blanks(objective: BlankInfilling, text: np.ndarray, draws: Draws) -> Columns:
    before, lengths = poisson_spans(*objective.counts(len(text)), len(text), objective.mean_span, draws, shortest=1)
    known = cut_out(text, before, lengths, np.full(len(lengths), objective.mask))
    begins = before + np.cumsum(lengths) - lengths
    order = draws.permutation(len(lengths))
    spans = [text[begins[i] : begins[i] + lengths[i]] for i in order]
    zeros, count = np.zeros(len(known), np.int64), lengths[order] + 1
    return {
        "tokens": np.concatenate([known, *([objective.start, *span] for span in spans)]),
        "targets": np.concatenate([zeros, *([*span, objective.end] for span in spans)]),
        "weights": np.append(zeros, np.ones(count.sum())),
        "positions": np.append(np.arange(len(known)), np.repeat((before + np.arange(len(lengths)))[order], count)),
        "block_positions": np.concatenate([zeros, *(np.arange(1, n + 1) for n in count)]),
        "prefix": np.append(zeros + 1, np.zeros(count.sum())),
    }


def composition(total: int, parts: int, draws: Draws) -> np.ndarray:
    """`parts` positive numbers that add up to `total`, each such row of numbers as likely as any other: int64 `[parts]`."""
    cuts = draws.subset(parts - 1, total - 1) + 1
    return np.diff(cuts, prepend=0, append=total)


def poisson_spans(masked: int, most: int, n: int, mean: float, draws: Draws, *, shortest: Literal[0, 1]) -> tuple[np.ndarray, np.ndarray]:
    """Spans of n tokens that hold `masked` of them: the kept tokens before each, and its length, both int64 `[spans]`.

    Lengths are Poisson (given that they are at least `shortest`) until they add up to `masked`, the last cut short, or the longer where
    there would be more than `most`. Each span has a place of its own between kept tokens, any choice of places as likely as any other.
    """
    lengths = poisson(mean, shortest, draws.uniform(most))
    total = np.cumsum(lengths)
    count = min(int(np.searchsorted(total, masked)) + 1, most)
    lengths = lengths[:count]
    lengths[-1] = masked - lengths[:-1].sum()
    return draws.subset(count, n - masked + 1), lengths


def poisson(mean: float, shortest: Literal[0, 1], uniform: np.ndarray) -> np.ndarray:
    """Poisson numbers, given that they are at least `shortest`, by inversion of uniform ones: int64 of the same shape."""
    count = np.arange(1, int(mean + 12 * math.sqrt(mean)) + 20)
    below = np.cumsum(np.exp(np.append(0, np.cumsum(np.log(mean / count))) - mean))
    least = below[0] if shortest else 0.0
    return np.searchsorted(below[:-1], least + uniform * (1 - least), side="right")


def cut_out(text: np.ndarray, before: np.ndarray, lengths: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """The text with a mark in the place of each span."""
    return np.insert(text[~_inside(before, lengths, len(text))], before, marks)


def _inside(before: np.ndarray, lengths: np.ndarray, n: int) -> np.ndarray:
    """bool `[n]`: in a span."""
    begins = before + np.cumsum(lengths) - lengths
    steps = np.bincount(begins, minlength=n + 1) - np.bincount(begins + lengths, minlength=n + 1)
    return np.cumsum(steps[:n]) > 0


def word_starts(tokenizer: Tokenizer) -> np.ndarray:
    """Which tokens begin a word, bool `[vocab]`, by how a tokenizer writes them.

    In WordPiece vocabularies those without `##`; in others those that do not begin with a letter, a digit or a byte of a longer character,
    but with a space (or its mark, in SentencePiece and byte-level BPE), the end of a line, a sign, or that are special.
    """
    pieces = [tokenizer.token(id) for id in range(tokenizer.vocab)]
    if any(piece.startswith("##") and len(piece) > 2 for piece in pieces):
        return np.array([not piece.startswith("##") for piece in pieces])
    # Byte-level BPE writes bytes that are no printable ASCII as characters from U+0080 on: these are its space, line ends and tab.
    byte_level = any(piece.startswith("\u0120") for piece in pieces)
    blanks = "\u0120\u010a\u010d\u0109" if byte_level else ""

    def goes_on(piece: str) -> bool:
        first = piece[:1]
        return first not in blanks and (first.isalnum() or piece.startswith("<0x") or (byte_level and first >= "\x80"))

    return np.array([not goes_on(piece) for piece in pieces])
