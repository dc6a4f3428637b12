"""The doctor names what was planted, and says nothing of two copies."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from lmx.interop.compare import compare
from lmx.interop.files import mapped, write_tensors

LAYER = "model.layers.1"


@pytest.fixture
def made(tmp_path, shared):
    """A function that writes a changed copy of a case and compares it with the original."""

    def make(case: str, change, config: dict | None = None):
        source = shared / "goldens" / case
        tensors = dict(mapped(source / "model.safetensors"))
        change(tensors)
        target = tmp_path / case
        target.mkdir()
        write_tensors(target, {name: (a.shape, a.dtype, lambda a=a: a) for name, a in tensors.items()})
        said = json.loads((source / "config.json").read_text()) | (config or {})
        (target / "config.json").write_text(json.dumps(said))
        return compare(source, target)

    return make


def edit(name: str, function):
    def change(tensors):
        tensors[name] = function(np.asarray(tensors[name]))

    return change


def interleaved(a):
    heads = a.reshape(4, 2, 6, -1)
    return np.ascontiguousarray(heads.swapaxes(1, 2).reshape(a.shape))


def by_heads(a):
    return np.ascontiguousarray(a.T.reshape(3, 4, -1, len(a)).swapaxes(0, 1).reshape(a.T.shape))


def tie(tensors):
    del tensors["lm_head.weight"]


PLANTED = {
    "transposed": ("llama", edit(f"{LAYER}.self_attn.o_proj.weight", lambda a: np.ascontiguousarray(a.T)), "transposed"),
    "rope": ("llama", edit(f"{LAYER}.self_attn.q_proj.weight", interleaved), "interleaved layout of RoPE in the second"),
    "fused": (
        "bloom",
        edit("transformer.h.1.self_attention.query_key_value.weight", lambda a: np.concatenate([a[48:96], a[:48], a[96:]])),
        "fused projection in another order",
    ),
    "tied": ("llama", tie, "only in the first, whose head is its own"),
    "bias": ("glm", lambda tensors: tensors.pop(f"{LAYER}.self_attn.k_proj.bias"), "a bias that only the first has"),
    "dtype": (
        "mistral_bf16",
        edit(f"{LAYER}.mlp.up_proj.weight", lambda a: a.astype(np.float32)),
        "the same values as bfloat16 in the first and float32",
    ),
    "rounded": (
        "llama",
        edit(f"{LAYER}.mlp.up_proj.weight", lambda a: a.astype(ml_dtypes.bfloat16)),
        "rounded to bfloat16",
    ),
    "grown": ("llama", edit("model.embed_tokens.weight", lambda a: np.concatenate([a, a[:3]])), "163 rows for the first's 160"),
    "offset": ("gemma", edit(f"{LAYER}.input_layernorm.weight", lambda a: a + np.float32(1)), "off by one"),
    "scaled": ("llama", edit(f"{LAYER}.mlp.down_proj.weight", lambda a: a * np.float32(0.5)), "multiplied by 0.5"),
    "noise": ("llama", edit(f"{LAYER}.mlp.down_proj.weight", lambda a: a + np.float32(1e-3)), "of other values"),
    "other": ("llama", edit(f"{LAYER}.mlp.down_proj.weight", lambda a: a[::-1].copy()), "nothing to do with each other"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_it_names_what_was_planted(made, name):
    case, change, words = PLANTED[name]
    report = made(case, change)
    assert len(report.findings) == 1, str(report)
    assert words in report.findings[0].what
    assert len(report.findings[0].names) == 1


def test_settings_that_differ_are_named(made):
    report = made("llama", lambda tensors: None, {"rms_norm_eps": 1e-5})
    assert [f.what for f in report.findings] == ["config.json: rms_norm_eps is 1e-06 in the first and 1e-05 in the second"]


def test_copies_are_the_same(tmp_path, shared):
    shutil.copytree(shared / "goldens" / "llama", tmp_path / "copy")
    report = compare(shared / "goldens" / "llama", tmp_path / "copy")
    assert not report.findings
    assert report.same == 30
    assert "nothing else is there" in str(report)


def test_old_names_are_aligned(shared):
    report = compare(shared / "goldens" / "gpt2", shared / "goldens" / "gpt2_hub")
    assert report.same or any("attn.bias" in str(finding) for finding in report.findings)
    assert not any("only in the first" in finding.what for finding in report.findings)
