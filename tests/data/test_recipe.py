"""From a config to tokens."""

import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lmx.data.learned
import lmx.data.recipe
from lmx.data import ByteTokenizer, Data, HuggingFace, SentencePiece, check, prepare, prepare_tokenizer

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path):
    verse = (
        "When forty winters shall besiege thy brow, And dig deep trenches in thy beauty's field, Thy youth's proud livery so gazed on now"
    )
    lines = [json.dumps({"text": f"{verse} {i} times said the king. " * 3, "id": i}) for i in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:30]))
    (tmp_path / "validation.jsonl").write_text("\n".join(lines[30:]))
    return Data(train=str(tmp_path / "train.jsonl"), validation=str(tmp_path / "validation.jsonl"), cache=str(tmp_path / "cache"))


def test_bytes(data):
    prepared = prepare(data)
    assert isinstance(prepared.tokenizer, ByteTokenizer)
    assert (len(prepared.train), len(prepared.validation)) == (30, 10)
    assert prepare(dataclasses.replace(data, validation="")).validation is None


@pytest.mark.parametrize("tokenizer", ["bpe:310", "unigram:310", "byte_bpe:310", "byte_unigram:270"])
def test_trained_tokenizer_is_cached_by_content(data, tokenizer, monkeypatch):
    data = dataclasses.replace(data, tokenizer=tokenizer)
    first = prepare(data)
    assert isinstance(first.tokenizer, HuggingFace if "byte" in tokenizer else SentencePiece)
    assert first.tokenizer.vocab == first.train.vocab == first.validation.vocab == int(tokenizer.split(":")[1])
    text = json.loads(Path(data.train).read_text().splitlines()[0])["text"]
    assert first.tokenizer.decode(first.train.document(0).tolist()) == text
    with monkeypatch.context() as patch:
        for name in ("train_sentencepiece", "train_huggingface"):
            patch.setattr(lmx.data.learned, name, None)  # not trained again
        assert prepare(data).train.directory == first.train.directory
    Path(data.train).write_text(Path(data.train).read_text().replace("king", "queen"))
    assert prepare_tokenizer(data).fingerprint != first.tokenizer.fingerprint
    model = next(Path(data.cache).glob("tokenizers/*"))
    assert prepare(dataclasses.replace(data, tokenizer=str(model))).tokenizer.vocab == first.tokenizer.vocab


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"train": ""}, ValueError, r"data\.train='' names nothing"),
        ({"train": "nowhere/*.txt"}, FileNotFoundError, r"data\.train='nowhere/\*\.txt' matches no file"),
        ({"validation": "nowhere.txt"}, FileNotFoundError, r"data\.validation='nowhere\.txt' does not exist"),
        ({"tokenizer": "words"}, ValueError, "tokenizer='words' is not known; expected 'bytes'"),
        ({"tokenizer": "nowhere.model"}, FileNotFoundError, r"tokenizer='nowhere\.model' does not exist"),
        ({"tokenizer": "bpe"}, ValueError, r"data\.tokenizer='bpe' is not understood; give the vocabulary, .* as in 'bpe:2048'"),
        ({"tokenizer": "unigram:many"}, ValueError, r"data\.tokenizer='unigram:many' is not understood"),
        ({"tokenizer": "bpe:100"}, ValueError, r"data\.tokenizer='bpe:100' is not understood; give the vocabulary, 262 to 1048576"),
        ({"length": 0}, ValueError, r"data\.length=0 is not positive"),
        ({"packing": "best"}, ValueError, r"data\.packing='best' is not one of concatenate, first_fit, stream"),
    ],
)
def test_config_errors_come_before_any_work(data, change, kind, message, monkeypatch):
    monkeypatch.setattr(lmx.data.recipe, "cached_store", None)
    monkeypatch.setattr(lmx.data.learned, "train_sentencepiece", None)
    for function in (check, prepare):
        with pytest.raises(kind, match=message) as error:
            function(dataclasses.replace(data, **change))
        assert "\n" not in str(error.value)
    assert not Path(data.cache).exists()


def test_errors_in_the_text_name_the_knob(data):
    with pytest.raises(ValueError, match=r"data\.train: .*train\.jsonl, line 1 has no field 'body', only 'text', 'id'; set data\.field"):
        prepare(dataclasses.replace(data, field="body"))
    with pytest.raises(ValueError, match=r"tokenizer 'bpe:50000' cannot be trained on this text"):
        prepare(dataclasses.replace(data, tokenizer="bpe:50000"))
    Path(data.validation).write_text("")
    with pytest.raises(ValueError, match=r"data\.validation='.*validation\.jsonl' holds no text"):
        prepare(data)


def test_every_field_is_explained():
    source = inspect.getsource(Data).splitlines()
    for field in dataclasses.fields(Data):
        at = next(i for i, line in enumerate(source) if line.strip().startswith(f"{field.name}:"))
        assert source[at + 1].strip().startswith('"""'), field.name


def test_import_is_cheap():
    heavy = ("jax", "grain", "tensorflow_datasets", "sentencepiece", "tokenizers", "array_record", "rich")
    program = f"import sys, lmx.data; print(*(name for name in {heavy} if name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout.split()
    assert found == []
