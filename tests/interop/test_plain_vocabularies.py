"""Folders from before `tokenizer.json`: what is made of `vocab.txt`, or of `vocab.json` and `merges.txt`."""

import json

import pytest

from lmx import interop

TEXT = "Café I'LL we'Ve 1234 a\r\n\r\n  b e\u0301"
FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
SPECIAL = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
OPT = {"add_bos_token": True, "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
CLASSES = {"distilbert": "DistilBertTokenizer", "gpt2": "GPT2Tokenizer", "bart": "BartTokenizer", "qwen2": "Qwen2Tokenizer"}
QWEN = {"added_tokens_decoder": {"506": {"content": "<|im_start|>", **SPECIAL}}, "eos_token": "<|endoftext|>", "unk_token": None}
BODY = [35, 465, 477, 7, 44, 44, 433, 7, 54, 69, 450, 18, 19, 20, 257, 202, 199, 202, 199, 221, 293, 221, 69, 137, 224]
BODY_NFC = [35, 465, 477, 7, 44, 44, 433, 7, 54, 69, 221, 17, 18, 19, 20, 257, 202, 199, 202, 199, 221, 293, 221, 463]
HI = [302, 296, 259]
SEPARATED = [32, 91, 141, 81, 79, 3]
# The vocabulary, tokens added to it, what tokenizer_config.json says, and what transformers 5.24 makes of TEXT, and adds for "hi there" as the
# second text.
CASES = {
    "bert": ("wordpiece", (), {}, [2, 262, 33, 5, 163, 165, 5, 45, 79, 1, 25, 26, 29, 3], SEPARATED),
    "bert, cased": ("wordpiece", (), {"do_lower_case": False}, [2, 1, 1, 5, 1, 165, 5, 1, 1, 25, 26, 1, 3], SEPARATED),
    "distilbert, accents": ("wordpiece", (), {"strip_accents": False}, [2, 1, 33, 5, 163, 165, 5, 45, 79, 1, 25, 26, 1, 3], SEPARATED),
    "gpt2": ("byte_bpe", (), {}, BODY, HI),
    "gpt2 for opt": ("byte_bpe", ("</s>",), OPT, [506, *BODY], [506, *HI]),
    "roberta": ("byte_bpe", FAIRSEQ, {}, [506, *BODY, 508], [508, *HI, 508]),
    "bart, spaced": ("byte_bpe", FAIRSEQ, {"add_prefix_space": True}, [506, 221, *BODY, 508], [508, 221, *HI, 508]),
    "qwen2": ("byte_bpe", (), QWEN, BODY_NFC, HI),
}


@pytest.fixture
def plain(shared, tmp_path):
    """A folder with the plain files of a recorded vocabulary."""

    def make(name: str, tokens: tuple[str, ...] = (), **files):
        model = json.loads((shared / f"goldens/tokenizers/{name}/tokenizer.json").read_text())["model"]
        ids = dict(model["vocab"])
        for token in tokens:
            ids.setdefault(token, len(ids))
        if name == "wordpiece":
            (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in sorted(ids, key=ids.get)))
        else:
            pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
            (tmp_path / "merges.txt").write_text("\n".join(("#version: 0.2", *pairs, "")))
            (tmp_path / "vocab.json").write_text(json.dumps(ids))
        for file, value in files.items():
            (tmp_path / f"{file}.json").write_text(json.dumps(value))
        return tmp_path

    return make


@pytest.mark.parametrize("case", CASES)
def test_plain_files_are_read_as_transformers_reads_them(plain, case, tmp_path):
    name, tokens, config, ids, more = CASES[case]
    family = case.split(",")[0].split()[0]
    said = {} if family in ("bert", "roberta") else {"tokenizer_class": CLASSES[family]}  # else model_type says it
    tokenizer = interop.load_tokenizer(plain(name, tokens, config={"model_type": family}, tokenizer_config=config | said))
    assert tokenizer.encode(TEXT) == ids
    assert tokenizer.encode_pair(TEXT, "hi there")[0] == ids + more
    tokenizer.save(tmp_path / "saved")
    again = interop.load_tokenizer(tmp_path / "saved")
    assert again.encode(TEXT) == ids
    assert (again.roles, again.vocab) == (tokenizer.roles, tokenizer.vocab)


@pytest.mark.parametrize("name", ["wordpiece", "byte_bpe"])
def test_they_hold_what_the_tokenizer_json_holds(shared, plain, name):
    recorded = json.loads((shared / f"goldens/tokenizers/{name}/golden.json").read_text())
    tokenizer = interop.load_tokenizer(plain(name, config={"model_type": {"wordpiece": "bert", "byte_bpe": "gpt2"}[name]}))
    assert len(recorded) > 30
    for entry in recorded:
        assert tokenizer.encode(entry["text"]) == entry["ids"], entry["text"]


def test_a_mask_takes_the_space_before_it_along(plain):
    tokenizer = interop.load_tokenizer(plain("byte_bpe", FAIRSEQ, config={"model_type": "roberta"}))
    assert tokenizer.encode("a <mask>", special=False) == [*tokenizer.encode("a", special=False), tokenizer.mask_id]


def test_what_is_not_known_or_lacks_a_token_is_refused(plain):
    with pytest.raises(ValueError, match=r"what tokenizer class 'CodeGenTokenizer' does with vocab.json and merges.txt is not known"):
        interop.load_tokenizer(plain("byte_bpe", tokenizer_config={"tokenizer_class": "CodeGenTokenizer"}))
    with pytest.raises(ValueError, match="its sep token, which stands around texts, is '</s>', which is not in it"):
        interop.load_tokenizer(plain("byte_bpe", tokenizer_config={"tokenizer_class": "RobertaTokenizer"}))
