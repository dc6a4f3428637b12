"""Checkpoints of models that see, and what transformers computes with them (see the reference cases' README, and make_image_cases.py)."""

import json
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import CLOSE, apart, compiled
from lmx import interop
from lmx.infer import generate
from lmx.interop.files import mapped

OWN = Path(__file__).parent.parent / "data_files" / "images"
SHARED = ("vit", "vit_classifier", "llava")
CASES = (*SHARED, *sorted(f"own/{path.parent.name}" for path in OWN.glob("*/golden.safetensors")))
GRADED = ("vit_classifier", "llava", "own/vit_oblong", "own/clip", "own/llava_qwen")
CONTINUED = ("llava", "own/llava_qwen")


class Case:
    def __init__(self, folder):
        self.folder = folder
        self.golden = {name: np.asarray(a) for name, a in mapped(folder / "golden.safetensors").items()}
        self.model, self.params = interop.load(folder)
        self.inputs = {n.removeprefix("input."): a for n, a in self.golden.items() if n.startswith("input.") and n != "input.prompt"}
        self.expected = {n: a for n, a in self.golden.items() if not n.startswith(("input.", "grad.", "cotangent.", "greedy", "batch."))}

    @cached_property
    def outputs(self) -> tuple[dict, dict]:
        """What `call` gives, and the gradient of its loss or of what stands for one."""
        cotangents = {n.removeprefix("cotangent."): a for n, a in self.golden.items() if n.startswith("cotangent.")}
        static = {name: self.inputs[name] for name in ("return_loss",) if name in self.inputs}

        def loss(params):
            found = interop.call(self.model, params, self.inputs | static)
            return sum(((a * found[n]).sum() for n, a in cotangents.items()), found.get("loss", jnp.zeros(()))), found

        if not any(name.startswith("grad.") for name in self.golden):
            return compiled(loss)(self.params)[1], None
        gradient, found = compiled(jax.grad(loss, has_aux=True))(self.params)
        return found, gradient


@pytest.fixture(scope="module", params=CASES)
def case(request):
    name = request.param.removeprefix("own/")
    return Case(OWN / name if name != request.param else request.getfixturevalue("shared") / "goldens" / name)


def named(found: dict, name: str):
    """`image.hidden_states.1` of what `call` gives."""
    for side, whole in (("image.", "vision_model_output"), ("text.", "text_model_output")):
        if name.startswith(side):
            found, name = found[whole], name.removeprefix(side)
    key, *index = name.split(".")
    return found[key][int(index[0])] if index else found[key]


def test_outputs(case):
    found, _ = case.outputs
    mask = case.inputs.get("attention_mask")
    assert case.expected
    for name, exact in case.expected.items():
        of_text = mask is not None and exact.shape[:2] == mask.shape
        assert apart(named(found, name), exact, mask == 1 if of_text else None) < CLOSE, name
    states = [name for name in case.expected if name.startswith("hidden_states.")]
    assert not states or len(states) == len(found["hidden_states"])


@pytest.mark.parametrize("case", GRADED, indirect=True)
def test_gradients(case):
    expected = {name.removeprefix("grad."): a for name, a in case.golden.items() if name.startswith("grad.")}
    assert expected
    found = interop.tensors(case.model, case.outputs[1])
    largest = max(float(np.abs(a).max()) for a in expected.values())
    if case.folder.parent == OWN:  # all gradients are there, but of layers that are not read
        assert not any(own.any() for name, own in found.items() if name not in expected)
    for name, exact in expected.items():
        own = found[name]
        assert own.shape == exact.shape
        assert float(np.abs(own - exact).max()) / max(float(np.abs(exact).max()), 1e-3 * largest) < 1e-4, name


def test_saved_and_loaded_again(case, tmp_path):
    interop.save(case.model, case.params, tmp_path)
    model, params = interop.load(tmp_path)
    assert model.config == case.model.config
    jax.tree.map(np.testing.assert_array_equal, params, case.params)
    before, after = mapped(case.folder / "model.safetensors"), mapped(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert (tensor.shape, tensor.tobytes()) == (before[name].shape, before[name].tobytes())
    said, again = (json.loads((folder / "config.json").read_text()) for folder in (case.folder, tmp_path))
    for part in ("text_config", "vision_config"):
        assert set(said.get(part, {})) <= set(again.get(part, {}))


@pytest.mark.parametrize("case", CONTINUED, indirect=True)
def test_greedy_continuations_of_prompts_with_images(case):
    golden, lead = case.golden, "batch." if "batch.greedy" in case.golden else ""
    barred = (2, case.model.config.image_token) if lead else (2,)
    prompts = golden["batch.input_ids"] if lead else golden["input.prompt"]
    mask = golden["batch.attention_mask"] if lead else np.ones_like(prompts)
    pixels = golden["batch.pixel_values"] if lead else golden["input.pixel_values"][: len(prompts)]
    expected, start = golden[f"{lead}greedy"], prompts.shape[1]
    ids = [row[real == 1].tolist() for row, real in zip(prompts, mask, strict=True)]
    steps = expected.shape[1] - start
    found = generate(case.model, case.params, ids, max_new_tokens=steps, suppress_ids=barred, pixel_values=pixels)
    assert found == expected[:, start:].tolist()
    whole = np.concatenate([mask, np.ones((len(mask), steps), mask.dtype)], 1)
    inputs = {"input_ids": expected, "attention_mask": whole, "pixel_values": pixels}
    inputs = {name: a[:, :-1] if a.ndim == 2 else a for name, a in inputs.items()}
    logits = compiled(lambda inputs: interop.call(case.model, case.params, inputs)["logits"])(inputs)
    assert apart(logits[:, start - 1 :], golden[f"{lead}greedy_logits"]) < CLOSE
