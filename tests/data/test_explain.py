"""A batch as a person reads it."""

import io

import numpy as np
import pytest
from rich.console import Console

from lmx.data import Batches, ByteTokenizer, Document, build_store, explain, train_sentencepiece


def batch_of(tmp_path, texts, tokenizer, **options):
    store = build_store([Document(str(i), text, "test") for i, text in enumerate(texts)], tokenizer, tmp_path / "store")
    return Batches(store, **{"rows": 3, "length": 24, "seed": 0, "shuffle": False, "packing": "first_fit", "epochs": 1, **options})[0]


def test_text_segments_and_padding(tmp_path):
    shown = explain(batch_of(tmp_path, ["To be\n", "or <b>not</b>"], ByteTokenizer()), ByteTokenizer(), rows=1)
    row = shown.rows[0]
    assert "".join(piece.text for piece in row.pieces) == "To be\u23ce\n<eos>or <b>not</b><eos>[5 padding]"
    assert [piece.segment for piece in row.pieces] == [1] * 7 + [2] * 14 + [0]
    # the first token of a document is context, all others are predicted
    assert [i for i, piece in enumerate(row.pieces) if piece.role == "context"] == [0, 7]
    assert row.title == "example 0: 2 segments, 19 of 24 predicted"
    assert shown.title == "3 rows of 24 tokens, 19 predicted, 53 padding (73.6%), the first 1 shown"


def test_masked_targets_are_context(tmp_path):
    batch = batch_of(tmp_path, ["prompt answer"], ByteTokenizer())
    batch["weights"][0, :6] = 0
    pieces = explain(batch, ByteTokenizer()).rows[0].pieces
    assert "".join(piece.text for piece in pieces if piece.role == "predicted") == " answer<eos>"[1:]


def test_targets_that_are_not_the_next_tokens(tmp_path):
    batch = batch_of(tmp_path, ["abc"], ByteTokenizer())
    batch["targets"] = batch["tokens"].copy()
    batch["tokens"][0, 1] = ord("?")
    batch["weights"][0] = np.arange(24) == 1
    pieces = explain(batch, ByteTokenizer()).rows[0].pieces
    assert [(piece.text, piece.role) for piece in pieces[:3]] == [("a", "context"), ("?\u2192b", "predicted"), ("c", "context")]


def test_pieces_of_words_read_as_text(tmp_path):
    text = "the cat and  the hat\n\nand \u00fc the cat"
    tokenizer = train_sentencepiece([text] * 3, tmp_path / "a.model", vocab=280)
    batch = batch_of(tmp_path, [text], tokenizer, length=60)
    shown = "".join(piece.text for piece in explain(batch, tokenizer).rows[0].pieces if piece.segment)
    assert shown.replace("<0xC3><0xBC>", "\u00fc").removesuffix("</s>").replace("\u23ce\n", "\n") == text


def test_terminal(tmp_path):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="truecolor", width=80)
    console.print(explain(batch_of(tmp_path, ["ab [red]", "cd"], ByteTokenizer()), ByteTokenizer()))
    text = out.getvalue()
    assert "legend" in text
    assert "context (weight 0)" in text
    # both segments have their own background, and text that looks like markup stays text
    assert "48;2;191;219;254m" in text
    assert "48;2;253;230;138m" in text
    assert "red" in text
    plain = str(explain(batch_of(tmp_path / "b", ["ab [red]"], ByteTokenizer()), ByteTokenizer()))
    assert "ab [red]<eos>" in plain


def test_notebook(tmp_path):
    html = explain(batch_of(tmp_path, ["<script>", "cd"], ByteTokenizer()), ByteTokenizer())._repr_html_()
    assert "<script>" not in html
    assert "&lt;</span>" in html
    assert 'title="segment 1, context"' in html
    assert 'title="segment 2, predicted"' in html
    assert html.count("<div") == html.count("</div>")
    assert "legend" in html


def test_nothing_supervised(tmp_path):
    batch = batch_of(tmp_path, ["abc"], ByteTokenizer())
    batch["weights"][:] = 0
    with pytest.raises(ValueError, match="has nothing to predict: every weight is 0"):
        explain(batch, ByteTokenizer())
