"""Vocabularies that grow: pieces learned from a new text, put behind a tokenizer's own.

Pieces are learned as BPE goes on where it stopped (Sennrich et al. 2016): words are cut as the tokenizer cuts them, and again and again the
pair of neighbouring tokens that is most frequent becomes a token. So a new piece is always made of tokens that were there before, which
says what its embedding begins as (`lmx.interop.expand_vocabulary`); ids of old tokens stay, and text that holds no new piece is encoded as
before. In a unigram model a new piece gets the logarithm of its frequency in the new text, or a little more than what its parts are worth
together where that is more: else it would never be chosen.
"""

import heapq
import json
import math
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from lmx.data.learned import replace_file
from lmx.data.tokenizers import SPACE, HuggingFace, SentencePiece

LONGEST = 16  # characters of a new piece, as SentencePiece has it


@dataclass(frozen=True)
class Piece:
    """A token that is learned."""

    text: str
    """As the vocabulary writes it."""
    pair: tuple[int, int]
    """The two tokens that become this one, old or new."""
    parts: tuple[int, ...]
    """The old tokens that it is made of."""
    count: int
    """How often it was met in the text when it was made."""


def expand_tokenizer(
    source: str | Path, texts: Iterable[str], path: str | Path, *, pieces: int
) -> tuple[SentencePiece | HuggingFace, dict[int, tuple[int, ...]]]:
    """A tokenizer's file (`*.model` or `tokenizer.json`) with so many pieces more, learned from texts, written to `path`.

    Returns the new tokenizer, and of each new id the old ones that the piece is made of. Raises ValueError for a tokenizer that has no
    pieces to put together (WordPiece, words), or a text that has not so many.
    """
    source = Path(source)
    grown, parts = (expanded_pieces if source.suffix == ".model" else expanded_json)(source.read_bytes(), texts, pieces)
    replace_file(path, grown)
    return (SentencePiece if source.suffix == ".model" else HuggingFace)(path), parts


def expanded_json(data: bytes, texts: Iterable[str], pieces: int) -> tuple[bytes, dict[int, tuple[int, ...]]]:
    """`expand_tokenizer` of a `tokenizer.json`, as bytes."""
    import tokenizers

    tokenizer, about = tokenizers.Tokenizer.from_buffer(data), json.loads(data)
    model = about["model"]
    kind = model.get("type")
    if kind not in ("BPE", "Unigram"):
        raise ValueError(f"a tokenizer.json of type {kind} has no pieces to put together; expected BPE or Unigram")
    if model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"):
        raise ValueError("a tokenizer.json whose pieces are marked at the ends of words cannot be expanded")
    added = {token["content"]: token["id"] for token in about.get("added_tokens", ())}
    counts: Counter[str] = Counter()
    for text in texts:
        text = text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)
        cut = _words(text) if tokenizer.pre_tokenizer is None else (word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
        counts.update(part for word in cut for part in _words(word))
    cut_words = {word: [token.id for token in tokenizer.model.tokenize(word)] for word in counts}
    names = {id: text for text, id in tokenizer.get_vocab(with_added_tokens=False).items()}
    # Neither what marks that something is unknown nor bytes of a character are parts of words.
    whole = {id: text for id, text in names.items() if text not in added and not re.fullmatch("<0x[0-9A-F]{2}>", text)}
    learned = learn({tuple(ids): counts[word] for word, ids in cut_words.items()}, whole, set(names.values()) | set(added), pieces)
    first = max([*names, *added.values()]) + 1
    if kind == "BPE":
        # Added tokens are given ids behind the vocabulary's: in it, they keep theirs.
        model["vocab"] |= {text: id for text, id in added.items() if text not in model["vocab"]}
        texts_of = names | {first + i: piece.text for i, piece in enumerate(learned)}
        as_pairs = not model["merges"] or not isinstance(model["merges"][0], str)
        merges = [[texts_of[_id(id, first)] for id in piece.pair] for piece in learned]
        model["merges"] += merges if as_pairs else [" ".join(merge) for merge in merges]
        model["vocab"] |= {piece.text: first + i for i, piece in enumerate(learned)}
    else:
        lowest = min(score for _, score in model["vocab"])
        by_id = {id: text for text, id in added.items()}
        gap = range(len(model["vocab"]), first)
        if missing := [id for id in gap if id not in by_id]:
            raise ValueError(f"the tokenizer's ids have holes ({missing[:5]}), which a Unigram model cannot have; it cannot be expanded")
        model["vocab"] += [[by_id[id], lowest - 1000] for id in gap]
        model["vocab"] += [[p.text, s] for p, s in zip(learned, _scores(learned, [s for _, s in model["vocab"]], counts), strict=True)]
    return json.dumps(about, ensure_ascii=False).encode(), {first + i: piece.parts for i, piece in enumerate(learned)}


def expanded_pieces(data: bytes, texts: Iterable[str], pieces: int) -> tuple[bytes, dict[int, tuple[int, ...]]]:
    """`expand_tokenizer` of a SentencePiece model, as bytes."""
    import sentencepiece

    model, bpe = sentencepiece.SentencePieceProcessor(model_proto=data), _is_bpe(data)
    counts: Counter[str] = Counter()
    for text in texts:
        for line in text.split("\n"):
            counts.update(_words(model.normalize(line)))
    size = model.vocab_size()
    names = {i: model.id_to_piece(i) for i in range(size)}
    scores = [model.get_score(i) for i in range(size)]
    plain = [i for i in range(size) if not (model.is_byte(i) or model.is_control(i) or model.is_unknown(i) or model.is_unused(i))]
    # A word is cut as within a line: without the space that a model may put before its first.
    bare = sentencepiece.SentencePieceProcessor(model_proto=data + PLAIN)
    words = {tuple(bare.encode(word.replace(SPACE, " "))): count for word, count in counts.items()}
    whole = {i: names[i] for i in plain}
    learned = learn(words, whole, set(names.values()), pieces)
    # In BPE the score is the turn: scores fall by one from piece to piece. A unigram's are logarithms, which differ by less.
    lowest = min(scores)
    values = [lowest - 1 - i for i in range(len(learned))] if bpe else _scores(learned, scores, counts)
    grown = data + b"".join(_proto(piece.text, value) for piece, value in zip(learned, values, strict=True))
    return grown, {size + i: piece.parts for i, piece in enumerate(learned)}


PLAIN = b"\x1a\x06\x18\x00\x20\x00\x28\x01"  # normalizer_spec: add_dummy_prefix = false, remove_extra_whitespaces = false, escape = true


def _is_bpe(data: bytes) -> bool:
    """Whether a SentencePiece model is BPE: field 2 (trainer_spec), its field 3 (model_type: 1 unigram, the default; 2 BPE)."""
    kind = 1
    for number, value in _fields(data):
        if number == 2 and isinstance(value, bytes):
            kind = next((inner for n, inner in _fields(value) if n == 3), kind)
    if kind not in (1, 2):
        raise ValueError("a SentencePiece model of words or characters has no pieces to put together; expected bpe or unigram")
    return kind == 2


def _fields(data: bytes) -> Iterable[tuple[int, int | bytes]]:
    """Fields of a protocol buffer: their numbers, and integers or bytes."""
    place = 0

    def integer() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while place < len(data):
        number, wire = divmod(integer(), 8)
        if wire == 0:
            yield number, integer()
            continue
        size = {1: 8, 5: 4}.get(wire)
        size = integer() if size is None else size
        yield number, data[place : place + size]
        place += size


def _proto(text: str, score: float) -> bytes:
    """A piece as ModelProto holds it: field 1, of a text (field 1) and a score (field 2)."""
    name = text.encode()  # at most 16 characters, so lengths are single bytes
    body = b"\x0a" + bytes([len(name)]) + name + b"\x15" + struct.pack("<f", score)
    return b"\x0a" + bytes([len(body)]) + body


def _scores(learned: Sequence[Piece], scores: Sequence[float], counts: Mapping[str, int]) -> list[float]:
    """Logarithms of frequencies for a unigram model, where that is more than the parts have together."""
    total = sum(counts.values())
    return [max(math.log(piece.count / total), sum(scores[i] for i in piece.parts) + 1e-3) for piece in learned]


def _id(id: int, first: int) -> int:
    """New tokens are -1, -2, .. while they are learned."""
    return first - 1 - id if id < 0 else id


def _words(text: str) -> list[str]:
    """Parts of a text with their spaces in front, as SentencePiece and Llama's tokenizer.json have them."""
    return re.findall(f"{SPACE}*[^{SPACE}]+", text)


def learn(words: Mapping[tuple[int, ...], int], names: Mapping[int, str], taken: set[str], pieces: int) -> list[Piece]:
    """The most frequent pairs, one after another, of words (tokens and how often the word occurs). Equal ones in the order of their texts.

    `names` are the tokens that may be part of a piece, `taken` the texts that no piece may have. Raises ValueError when there are not so
    many that occur twice.
    """
    lines, weights = [list(word) for word in words], list(words.values())
    names, taken, found = dict(names), set(taken), []
    parts: dict[int, tuple[int, ...]] = {id: (id,) for id in names}
    counts: Counter[tuple[int, int]] = Counter()
    where: dict[tuple[int, int], set[int]] = defaultdict(set)
    for i, (line, weight) in enumerate(zip(lines, weights, strict=True)):
        for pair in pairwise(line):
            counts[pair] += weight
            where[pair].add(i)

    def entry(pair: tuple[int, int]) -> tuple[int, str, str, tuple[int, int]] | None:
        a, b = names.get(pair[0]), names.get(pair[1])
        possible = a is not None and b is not None and len(a) + len(b) <= LONGEST and a + b not in taken
        return (-counts[pair], a, b, pair) if possible and counts[pair] > 1 else None

    heap = [one for pair in counts if (one := entry(pair)) is not None]
    heapq.heapify(heap)
    while len(found) < pieces:
        if not heap:
            raise ValueError(f"pieces={pieces}: the text has only {len(found)} that occur twice; give it more text, or ask for fewer")
        negative, a, b, pair = heapq.heappop(heap)
        if -negative != counts[pair]:  # it has become rarer since
            if (again := entry(pair)) is not None:
                heapq.heappush(heap, again)
            continue
        if a + b in taken:
            continue
        new = -1 - len(found)
        parts[new], names[new] = parts[pair[0]] + parts[pair[1]], a + b
        taken.add(a + b)
        found.append(Piece(a + b, pair, parts[new], counts[pair]))
        changed = set()
        for i in where.pop(pair):
            line, weight = lines[i], weights[i]
            joined, place = [], 0
            while place < len(line):
                if place + 1 < len(line) and (line[place], line[place + 1]) == pair:
                    joined.append(new)
                    place += 2
                else:
                    joined.append(line[place])
                    place += 1
            for old in pairwise(line):
                counts[old] -= weight
            for fresh in pairwise(joined):
                counts[fresh] += weight
                where[fresh].add(i)
                if new in fresh:
                    changed.add(fresh)
            lines[i] = joined
        for fresh in changed:
            if (one := entry(fresh)) is not None:
                heapq.heappush(heap, one)
    return found
