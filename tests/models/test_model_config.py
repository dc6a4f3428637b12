"""Configs that are no model are refused in one line that names the knob."""

from dataclasses import fields

import pytest

from lmx.models.config import Transformer, check
from lmx.models.rope import RopeScaling

GOOD = {"vocab": 24}


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"heads": 6, "embed": 100, "head_dim": 8},
        {"kv_heads": 1},
        {"pattern": ("local", "global"), "window": 3},
        {"parallel": True, "norm_placement": "sandwich"},
        {"positions": "none", "embed": 12, "heads": 4},
        {"causal": False, "head": "masked", "embed_size": 8, "head_bias": True, "token_types": 2, "shared_layers": True},
        {"causal": False, "head": "classifier", "labels": 3},
    ],
)
def test_models_are_let_through(knobs):
    check(Transformer(**GOOD | knobs))


@pytest.mark.parametrize(
    ("knobs", "knob", "value"),
    [
        ({"vocab": 0}, "model.vocab", "0"),
        ({"layers": 0}, "model.layers", "0"),
        ({"heads": 0}, "model.heads", "0"),
        ({"kv_heads": 0}, "model.kv_heads", "0"),
        ({"head_dim": 0}, "model.head_dim", "0"),
        ({"mlp": -4}, "model.mlp", "-4"),
        ({"context": 0}, "model.context", "0"),
        ({"embed": 100, "heads": 3}, "model.embed", "100"),
        ({"heads": 4, "kv_heads": 3}, "model.kv_heads", "3"),
        ({"heads": 4, "kv_heads": 8}, "model.kv_heads", "8"),
        ({"embed": 12, "heads": 4}, "model.head_dim", "3"),
        ({"rope_theta": -1.0}, "model.rope_theta", "-1.0"),
        ({"local_rope_theta": float("inf")}, "model.local_rope_theta", "inf"),
        ({"rope_scaling": RopeScaling(factor=float("nan"))}, "model.rope_scaling.factor", "nan"),
        ({"rope_scaling": RopeScaling("llama3", 8.0, 64, low=0.0, high=4.0)}, "model.rope_scaling.low", "0.0"),
        ({"rope_scaling": RopeScaling("yarn", 4.0, 64, attention=-1.0)}, "model.rope_scaling.attention", "-1.0"),
        ({"rope_scaling": RopeScaling("longrope", 4.0, 64, short_factors=(1.0, 0.0))}, "model.rope_scaling.short_factors", "0.0"),
        ({"pattern": ()}, "model.pattern", "empty"),
        ({"window": 4}, "model.window", "4"),
        ({"pattern": ("local",)}, "model.window", "None"),
        ({"pattern": ("local",), "window": 0}, "model.window", "0"),
        ({"parallel": True, "norm_placement": "post"}, "model.parallel", "post"),
        ({"parallel_norms": True, "parallel": True, "norm_placement": "output"}, "model.parallel_norms", "output"),
        ({"qk_norm_joint": True}, "model.qk_norm_joint", "model.qk_norm,"),
        ({"alibi_scaled": True}, "model.alibi_scaled", "rope"),
        ({"causal": False, "window": 3, "pattern": ("local",)}, "model.causal", "3"),
        ({"causal": False, "positions": "alibi"}, "model.causal", "alibi"),
        ({"token_types": -1}, "model.token_types", "-1"),
        ({"labels": 3}, "model.labels", "3"),
        ({"head": "tokens"}, "model.labels", "0"),
        ({"head": "pooler", "head_bias": True}, "model.head_bias", "pooler"),
        ({"embed_size": 8}, "model.embed_size", "8"),
        ({"embed_size": 0, "tied": False}, "model.embed_size", "0"),
        ({"shared_layers": True, "pattern": ("local", "global"), "window": 3, "layers": 3}, "model.shared_layers", "3"),
        ({"dropout": 1.0}, "model.dropout", "1.0"),
        ({"dropout": -0.1}, "model.dropout", "-0.1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_no_model_is_refused_by_knob_and_value(knobs, knob, value):
    with pytest.raises(ValueError, match=r"model\.") as error:
        check(Transformer(**GOOD | knobs))
    message = str(error.value)
    assert knob in message
    assert value in message
    assert "\n" not in message


def test_messages_name_only_knobs_that_exist():
    knobs = {field.name for field in fields(Transformer)}
    for wrong in ({"kv_heads": 0}, {"head_dim": 0}, {"mlp": 0}):
        with pytest.raises(ValueError, match=r"model\.") as error:
            check(Transformer(**GOOD | wrong))
        named = {word.removeprefix("model.").split("=")[0] for word in str(error.value).split() if word.startswith("model.")}
        assert named <= knobs
