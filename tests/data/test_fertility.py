"""What a tokenizer makes of texts, counted one word and one token at a time."""

import pytest

from lmx.data import ByteTokenizer, Document, load_tokenizer, train_huggingface, train_sentencepiece
from lmx.data.fertility import by_field, draw, fertility, table

TEXTS = [
    Document("0", "the cat and the hat and the bat", "plain", {"language": "en"}),
    Document("1", "the hat  on the\n cat \u00fcber", "plain", {"language": "de"}),
    Document("2", "\u6f22\u5b57 the", "other"),
]


@pytest.fixture(scope="module", params=["byte_bpe", "byte_unigram", "bpe"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = ["the cat and the hat and the bat on the mat " * 9 + "abcdefghijklmnopqrstuvwxyz"]
    if request.param == "bpe":
        return train_sentencepiece(texts, folder / "a.model", vocab=300)
    return train_huggingface(texts, folder / "a.json", vocab=268 if request.param == "byte_bpe" else 260, algorithm=request.param[5:])


def test_counts(tokenizer):
    rows = {row.group: row for row in fertility(TEXTS, tokenizer)}
    assert list(rows) == ["other", "plain", "all"]
    for group, row in rows.items():
        texts = [d.text for d in TEXTS if group in (d.source, "all")]
        words = [word for text in texts for word in text.split()]
        tokens = [id for text in texts for id in tokenizer.encode(text)]
        assert (row.documents, row.words, row.tokens) == (len(texts), len(words), len(tokens))
        assert (row.characters, row.bytes) == (sum(map(len, texts)), sum(len(text.encode()) for text in texts))
        assert row.split == sum(len(tokenizer.encode(f" {word}")) > 1 for word in words)
        assert row.bytes_per_token == row.bytes / row.tokens
        assert row.unknown == 0
    # two characters of three bytes and one of two have no token of their own
    assert rows["other"].fallback == 6
    assert rows["all"].fallback == 8
    assert 0 < rows["plain"].split_share < 1


def test_bytes():
    row = {row.group: row for row in fertility(TEXTS, ByteTokenizer())}["all"]
    assert row.bytes_per_token == 1
    assert row.fallback == 8


def test_unknown(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat and the hat "] * 20), model_prefix=str(tmp_path / "a"), vocab_size=12, minloglevel=2
    )
    rows = {row.group: row for row in fertility(TEXTS, load_tokenizer(tmp_path / "a.model"))}
    assert rows["other"].unknown == 1
    assert rows["other"].fallback == 0


def test_report(tokenizer, tmp_path):
    rows = fertility(TEXTS, tokenizer, by_field("language"))
    assert [row.group for row in rows] == ["(none)", "de", "en", "all"]
    lines = table(rows).splitlines()
    assert len(lines) == 6
    assert lines[-1].startswith("| all | 3 | 16 | ")
    assert {line.count("|") for line in lines} == {11}
    draw({"ours": rows, "bytes": fertility(TEXTS, ByteTokenizer(), by_field("language"))}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no documents to look at"):
        fertility([], tokenizer)
