"""Texts released piece by piece, against the decoding of all their tokens and a search through it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.data.tokenizers import ByteTokenizer, HuggingFace, SentencePiece
from lmx.infer.stopping import REPLACEMENT, Stopper

TEXTS = st.text(st.sampled_from([*"aab  c\n.", "é", "€", "🙂", REPLACEMENT]), max_size=14)
STOPS = st.lists(st.text(st.sampled_from([*"aab c.", "é", "€", REPLACEMENT]), min_size=1, max_size=4), max_size=3)


class Pieces:
    """Like SentencePiece: `▁` is a space, dropped where the text begins, and bytes stand for what has no piece."""

    def __init__(self, pieces, first_only: bool):
        self.pieces, self.first_only = pieces, first_only

    def decode(self, ids):
        pieces = [self.pieces[id] for id in ids if self.pieces[id] != "<special>"]
        text = b"".join(p if isinstance(p, bytes) else p.replace("▁", " ").encode() for p in pieces).decode(errors="replace")
        return text.removeprefix(" ") if self.first_only else text.lstrip(" ")


PIECES = [*(bytes([i]) for i in range(256)), "▁", "▁a", "a", "b", "ab", "▁ab", "c.", "▁▁", "a▁b", "b▁", "<special>", "\n"]


def searched(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first; of those complete with one character, the longest."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    return text[: min(ends)[0] - len(min(ends)[2])] if ends else text


def released(stopper: Stopper, ids: list[int]) -> list[str]:
    """Pieces of a text, the last by `finish` unless it stopped."""
    pieces = []
    for id in ids:
        text, reason = stopper.push(id)
        pieces.append(text)
        if reason is not None:
            break
    return [*pieces, stopper.finish()]


def agrees(tokenizer, ids: list[int], stops: list[str]) -> None:
    whole, stopper = searched(tokenizer.decode(ids), stops), Stopper(tokenizer, stops)
    assert "".join(released(stopper, ids)) == whole
    assert (stopper.stopped_by is None) == (whole == tokenizer.decode(ids))


@settings(max_examples=300, deadline=None)
@given(TEXTS, STOPS)
def test_bytes(text, stops):
    agrees(ByteTokenizer(), list(text.encode()), stops)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([0x61, 0x62, 0x20, 0xE2, 0x82, 0xAC, 0xFF, 0xC3, 0xA9, 256]), max_size=12), STOPS)
def test_bytes_that_are_no_text(ids, stops):
    agrees(ByteTokenizer(), ids, stops)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.integers(256, len(PIECES) - 1) | st.sampled_from([0x61, 0xE2, 0x82, 0xAC]), max_size=12), STOPS, st.booleans())
def test_pieces(ids, stops, first_only):
    for some in ([], stops):
        agrees(Pieces(PIECES, first_only), ids, some)


@pytest.fixture(scope="module", params=["llama", "bytelevel"])
def tokenizer(request, tmp_path_factory):
    """Real ones: SentencePiece as it is by default, with a space before the first word, and GPT-2's kind."""
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = ["ab a b ab. c a  b", "abc ab\n a. b a", "a ab abab c. ab é €"] * 9
    if request.param == "llama":
        import sentencepiece

        how = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2}
        how |= {"model_type": "bpe", "vocab_size": 275}
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_prefix=str(folder / "m"), **how)
        return SentencePiece(folder / "m.model")
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=275, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False)
    model.train_from_iterator(texts, trainer)
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(model.to_str())))
    return HuggingFace(folder)


def test_tokenizers_as_they_are_made(tokenizer):
    @settings(max_examples=150, deadline=None)
    @given(TEXTS | st.lists(st.integers(0, tokenizer.vocab - 1), max_size=10), STOPS)
    def check(text, stops):
        agrees(tokenizer, tokenizer.encode(text) if isinstance(text, str) else text, stops)

    check()


@settings(max_examples=100, deadline=None)
@given(TEXTS, STOPS)
def test_no_more_is_held_back_than_may_begin_a_stop_string_or_a_character(text, stops):
    stopper, shown = Stopper(ByteTokenizer(), stops), ""
    for count, id in enumerate(text.encode(), 1):
        piece, reason = stopper.push(id)
        shown += piece
        if reason is not None:
            return
        known = text.encode()[:count].decode(errors="ignore")
        held = known[len(shown) :]
        assert held == "" or any(stop.startswith(held) for stop in stops) or REPLACEMENT in held


def test_a_space_behind_nothing_but_space_is_kept():
    for first_only in (True, False):
        assert released(Stopper(Pieces(["a", "▁", "▁b"], first_only)), [1, 0, 1, 1, 2, 1, 2]) == ["", "a", " ", " ", " b", " ", " b", ""]


class TakesBack:
    """As `tokenizers` decodes bytes that stand for pieces, and as transformers cleans up."""

    def decode(self, ids):
        import tokenizers

        return tokenizers.decoders.ByteFallback().decode(ids).replace("▁", " ").replace(" ,", ",")


def test_what_was_released_stays_when_more_tokens_change_it_and_nothing_is_lost():
    character = [f"<0x{byte:02X}>" for byte in "日".encode()]
    assert released(Stopper(TakesBack()), [*character, *character[:2], "b"]) == ["", "", "日", "", "", 2 * REPLACEMENT + "b", ""]
    assert released(Stopper(TakesBack()), [*character, *character[:2]]) == ["", "", "日", "", "", 2 * REPLACEMENT]
    assert released(Stopper(TakesBack()), ["a", "▁", ",", "b"]) == ["a", " ", ",", "b", ""]


def test_pieces_come_as_soon_as_they_may():
    stopper = Stopper(ByteTokenizer(), ["STOP", "Tea"])
    assert [stopper.push(id)[0] for id in "a€STo".encode()] == ["a", "", "", "€", "", "", "STo"]
    assert [stopper.push(id) for id in b"xTe"] == [("x", None), ("", None), ("", None)]
    assert stopper.push(ord("a")) == ("", "stop_string")
    assert stopper.stopped_by == "Tea"
    assert stopper.finish() == ""
    with pytest.raises(ValueError, match="token 97 comes after the end"):
        stopper.push(97)


def test_the_stop_string_that_is_complete_first_ends_the_text():
    assert released(Stopper(Pieces(["abc"], True), ["abc", "b"]), [0]) == ["a", ""]
    assert released(Stopper(Pieces(["abc"], True), ["c", "abc"]), [0]) == ["", ""]


def test_a_stop_id_ends_the_text_and_is_no_part_of_it():
    stopper = Stopper(ByteTokenizer(), ["bc"], [98, 256])
    assert [stopper.push(97), stopper.push(256)] == [("a", None), ("", "stop_id")]
    assert stopper.stopped_by == 256
    stopper = Stopper(ByteTokenizer(), ["ax"], [98])
    assert [stopper.push(97), stopper.push(98)] == [("", None), ("a", "stop_id")]
    assert stopper.finish() == ""
    # What was to be a character and is not now ends a text too, and may be what it stops at.
    stopper = Stopper(ByteTokenizer(), [REPLACEMENT], [98])
    assert [stopper.push(0xE2), stopper.push(98)] == [("", None), ("", "stop_string")]
    assert stopper.stopped_by == REPLACEMENT


def test_what_is_held_back_comes_at_the_end():
    stopper = Stopper(ByteTokenizer(), ["abc"])
    assert [stopper.push(id)[0] for id in b"xab"] == ["x", "", ""]
    assert stopper.finish() == "ab"
    stopper = Stopper(ByteTokenizer())
    assert [stopper.push(id)[0] for id in (97, 0xE2, 0x82)] == ["a", "", ""]
    assert stopper.finish() == REPLACEMENT


def test_a_stop_string_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"stop=\['a', ''\] has an empty string"):
        Stopper(ByteTokenizer(), ["a", ""])
    with pytest.raises(ValueError, match="stop='abc' is one string; give a list"):
        Stopper(ByteTokenizer(), "abc")
