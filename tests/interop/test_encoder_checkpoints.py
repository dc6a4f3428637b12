"""Encoders written by transformers, and what it computes with them: the shared reference cases, and tiny ones beside this file.

`encoders/*` are of transformers 5.24.0: random weights of standard deviation 0.4, width 8, in the form of the shared cases.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from checkpoints import Case, apart
from lmx import interop
from lmx.interop.files import mapped, write_tensors
from lmx.parallel.layout import Layout, make_mesh

pytestmark = pytest.mark.usefixtures("optimised")

HERE = Path(__file__).parent / "encoders"
SHARED = ("bert", "bert_hub", "bert_pooled", "bert_classifier", "distilbert", "albert")
OLD = {"gamma": "weight", "beta": "bias"}


def now(name: str) -> str:
    """A tensor's name without what old files have otherwise."""
    *lead, last = name.removeprefix("bert.").split(".")
    return ".".join([*lead, OLD.get(last, last)])


@pytest.fixture(scope="module", params=[*SHARED, *sorted(path.name for path in HERE.iterdir())])
def case(request):
    if (HERE / request.param).exists():
        return Case(HERE / request.param)
    return Case(request.getfixturevalue("shared") / "goldens" / request.param)


def test_outputs_and_loss(case):
    found = jax.jit(lambda params, inputs: interop.call(case.model, params, inputs))(case.params, case.inputs)
    real = np.asarray(case.inputs["attention_mask"]) == 1
    expected = {name: a for name, a in case.golden.items() if not name.startswith(("input.", "grad."))}
    assert len(found["hidden_states"]) == case.model.config.layers + 1 == sum(name.startswith("hidden") for name in expected)
    for name, exact in expected.items():
        a = found["hidden_states"][int(name.removeprefix("hidden_states."))] if name.startswith("hidden") else found[name]
        a, exact = (np.asarray(b)[real] if np.shape(exact)[:2] == real.shape else b for b in (a, exact))
        assert apart(a, exact) < 2e-5, name


def test_gradients(case):
    expected = {name.removeprefix("grad."): a for name, a in case.golden.items() if name.startswith("grad.")}
    if not expected:
        pytest.skip("the case has no loss")

    def loss(params):
        return interop.call(case.model, params, case.inputs)["loss"]

    found = interop.tensors(case.model, jax.jit(jax.grad(loss))(case.params))
    largest = max(float(np.abs(a).max()) for a in expected.values())
    for name, exact in expected.items():
        scale = max(float(np.abs(exact).max()), 1e-3 * largest)  # that of a key bias is zero but for rounding
        assert float(np.abs(found[name] - exact).max()) / scale < 1e-4, name


def test_saved_and_loaded_again(case, tmp_path):
    interop.save(case.model, case.params, tmp_path)
    model, params = interop.load(tmp_path)
    assert model.config == case.model.config
    jax.tree.map(np.testing.assert_array_equal, params, case.params)
    before, after = ({now(name): a for name, a in mapped(f / "model.safetensors").items()} for f in (case.folder, tmp_path))
    left_over = {name for name in before if "position_ids" in name or "seq_relationship" in name}
    left_over |= {"pooler.dense.weight", "pooler.dense.bias"} if case.folder.name == "bert_hub" else set()
    left_over |= {"cls.predictions.bias"} if case.folder.name == "bert_untied" else set()
    assert set(after) == set(before) - left_over
    for name, tensor in after.items():
        np.testing.assert_array_equal(before[name], tensor)
    said, written = (json.loads((f / "config.json").read_text()) for f in (case.folder, tmp_path))
    assert {name: written[name] for name in ("model_type", "architectures")} == {n: said[n] for n in ("model_type", "architectures")}


def rewritten(folder: Path, target: Path, *, tensors=None, **changes) -> Path:
    """A case with other tensors, and other fields in its config.json (None: without)."""
    config = json.loads((folder / "config.json").read_text()) | changes
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    tensors = dict(mapped(folder / "model.safetensors")) if tensors is None else tensors
    write_tensors(target, {name: (a.shape, a.dtype, lambda a=a: a) for name, a in tensors.items()})
    return target


def test_published_files_of_every_age(tmp_path):
    folder = HERE / "electra_masked"
    here = dict(mapped(folder / "model.safetensors"))
    old = {name.removeprefix("electra."): a for name, a in here.items()}
    old = {(n.replace(".weight", ".gamma").replace(".bias", ".beta") if "LayerNorm" in n else n): a for n, a in old.items()}
    old |= {"embeddings.position_ids": np.arange(12)[None], "generator_lm_head.weight": here["electra.embeddings.word_embeddings.weight"]}
    _, exact = interop.load(folder)
    _, found = interop.load(rewritten(folder, tmp_path, tensors=old, tie_word_embeddings=None, transformers_version="2.8.0"))
    jax.tree.map(np.testing.assert_array_equal, found, exact)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("bert_tokens", {"architectures": ["BertForNextSentencePrediction"]}, ("architectures", "BertForNextSentence", "BertForMaskedLM")),
        ("bert_tokens", {"position_embedding_type": "relative_key"}, ("position_embedding_type", "relative_key", "absolute")),
        ("bert_tokens", {"is_decoder": True}, ("is_decoder", "True")),
        ("bert_tokens", {"num_labels": 4}, ("num_labels", "4", "5")),
        ("bert_tokens", {"hidden_act": "mish"}, ("hidden_act", "mish")),
        ("albert_regression", {"num_hidden_groups": 2}, ("num_hidden_groups", "2")),
        ("distilbert_spans", {"num_labels": 3}, ("num_labels", "3")),
        ("electra_masked", {"architectures": ["ElectraForPreTraining"]}, ("lacks", "discriminator_predictions")),
    ],
)
def test_what_lmx_has_not_is_refused_by_name(name, changes, words, tmp_path):
    with pytest.raises(ValueError, match=words[0]) as error:
        interop.load(rewritten(HERE / name, tmp_path, **changes))
    assert all(word in str(error.value) for word in words)


def test_inputs_that_a_model_does_not_take_are_refused():
    ids = np.ones((1, 3), np.int32)
    model, params = interop.load(HERE / "distilbert_spans")
    with pytest.raises(ValueError, match=r"takes input_ids.*not token_type_ids"):
        interop.call(model, params, {"input_ids": ids, "token_type_ids": ids})
    with pytest.raises(ValueError, match="DistilBertForQuestionAnswering has no loss of labels"):
        interop.call(model, params, {"input_ids": ids, "labels": ids})
    model, params = interop.load(HERE / "bert_tokens")
    model = type(model)(model.config, model.family, json.dumps(json.loads(model.about) | {"problem_type": "regression"}))
    assert interop.call(model, params, {"input_ids": ids, "labels": ids})["loss"] > 0  # which is of whole texts alone


@pytest.mark.parametrize(("family", "name"), [("xlm-roberta", "XLMRoberta"), ("camembert", "Camembert")])
def test_roberta_by_other_names(family, name, tmp_path):
    folder, inputs = HERE / "roberta_classifier", {"input_ids": np.array([[5, 9, 3]])}
    renamed = rewritten(folder, tmp_path / "it", model_type=family, architectures=[f"{name}ForSequenceClassification"])
    found, exact = (interop.call(*interop.load(f), inputs)["logits"] for f in (renamed, folder))
    np.testing.assert_array_equal(found, exact)
    interop.save(*interop.load(renamed), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == [f"{name}ForSequenceClassification"]


@pytest.mark.parametrize("name", ["albert_regression", "bert_untied", "electra_detector"])
def test_loaded_onto_eight_devices(name):
    layout = Layout(data=2, fsdp=2, tensor=2)
    mesh = make_mesh(layout)
    _, whole = interop.load(HERE / name)
    _, parts = interop.load(HERE / name, mesh=mesh, layout=layout)
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    assert {len(a.sharding.device_set) for a in jax.tree.leaves(parts)} == {8}
    assert parts["embed"].addressable_shards[0].data.size == whole["embed"].size // 4


def test_positions_are_the_peers():
    for name, first in (("bert_tokens", 0), ("roberta_masked", 2)):  # RoBERTa's begin behind the padding token's
        model, params = interop.load(HERE / name)
        inputs = {"input_ids": np.array([[5, 9, 3]])}
        exact, found = (interop.call(model, params, inputs | more)["logits"] for more in ({}, {"position_ids": first + np.arange(3)[None]}))
        np.testing.assert_allclose(found, exact, atol=1e-6)


@pytest.mark.parametrize("name", ["bert_tokens", "roberta_masked", "roberta_classifier", "electra_detector"])
def test_padding_on_either_side_changes_nothing(name):
    model, params = interop.load(HERE / name)
    pad = 1 if model.family == "roberta" else 0
    text = np.array([[5, 9, 3, 17]])
    found = []
    for left, right in ((0, 0), (3, 0), (0, 2)):
        padded = np.pad(text, ((0, 0), (left, right)), constant_values=pad)
        mask = np.pad(np.ones_like(text), ((0, 0), (left, right)))
        logits = interop.call(model, params, {"input_ids": padded, "attention_mask": mask})["logits"]
        found.append(logits if model.config.head == "classifier" else logits[:, left : left + 4])
    assert all(apart(other, found[0]) < 2e-6 for other in found[1:])
