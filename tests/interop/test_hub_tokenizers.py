import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx import interop

DATA = Path(__file__).parents[1] / "data_files"
# What transformers' AutoTokenizer made of the checkpoints beside it (small SentencePiece models and what a hub repository has with them).
RECORDED = json.loads((DATA / "tokenizers/expected.json").read_text())
CHATS = json.loads((DATA / "chat_templates/expected.json").read_text())["chats"]
CONVERSATIONS = json.loads((DATA / "chat_templates/conversations.json").read_text())
NOW = datetime(2025, 2, 3, 4, 5, 6)
USER = [{"role": "user", "content": "hello"}]
MARKED = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}"
FLAGS = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
T5 = DATA / "tokenizers/t5"


@pytest.fixture
def made(tmp_path):
    """A checkpoint: the vocabulary of one of those recorded, or a `tokenizer.json`, and files of one's own."""

    def make(vocabulary: Path, **files):
        folder = tmp_path / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path in [vocabulary] if vocabulary.is_file() else [p for p in vocabulary.iterdir() if p.suffix == ".model"]:
            (folder / path.name).write_bytes(path.read_bytes())
        for name, value in files.items():
            name = name.replace("__", ".")
            (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
        return folder

    return make


@pytest.fixture
def byte_bpe(shared):
    return shared / "goldens/tokenizers/byte_bpe/tokenizer.json"


@pytest.mark.parametrize("case", ["sentencepiece_bpe", "sentencepiece_unigram", "byte_bpe", "wordpiece"])
def test_bare_vocabularies_agree_with_recorded_results(shared, case):
    folder = shared / "goldens/tokenizers" / case
    tokenizer = interop.load_tokenizer(folder)
    recorded = json.loads((folder / "golden.json").read_text())
    assert len(recorded) > 30
    for entry in recorded:
        assert tokenizer.encode(entry["text"]) == entry["ids"], entry["text"]
        assert tokenizer.decode(entry["ids"]) == entry["decoded"], entry["text"]
        assert [tokenizer.token(id) for id in entry["ids"]] == entry["tokens"]


@pytest.mark.parametrize("name", sorted(RECORDED["checkpoints"]))
def test_sentencepiece_checkpoints_agree_with_transformers(name):
    tokenizer, recorded = interop.load_tokenizer(DATA / "tokenizers" / name), RECORDED["checkpoints"][name]
    assert tokenizer.vocab == recorded["len"]
    assert {role: getattr(tokenizer, f"{role}_id") for role in recorded["roles"]} == recorded["roles"]
    for i, text in enumerate(RECORDED["texts"]):
        ids = tokenizer.encode(text)
        assert ids == recorded["enc"][i], text
        assert tokenizer.encode(text, special=False) == recorded["plain"][i], text
        assert list(map(list, tokenizer.encode_pair(text, "hello there"))) == recorded["pair"][i], text
        assert tokenizer.decode(ids, skip_special=False) == recorded["dec"][i], text
        assert tokenizer.decode(ids) == recorded["skip"][i], text
    assert len(RECORDED["texts"]) > 30


def test_t5_sentinels_come_after_the_pieces_in_reverse():
    tokenizer = interop.load_tokenizer(T5)
    assert [tokenizer.id(f"<extra_id_{i}>") for i in (0, 1, 99)] == [259, 258, 160]
    assert tokenizer.encode("<extra_id_0>", special=False) == [259]
    assert tokenizer.stop_ids == (tokenizer.eos_id,) == (1,)
    assert tokenizer.bos_id is None


def test_a_t5_is_known_by_its_model_type(made):
    folder = made(T5, config__json={"model_type": "t5", "eos_token_id": 1})
    assert interop.load_tokenizer(folder).encode("the fox<extra_id_3>") == interop.load_tokenizer(T5).encode("the fox<extra_id_3>")
    few = interop.load_tokenizer(made(T5, tokenizer_config__json={"tokenizer_class": "T5Tokenizer", "extra_ids": 3}))
    assert (few.vocab, few.id("<extra_id_2>"), few.id("<extra_id_3>")) == (163, 160, None)


def test_pairs_of_a_bert(shared, made):
    wordpiece = shared / "goldens/tokenizers/wordpiece/tokenizer.json"
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("cls", "sep", "unk", "pad", "mask")}
    bert = interop.load_tokenizer(made(wordpiece, tokenizer_config__json={"tokenizer_class": "BertTokenizer", **roles}))
    ids, types = bert.encode_pair("hello", "new world")
    first, second = bert.encode("hello", special=False), bert.encode("new world", special=False)
    assert ids == [bert.cls_id, *first, bert.sep_id, *second, bert.sep_id]
    assert types == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    plain, plain_types = bert.encode_pair("hello", "new world", special=False)
    assert (plain, plain_types) == (first + second, [0] * len(first) + [1] * len(second))
    assert (bert.bos_id, bert.eos_id, bert.stop_ids) == (None, None, ())


def test_cleaning_up_is_for_vocabularies_with_spaces_before_punctuation(byte_bpe, made):
    said = {"clean_up_tokenization_spaces": True}
    bpe = interop.load_tokenizer(made(byte_bpe, tokenizer_config__json=said))
    assert bpe.decode(bpe.encode("it is . really")) == "it is . really"
    t5 = interop.load_tokenizer(made(T5, tokenizer_config__json={"tokenizer_class": "T5Tokenizer", **said}))
    assert t5.decode(t5.encode("it is . really")) == "it is. really"


def test_stop_ids(byte_bpe, made):
    config = {"eos_token": "<|endoftext|>"}
    load = interop.load_tokenizer
    assert load(made(byte_bpe, tokenizer_config__json=config)).stop_ids == (0,)
    assert load(made(byte_bpe, tokenizer_config__json=config, config__json={"eos_token_id": 7})).stop_ids == (7,)
    assert load(made(byte_bpe, config__json={"eos_token_id": 7}, generation_config__json={"eos_token_id": [3, 0]})).stop_ids == (3, 0)
    with pytest.raises(ValueError, match=r"eos_token_id=\['x'\].*token id"):
        load(made(byte_bpe, generation_config__json={"eos_token_id": "x"}))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tokenizer_config__json": {"tokenizer_class": "CamembertTokenizer"}}, "'CamembertTokenizer' is not known.*save_pretrained"),
        ({"tokenizer_config__json": "{"}, "is not JSON"),
        ({"tokenizer_config__json": "[]"}, "expected a JSON object"),
        ({"tokenizer_config__json": {"pad_token": "<gone>"}}, "pad_token is '<gone>', which its vocabulary has not"),
        ({"tokenizer_config__json": {"pad_token": 3}}, "pad_token is 3; expected a token"),
        ({"tokenizer_config__json": {"additional_special_tokens": ["<gone>"]}}, "a special token is '<gone>'"),
        (
            {"tokenizer_config__json": {"eos_token": "</s>"}, "special_tokens_map__json": {"eos_token": "<pad>"}},
            "'</s>' in .* but '<pad>' in",
        ),
        ({"added_tokens__json": {"<a>": 400}}, r"leave ids \[160"),
        ({"added_tokens__json": {"<a>": 5}}, "'<a>' is 5, but the vocabulary has"),
        ({"added_tokens__json": {"<a>": 160, "<b>": 160}}, "'<b>' is token 160, another entry"),
        ({"added_tokens__json": {"<a>": "x"}}, "the id 'x'; expected a number"),
        (
            {"added_tokens__json": {"<a>": 160}, "tokenizer_config__json": {"added_tokens_decoder": {"161": {"content": "<a>"}}}},
            "another entry",
        ),
        ({"tokenizer_config__json": {"tokenizer_class": "T5Tokenizer", "add_bos_token": True}}, "contradict T5Tokenizer's frame"),
        ({"tokenizer_config__json": {"tokenizer_class": "T5Tokenizer", "extra_ids": -1}}, "extra_ids=-1"),
        (
            {"tokenizer_config__json": {"tokenizer_class": "T5Tokenizer"}, "added_tokens__json": {"<extra_id_0>": 160}},
            "'<extra_id_0>' is 160",
        ),
        ({"tokenizer_config__json": {"tokenizer_class": "AlbertTokenizer"}}, "puts a cls token"),
        ({"tokenizer_config__json": {"add_bos_token": True}}, "puts a bos token"),
        ({"tokenizer_config__json": {"chat_template": 3}}, "chat_template must be"),
        ({"tokenizer_config__json": {"chat_template": [{"name": "a"}]}}, "chat_template is a list"),
        ({"tokenizer_config__json": {"chat_template": "a"}, "chat_template__jinja": "b"}, "different chat templates 'default'"),
        ({"tokenizer__json": "{}"}, "is not a tokenizer.json"),
        ({"tokenizer__model": "x"}, "exactly one vocabulary"),
    ],
)
def test_unknown_and_contradictory_files_are_refused(made, files, said):
    with pytest.raises(ValueError, match=said):
        interop.load_tokenizer(made(T5, **files))


def test_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected exactly one vocabulary"):
        interop.load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        interop.load_tokenizer(tmp_path / "absent")
    (tmp_path / "spiece.model").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        interop.load_tokenizer(tmp_path)


def test_a_tokenizer_json_and_the_files_beside_it(byte_bpe, made):
    decoder = {
        "0": {"content": "<|endoftext|>", **FLAGS},
        "506": {"content": "<|im_end|>", **FLAGS},
        "507": {"content": "<x>", **FLAGS, "special": False},
    }
    tokenizer = interop.load_tokenizer(made(byte_bpe, tokenizer_config__json={"added_tokens_decoder": decoder, "eos_token": "<|im_end|>"}))
    assert (tokenizer.vocab, tokenizer.eos_id, tokenizer.bos_id) == (508, 506, None)
    ids = tokenizer.encode("a<|im_end|>b<x>")
    assert ids == [65, 506, 66, 507]
    assert (tokenizer.decode(ids), tokenizer.decode(ids, skip_special=False)) == ("ab<x>", "a<|im_end|>b<x>")
    with pytest.raises(ValueError, match="'<z>' is 600, but"):
        interop.load_tokenizer(made(byte_bpe, added_tokens__json={"<z>": 600}))
    with pytest.raises(ValueError, match="add_bos_token=True, but the post-processor"):
        interop.load_tokenizer(made(byte_bpe, tokenizer_config__json={"bos_token": "<|endoftext|>", "add_bos_token": True}))


@pytest.mark.parametrize("name", [*sorted(RECORDED["checkpoints"]), "byte_bpe"])
def test_growing_and_saving(request, made, tmp_path, name):
    folder = made(request.getfixturevalue("byte_bpe"), chat_template__jinja=MARKED) if name == "byte_bpe" else DATA / "tokenizers" / name
    before = interop.load_tokenizer(folder)
    grown = before.with_tokens(["<|new|>", "<two>"], pad="<two>")
    assert (grown.vocab, grown.pad_id, before.id("<two>")) == (before.vocab + 2, before.vocab + 1, None)
    assert grown.decode([grown.vocab - 2]) == ""
    grown.save(tmp_path / "saved")
    again = interop.load_tokenizer(tmp_path / "saved")
    assert (again.vocab, again.roles, again.templates, again.stop_ids) == (grown.vocab, grown.roles, grown.templates, grown.stop_ids)
    for text in [*RECORDED["texts"], "a <|new|>b<two> hello"]:
        ids = grown.encode(text)
        assert again.encode(text) == ids
        assert again.decode(ids, skip_special=False) == grown.decode(ids, skip_special=False)
    assert grown.vocab - 2 in ids
    assert grown.vocab - 1 in ids
    again.save(tmp_path / "saved")  # over itself
    assert interop.load_tokenizer(tmp_path / "saved").vocab == grown.vocab


def test_growing_refuses_what_is_there(byte_bpe, made):
    tokenizer = interop.load_tokenizer(made(byte_bpe))
    for tokens, said in ((["<|endoftext|>"], "already"), (["<a>", "<a>"], "named twice"), ("<a>", "list of texts"), ([""], "not empty")):
        with pytest.raises(ValueError, match=said):
            tokenizer.with_tokens(tokens)
    with pytest.raises(ValueError, match="begin='<a>': roles are bos"):
        tokenizer.with_tokens(["<a>"], begin="<a>")
    with pytest.raises(ValueError, match=r"token id 506 is outside the vocabulary 0..505"):
        tokenizer.decode([506])


def test_chats_of_a_checkpoint(byte_bpe, made):
    """Text, ids and the assistant's tokens, as transformers has them; `<s>` and `</s>` are added to the vocabulary there."""
    source = (DATA / "chat_templates/generation.jinja").read_text()
    files = {"added_tokens__json": {"<s>": 506, "</s>": 507}, "special_tokens_map__json": {"bos_token": "<s>", "eos_token": "</s>"}}
    tokenizer = interop.load_tokenizer(made(byte_bpe, chat_template__jinja=source, **files))
    compared = 0
    for name, case in CONVERSATIONS.items():
        expected = CHATS[f"generation/{name}"]
        assert tokenizer.chat(case["messages"], now=NOW, **case["how"]) == expected["text"]
        assert tokenizer.chat_ids(case["messages"], now=NOW, **case["how"]) == expected["ids"]
        assert tokenizer.chat_spans(case["messages"], now=NOW, **case["how"]) == (expected["ids"], expected["mask"])
        compared += sum(expected["mask"])
    assert compared > 100


@pytest.mark.parametrize("name", ["llama", "t5", "gemma"])
def test_the_assistants_tokens_of_a_sentencepiece_model(made, name):
    tokenizer = interop.load_tokenizer(DATA / "tokenizers" / name)
    folder = made(DATA / "tokenizers" / name, chat_template__jinja="{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
        tokenizer_config__json=dict(tokenizer.config))  # fmt: skip
    tokenizer = interop.load_tokenizer(folder)
    messages = [*USER, {"role": "assistant", "content": "the 🙂  quick fox é"}, *USER]
    ids, mask = tokenizer.chat_spans(messages)
    assert ids == tokenizer.chat_ids(messages) == tokenizer.encode(tokenizer.chat(messages), special=False)
    written = tokenizer.decode([id for id, one in zip(ids, mask, strict=True) if one], skip_special=False)
    others = tokenizer.decode([id for id, one in zip(ids, mask, strict=True) if not one], skip_special=False)
    assert "quick fox" in written
    assert "quick" not in others
    assert "user" not in written
    assert mask == sorted(mask[: mask.index(1)]) + [1] * sum(mask) + [0] * (len(mask) - mask.index(1) - sum(mask))


def test_templates_by_name(byte_bpe, made, tmp_path):
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "with {{ tools | length }}"},
        {"name": "rag", "template": "rag"},
    ]
    tokenizer = interop.load_tokenizer(made(byte_bpe, tokenizer_config__json={"chat_template": named}))
    assert tokenizer.chat(USER) == "plain"
    assert tokenizer.chat(USER, tools=[{"type": "function"}]) == "with 1"
    assert tokenizer.chat(USER, template="rag") == "rag"
    assert tokenizer.chat(USER, template="{{ messages[0].content }} {{ colour }}", colour="red") == "hello red"
    tokenizer.save(tmp_path / "saved")
    assert interop.load_tokenizer(tmp_path / "saved").templates == tokenizer.templates
    tokenizer.with_tokens([]).save(tmp_path / "saved")
    bare = interop.load_tokenizer(made(byte_bpe))
    bare.save(tmp_path / "saved")
    assert interop.load_tokenizer(tmp_path / "saved").templates == {}
    with pytest.raises(ValueError, match="has no chat template"):
        bare.chat(USER)
    without = interop.load_tokenizer(made(byte_bpe, tokenizer_config__json={"chat_template": named[1:]}))
    with pytest.raises(ValueError, match=r"only templates named \['rag', 'tool_use'\]"):
        without.chat(USER)


LLAMA = interop.load_tokenizer(DATA / "tokenizers/llama")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.text(), st.sampled_from([" ", "  ", "\n", "<s>", "</s>", "<|im_start|>", "<pad>", "the", "▁"]))).map("".join))
def test_any_text_comes_back_from_a_model_with_bytes(text):
    """What the model keeps (it reads U+2581 as a space) comes back, special tokens included; ids are those of its parts."""
    ids = LLAMA.encode(text, special=False)
    assert LLAMA.decode(ids, skip_special=False) == text.replace("▁", " ")
    spans = LLAMA.vocabulary.spans(text)
    assert spans[0] == ids
    assert all(0 <= start <= end <= len(text) for start, end in spans[1])
    assert [start for start, _ in spans[1]] == sorted(start for start, _ in spans[1])
