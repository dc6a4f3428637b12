"""Tokenizers: lossless round trips, training, and agreement with recorded results of the libraries."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.data import (
    ByteTokenizer,
    HuggingFace,
    SentencePiece,
    Tokenizer,
    documents,
    load_tokenizer,
    train_huggingface,
    train_sentencepiece,
)
from lmx.data.learned import _sample

REPOSITORY = Path(__file__).parents[2]
GOLDENS = REPOSITORY / "../shared/goldens/tokenizers"
SHAKESPEARE = REPOSITORY / "experiments/data/shakespeare/validation.jsonl.xz"

# Any text, and often the characters that tokenizers treat specially.
TEXT = st.lists(
    st.one_of(st.text(), st.sampled_from(["\u2581", " ", "   ", "\n", "\n\n", "\t", "\r\n", "\0", "<s>", "</s>", "<0x41>", "the "]))
).map("".join)


@pytest.fixture(scope="session")
def text():
    return next(documents(str(SHAKESPEARE))).text


@pytest.fixture(scope="session")
def trained(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {kind: train_sentencepiece([text], folder / f"{kind}.model", vocab=512, algorithm=kind) for kind in ("bpe", "unigram")}


@given(TEXT)
@settings(deadline=None)
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text) == list(tokenizer.encode_batch([text])[0])


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_sentencepiece_round_trip(trained, kind):
    tokenizer = trained[kind]

    @given(TEXT)
    @settings(deadline=None, max_examples=300)
    def check(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= id < tokenizer.vocab and id != 0 for id in ids)
        assert tokenizer.encode_batch([text, "a b", text]) == [ids, tokenizer.encode("a b"), ids]

    check()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_trained_tokenizer(trained, text, kind):
    tokenizer = trained[kind]
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.vocab == 512
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(text) / len(ids) > 1.6
    pieces = [tokenizer.token(id) for id in range(tokenizer.vocab)]
    assert not any("\\n" in piece for piece in pieces if piece not in ("\\n", "\\n\\n"))
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("Hamlet"), tokenizer.eos_id]) == "Hamlet"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_deterministic(text, tmp_path, kind):
    a, b = (train_sentencepiece([text[:60_000]], tmp_path / f"{name}.model", vocab=400, algorithm=kind, sentences=500) for name in "ab")
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert a.fingerprint == b.fingerprint == load_tokenizer(tmp_path / "a.model").fingerprint
    other = train_sentencepiece([text[:60_000]], tmp_path / "c.model", vocab=400, algorithm=kind, sentences=500, seed=1)
    assert a.fingerprint != other.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.model", "b.model", "c.model"]


def test_training_is_the_same_in_another_process(text, tmp_path):
    program = """
import sys
from lmx.data import train_sentencepiece
print(train_sentencepiece([sys.stdin.read()], sys.argv[1], vocab=400, sentences=500).fingerprint)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "b.model")]
    there = subprocess.run(command, input=text[:60_000], capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout.strip()
    assert there == train_sentencepiece([text[:60_000]], tmp_path / "a.model", vocab=400, sentences=500).fingerprint


def test_sample_is_uniform():
    counts = Counter(chosen for seed in range(3000) for chosen in _sample(iter(range(20)), 5, seed))
    assert all(600 < counts[i] < 900 for i in range(20))  # 750 expected, standard deviation 24
    assert _sample(iter(range(4)), 5, 0) == [0, 1, 2, 3]


def test_training_learns_from_very_long_lines(tmp_path):
    tokenizer = train_sentencepiece(["abracadabra " * 5000, "\u6f22" * 9000], tmp_path / "a.model", vocab=280)
    assert tokenizer.decode(tokenizer.encode("abracadabra " * 50)) == "abracadabra " * 50
    assert len(tokenizer.encode("abracadabra " * 50)) < 200


@pytest.mark.parametrize(
    ("vocab", "message"), [(100_000, r"'bpe:100000' cannot be trained on this text \(.*; choose another"), (262, "'bpe:262' cannot")]
)
def test_vocabulary_that_does_not_fit(tmp_path, vocab, message):
    with pytest.raises(ValueError, match=message) as error:
        train_sentencepiece(["a small text with few words in it"], tmp_path / "a.model", vocab=vocab)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_unknown_algorithm(tmp_path):
    with pytest.raises(ValueError, match="algorithm='word' is not known; use 'bpe' or 'unigram'"):
        train_sentencepiece(["a"], tmp_path / "a.model", vocab=300, algorithm="word")


def test_tokens_are_printable(trained):
    for tokenizer in (ByteTokenizer(), *trained.values()):
        assert all(tokenizer.token(id).isprintable() and tokenizer.token(id) for id in range(tokenizer.vocab))


def test_ids_outside_the_vocabulary(trained):
    for tokenizer in (ByteTokenizer(), trained["bpe"]):
        for id in (-1, tokenizer.vocab):
            with pytest.raises(ValueError, match=f"token id {id} is outside the vocabulary 0..{tokenizer.vocab - 1}"):
                tokenizer.decode([id])
            with pytest.raises(ValueError, match="outside the vocabulary"):
                tokenizer.token(id)


def test_bytes_that_are_no_text_are_shown():
    assert ByteTokenizer().decode([72, 0xC3, 256]) == "H\ufffd"


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory):
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<odd>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(["the cat and the hat"] * 9, trainer)
    model.enable_padding(length=50)
    model.enable_truncation(3)
    folder = tmp_path_factory.mktemp("hf")
    model.save(str(folder / "tokenizer.json"))
    return folder


def test_hugging_face(tokenizer_json, tmp_path):
    tokenizer = load_tokenizer(tokenizer_json)
    assert isinstance(tokenizer, HuggingFace)
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 0, None)
    text = "the cat \u00fc and\n the hat"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) > 3
    assert tokenizer.encode_batch([text, ""]) == [tokenizer.encode(text), []]
    assert tokenizer.fingerprint == load_tokenizer(tokenizer_json / "tokenizer.json").fingerprint
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_json / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<odd>"}, "pad_token": null}')
    assert (load_tokenizer(tmp_path).eos_id, load_tokenizer(tmp_path).pad_id) == (1, None)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<none>"}')
    with pytest.raises(ValueError, match=r"names the eos token '<none>', which tokenizer.json has not"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "name", "kind", "message"),
    [
        ({}, "words", ValueError, "tokenizer='words' is not known; expected 'bytes', a SentencePiece"),
        ({}, "{tmp}/a.model", FileNotFoundError, "does not exist"),
        ({}, "{tmp}/a.json", FileNotFoundError, "does not exist"),
        ({}, "{tmp}", ValueError, "is a folder with no tokenizer.json and 0 .*model files"),
        ({"a.model": "no model"}, "{tmp}/a.model", ValueError, "is not a SentencePiece model"),
        ({"a.json": "{}"}, "{tmp}/a.json", ValueError, "is not a tokenizer.json"),
        ({"a.json": "no json"}, "{tmp}/a.json", ValueError, "is not a tokenizer.json"),
    ],
)
def test_wrong_names(tmp_path, files, name, kind, message):
    for file, contents in files.items():
        (tmp_path / file).write_text(contents)
    with pytest.raises(kind, match=message) as error:
        load_tokenizer(name.format(tmp=tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not GOLDENS.exists(), reason="../shared/goldens is not here")
@pytest.mark.parametrize("case", ["sentencepiece_bpe", "sentencepiece_unigram", "byte_bpe", "wordpiece"])
def test_agrees_with_recorded_results(case):
    tokenizer = load_tokenizer(GOLDENS / case)
    assert isinstance(tokenizer, SentencePiece if "sentencepiece" in case else HuggingFace)
    recorded = json.loads((GOLDENS / case / "golden.json").read_text())
    assert len(recorded) > 30
    for entry in recorded:
        # WordPiece's were recorded with [CLS] and [SEP], which `encode` leaves to the data.
        ends = slice(1, -1) if case == "wordpiece" else slice(None)
        assert tokenizer.encode(entry["text"]) == entry["ids"][ends], entry["text"]
        assert tokenizer.decode(entry["ids"]) == entry["decoded"], entry["text"]
        assert [tokenizer.token(id) for id in entry["ids"]] == entry["tokens"]
    texts = [entry["text"] for entry in recorded]
    assert [list(ids) for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_byte_level_tokenizers_are_lossless_and_come_out_the_same(text, tmp_path, kind):
    tokenizer = train_huggingface([text[:60_000]], tmp_path / "a.json", vocab=400, algorithm=kind, lines=500)
    assert (tokenizer.vocab, tokenizer.eos_id, tokenizer.token(0)) == (400, 0, "<|endoftext|>")

    @given(TEXT)
    @settings(deadline=None, max_examples=100)
    def check(text):
        assert tokenizer.decode(tokenizer.encode(text)) == text

    check()
    program = """
import sys
from lmx.data import train_huggingface
print(train_huggingface([sys.stdin.read()], sys.argv[1], vocab=400, algorithm=sys.argv[2], lines=500).fingerprint)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "b.json"), kind]
    there = subprocess.run(command, input=text[:60_000], capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout.strip()
    assert there == tokenizer.fingerprint
    other = train_huggingface([text[:60_000]], tmp_path / "c.json", vocab=400, algorithm=kind, lines=500, seed=1)
    assert other.fingerprint != tokenizer.fingerprint
    with pytest.raises(ValueError, match=f"tokenizer 'byte_{kind}:90000' cannot be trained on this text.*; choose another vocabulary size"):
        train_huggingface([text[:60_000]], tmp_path / "d.json", vocab=90_000, algorithm=kind)
    with pytest.raises(ValueError, match="algorithm='word' is not known"):
        train_huggingface(["a"], tmp_path / "d.json", vocab=300, algorithm="word")
    assert not (tmp_path / "d.json").exists()
