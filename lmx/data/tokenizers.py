"""Tokenizers: bytes, SentencePiece and Hugging Face's `tokenizer.json`, behind one small protocol."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

SPACE = "\u2581"  # how SentencePiece writes a space
USUAL = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
    "pad": ("<pad>", "[PAD]", "<|pad|>"),
}


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back. `encode` adds no special tokens and `decode` drops them: beginnings and ends are the data's business."""

    vocab: int
    """Ids are below this."""
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    fingerprint: str
    """SHA-256 (hex) of all that decides what `encode` returns: a changed tokenizer makes a new cache."""

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Each text as `encode` would, in one call of the library (which may use several threads)."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token(self, id: int) -> str:
        """What a person is shown for an id: the library's piece, control characters escaped."""
        ...


class ByteTokenizer:
    """UTF-8 bytes 0..255 and an end-of-text token, 256. Lossless; nothing to train.

    `decode` shows bytes that are no UTF-8, which a model may well produce, as U+FFFD. Raises ValueError for ids outside 0..256.
    """

    vocab, eos_id = 257, 256
    bos_id = pad_id = None
    fingerprint = hashlib.sha256(b"lmx bytes, end of text 256").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return [text.encode() for text in texts]  # bytes are a sequence of ints already

    def decode(self, ids: Sequence[int]) -> str:
        _check_ids(ids, self.vocab)
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token(self, id: int) -> str:
        _check_ids([id], self.vocab)
        if id == 256:
            return "<eos>"
        return chr(id) if 32 <= id < 127 else f"<0x{id:02X}>"


class SentencePiece:
    """A SentencePiece model file. Raises ValueError when the file is none.

    Models that `lmx.data.train_sentencepiece` makes are lossless. SentencePiece itself reads U+2581 as a space; where a model is otherwise lossless
    and has byte pieces, that character is encoded by its three bytes instead. Other models (T5's, Llama's) are encoded exactly as the
    library does.
    """

    def __init__(self, path: str | Path):
        import sentencepiece

        data = _read(path, "SentencePiece model")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise ValueError(
                f"tokenizer={str(path)!r} is not a SentencePiece model; expected a file from train_sentencepiece or a spiece.model"
            ) from error
        self.vocab = self._model.vocab_size()
        self.bos_id, self.eos_id, self.pad_id = (
            i if i >= 0 else None for i in (self._model.bos_id(), self._model.eos_id(), self._model.pad_id())
        )
        self.fingerprint = hashlib.sha256(b"sentencepiece" + data).hexdigest()
        byte_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        probe = " \n a  b\t\n"
        exact = all(self._model.is_byte(i) for i in byte_ids) and self._model.decode(self._model.encode(probe)) == probe
        self._space_bytes = byte_ids if exact else None

    def encode(self, text: str) -> list[int]:
        if self._space_bytes is None or SPACE not in text:
            return self._model.encode(text)
        first, *rest = (self._model.encode(part) for part in text.split(SPACE))
        return first + [id for part in rest for id in (*self._space_bytes, *part)]

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        ids = self._model.encode(list(texts))
        if self._space_bytes is not None:
            ids = [self.encode(text) if SPACE in text else row for text, row in zip(texts, ids, strict=True)]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        _check_ids(ids, self.vocab)
        return self._model.decode([int(i) for i in ids])

    def token(self, id: int) -> str:
        _check_ids([id], self.vocab)
        return _printable(self._model.id_to_piece(int(id)))


class HuggingFace:
    """A `tokenizer.json` (or the folder that has one), as the `tokenizers` library runs it, without its padding and truncation.

    `tokenizer.json` does not say which of its special tokens begin, end or pad: that comes from `tokenizer_config.json` or
    `special_tokens_map.json` beside it, else from the usual names if the vocabulary has exactly such a special token, else there is none.
    As everywhere with this library, a special token written out in the text becomes that token. Raises ValueError when the file is none.
    """

    def __init__(self, path: str | Path):
        import tokenizers

        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        data = _read(file, "tokenizer.json")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"tokenizer={str(path)!r} is not a tokenizer.json ({str(error).splitlines()[0][:120]})") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # Ids may have holes, so the count of tokens is no bound.
        self.vocab = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = hashlib.sha256(b"tokenizer.json" + data).hexdigest()
        self.bos_id, self.eos_id, self.pad_id = (self._special(file.parent, role) for role in ("bos", "eos", "pad"))

    def _special(self, folder: Path, role: str) -> int | None:
        for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
            if file.exists():
                named = json.loads(file.read_text(encoding="utf-8")).get(f"{role}_token")
                named = named["content"] if isinstance(named, dict) else named
                if named is not None:
                    id = self._tokenizer.token_to_id(named)
                    if id is None:
                        raise ValueError(f"{file} names the {role} token {named!r}, which tokenizer.json has not; correct one of the two")
                    return id
        special = {token.content: id for id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        return next((special[token] for token in USUAL[role] if token in special), None)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        _check_ids(ids, self.vocab)
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def token(self, id: int) -> str:
        _check_ids([id], self.vocab)
        piece = self._tokenizer.id_to_token(int(id))
        return f"<unused {id}>" if piece is None else _printable(piece)


def load_tokenizer(name_or_path: str | Path, *, name: str = "tokenizer") -> Tokenizer:
    """`"bytes"`, a SentencePiece `*.model`, a `*.json`, or a folder with `tokenizer.json` or one `*.model`.

    Raises FileNotFoundError when nothing is there, ValueError when it is no tokenizer; `name` is the knob that errors mention.
    """
    path, expected = Path(name_or_path), "expected 'bytes', a SentencePiece *.model, a tokenizer.json, or a folder with one of them"
    if str(name_or_path) == "bytes":
        return ByteTokenizer()
    if path.is_dir():
        models = sorted(path.glob("*.model"))
        if (path / "tokenizer.json").exists():
            return HuggingFace(path)
        if len(models) == 1:
            return SentencePiece(models[0])
        raise ValueError(f"{name}={str(path)!r} is a folder with no tokenizer.json and {len(models)} *.model files; {expected}")
    if path.suffix not in (".model", ".json"):
        raise ValueError(f"{name}={str(name_or_path)!r} is not known; {expected}")
    if not path.exists():
        raise FileNotFoundError(f"{name}={str(path)!r} does not exist; {expected}")
    return SentencePiece(path) if path.suffix == ".model" else HuggingFace(path)


def _read(path: str | Path, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"tokenizer={str(path)!r} does not exist; expected a {what}") from error
    except OSError as error:
        raise ValueError(f"tokenizer={str(path)!r} cannot be read ({error.strerror}); expected a {what}") from error


def _check_ids(ids: Sequence[int], vocab: int) -> None:
    for id in ids:
        if not 0 <= id < vocab:
            raise ValueError(
                f"token id {id} is outside the vocabulary 0..{vocab - 1}; the ids come from another tokenizer, or a padded vocabulary"
            )


def _printable(piece: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in piece)
