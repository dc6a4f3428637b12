"""Texts as numbers: folded to words, and hashes of words and of runs of them, without a Python loop over either."""

import hashlib
import re
import unicodedata
from functools import cache

import numpy as np

BLOCK = 1 << 18  # bytes or items worked on at a time: memory stays the same however long a document is
ODD = np.uint64(0x9E3779B97F4A7C15)  # the base of all polynomials; odd, so that it can be divided by modulo 2^64

_SIGNS = frozenset(("Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sm", "Sc", "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf"))
# Scripts that are written without spaces: each character is a word.
_SCRIPTS = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_ASCII = bytes(range(128))
_LATER = "\u0300"  # from here on characters combine with those before them, or are words by themselves
_SPACES = re.compile(rb"  +")
_UNSPACED = re.compile(f"[{_SCRIPTS}]")
_WORD = re.compile(rf"[{_SCRIPTS}]|[^\x00-/:-@\[-`{{-\x7f{_SCRIPTS}]+")  # of a `spaced` text


def _is_apart(character: str, punctuation: bool) -> bool:
    """White space, with `punctuation` also signs, symbols and controls. Marks (vowel signs, accents) are parts of words."""
    return character.isspace() or (punctuation and unicodedata.category(character) in _SIGNS)


def spaced(text: str, punctuation: bool = True) -> str:
    """A text of the same length where what stands between words, beyond ASCII, is spaces."""
    for character in _beyond(text):
        if _is_apart(character, punctuation):
            text = text.replace(character, " ")
    return text


def _beyond(text: str) -> set[str]:
    """The different characters beyond ASCII. (The others go while it is bytes, which is several times as fast.)"""
    return set(text.encode(errors="surrogatepass").translate(None, _ASCII).decode(errors="surrogatepass"))


@cache
def _table(lowercase: bool, punctuation: bool) -> bytes:
    """What ASCII bytes fold to; others stay."""
    ascii = map(chr, range(128))
    folded = "".join(" " if _is_apart(c, punctuation) else c.lower() if lowercase else c for c in ascii)
    return folded.encode() + bytes(range(128, 256))


def fold(text: str, lowercase: bool = True, punctuation: bool = True) -> bytes:
    """UTF-8 of a text whose words (or characters, of scripts without spaces) stand between spaces, one or more.

    `lowercase` folds case (as Unicode does it: ß is ss), `punctuation` takes signs and symbols for spaces. Composed and decomposed accents
    are the same; digits and accents stay.
    """
    if not text.isascii():
        text = spaced(text, punctuation)
        left = _beyond(text)
        if lowercase and any(c >= _LATER or c != c.casefold() for c in left):
            text = spaced(text.casefold(), punctuation)
            left = _beyond(text)
        if any(c >= _LATER for c in left):
            text = unicodedata.normalize("NFC", _UNSPACED.sub(r" \g<0> ", text))
    return text.encode(errors="surrogatepass").translate(_table(lowercase, punctuation))


def joined(folded: bytes) -> bytes:
    """The words of a folded text with one space between."""
    return _SPACES.sub(b" ", folded).strip()


def spans(text: str) -> list[tuple[int, int]]:
    """Where in a text the words are that `fold` finds: first character and end of each."""
    return [match.span() for match in _WORD.finditer(spaced(text))]


def digest(text: bytes) -> int:
    """64 bits of BLAKE2b: for whole documents and paragraphs, where nobody should be able to make two that agree."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 after which every bit depends on every bit (the end of SplitMix64; Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def words(folded: bytes) -> np.ndarray:
    """uint64 `[words]`: a hash of each word of a folded text. Two words agree once in 2^64; not meant to withstand an adversary."""
    if len(folded) <= BLOCK:
        return _words(folded)
    parts, start = [], 0
    while start < len(folded):
        stop = folded.find(b" ", start + BLOCK)
        parts.append(_words(folded[start : stop if stop >= 0 else len(folded)]))
        start = stop if stop >= 0 else len(folded)
    return np.concatenate(parts)


def _words(folded: bytes) -> np.ndarray:
    """A word's bytes b_i are Σ T[b_i] p^i: a difference of two sums from the text's beginning, divided by p^start."""
    text = np.frombuffer(b" " + folded + b" ", np.uint8)
    inside = text != 32
    edges = np.flatnonzero(inside[1:] != inside[:-1])  # before the first byte and at the last byte of each word
    powers, inverses = _powers(len(text).bit_length())
    sums = np.take(_letters(), text)
    sums *= powers[: len(text)]
    np.cumsum(sums, out=sums)
    return mix((sums[edges[1::2]] - sums[edges[::2]]) * inverses[edges[::2]])


def windows(hashes: np.ndarray, length: int) -> np.ndarray:
    """uint64 `[n - length + 1]`: a hash of every run of `length` hashes, in order; of fewer than that, one of all (none of none)."""
    if len(hashes) <= length:
        length = max(len(hashes), 1)
    count = len(hashes) - length + 1
    if length <= 8:  # cheaper than tables
        found = hashes[:count].copy()
        for k in range(1, length):
            found *= ODD
            found += hashes[k : k + count]
        return mix(found)
    found = np.empty(count, np.uint64)
    for start in range(0, count, BLOCK):
        part = hashes[start : start + BLOCK + length - 1]
        powers, inverses = _powers((len(part) + 1).bit_length())
        sums = np.zeros(len(part) + 1, np.uint64)
        np.cumsum(part * powers[: len(part)], out=sums[1:])
        found[start : start + BLOCK] = (sums[length:] - sums[:-length]) * inverses[: len(part) - length + 1]
    return mix(found)


@cache
def _letters() -> np.ndarray:
    """A number for each byte, without a pattern."""
    return mix(np.arange(1, 257, dtype=np.uint64) * ODD)


@cache
def _powers(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The base's first 2^bits powers, and those of its inverse."""
    inverse = np.uint64(pow(int(ODD), -1, 1 << 64))
    powers = np.full((2, 1 << bits), 1, np.uint64)
    powers[:, 1:] = [[ODD], [inverse]]
    return tuple(np.cumprod(powers, axis=1))
