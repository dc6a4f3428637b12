"""Attention weights under the peer's names are the peer's (tests/interop/make_attentions.py)."""

from pathlib import Path

import jax
import numpy as np
import pytest

from checkpoints import CLOSE, Case, apart, compiled
from lmx import interop
from lmx.core.execution import Execution
from lmx.interop.files import mapped

HERE, DATA = Path(__file__).parent, Path(__file__).parent.parent / "data_files"
GOLDENS = sorted((DATA / "attentions").glob("*.safetensors"))


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda path: path.stem)
def test_attentions(golden, request):
    near = [folder / golden.stem for folder in (DATA / "interop", HERE / "encoders")]
    folder = next((path for path in near if path.exists()), None)
    case = Case(folder or request.getfixturevalue("shared") / "goldens" / golden.stem)
    inputs = {name: a for name, a in case.inputs.items() if name != "prompt"}
    found = compiled(lambda params: interop.call(case.model, params, inputs, output_attentions=True))(case.params)
    expected = mapped(golden)
    assert sum(len(found[name]) for name in found if name.endswith("attentions")) == len(expected) >= 2
    reads = (
        np.asarray(inputs["labels"]) != -100 if "t5" in golden.stem or "bart" in golden.stem else np.asarray(inputs["attention_mask"]) == 1
    )
    for name, exact in expected.items():
        kind, layer = name.split(".")
        real = np.asarray(inputs["attention_mask"]) == 1 if kind == "encoder_attentions" else reads
        a, b = (np.moveaxis(np.asarray(weights), 2, 1) for weights in (found[kind][int(layer)], exact))
        assert apart(a, b, real) < CLOSE, name


def test_outputs_are_the_same_with_and_without():
    model, params = interop.load(DATA / "interop" / "gptj")
    inputs = {"input_ids": np.array([[5, 9, 3, 17]])}
    plain, more = (interop.call(model, params, inputs, output_attentions=asked) for asked in (False, True))
    assert set(more) - set(plain) == {"attentions"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, {name: more[name] for name in plain})
    with pytest.raises(ValueError, match="attention='chunked' never forms"):
        interop.call(model, params, inputs, output_attentions=True, execution=Execution(attention="chunked"))


def test_what_has_no_attentions_is_refused(shared):
    with pytest.raises(ValueError, match="a rwkv has no attention weights"):
        interop.call(*interop.load(shared / "goldens" / "rwkv"), {"input_ids": np.array([[5, 9, 3]])}, output_attentions=True)
