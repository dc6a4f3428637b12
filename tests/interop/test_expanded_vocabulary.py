"""A model and its tokenizer learn pieces of a new text together."""

import numpy as np
import pytest

from checkpoints import apart
from lmx import interop

NEW = ["walle walle manche Strecke, dass zum Zwecke Wasser fliesse und mit reichem vollem Schwalle zu dem Bade sich ergiesse "] * 4


@pytest.mark.parametrize(("family", "case"), [("llama", "byte_bpe"), ("gpt2", "sentencepiece_bpe"), ("gpt2", "sentencepiece_unigram")])
def test_new_rows_are_means_of_their_pieces(shared, tmp_path, family, case):
    """llama has a head of its own, gpt2 one tied to its table."""
    model, params = interop.load(shared / "goldens" / family)
    tokenizer = interop.load_tokenizer(shared / "goldens/tokenizers" / case)
    model, params = interop.resize_vocabulary(model, params, tokenizer.vocab, discard=True)
    grown_model, grown, expanded = interop.expand_vocabulary(model, params, tokenizer, NEW, pieces=12, pad_to_multiple_of=8)
    assert expanded.vocab == tokenizer.vocab + 12
    assert grown_model.config.vocab == -(-expanded.vocab // 8) * 8
    assert expanded.roles == tokenizer.roles
    before, after = tokenizer.encode(NEW[0], special=False), expanded.encode(NEW[0], special=False)
    assert len(after) < len(before)
    assert expanded.decode(after) == tokenizer.decode(before)
    _, parts = tokenizer.with_pieces(NEW, 12)
    tables = {"embed": (np.asarray(params["embed"]), np.asarray(grown["embed"]))}
    if "head" in params:
        tables["head"] = (np.asarray(params["head"]).T, np.asarray(grown["head"]).T)
    for old, new in tables.values():
        assert np.array_equal(new[: tokenizer.vocab], old)
        for id, ids in parts.items():
            assert np.allclose(new[id], old[list(ids)].mean(0), atol=1e-6)
        assert np.allclose(new[expanded.vocab :], old.mean(0), atol=1e-6)  # padding
    ids = np.array([before[:8]])
    logits = [interop.call(m, p, {"input_ids": ids})["logits"] for m, p in ((model, params), (grown_model, grown))]
    assert apart(logits[1][..., : tokenizer.vocab], logits[0]) < 1e-5
    expanded.save(tmp_path)
    assert interop.load_tokenizer(tmp_path).encode(NEW[0]) == expanded.encode(NEW[0])


def test_wrong_parts_are_refused(shared):
    model, params = interop.load(shared / "goldens/llama")
    with pytest.raises(ValueError, match=r"parts of row 160, \(3, 165\), are not rows of the 160 there are"):
        interop.resize_vocabulary(model, params, 168, parts={160: (3, 165)})


def test_tokens_behind_the_pieces_are_in_the_way(shared):
    tokenizer = interop.load_tokenizer(shared / "goldens/tokenizers/sentencepiece_bpe").with_tokens(["<|user|>"])
    with pytest.raises(ValueError, match=r"has tokens of its own behind its pieces \('<\|user\|>'\)"):
        tokenizer.with_pieces(NEW, 3)
