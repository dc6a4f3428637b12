"""A checkpoint as a run, and back."""

import shutil

import jax
import numpy as np
import pytest

from lmx import interop
from lmx.infer.generate import generate
from lmx.interop.__main__ import main
from lmx.parallel.layout import Layout, make_mesh


@pytest.mark.parametrize("case", ["mistral_bf16", "t5", "bert", "rwkv"])
def test_an_imported_checkpoint_is_exported_as_it_was(shared, tmp_path, case, capsys):
    source, run, back = shared / "goldens" / case, tmp_path / "run", tmp_path / "back"
    main(["import", str(source), str(run)])
    main(["export", str(run), str(back)])
    for name in ("config.json", "model.safetensors"):
        assert (back / name).read_bytes() == (source / name).read_bytes(), name
    capsys.readouterr()
    main(["compare", str(source), str(run)])
    said = capsys.readouterr().out
    assert "are the same to the last bit" in said or "the same values" in said
    assert "only in" not in said


def test_a_run_is_loaded_as_a_checkpoint_is(shared, tmp_path, capsys, monkeypatch):
    source, run = shared / "goldens" / "llama", tmp_path / "run"
    layout = Layout(fsdp=2, tensor=2)
    mesh = make_mesh(layout)
    interop.import_run(source, run, mesh=mesh, layout=layout)
    model, params = interop.load_run(run)
    expected, whole = interop.load(source)
    assert model.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    assert generate(model, params, [[5, 6, 7]], max_new_tokens=3) == generate(expected, whole, [[5, 6, 7]], max_new_tokens=3)
    _, split = interop.load_run(run, mesh=mesh, layout=layout)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(split))
    monkeypatch.setenv("COLUMNS", "200")
    main(["inspect", str(run)])
    assert "model.layers.*.self_attn.q_proj.weight" in capsys.readouterr().out


def test_what_cannot_be_is_one_line(shared, tmp_path, capsys):
    run = tmp_path / "run"
    interop.import_run(shared / "goldens" / "llama", run)
    for argv, message in (
        (["import", str(shared / "goldens" / "llama"), str(run)], "holds a run; name another folder"),
        (["export", str(run), str(tmp_path / "x"), "--family", "lama"], "family lama is not one of"),
        (["export", str(run), str(tmp_path / "x"), "--family", "gpt2"], "gpt2 cannot say"),
        (["export", "nowhere", str(tmp_path / "x")], "nowhere is not a run"),
    ):
        with pytest.raises(SystemExit):
            main(argv)
        said = capsys.readouterr().err
        assert message in said
        assert len(said.strip().splitlines()) == 1


def test_a_run_that_was_not_imported_says_no_family(shared, tmp_path, capsys, monkeypatch):
    source, run = shared / "goldens" / "llama", tmp_path / "run"
    interop.import_run(source, run)
    shutil.rmtree(run / "huggingface")
    with pytest.raises(ValueError, match="say as which family"):
        interop.load_run(run)
    interop.export_run(run, tmp_path / "back", "llama")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    capsys.readouterr()
    monkeypatch.setenv("COLUMNS", "200")
    main(["inspect", str(run)])
    assert "layers/0/0/attention/query/weight" in capsys.readouterr().out
    main(["compare", str(run), str(run)])
    assert "12 tensors are the same to the last bit, and nothing else is there" in capsys.readouterr().out
