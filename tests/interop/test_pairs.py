"""Encoder-decoders written by transformers, and what it computes with them (see the reference cases' README)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import CLOSE, Case, apart
from lmx import interop
from lmx.infer import generate
from lmx.infer.weights import decoding_params
from lmx.interop import pairs
from lmx.interop.checkpoint import Model, Names
from lmx.interop.families.t5 import FEED, T5
from lmx.interop.files import mapped, write_tensors
from lmx.models.losses import logits
from lmx.models.transformer import Source, empty_cache, forward

PAIRS = ("t5", "t5_unscaled", "t5_untied", "bart")


@pytest.fixture(scope="module", params=PAIRS)
def case(request, shared):
    return Case(shared / "goldens" / request.param)


def test_outputs(case):
    found, _ = case.outputs
    config, golden = case.model.config, case.golden
    source = np.asarray(golden["input.attention_mask"]) == 1
    target = np.asarray(golden["input.labels"]) != -100
    assert apart(found["logits"], golden["logits"], target) < CLOSE
    assert apart(found["encoder_last_hidden_state"], golden["encoder_last_hidden_state"], source) < CLOSE
    for side, layers, real in (("encoder", config.encoder.layers, source), ("decoder", config.layers, target)):
        states = found[f"{side}_hidden_states"]
        assert len(states) == layers + 1
        for i, state in enumerate(states):
            assert apart(state, golden[f"{side}_hidden_states.{i}"], real) < CLOSE
    assert float(found["loss"]) == pytest.approx(float(golden["loss"]), rel=1e-5)


def test_decoder_inputs_are_the_labels_shifted(case):
    np.testing.assert_array_equal(pairs.shifted(case.model, jnp.asarray(case.golden["input.labels"])), case.golden["decoder_input_ids"])


def test_gradients(case):
    found = interop.tensors(case.model, case.outputs[1])
    expected = {name.removeprefix("grad."): a for name, a in case.golden.items() if name.startswith("grad.")}
    largest = max(float(np.abs(a).max()) for a in expected.values())
    assert expected
    for name, exact in expected.items():
        scale = max(float(np.abs(exact).max()), 1e-3 * largest)
        assert float(np.abs(found[name] - exact).max()) / scale < 1e-4, name


def test_saved_and_loaded_again(case, tmp_path):
    interop.save(case.model, case.params, tmp_path)
    model, params = interop.load(tmp_path)
    assert model.config == case.model.config
    jax.tree.map(np.testing.assert_array_equal, params, case.params)
    before, after = mapped(case.folder / "model.safetensors"), mapped(tmp_path / "model.safetensors")
    for name, tensor in after.items():
        assert before[name].shape == tensor.shape, name
        np.testing.assert_array_equal(before[name], tensor)
    assert not [name for name in set(before) - set(after) if "embed_tokens" not in name and "EncDecAttention.relative" not in name]
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == case.model.family


def test_greedy_by_a_full_forward(case):
    golden = case.golden
    given = {"input_ids": golden["input.prompt"], "decoder_input_ids": golden["greedy"][:, :-1]}
    found = interop.call(case.model, case.params, given)["logits"]
    assert apart(found, golden["greedy_logits"]) < CLOSE
    np.testing.assert_array_equal(jnp.argmax(found.at[..., 2].set(-jnp.inf), -1), golden["greedy"][:, 1:])


def test_greedy_of_a_batch_of_unequal_prompts(case):
    golden = case.golden
    given = {"input_ids": golden["batch.input_ids"], "attention_mask": golden["batch.attention_mask"]}
    given |= {"decoder_input_ids": golden["batch.greedy"][:, :-1]}
    found = interop.call(case.model, case.params, given)["logits"]
    assert apart(found, golden["batch.greedy_logits"]) < CLOSE


def test_greedy_token_by_token(case):
    config, golden = case.model.config, case.golden
    params = decoding_params(case.params)
    ids, mask, chosen = (jnp.asarray(golden[f"batch.{name}"]) for name in ("input_ids", "attention_mask", "greedy"))
    source = Source(ids, jnp.maximum(jnp.cumsum(mask, -1) - 1, 0), mask)

    @jax.jit
    def step(params, token, cache, source):
        output = forward(params, config, token, cache=cache, source=source)
        return logits(params, config, output.hidden)[:, 0], output.cache

    cache, found = empty_cache(config, len(ids), 20), []
    for i in range(chosen.shape[1] - 1):
        rows, cache = step(params, chosen[:, i : i + 1], cache, source if i == 0 else None)
        found.append(rows)
    assert apart(jnp.stack(found, 1), golden["batch.greedy_logits"]) < CLOSE


def test_generate_is_the_full_forward_over_and_over(case):
    golden, new = case.golden, 5
    start = int(golden["decoder_input_ids"][0, 0])
    prompts = [row[mask == 1].tolist() for row, mask in zip(golden["batch.input_ids"], golden["batch.attention_mask"], strict=True)]
    found = generate(case.model.config, case.params, prompts, max_new_tokens=new, start_id=start)
    text = np.full((len(prompts), 1), start)
    for _ in range(new):
        given = {"input_ids": golden["batch.input_ids"], "attention_mask": golden["batch.attention_mask"], "decoder_input_ids": text}
        text = np.concatenate([text, np.argmax(interop.call(case.model, case.params, given)["logits"][:, -1:], -1)], 1)
    assert found == text[:, 1:].tolist()
    with pytest.raises(ValueError, match="start_id=None of model=EncoderDecoder"):
        generate(case.model.config, case.params, prompts, max_new_tokens=new)


def test_a_copy_of_the_embedding_that_differs_is_refused(shared, tmp_path):
    tensors = dict(mapped(shared / "goldens" / "t5_untied" / "model.safetensors"))
    tensors["encoder.embed_tokens.weight"] = tensors["encoder.embed_tokens.weight"] + 1
    write_tensors(tmp_path, {name: (a.shape, a.dtype, lambda a=a: a) for name, a in tensors.items()})
    (tmp_path / "config.json").write_text((shared / "goldens" / "t5_untied" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"encoder.embed_tokens.weight, which should repeat shared.weight and differs"):
        interop.load(tmp_path)


def test_a_head_that_differs_from_the_embedding_is_no_tied_one(shared, tmp_path):
    case = Case(shared / "goldens" / "t5_untied")
    tensors = {name: a for name, a in mapped(case.folder / "model.safetensors").items() if "embed_tokens" not in name}
    write_tensors(tmp_path, {name: (a.shape, a.dtype, lambda a=a: a) for name, a in tensors.items()})
    config = json.loads((case.folder / "config.json").read_text()) | {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    (tmp_path / "config.json").write_text(json.dumps(config))  # as transformers 5 writes one that it has read
    model, params = interop.load(tmp_path)
    assert model.config == case.model.config
    jax.tree.map(np.testing.assert_array_equal, params, case.params)


def test_an_old_file_of_a_bare_bart(shared, tmp_path):
    case = Case(shared / "goldens" / "bart")
    tensors = {n.removeprefix("model."): a for n, a in mapped(case.folder / "model.safetensors").items() if n != "final_logits_bias"}
    tensors |= {f"{side}.embed_tokens.weight": tensors["shared.weight"] for side in ("encoder", "decoder")}
    write_tensors(tmp_path, {name: (a.shape, a.dtype, lambda a=a: a) for name, a in tensors.items()})
    config = json.loads((case.folder / "config.json").read_text())
    old = {"normalize_before": False, "add_final_layer_norm": False, "normalize_embedding": True, "extra_pos_embeddings": 2}
    left_out = ("tie_word_embeddings", "decoder_start_token_id", "scale_embedding")
    config = {name: value for name, value in (config | old).items() if name not in left_out}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, params = interop.load(tmp_path)
    assert model.config == case.model.config
    assert not params["head_bias"].any()
    expected = case.params | {"head_bias": params["head_bias"]}
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def config_of(**changes) -> dict:
    return {"model_type": "t5", "vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 3, "num_heads": 2} | changes


@pytest.mark.parametrize("said", [*FEED])
def test_every_feed_forward_of_t5_is_written_as_it_is_read(said):
    config = T5.read(config_of(feed_forward_proj=said, num_decoder_layers=1, tie_word_embeddings=False))
    assert (config.encoder.gated, config.encoder.layers, config.layers) == (said.startswith("gated-"), 3, 1)
    assert T5.write(config)["feed_forward_proj"] == said
    assert {name.rsplit("/", 1)[1] for name in Names(Model(config, "t5")).specs if "feedforward/" in name} == {"weight"}
    assert ("decoder.block.0.layer.2.DenseReluDense.wi_0.weight" in set(Names(Model(config, "t5")).all())) == said.startswith("gated-")


@pytest.mark.parametrize(
    ("tied", "scaled", "scale"), [(None, None, 0.25), (True, None, 0.25), (False, None, None), (True, False, None), (True, True, 0.25)]
)
def test_logits_of_t5_are_scaled_as_its_config_says(tied, scaled, scale):
    changes = {"tie_word_embeddings": tied, "scale_decoder_outputs": scaled}
    config = T5.read(config_of(**{name: value for name, value in changes.items() if value is not None}))
    assert (config.tied, config.logit_scale) == (tied is not False, scale)
    assert T5.read(T5.write(config)) == config


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"feed_forward_proj": "gated-tanh"}, "feed_forward_proj='gated-tanh'"), ({"is_encoder_decoder": False}, "is_encoder_decoder=False")],
)
def test_what_t5_has_not_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        T5.read(config_of(**changes))
