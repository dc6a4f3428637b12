"""Checkpoints written by transformers, and what it computes with them (see the reference cases' README, and make_cases.py)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import CLOSE, Case, apart, compiled
from lmx import interop
from lmx.infer.generate import generate
from lmx.interop.files import mapped

DECODERS = (
    *("gpt2", "gpt2_hub", "llama", "llama3", "llama_v4", "mistral", "mistral_bf16", "gemma", "gemma2", "glm", "mixtral", "opt", "bloom"),
    *("bloom_pow2", "rwkv"),
)
OWN = sorted(path.parent.name for path in (Path(__file__).parent.parent / "data_files" / "interop").glob("*/golden.safetensors"))
"""Cases that lie with the tests."""


@pytest.fixture(scope="module", params=(*DECODERS, *(f"own/{name}" for name in OWN)))
def case(request):
    name = request.param.removeprefix("own/")
    if name != request.param:
        return Case(Path(__file__).parent.parent / "data_files" / "interop" / name)
    return Case(request.getfixturevalue("shared") / "goldens" / name)


def test_logits_and_hidden_states(case):
    found, _ = case.outputs
    real = np.asarray(case.golden["input.attention_mask"]) == 1
    assert apart(found["logits"], case.golden["logits"], real) < CLOSE
    expected = [case.golden[f"hidden_states.{i}"] for i in range(case.model.config.layers + 1)]
    assert len(found["hidden_states"]) == len(expected)
    for a, b in zip(found["hidden_states"], expected, strict=True):
        assert apart(a, b, real) < CLOSE
    assert float(found["loss"]) == pytest.approx(float(case.golden["loss"]), rel=1e-5)


def test_gradients(case):
    found = interop.tensors(case.model, case.outputs[1])
    expected = {name.removeprefix("grad."): a for name, a in case.golden.items() if name.startswith("grad.")}
    largest = max(float(np.abs(a).max()) for a in expected.values())
    assert expected
    for name, exact in expected.items():
        own = next(n for n in found if n.removeprefix("transformer.") == name.removeprefix("transformer."))
        scale = max(float(np.abs(exact).max()), 1e-3 * largest)
        assert float(np.abs(found[own] - exact).max()) / scale < 1e-4, name


def test_saved_and_loaded_again(case, tmp_path):
    interop.save(case.model, case.params, tmp_path)
    model, params = interop.load(tmp_path)
    assert model.config == case.model.config
    jax.tree.map(np.testing.assert_array_equal, params, case.params)
    before, after = mapped(case.folder / "model.safetensors"), mapped(tmp_path / "model.safetensors")
    for name, tensor in after.items():
        own = next((n for n in before if n.removeprefix("transformer.") == name.removeprefix("transformer.")), None)
        assert own is not None
        assert before[own].dtype == tensor.dtype
        np.testing.assert_array_equal(before[own], tensor)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == case.model.family


def test_greedy_through_a_cache_in_a_batch_of_unequal_prompts(case):
    prompt = np.asarray(case.golden["input.prompt"])
    expected = np.asarray(case.golden["greedy"])[:, prompt.shape[1] :]
    alone = generate(case.model, case.params, prompt.tolist(), max_new_tokens=expected.shape[1], suppress_ids=(2,))
    assert alone == expected.tolist()
    if "batch.greedy" in case.golden:
        ids, mask = (np.asarray(case.golden[f"batch.{name}"]) for name in ("input_ids", "attention_mask"))
        prompts = [row[real == 1].tolist() for row, real in zip(ids, mask, strict=True)]
        expected = np.asarray(case.golden["batch.greedy"])[:, ids.shape[1] :]
        assert generate(case.model, case.params, prompts, max_new_tokens=expected.shape[1], suppress_ids=(2,)) == expected.tolist()


def test_logits_do_not_depend_on_where_the_padding_is(case):
    """Left, right, none: the same on real tokens."""
    ids = np.asarray(case.golden["input.input_ids"])[0, :7]
    padded = np.stack([np.pad(ids, (4, 0)), np.pad(ids, (0, 4))])
    real = np.stack([np.arange(11) >= 4, np.arange(11) < 7])
    run = jax.jit(lambda **inputs: interop.call(case.model, case.params, inputs)["logits"])
    (plain,) = run(input_ids=ids[None])
    for found, own in zip(run(input_ids=padded, attention_mask=real.astype(np.int32)), real, strict=True):
        assert apart(found[own], plain) < 5e-6


def test_greedy_by_a_full_forward(case):
    kind = "greedy_uncached" if "greedy_uncached" in case.golden else "greedy"
    ids, chosen = np.asarray(case.golden[kind]), np.asarray(case.golden[f"{kind}_logits"])
    prompt = case.golden["input.prompt"].shape[1]

    @compiled
    def logits(mask):
        return interop.call(case.model, case.params, {"input_ids": ids, "attention_mask": mask})["logits"]

    if kind == "greedy":
        found = logits(np.ones_like(ids))[:, prompt - 1 : -1]
    else:  # where frequencies depend on the length at hand, each text by itself
        place = np.arange(ids.shape[1])[None]
        found = jnp.stack([logits((place < end).astype(np.int32))[:, end - 1] for end in range(prompt, ids.shape[1])], 1)
    assert apart(found, chosen) < CLOSE
    np.testing.assert_array_equal(jnp.argmax(found.at[..., 2].set(-jnp.inf), -1), ids[:, prompt:])
