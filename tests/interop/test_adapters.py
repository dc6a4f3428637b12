"""Adapters over the reference cases (`make_adapters.py`): PEFT's numbers, and its files again."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import apart, compiled
from lmx import interop
from lmx.core.execution import Execution
from lmx.core.tree import disagreement
from lmx.core.weights import Adapted
from lmx.infer.generate import generate
from lmx.interop.files import mapped, write_file
from lmx.models.config import EncoderDecoder
from lmx.parallel.layout import Layout, make_mesh
from lmx.parallel.rules import rules

HERE = Path(__file__).parent.parent / "data_files" / "interop"
STORED = sorted(folder.name for folder in (HERE / "adapters").iterdir())
SHARED = ["lora", "rslora_dora", "ia3", "prefix", "prompt", "p_tuning"]
CLOSE = 2e-5


@cache
def base(folder: Path):
    return interop.load(folder)


@dataclass
class Case:
    folder: Path
    base: Path

    def __post_init__(self):
        self.golden = mapped(self.folder / "golden.safetensors")
        self.model, self.params = base(self.base)
        self.adapter = interop.load_adapter(self.folder, self.model)
        self.inputs = {name.removeprefix("input."): a for name, a in self.golden.items() if name.startswith("input.")}
        self.prompt = self.inputs.pop("prompt", None)

    @property
    def real(self):
        """Of the logits of a decoder, those of tokens that are no padding."""
        mask, rows = self.inputs.get("attention_mask"), self.golden["logits"]
        if mask is None or rows.ndim == 2 or isinstance(self.model.config, EncoderDecoder):
            return None
        return np.pad(mask, ((0, 0), (rows.shape[1] - mask.shape[1], 0)), constant_values=1) == 1

    def call(self, params=None, adapter=None, **changes):
        adapted = interop.adapt(self.params if params is None else params, self.adapter if adapter is None else adapter)
        return interop.call(self.model, adapted, self.inputs | changes)


@pytest.fixture
def case(shared):
    def of(name: str) -> Case:
        folder = HERE / "adapters" / name if name in STORED else shared / "goldens" / "peft" / name
        under = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        return Case(folder, HERE / under if (HERE / under).exists() else shared / "goldens" / under)

    return of


@pytest.mark.parametrize("name", [*SHARED, *STORED])
def test_outputs_and_gradients_are_pefts(case, name):
    one = case(name)

    theirs = {key.removeprefix("grad."): a for key, a in one.golden.items() if key.startswith("grad.")}

    def loss(adapter):
        found = one.call(adapter=adapter)
        return found["loss"], {name: found[name] for name in ("logits", "loss")}

    if theirs:
        gradient, found = compiled(jax.grad(loss, has_aux=True))(one.adapter)
    else:
        found = compiled(lambda adapter: {n: a for n, a in one.call(adapter=adapter).items() if n in ("logits", "loss")})(one.adapter)
    assert apart(found["logits"], one.golden["logits"], one.real) < CLOSE
    if "loss" in one.golden:
        assert apart(found["loss"], one.golden["loss"]) < CLOSE
    if theirs:
        ours = interop.adapter_tensors(gradient)
        assert ours.keys() >= theirs.keys()
        far = disagreement({n: ours[n].reshape(a.shape) for n, a in theirs.items()}, theirs)
        assert max(far.values()) < 1e-4, far


@pytest.mark.parametrize("name", [*SHARED, *STORED])
def test_a_saved_adapter_is_the_one_that_was_loaded(case, name, tmp_path):
    one = case(name)
    interop.save_adapter(one.adapter, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == json.loads((one.folder / "adapter_config.json").read_text())
    before, after = (mapped(folder / "adapter_model.safetensors") for folder in (one.folder, tmp_path))
    assert before.keys() == after.keys()
    for tensor in before:
        assert before[tensor].dtype == after[tensor].dtype
        np.testing.assert_array_equal(before[tensor], after[tensor])


@pytest.mark.parametrize("name", [*SHARED, *STORED])
def test_a_new_adapter_has_pefts_tensors(case, name):
    one = case(name)
    settings = json.loads((one.folder / "adapter_config.json").read_text())
    new = interop.new_adapter(one.model, one.params, settings, jax.random.key(0))
    theirs = {n: a.shape for n, a in mapped(one.folder / "adapter_model.safetensors").items() if not n.endswith(".base_layer.weight")}
    assert {n: a.shape for n, a in interop.adapter_tensors(new).items()} == theirs


@pytest.mark.parametrize("name", ["gpt2_dora", "gpt2_ia3", "llama_linear"])
def test_a_new_adapter_changes_nothing_yet(case, name):
    one = case(name)
    settings = json.loads((one.folder / "adapter_config.json").read_text())
    new = interop.new_adapter(one.model, one.params, settings, jax.random.key(0))
    run = compiled(lambda params: interop.call(one.model, params, {"input_ids": one.inputs["input_ids"]})["logits"])
    assert apart(run(interop.merge(interop.adapt(one.params, new))), run(one.params)) < 1e-6
    if name == "gpt2_dora":
        with pytest.raises(ValueError, match=r"target_modules=\['q_proj'\] names nothing of a gpt2"):
            interop.new_adapter(one.model, one.params, settings | {"target_modules": ["q_proj"]}, jax.random.key(0))


@pytest.mark.parametrize("name", ["gpt2_prompt", "llama_projected", "opt_prefix", "t5_prompt"])
def test_texts_are_continued_behind_virtual_tokens(case, name):
    one = case(name)
    adapted = interop.adapt(one.params, one.adapter)
    prompt = one.prompt[0].tolist()
    more = {"max_new_tokens": 6, "suppress_ids": (2,)} | ({"start_id": 0} if name.startswith("t5") else {})
    found = generate(one.model, adapted, [prompt[:3], prompt], **more)
    assert found[1] == one.golden["greedy"].tolist()
    assert found[0] == generate(one.model, adapted, [prompt[:3], [5] * 11], **more)[0]  # however long the others are


@pytest.mark.parametrize("name", ["llama_patterns", "gpt2_biases", "bloom_fused", "gpt2_dora", "llama_head", "gpt2_ia3"])
def test_merged_it_is_the_same_model(case, name):
    one = case(name)
    adapted = interop.adapt(one.params, one.adapter)
    merged = interop.merge(adapted)
    assert jax.tree.structure(merged) == jax.tree.structure(one.params)
    found = compiled(lambda params: interop.call(one.model, params, one.inputs)["logits"])(merged)
    assert apart(found, one.golden["logits"], one.real) < CLOSE
    if name in ("llama_patterns", "bloom_fused"):
        assert max(disagreement(interop.unmerge(merged, one.adapter), one.params).values()) < 1e-6
    else:
        with pytest.raises(ValueError, match="is not known from a sum with"):
            interop.unmerge(merged, one.adapter)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma_table", "changes embed as the table of embeddings or as the head alone, and the model ties the two"),
        ("gemma_head", "changes embed as the table"),
        ("gpt2_prompt", "virtual tokens are no sum"),
    ],
)
def test_what_cannot_be_merged_is_refused(case, name, message):
    one = case(name)
    with pytest.raises(ValueError, match=message):
        interop.merge(interop.adapt(one.params, one.adapter))


def test_adapters_add_up(case):
    one, two = case("lora"), case("llama_patterns")
    both = interop.adapt(interop.adapt(one.params, one.adapter), two.adapter)
    merged = interop.merge(interop.adapt(interop.merge(interop.adapt(one.params, one.adapter)), two.adapter))
    inputs = {"input_ids": one.inputs["input_ids"]}
    run = compiled(lambda params: interop.call(one.model, params, inputs)["logits"])
    assert apart(run(both), run(merged)) < CLOSE


@pytest.mark.parametrize("name", ["llama_head", "llama_patterns", "llama_projected"])
def test_eight_devices_equal_one(case, name):
    one, layout = case(name), Layout(data=2, fsdp=2, tensor=2)
    mesh = make_mesh(layout)
    model, params = interop.load(one.base, mesh=mesh, layout=layout)
    adapter = interop.load_adapter(one.folder, model, mesh=mesh, layout=layout)
    inputs = {n: np.concatenate([a, a]) for n, a in one.inputs.items()}
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(adapter)) or name == "llama_projected"
    execution = Execution(rules=rules(layout), split=rules(layout, split=True))

    def loss(adapter, params, execution):
        found = interop.call(model, interop.adapt(params, adapter), inputs, execution=execution)
        return found["loss"], (found["loss"], found["last_hidden_state"])

    def run(adapter, params, execution):
        return jax.jit(jax.grad(lambda a, p: loss(a, p, execution), has_aux=True))(adapter, params)

    with jax.set_mesh(mesh):
        split = run(adapter, params, execution)
    whole = run(one.adapter, one.params, Execution())
    assert max(apart(a, b) for a, b in zip(split[1], whole[1], strict=True)) < CLOSE
    assert max(disagreement(split[0].values, whole[0].values).values()) < 1e-4


def test_in_bf16_the_base_stays_narrow(case):
    one = case("llama_patterns")
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), one.params)
    adapted = interop.adapt(params, one.adapter)
    leaf = adapted["layers"][0]["0"]["attention"]["query"]["weight"]
    assert isinstance(leaf, Adapted)
    assert leaf.base.dtype == jnp.bfloat16
    assert leaf.down.dtype == jnp.float32
    rounded = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    run = compiled(lambda params: one.call(params=params)["logits"])
    assert apart(run(params), run(rounded)) < CLOSE


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("lora", {"peft_type": "LOHA"}, "peft_type='LOHA' is not one of LORA, IA3"),
        ("lora", {"use_qalora": True}, "fields that lmx does not know: use_qalora=True"),
        ("lora", {"lora_bias": True}, "lora_bias=True"),
        ("lora", {"layer_replication": [[0, 2]]}, "layer_replication="),
        ("lora", {"target_parameters": ["experts.up"]}, "target_parameters="),
        ("lora", {"trainable_token_indices": [1]}, "trainable_token_indices="),
        ("lora", {"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base"),
        ("lora", {"bias": "some"}, "bias='some' is not one of"),
        ("lora", {"target_modules": ["q_proj"]}, r"has model\.layers\.0\.mlp\.down_proj, .* which they do not"),
        ("lora", {"target_modules": "all-linear"}, r"lacks .*gate_proj.* which its settings target"),
        ("lora", {"r": 8}, r"down_proj\.lora_A\.weight is \[4, 96\]"),
        ("lora", {"use_dora": True}, "has down, up in the adapter, where a LORA of its settings has down, magnitude, up"),
        ("prompt", {"token_dim": 24}, "token_dim=24, and the model's embeddings have 48"),
        ("prompt", {"num_virtual_tokens": None}, "num_virtual_tokens=None; it should be a number"),
        ("prefix", {"num_attention_heads": 4}, "num_attention_heads=4, and the model's keys and values make it 2"),
        ("prompt", {"peft_type": "MULTITASK_PROMPT_TUNING"}, "peft_type='MULTITASK_PROMPT_TUNING' is not one of"),
    ],
)
def test_settings_that_are_not_known_are_refused_by_name(case, name, changes, message, tmp_path):
    one = case(name)
    said = json.loads((one.folder / "adapter_config.json").read_text()) | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    (tmp_path / "adapter_model.safetensors").write_bytes((one.folder / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=message):
        interop.load_adapter(tmp_path, one.model)


def test_what_is_no_adapter_of_the_model_is_refused(case, tmp_path):
    one = case("lora")
    with pytest.raises(ValueError, match=r"has base_model\.model\.transformer\..*, which a llama has nothing for"):
        interop.load_adapter(case("gpt2_embeddings").folder, one.model)
    with pytest.raises(ValueError, match="no adapter_config"):
        interop.load_adapter(tmp_path, one.model)
    (tmp_path / "adapter_config.json").write_text((one.folder / "adapter_config.json").read_text())
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle"):
        interop.load_adapter(tmp_path, one.model)
    said = json.loads((case("t5_lora").folder / "adapter_config.json").read_text()) | {"target_modules": ["shared"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    names = {
        f"base_model.model.shared.lora_embedding_{which}": np.zeros(shape, np.float32) for which, shape in (("A", (2, 160)), ("B", (48, 2)))
    }
    write_file(tmp_path / "adapter_model.safetensors", names)
    with pytest.raises(ValueError, match="shared of a t5: encoder and decoder look rows up through modules of their own"):
        interop.load_adapter(tmp_path, case("t5_lora").model)
    with pytest.raises(ValueError, match="takes no position_ids"):
        case("gpt2_prompt").call(position_ids=np.zeros((2, 8), int))
