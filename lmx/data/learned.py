"""Tokenizers learned from text: SentencePiece's, and byte-level ones that the `tokenizers` library runs."""

import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

from lmx.data.tokenizers import HuggingFace, SentencePiece
from lmx.data.whole import whole

SENTENCE_BYTES = 4000  # SentencePiece leaves out longer sentences (its limit is 4192)
END = "<|endoftext|>"
TRAINED = {"bpe": "sentencepiece", "unigram": "sentencepiece", "byte_bpe": "tokenizers", "byte_unigram": "tokenizers"}
"""Tokenizers that are trained on a run's text, and the library that does."""


def train_sentencepiece(
    texts: Iterable[str],
    path: str | Path,
    *,
    vocab: int,
    algorithm: Literal["bpe", "unigram"] = "bpe",
    seed: int = 0,
    sentences: int = 500_000,
) -> SentencePiece:
    """Train a lossless SentencePiece model of `vocab` pieces on texts and write it to `path` (whole, or not at all).

    Lossless: no normalisation, no dummy space in front, bytes for characters that get no piece, `\\n` and `\\n\\n` pieces of their own (so
    that no piece spans lines). Ids: 0 unknown (never used), 1 beginning, 2 end of text. BPE: Sennrich et al. 2016; unigram: Kudo 2018.
    The same texts, seed and version of the library give the same file, in any process; the seed decides which lines are learned from when
    there are more than `sentences` of them. Raises ValueError when the vocabulary does not fit the texts, with the range that would.
    """
    if algorithm not in ("bpe", "unigram"):
        raise ValueError(f"algorithm={algorithm!r} is not known; use 'bpe' or 'unigram'")
    data = _sentencepiece(
        iter(_sample(_sentences(texts), sentences, seed)),
        f"{algorithm}:{vocab}",
        vocab_size=vocab,
        model_type=algorithm,
        byte_fallback=True,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=["\n", "\n\n"],
        character_coverage=0.9999,
        max_sentence_length=SENTENCE_BYTES + 192,
        # Candidates for unigram: the default of a million takes twice the time and finds no fewer tokens.
        seed_sentencepiece_size=max(20_000, 10 * vocab),
    )
    replace_file(path, data)
    return SentencePiece(path)


def train_huggingface(
    texts: Iterable[str],
    path: str | Path,
    *,
    vocab: int,
    algorithm: Literal["bpe", "unigram"] = "bpe",
    seed: int = 0,
    lines: int = 500_000,
) -> HuggingFace:
    """Train a byte-level `tokenizer.json` of `vocab` tokens on texts, as GPT-2's is, and write it to `path` (whole, or not at all).

    Lossless, but that `<|endoftext|>` (id 0, the only special token) written out in a text is that token. Words are told apart by GPT-2's
    rule (Radford et al. 2019), digits are tokens of their own, all 256 bytes are in the vocabulary. BPE: Sennrich et al. 2016; unigram: Kudo
    2018. The same texts, seed and version of the libraries give the same file, in any process; the seed decides which lines are learned
    from when there are more than `lines` of them. Raises ValueError when the vocabulary does not fit the texts.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if algorithm not in ("bpe", "unigram"):
        raise ValueError(f"algorithm={algorithm!r} is not known; use 'bpe' or 'unigram'")
    words = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    split, alphabet = pre_tokenizers.Sequence(words), sorted(pre_tokenizers.ByteLevel.alphabet())
    # A line with the line ends that follow it, so that several of these can be a token.
    found = _sample((line for text in texts for line in re.findall(r"[^\n]*\n+|[^\n]+", text)), lines, seed)
    name = f"byte_{algorithm}:{vocab}"
    if algorithm == "bpe":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = split
        settings = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, special_tokens=[END], show_progress=False)
        tokenizer.train_from_iterator(found, settings)
        if (learned := tokenizer.get_vocab_size()) != vocab:
            raise ValueError(
                f"tokenizer '{name}' cannot be trained on this text, which gives {learned} tokens; choose another vocabulary size"
            )
    else:
        tokenizer = tokenizers.Tokenizer(models.Unigram(_byte_unigram(found, split, alphabet, vocab, name)))
        tokenizer.pre_tokenizer = split
        tokenizer.add_special_tokens([END])
    tokenizer.decoder = decoders.ByteLevel()
    replace_file(path, tokenizer.to_str().encode())
    return HuggingFace(path)


def _byte_unigram(lines: Sequence[str], split, alphabet: Sequence[str], vocab: int, name: str) -> list[tuple[str, float]]:
    """Pieces and their scores, learned by SentencePiece from the words that a pre-tokenizer makes of lines.

    The `tokenizers` library sums in another order each time, so that its scores differ from run to run.
    """
    words = Counter(word for line in lines for word, _ in split.pre_tokenize_str(line))
    missing = sorted(set(alphabet) - set("".join(words)))
    data = _sentencepiece(
        (f"{word}\t{count}" for word, count in sorted(words.items()) if len(word) < SENTENCE_BYTES // 2),
        name,
        len(missing),
        vocab_size=vocab - len(missing),
        model_type="unigram",
        input_format="tsv",
        character_coverage=1.0,
        split_by_unicode_script=False,
        split_by_number=False,
        split_by_whitespace=False,
        bos_id=-1,
        eos_id=-1,
        seed_sentencepiece_size=max(20_000, 10 * vocab),
    )
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(1, model.vocab_size())]
    rarest = min(score for _, score in pieces) - 1
    return [(END, 0.0), *pieces, *((character, rarest) for character in missing)]


def _sentencepiece(sentences: Iterator[str], name: str, besides: int = 0, **settings: object) -> bytes:
    """A model trained without changing the text, in one thread: several sum in an order of their own. `besides` is the size of the
    vocabulary that errors do not count."""
    import sentencepiece

    model = _Buffer()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
            **settings,
        )
    except RuntimeError as error:
        reason = re.sub(r"\d+", lambda size: str(int(size[0]) + besides), str(error).rsplit("] ", 1)[-1].strip(" ."))
        raise ValueError(f"tokenizer '{name}' cannot be trained on this text ({reason}); choose another vocabulary size") from error
    return model.data


def replace_file(path: str | Path, data: bytes) -> None:
    """Write a file whole, or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as file:
        file.write(data)


class _Buffer:
    """What SentencePiece asks of a model writer."""

    data = b""

    def write(self, data: bytes) -> None:
        self.data += data


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines, cut where SentencePiece would leave them out for their length; a tab, which it reserves while training, ends a sentence."""
    for text in texts:
        for line in text.replace("\t", "\n").replace("\0", "\n").split("\n"):
            while len(line.encode()) > SENTENCE_BYTES:
                cut = line.rfind(" ", 1, SENTENCE_BYTES // 4)  # no character has more than four bytes
                cut = cut if cut > 0 else SENTENCE_BYTES // 4
                yield line[:cut]
                line = line[cut:]
            if line:
                yield line


def _sample(sentences: Iterator[str], count: int, seed: int) -> list[str]:
    """A uniform sample of at most `count`, in one pass (Li 1994, algorithm L).

    SentencePiece can sample too, but draws another sample in each process.
    """
    kept = list(islice(sentences, count))
    draw = random.Random(seed).random
    largest = 1.0
    while True:
        largest *= math.exp(math.log(1 - draw()) / count)
        skip = int(math.log(1 - draw()) / math.log1p(-largest)) if largest < 1 else 0
        sentence = next(islice(sentences, skip, None), None)
        if sentence is None:
            return kept
        kept[int(draw() * count)] = sentence


def trained(tokenizer: str, *, name: str = "tokenizer") -> tuple[str, int] | None:
    """`"bpe:2048"` -> `("bpe", 2048)`; None for a tokenizer that is loaded. Raises ValueError for half of one."""
    algorithm, colon, vocab = tokenizer.partition(":")
    if algorithm not in TRAINED:
        return None
    # 256 bytes, three special tokens, two kinds of line end and at least one character
    if not colon or not vocab.isdecimal() or not 262 <= int(vocab) <= 1 << 20:
        raise ValueError(f"{name}={tokenizer!r} is not understood; give the vocabulary, 262 to 1048576, as in '{algorithm}:2048'")
    return algorithm, int(vocab)


def train_tokenizer(texts: Iterable[str], path: Path, tokenizer: str) -> Path:
    """Train what a name says (`byte_bpe:32000`) into a file, `path` with the suffix of its kind, unless it is there; returns it."""
    algorithm, vocab = trained(tokenizer)
    sentencepiece = TRAINED[algorithm] == "sentencepiece"
    path = path.with_name(f"{path.name}.{'model' if sentencepiece else 'json'}")
    if not path.exists():
        if sentencepiece:
            train_sentencepiece(texts, path, vocab=vocab, algorithm=algorithm)
        else:
            train_huggingface(texts, path, vocab=vocab, algorithm=algorithm.removeprefix("byte_"))
    return path
