"""`python -m lmx.interop`."""

import json

import numpy as np
import pytest

from lmx import interop
from lmx.core.tree import named_leaves
from lmx.interop.__main__ import main


def test_inspect_shows_names_shapes_and_bytes(shared, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    main(["inspect", str(shared / "goldens" / "gpt2"), "--layout.tensor", "2", "--layout.fsdp", "2"])
    said = capsys.readouterr().out
    assert "a gpt2" in said
    assert "transformer.h.*.attn.c_attn.weight (part 3)" in said
    assert "layers/0/0/attention/value/weight" in said
    sizes = sum(np.prod(a.shape) for a in named_leaves(interop.load(shared / "goldens" / "gpt2")[1]).values())
    assert f"{sizes:,} parameters" in said
    assert "on each of 4 devices" in said


def test_compare_says_what_differs(shared, capsys):
    folder = shared / "goldens"
    main(["compare", str(folder / "llama"), str(folder / "llama3")])
    said = capsys.readouterr().out
    assert "rope_parameters is" in said
    assert "whose head is its own" in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspekt", "x"], "inspekt x: not understood"),
        (["inspect", "nowhere"], "nowhere has no config.json"),
        (["export", "nowhere", "there", "--family", "llama"], "nowhere is not a run"),
    ],
)
def test_what_is_wrong_is_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1


CONFIG = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "lama"}, "model_type='lama' is not one of"),
        ({"hidden_act": "mish"}, "hidden_act='mish' of a llama is not supported"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "rope_type='spiral' of a llama is not supported"),
        ({"attention_sinks": 4}, "has fields that lmx does not know: attention_sinks=4"),
        ({"num_attention_heads": 3}, "not divisible by model.heads=3"),
    ],
)
def test_a_config_that_is_not_known_is_refused_by_name(config, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | CONFIG | config))
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        interop.load(tmp_path)


def test_tensors_that_do_not_fit_are_refused_by_name(shared, tmp_path):
    model, params = interop.load(shared / "goldens" / "llama")
    interop.save(model, params, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"has model\.layers\.2\..* and 5 more, which lmx knows nothing of"):
        interop.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"lacks model\.layers\.3\."):
        interop.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(ValueError, match=r"mlp\.down_proj\.weight is \[48, 96\] in the checkpoint; config\.json makes it \[48, 64\]"):
        interop.load(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="was it downloaded whole"):
        interop.load(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no archive of PyTorch 1\.6 or later"):
        interop.load(tmp_path)
