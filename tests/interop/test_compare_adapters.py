"""The doctor on adapters: each planted difference is named."""

import json
from pathlib import Path

import numpy as np
import pytest

from lmx.interop.__main__ import main
from lmx.interop.compare import compare
from lmx.interop.files import mapped, write_file

CASE = Path(__file__).parent.parent / "data_files" / "interop" / "adapters" / "llama_layers"
ONE = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"


def edited(**changes):
    def change(tensors):
        for which, function in changes.items():
            tensors[ONE.format(which)] = np.ascontiguousarray(function(tensors[ONE.format(which)]))

    return change


def without(tensors):
    for name in [name for name in tensors if "layers.2.self_attn" in name]:
        del tensors[name]


def mixed(tensors):
    """Other factors of the same product."""
    turn = np.array([[2.0, 1.0], [1.0, 1.0]], np.float32)
    edited(A=lambda a: turn @ a, B=lambda b: b @ np.linalg.inv(turn))(tensors)


def swapped(tensors):
    down, up = (tensors[ONE.format(which)] for which in "AB")
    tensors[ONE.format("A")], tensors[ONE.format("B")] = np.ascontiguousarray(up.T), np.ascontiguousarray(down.T)


PLANTED = {
    "rank": (
        {"r": 3},
        edited(A=lambda a: np.pad(a, ((0, 1), (0, 0))), B=lambda b: np.pad(b, ((0, 0), (0, 1)))),
        "of rank 2 in the first and 3",
    ),
    "alpha": ({"lora_alpha": 10}, lambda tensors: None, "multiplied by 2.5 in the first and 5 in the second (alpha and rank)"),
    "rslora": ({"use_rslora": True}, lambda tensors: None, "multiplied by 2.5 in the first and 3.536 in the second"),
    "transposed": ({}, edited(A=np.transpose), "transposed: "),
    "unusable": ({}, edited(A=np.transpose), "factors that do not multiply in the second"),
    "missing": ({}, without, "adapted in the first alone: model.layers.2.self_attn.v_proj"),
    "factors": ({}, mixed, "other factors of the same sum: model.layers.0.mlp.down_proj"),
    "swapped": ({}, swapped, "lora_A.weight"),
    "settings": ({"target_modules": ["v_proj"]}, lambda tensors: None, "adapter_config.json: target_modules is"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_it_names_what_was_planted(name, tmp_path, capsys):
    config, change, words = PLANTED[name]
    tensors = {key: np.asarray(a) for key, a in mapped(CASE / "adapter_model.safetensors").items()}
    change(tensors)
    write_file(tmp_path / "adapter_model.safetensors", tensors)
    said = json.loads((CASE / "adapter_config.json").read_text()) | config
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    main(["compare", str(CASE), str(tmp_path)])
    assert words in capsys.readouterr().out


def test_copies_are_the_same_and_an_adapter_is_no_checkpoint(shared):
    report = compare(CASE, CASE)
    assert not report.findings
    assert report.same == 8
    assert "an adapter is compared with what is none" in str(compare(CASE, shared / "goldens" / "llama"))


def test_inspect_shows_an_adapter(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["inspect", str(CASE)])
    said = capsys.readouterr().out
    for words in (
        "LORA adapter",
        "target_modules",
        "down_proj, v_proj",
        "base_model.model.model.layers.2.self_attn.v_proj.lora_B.weight",
        "24x2",
    ):
        assert words in said
    assert "864 parameters" in said
