"""Exact repeated substrings (Lee et al. 2022, Deduplicating Training Data Makes Language Models Better)."""

from dataclasses import dataclass

import numpy as np

from lmx.data.clean.runs import repeated_runs
from lmx.data.clean.step import Change, Document, Drop, Ragged, Verdict

PIECE = 7  # bytes of the longest token: with its length it fits into 64 bits

_SPACE, _WORD, _SIGN = 0, 1, 2
_KIND = np.array(
    [_SPACE if chr(b).isspace() and b < 128 else _WORD if b > 127 or chr(b).isalnum() else _SIGN for b in range(256)], np.uint8
)

# By the kinds of a byte and of the next one: a space begins a token and goes with what follows, and signs stand alone.
_BEGINS = np.array([False, False, False, True, False, True, True, True, True])
_LENGTH = np.arange(PIECE + 1, dtype=np.uint64) << np.uint64(56)
_MASK = (np.uint64(1) << np.arange(0, 8 * PIECE + 8, 8, dtype=np.uint64)) - np.uint64(1)


@dataclass(frozen=True)
class Substrings:
    """Cuts what has occurred before, anywhere in the corpus, in exactly these bytes: passages of at least `length` tokens; the first stays.

    A token is a word or a part of one, of at most seven bytes with the spaces before it, or a sign, or a character of three and more bytes (of
    Chinese): four bytes of English on average, as with the byte-pair encodings of the paper. No tokenizer is needed, and equal tokens are equal
    bytes. Windows of `length` tokens are found by their hash and compared, which gives what a suffix array gives. What is left of a document
    is joined as it stands; one of which fewer than `shortest` characters are left is dropped.
    """

    length: int = 50
    shortest: int = 1
    name: str = "substrings"

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length={self.length} tokens is not a length; Lee et al. take 50")

    def extract(self, document: Document) -> np.ndarray:
        """uint64 `[tokens]`: their bytes."""
        return tokens(document.text.encode(errors="surrogatepass"))[0]

    def resolve(self, extracted: Ragged) -> Ragged:
        """Tokens to cut: first, end, and the document where they stay."""
        return repeated_runs(extracted, self.length)

    def apply(self, document: Document, resolved: np.ndarray) -> Verdict:
        if not len(resolved):
            return None
        text = document.text.encode(errors="surrogatepass")
        bounds = np.append(tokens(text)[1], len(text))
        kept, last = [], 0
        for first, end, _ in resolved.reshape(-1, 3):
            kept.append(text[last : _character(text, bounds[first], 1)])
            last = _character(text, bounds[end], -1)
        left = b"".join([*kept, text[last:]]).decode(errors="surrogatepass")
        if len(left.strip()) < self.shortest:
            return Drop("repeated_substrings", int(resolved[2]))
        return Change(left, {"repeated_substrings": len(resolved) // 3})


def _character(text: bytes, place: int, step: int) -> int:
    """The nearest place, onwards or backwards, where a character of UTF-8 begins."""
    while place < len(text) and text[place] & 0xC0 == 0x80:
        place += step
    return place


def tokens(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Of each token of UTF-8 its bytes and their number as a uint64, and where it begins."""
    if not text:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    size = len(text)
    data = np.frombuffer(text + bytes(8), np.uint8)
    kind = _KIND[data[: size + 1]]
    begins = np.empty(size + 1, bool)
    begins[0] = begins[-1] = True
    np.take(_BEGINS, kind[:-2] * np.uint8(3) + kind[1:-1], out=begins[1:-1])
    if not text.isascii():
        wide = data[:size] >= 0xE0
        begins[1:-1] |= wide[1:] & (kind[:-2] != _SPACE)
        after = np.flatnonzero(wide)
        after += 3 + (data[after] >= 0xF0)
        begins[after[kind[after] == _WORD]] = True
    starts = begins.nonzero()[0]
    lengths = starts[1:] - starts[:-1]
    if lengths.max() > PIECE:  # pieces are counted from the beginning of a long one
        pieces = (lengths + (PIECE - 1)) // PIECE
        last = pieces.cumsum()
        number = np.arange(last[-1]) - (last - pieces).repeat(pieces)
        starts = np.append(starts[:-1].repeat(pieces) + number * PIECE, size)
        lengths = starts[1:] - starts[:-1]
    at = np.ndarray((size,), "<u8", data.data, strides=(1,))[starts[:-1]]
    return at & _MASK[lengths] | _LENGTH[lengths], starts[:-1]
