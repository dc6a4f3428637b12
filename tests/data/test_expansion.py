"""Vocabularies that grow: old ids stay, new pieces unfold into old tokens, nothing is lost."""

import json
import lzma
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmx.data import load_tokenizer, train_huggingface, train_sentencepiece
from lmx.data.expansion import expand_tokenizer, learn

KINDS = ("byte_bpe", "byte_unigram", "bpe", "unigram")
NEW = [
    "Der Zauberlehrling: Hat der alte Hexenmeister sich doch einmal wegbegeben! Und nun sollen seine Geister auch nach meinem Willen leben.\n",
    "Seine Wort' und Werke merkt' ich, und den Brauch, und mit Geistesst\u00e4rke tu' ich Wunder auch. Walle! walle manche Strecke, dass, zum\n",
    "Zwecke, Wasser flie\u00dfe und mit reichem, vollem Schwalle zu dem Bade sich ergie\u00dfe. Und nun komm, du alter Besen, nimm die schlechten\n",
] * 3
PLAIN = "To be,  or not\n\n to be: \u6f22\u5b57 \u00fc 1623\tthat is.\n"


@pytest.fixture(scope="module")
def english(request) -> list[str]:
    file = request.config.rootpath / "experiments/data/shakespeare/validation.jsonl.xz"
    return [json.loads(line)["text"][:60_000] for line in lzma.open(file, "rt")][:1]


@pytest.fixture(scope="module")
def made(english, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")

    def path(kind: str):
        train = train_huggingface if kind.startswith("byte_") else train_sentencepiece
        name = folder / f"{kind}{'.json' if kind.startswith('byte_') else '.model'}"
        if not name.exists():
            train(english, name, vocab=400, algorithm=kind.removeprefix("byte_"))
        return name

    return path


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_learned(made, english, tmp_path, kind):
    source = made(kind)
    old = load_tokenizer(source)
    new, parts = expand_tokenizer(source, NEW, tmp_path / source.name, pieces=60)
    assert new.vocab == old.vocab + 60
    assert list(parts) == list(range(old.vocab, new.vocab))
    assert [new.token(i) for i in range(old.vocab)] == [old.token(i) for i in range(old.vocab)]
    assert (new.bos_id, new.eos_id, new.pad_id) == (old.bos_id, old.eos_id, old.pad_id)
    for id, ids in parts.items():
        assert len(ids) > 1
        assert max(ids) < old.vocab
        assert "".join(old.token(i) for i in ids) == new.token(id)
    for text in (*NEW[:3], PLAIN, *english):
        ids = new.encode(text)
        assert new.decode(ids) == text
        if kind in ("bpe", "byte_bpe"):  # the new merges come after all old ones
            assert [i for id in ids for i in parts.get(id, (id,))] == list(old.encode(text))
    before, after = (sum(map(len, t.encode_batch(NEW))) for t in (old, new))
    assert after < 0.75 * before
    assert {i for ids in new.encode_batch(NEW) for i in ids} & set(parts)
    again, _ = expand_tokenizer(source, NEW, tmp_path / f"again{source.suffix}", pieces=60)
    assert again.fingerprint == new.fingerprint


def test_special_tokens_keep_their_ids(made, tmp_path):
    """Tokens that were added behind the vocabulary stay where they are; new pieces come after them."""
    import tokenizers

    for kind in ("byte_bpe", "byte_unigram"):
        tokenizer = tokenizers.Tokenizer.from_file(str(made(kind)))
        tokenizer.add_special_tokens(["<|user|>", "<|tool|>"])
        tokenizer.save(str(tmp_path / "chat.json"))
        old = load_tokenizer(tmp_path / "chat.json")
        new, parts = expand_tokenizer(tmp_path / "chat.json", NEW, tmp_path / "new.json", pieces=10)
        assert list(parts) == list(range(old.vocab, old.vocab + 10)) == list(range(402, 412))
        assert [i for i in new.encode("<|user|>Besen<|tool|>") if i in (400, 401)] == [400, 401]
        assert [new.token(i) for i in (400, 401)] == ["<|user|>", "<|tool|>"]


@given(st.dictionaries(st.lists(st.integers(0, 3), min_size=1, max_size=6).map(tuple), st.integers(1, 5), min_size=1, max_size=6))
def test_learning_counts_as_a_slow_version_does(words):
    names = dict(enumerate("abcd"))

    def slow(count):
        lines, text, found = {w: list(w) for w in words}, dict(names), []
        while len(found) < count:
            pairs = Counter()
            for word, line in lines.items():
                for pair in pairwise(line):
                    pairs[pair] += words[word]
            possible = {p: n for p, n in pairs.items() if n > 1 and text[p[0]] + text[p[1]] not in text.values()}
            if not possible:
                return found
            best = min(possible, key=lambda p: (-possible[p], text[p[0]], text[p[1]]))
            new = -1 - len(found)
            text[new] = text[best[0]] + text[best[1]]
            found.append((text[new], possible[best]))
            for line in lines.values():
                i = 0
                while i < len(line) - 1:
                    if (line[i], line[i + 1]) == best:
                        line[i : i + 2] = [new]
                    i += 1
        return found

    expected = slow(8)
    if expected:
        assert [(piece.text, piece.count) for piece in learn(words, names, set(names.values()), len(expected))] == expected
    if len(expected) < 8:
        with pytest.raises(ValueError, match=f"the text has only {len(expected)} that occur twice"):
            learn(words, names, set(names.values()), 8)


def test_what_has_no_pieces_is_refused(tmp_path, shared):
    with pytest.raises(ValueError, match="type WordPiece has no pieces to put together"):
        expand_tokenizer(shared / "goldens/tokenizers/wordpiece/tokenizer.json", NEW, tmp_path / "a.json", pieces=5)
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(NEW), model_prefix=str(tmp_path / "words"), model_type="word", vocab_size=40, minloglevel=2
    )
    with pytest.raises(ValueError, match="words or characters has no pieces"):
        expand_tokenizer(tmp_path / "words.model", NEW, tmp_path / "a.model", pieces=5)
