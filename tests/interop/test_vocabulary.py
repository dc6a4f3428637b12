"""A vocabulary grows as transformers grows it (`make_vocabularies.py`), and never shrinks unasked."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import apart, compiled
from lmx import interop
from lmx.core.tree import disagreement
from lmx.interop.files import mapped

HERE = Path(__file__).parent.parent / "data_files" / "interop"
GOLDEN = mapped(HERE / "vocabularies.safetensors")
CASES = sorted({name.split(".")[0] for name in GOLDEN})


@pytest.fixture
def loaded(shared):
    return lambda case: interop.load(HERE / case if (HERE / case).exists() else shared / "goldens" / case)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_transformers(loaded, tmp_path, case):
    before, params = loaded(case)
    model, grown = interop.resize_vocabulary(before, params, before.config.vocab + 3, pad_to_multiple_of=8)
    tokens = GOLDEN[f"{case}.input_ids"]
    assert model.config.vocab == GOLDEN[f"{case}.logits"].shape[-1]
    more = {"decoder_input_ids": tokens} if case in ("bart", "t5") else {}
    found = compiled(lambda params: interop.call(model, params, {"input_ids": tokens} | more)["logits"])(grown)
    assert apart(found, GOLDEN[f"{case}.logits"]) < 1e-4
    interop.save(model, grown, tmp_path)
    again, read = interop.load(tmp_path)
    assert again.config == model.config
    assert not max(disagreement(read, grown).values())
    small, back = interop.resize_vocabulary(model, grown, before.config.vocab, discard=True)
    assert small.config == before.config
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_zeros_are_rows_too_and_types_stay(loaded):
    model, params = loaded("llama")
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    _, grown = interop.resize_vocabulary(model, params, 164, mean=False)
    assert grown["embed"].dtype == grown["head"].dtype == jnp.bfloat16
    assert not grown["embed"][160:].any()
    assert not grown["head"][:, 160:].any()


def test_what_would_be_lost_is_refused(loaded):
    model, params = loaded("llama")
    with pytest.raises(ValueError, match="size=150 drops 10 of the vocabulary's 160 rows"):
        interop.resize_vocabulary(model, params, 150)
    with pytest.raises(ValueError, match="drops eos_token_id=2"):
        interop.resize_vocabulary(model, params, 2, discard=True)
    with pytest.raises(ValueError, match="at least 1"):
        interop.resize_vocabulary(model, params, 0)
    adapter = interop.load_adapter(HERE / "adapters" / "llama_patterns", model)
    with pytest.raises(ValueError, match="merge an adapter first"):
        interop.resize_vocabulary(model, interop.adapt(params, adapter), 168)


@pytest.mark.parametrize("case", ["gemma_table", "gemma_head", "gemma_saved"])
def test_untied_an_adapter_of_one_use_of_the_table_can_be_merged(loaded, tmp_path, case):
    model, params = loaded("gemma")
    adapted = interop.adapt(params, interop.load_adapter(HERE / "adapters" / case, model))
    with pytest.raises(ValueError, match="Untie them first"):
        interop.merge(adapted)
    untied, own = interop.untie(model, adapted)
    merged = interop.merge(own)
    inputs = {"input_ids": np.arange(3, 11)[None]}
    expected = interop.call(model, adapted, inputs)["logits"]
    assert apart(interop.call(untied, merged, inputs)["logits"], expected) < 2e-5
    interop.save(untied, merged, tmp_path)
    assert apart(interop.call(*interop.load(tmp_path), inputs)["logits"], expected) < 2e-5


def test_only_what_is_tied_is_untied(loaded):
    with pytest.raises(ValueError, match="has no head that is tied"):
        interop.untie(*loaded("llama"))
