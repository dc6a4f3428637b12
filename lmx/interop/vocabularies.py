"""The two kinds of vocabulary that checkpoints have, behind one set of verbs: `tokenizer.json` and SentencePiece models with tokens added."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol

from lmx.data.expansion import expanded_json, expanded_pieces
from lmx.data.tokenizers import SPACE
from lmx.interop.tokenizer_files import Added

Span = tuple[int, int]
Parts = dict[int, tuple[int, ...]]


class Vocabulary(Protocol):
    """Ids and text. Frames are what stands around a text: beginnings, ends, separators."""

    size: int
    """Ids are below this."""
    spaced: bool
    """Decoded text may have spaces before its punctuation, which old checkpoints ask to have removed."""

    def encode(self, text: str, framed: bool) -> list[int]: ...
    def encode_pair(self, first: str, second: str, framed: bool) -> tuple[list[int], list[int]]:
        """Ids, and for each whether it belongs to the second text (where the checkpoint tells them apart)."""
        ...

    def spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids without a frame, and the range of characters of each."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool) -> str: ...
    def id(self, token: str) -> int | None: ...
    def token(self, id: int) -> str | None: ...
    def added(self) -> dict[str, bool]:
        """Tokens that are found in text before the vocabulary's own pieces, and whether they are special."""
        ...

    def grown(self, tokens: Sequence[str]) -> "Vocabulary":
        """With these special tokens after the last id."""
        ...

    def expanded(self, texts: Iterable[str], count: int) -> "tuple[Vocabulary, Parts]":
        """With so many pieces after the last id, learned from texts; and what each is made of."""
        ...

    def save(self, folder: Path) -> dict:
        """Write the vocabulary's own file; the entries of tokenizer_config.json that go with it."""
        ...


class Json:
    """A `tokenizer.json`, run by the `tokenizers` library without its padding and truncation."""

    def __init__(self, data: bytes):
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.spaced = type(self._tokenizer.model).__name__ != "BPE"

    @property
    def size(self) -> int:
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1  # ids may have holes

    def encode(self, text: str, framed: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=framed).ids

    def encode_pair(self, first: str, second: str, framed: bool) -> tuple[list[int], list[int]]:
        encoding = self._tokenizer.encode(first, second, add_special_tokens=framed)
        return encoding.ids, encoding.type_ids

    def spans(self, text: str) -> tuple[list[int], list[Span]]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def token(self, id: int) -> str | None:
        return self._tokenizer.id_to_token(id)

    def added(self) -> dict[str, bool]:
        return {token.content: token.special for token in self._tokenizer.get_added_tokens_decoder().values()}

    def grown(self, tokens: Sequence[str]) -> "Json":
        other = Json(self._tokenizer.to_str().encode())
        other.add([Added(token, special=True) for token in tokens])
        return other

    def expanded(self, texts: Iterable[str], count: int) -> "tuple[Json, Parts]":
        data, parts = expanded_json(self._tokenizer.to_str().encode(), texts, count)
        return Json(data), parts

    def add(self, tokens: Iterable[Added]) -> None:
        """Tokens of the vocabulary become added ones, others get the next ids. While loading only: a vocabulary in use does not change."""
        import tokenizers

        for token in tokens:
            entry = tokenizers.AddedToken(
                token.content,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                special=token.special,
            )
            (self._tokenizer.add_special_tokens if token.special else self._tokenizer.add_tokens)([entry])

    def frame(self) -> tuple[list[int], list[int]]:
        """What its post-processor puts before and after a text."""
        probe = self._tokenizer.encode("a", add_special_tokens=True)
        inner = [i for i, mask in enumerate(probe.special_tokens_mask) if not mask]
        start, end = (inner[0], inner[-1] + 1) if inner else (len(probe.ids), len(probe.ids))
        return probe.ids[:start], probe.ids[end:]

    def frame_pairs(self, cls: str, sep: str) -> None:
        """BERT's frame for pairs, where the post-processor has BERT's for one text and none for two (it was made without saying)."""
        from tokenizers import processors

        ids = [(token, self._tokenizer.token_to_id(token)) for token in (cls, sep)]
        if self.frame() == ([ids[0][1]], [ids[1][1]]) and not any(self._tokenizer.encode("a", "a").special_tokens_mask):
            one = f"{cls}:0 $A:0 {sep}:0"
            self._tokenizer.post_processor = processors.TemplateProcessing(single=one, pair=f"{one} $B:1 {sep}:1", special_tokens=ids)

    def save(self, folder: Path) -> dict:
        (folder / "tokenizer.json").write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")
        return {}


@dataclass(frozen=True)
class Kind:
    """What a tokenizer class does around a SentencePiece model. Frames are of roles, `A` and `B`."""

    single: tuple[str, ...] = ("A",)
    pair: tuple[str, ...] = ("A", "B")
    types: bool = False
    """The second text of a pair, and what ends it, has token type 1."""
    optional: bool = False
    """Beginning and end are settings of the checkpoint."""
    sentinels: int = 0
    """`<extra_id_0>` …, after the pieces, the last one first."""
    shifted: bool = False
    """fairseq's ids: `<s> <pad> </s> <unk>`, the pieces from the fourth on, `<mask>`."""
    accents: bool = True
    """False: lower case, no combining marks, one kind of quotes, before the model sees the text."""
    first_only: bool = False
    """Only the beginning of the text gets the model's space in front, not what follows an added token."""
    unigram: bool = False


KINDS: dict[str | None, Kind] = {
    None: Kind(optional=True),
    "LlamaTokenizer": Kind(("bos", "A"), ("bos", "A", "bos", "B"), types=True, optional=True, first_only=True),
    "GemmaTokenizer": Kind(("bos", "A"), ("bos", "A", "bos", "B"), types=True, optional=True),
    "T5Tokenizer": Kind(("A", "eos"), ("A", "eos", "B", "eos"), sentinels=100, unigram=True),
    "XLMRobertaTokenizer": Kind(("cls", "A", "sep"), ("cls", "A", "sep", "sep", "B", "sep"), shifted=True, unigram=True),
    "AlbertTokenizer": Kind(("cls", "A", "sep"), ("cls", "A", "sep", "B", "sep"), types=True, accents=False, unigram=True),
}
FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"  # ModelProto.normalizer_spec.add_dummy_prefix = false; a later occurrence of a field wins


class Pieces:
    """A SentencePiece model and tokens added to it, which are found in the text before the model sees what lies between them.

    `added` maps ids to tokens; they may also be pieces of the model itself (`<s>`). Raises ValueError when `data` is no model.
    """

    def __init__(self, data: bytes, file: str, kind: Kind, added: Mapping[int, Added], frames: Mapping[str, int]):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
            self._inner = sentencepiece.SentencePieceProcessor(model_proto=data + NO_DUMMY_PREFIX) if kind.first_only else self._model
        except RuntimeError as error:
            raise ValueError(f"{file} is not a SentencePiece model") from error
        self._data, self._file, self._kind, self._frames = data, file, kind, dict(frames)
        self._added = dict(added)
        count = self._model.vocab_size()
        first = {0: 3, 1: 0, 2: 2}
        self._ids = [first.get(i, i + 1) if kind.shifted else i for i in range(count)]
        self._pieces = {id: piece for piece, id in enumerate(self._ids)}
        self.size = max(max(self._pieces), *self._added, -1) + 1 if self._added else max(self._pieces) + 1
        self.spaced = kind.unigram
        self._drops_space = not self._model.decode([SPACE, "a"]).startswith(" ")
        self._by_content = {token.content: id for id, token in self._added.items()}
        self._order = sorted(self._added, key=lambda id: -len(self._added[id].content))
        self._pattern = re.compile("|".join(f"({_searched(self._added[id])})" for id in self._order)) if self._order else None

    def encode(self, text: str, framed: bool) -> list[int]:
        return self._framed(self._kind.single, {"A": self._encode(text)})[0] if framed else self._encode(text)

    def encode_pair(self, first: str, second: str, framed: bool) -> tuple[list[int], list[int]]:
        return self._framed(self._kind.pair if framed else ("A", "B"), {"A": self._encode(first), "B": self._encode(second)})

    def _framed(self, frame: tuple[str, ...], texts: Mapping[str, list[int]]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        types: list[int] = []
        # A separator before the second text belongs to the first; a beginning before it does not.
        second = min((i for i, role in enumerate(frame) if i and role in ("B", "bos")), default=len(frame))
        for i, role in enumerate(frame):
            part = texts[role] if role in texts else [self._frames[role]]
            ids += part
            types += [int(self._kind.types and i >= second)] * len(part)
        return ids, types

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for start, end, id in self._segments(text):
            ids += [id] if id is not None else [self._ids[i] for i in self._at(start).encode(self._cleaned(text[start:end]))]
        return ids

    def spans(self, text: str) -> tuple[list[int], list[Span]]:
        if not self._kind.accents:
            raise ValueError(f"{self._file}: its tokenizer changes letters, so the characters of a token are not known")
        ids: list[int] = []
        spans: list[Span] = []
        for start, end, id in self._segments(text):
            if id is not None:
                ids.append(id)
                spans.append((start, end))
                continue
            found = self._at(start).encode_as_offset_mapping(text[start:end])
            ids += [self._ids[i] for i in found["ids"]]
            whole = list(found["offsets"])
            # The first bytes of a character, and a space put in front, are given no room: they share that of what follows.
            for i in reversed(range(len(whole) - 1)):
                if whole[i][0] == whole[i][1]:
                    whole[i] = (whole[i][0], whole[i + 1][1])
            spans += [(start + a, start + b) for a, b in whole]
        return ids, spans

    def _segments(self, text: str) -> Iterator[tuple[int, int, int | None]]:
        place = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            if match.start() > place:
                yield place, match.start(), None
            yield match.start(), match.end(), self._order[match.lastindex - 1]
            place = match.end()
        if place < len(text):
            yield place, len(text), None

    def _at(self, start: int):
        return self._model if start == 0 else self._inner

    def _cleaned(self, text: str) -> str:
        if self._kind.accents:
            return text
        text = unicodedata.normalize("NFKD", text.replace("``", '"').replace("''", '"'))
        return "".join(c for c in text if unicodedata.category(c)[0] != "M").lower()

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        shown = [id for id in ids if not (skip_special and id in self._added and self._added[id].special)]
        text = ""
        for added, run in groupby(shown, key=lambda id: id in self._added):
            if added:
                text += "".join(self._added[id].content for id in run)
                continue
            pieces = [self._pieces[id] for id in run if id in self._pieces]
            part = self._model.decode(pieces)
            if text and pieces and self._drops_space and self._model.id_to_piece(pieces[0]).startswith(SPACE):
                part = f" {part}"  # the model takes this for the beginning of a text
            text += part
        return text

    def id(self, token: str) -> int | None:
        if token in self._by_content:
            return self._by_content[token]
        piece = self._model.piece_to_id(token)
        return self._ids[piece] if self._model.id_to_piece(piece) == token else None

    def token(self, id: int) -> str | None:
        if id in self._added:
            return self._added[id].content
        return self._model.id_to_piece(self._pieces[id]) if id in self._pieces else None

    def added(self) -> dict[str, bool]:
        return {token.content: token.special for token in self._added.values()}

    def roles(self) -> dict[str, str]:
        """The roles that the model itself knows, and their pieces."""
        ids = {"bos": self._model.bos_id(), "eos": self._model.eos_id(), "unk": self._model.unk_id(), "pad": self._model.pad_id()}
        return {role: self._model.id_to_piece(id) for role, id in ids.items() if id >= 0}

    def grown(self, tokens: Sequence[str]) -> "Pieces":
        more = {self.size + i: Added(token, special=True) for i, token in enumerate(tokens)}
        return Pieces(self._data, self._file, self._kind, self._added | more, self._frames)

    def expanded(self, texts: Iterable[str], count: int) -> "tuple[Pieces, Parts]":
        behind = sorted(id for id in self._added if id not in self._pieces)
        if self._kind.shifted or behind or not self._kind.accents:
            what = f"has tokens of its own behind its pieces ({self.token(behind[0])!r})" if behind else "changes ids or letters"
            raise ValueError(
                f"{self._file}: its tokenizer {what}, so more pieces have no place; expand its tokenizer.json (transformers' save_pretrained "
                "writes one)"
            )
        data, parts = expanded_pieces(self._data, texts, count)
        return Pieces(data, self._file, self._kind, self._added, self._frames), parts

    def save(self, folder: Path) -> dict:
        (folder / self._file).write_bytes(self._data)
        return {"added_tokens_decoder": {str(id): vars(self._added[id]) for id in sorted(self._added)}}


def _searched(token: Added) -> str:
    word = ("(?<!\\w)", "(?!\\w)") if token.single_word else ("", "")
    return f"{'\\s*' if token.lstrip else ''}{word[0]}{re.escape(token.content)}{word[1]}{'\\s*' if token.rstrip else ''}"
