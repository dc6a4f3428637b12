"""The parameter table: what is derived from it, and that initial values depend on a parameter's name and layer alone."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.params import (
    ONES,
    ZEROS,
    Constant,
    FanIn,
    Normal,
    ParamSpec,
    abstract,
    count,
    initial_values,
    is_spec,
    stacked,
    table,
)
from lmx.core.tree import named_leaves
from lmx.models.config import Transformer
from lmx.models.stack import unstack
from lmx.models.transformer import specs
from lmx.parallel.layout import Layout, make_mesh
from lmx.parallel.rules import rules, shardings

KEY = jax.random.key(7)
LAYER = {"query": ParamSpec((16, 4, 8), ("embed", "heads", "head_dim"), 1, Normal(0.02)), "scale": ParamSpec((16,), ("embed",), init=ONES)}
MODEL = Transformer(vocab=24, layers=4, embed=16, heads=4, kv_heads=2, mlp=24, context=8, positions="learned", tied=False)


def drawn(tree, **knobs):
    """Initial values, compiled in half the time; unoptimised code also rounds alike whatever the shapes and shards."""
    return jax.jit(lambda key: initial_values(key, tree), compiler_options={"xla_backend_optimization_level": 0}, **knobs)(KEY)


def by_layer(config: Transformer) -> dict[str, np.ndarray]:
    """Initial values by name, layers by their absolute index, in whatever groups they are."""
    params = jax.device_get(drawn(specs(config)))
    layers = [layer for group in unstack(params["layers"]) for layer in group]
    return named_leaves({**params, "layers": layers})


@pytest.fixture(scope="module")
def plain():
    return by_layer(MODEL)


def changed(before: dict, after: dict) -> set[str]:
    """Names of both whose values are not bit-equal."""
    return {name for name in before.keys() & after.keys() if not np.array_equal(before[name], after[name])}


def test_another_parameter_changes_no_other():
    table = {"a": ParamSpec((3, 3), (None, None), 1, Normal(1.0)), "layers": (stacked(LAYER, (0, 1)),)}
    more = {"0": table["a"], "aa": table["a"], **table, "layers": (stacked(LAYER | {"new": LAYER["query"]}, (0, 1)),)}
    before, after = (named_leaves(initial_values(KEY, t)) for t in (table, more))
    assert after.keys() > before.keys()
    assert not changed(before, after)


def test_more_knobs_change_no_value_of_what_was_there(plain):
    more = by_layer(replace(MODEL, bias=True, norm="layernorm", norm_placement="sandwich", qk_norm=True))
    assert more.keys() > plain.keys()
    assert not changed(plain, more)


def test_another_layer_changes_no_other_but_for_the_scale_that_depth_sets(plain):
    deeper = by_layer(replace(MODEL, layers=5))
    residual = {f"layers/{i}/{name}/weight" for i in range(4) for name in ("attention/output", "feedforward/down")}
    assert changed(plain, deeper) == residual
    for name in residual:
        np.testing.assert_allclose(deeper[name] * np.sqrt(2 * 5), plain[name] * np.sqrt(2 * 4), rtol=1e-5)


def test_another_pattern_changes_no_value(plain):
    for pattern in (("local", "global"), ("local", "local", "global")):
        grouped = by_layer(replace(MODEL, pattern=pattern, window=4))
        assert grouped.keys() == plain.keys()
        assert not changed(plain, grouped)


def test_no_two_parameters_or_layers_start_alike(plain):
    drawn = {name: a for name, a in plain.items() if name.endswith(("weight", "embed", "positions", "head"))}
    assert len(drawn) == 4 * 7 + 3
    flat = {name: np.asarray(a).ravel()[:64] / np.std(a) for name, a in drawn.items()}
    names = list(flat)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert abs(np.corrcoef(flat[a], flat[b])[0, 1]) < 0.6, (a, b)
    other = initial_values(jax.random.key(8), {"embed": specs(MODEL)["embed"]})
    assert not np.array_equal(other["embed"], plain["embed"])


def test_a_mesh_of_eight_changes_no_value():
    tree = specs(MODEL)
    alone = jax.device_get(drawn(tree))
    for layout in (Layout(fsdp=8), Layout(data=2, fsdp=2, tensor=2)):
        there = drawn(tree, out_shardings=shardings(tree, make_mesh(layout), rules(layout, split=True)))
        assert len(there["embed"].sharding.device_set) == 8
        assert not there["embed"].sharding.is_fully_replicated
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, jax.device_get(there), alone)))


@pytest.mark.parametrize(
    ("init", "shape", "inputs", "expected"),
    [
        (Normal(0.02), (200, 100), 1, 0.02),
        (FanIn(), (400, 50), 1, 400**-0.5),
        (FanIn(2.0), (8, 50, 50), 2, (2 / 400) ** 0.5),
    ],
)
def test_values_start_with_the_spread_that_their_spec_says(init, shape, inputs, expected):
    spec = ParamSpec(shape, (None,) * len(shape), inputs, init)
    values = initial_values(KEY, {"w": spec, "layers": stacked({"w": spec}, (0, 1, 2))})
    for found in (values["w"], *values["layers"]["w"]):
        numbers = np.asarray(found, np.float64).ravel()
        # Four standard errors of a standard deviation, a mean, and a share beyond one deviation, of 20,000 numbers.
        assert numbers.std() == pytest.approx(expected, rel=4 / np.sqrt(2 * numbers.size))
        assert abs(numbers.mean()) < 4 * expected / np.sqrt(numbers.size)
        assert (np.abs(numbers) < expected).mean() == pytest.approx(0.6827, abs=4 * 0.4655 / np.sqrt(numbers.size))


def test_a_transformers_projections_into_the_residual_stream_start_smaller():
    config = replace(MODEL, layers=8, embed=64, mlp=64)
    layer = specs(config)["layers"][0]["0"]
    values = initial_values(KEY, {"query": layer["attention"]["query"], "output": layer["attention"]["output"], **layer["feedforward"]})
    spread = {name: float(value["weight"].std()) for name, value in values.items()}
    expected = {"query": 0.02, "gate": 0.02, "up": 0.02, "output": 0.02 / 4, "down": 0.02 / 4}
    assert spread == pytest.approx(expected, rel=0.03)


def test_constants_are_constant_and_the_type_is_the_one_asked_for():
    tree = {"one": ParamSpec((3,), (None,), init=ONES), "zero": ParamSpec((3,), (None,)), "half": ParamSpec((), (), init=Constant(0.5))}
    values = initial_values(KEY, tree, jnp.bfloat16)
    assert {a.dtype for a in values.values()} == {jnp.dtype("bfloat16")}
    assert values["one"].tolist() == [1, 1, 1]
    assert values["zero"].tolist() == [0, 0, 0]
    assert ParamSpec((3,), (None,)).init == ZEROS
    assert values["half"] == 0.5


def test_abstract_parameters_have_the_shapes_types_and_shardings_of_real_ones():
    tree = specs(MODEL)
    layout = Layout(fsdp=2, tensor=4)
    placement = shardings(tree, make_mesh(layout), rules(layout, split=True))
    expected = jax.eval_shape(lambda: initial_values(KEY, tree, jnp.bfloat16))
    found = abstract(tree, jnp.bfloat16, placement)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), found) == jax.tree.map(lambda a: (a.shape, a.dtype), expected)
    assert jax.tree.map(lambda a: a.sharding, found) == placement
    assert all(leaf.sharding is None and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(abstract(tree)))


def test_counts_are_those_of_published_models():
    gpt2 = Transformer(vocab=50257, layers=12, embed=768, heads=12, positions="learned", norm="layernorm", gated=False, bias=True)
    assert count(specs(gpt2)) == 124_439_808
    mistral = Transformer(vocab=32000, layers=32, embed=4096, heads=32, kv_heads=8, mlp=14336, tied=False)
    assert count(specs(mistral)) == 7_241_732_096


def test_stacking_adds_a_named_dimension_and_remembers_the_layers():
    found = stacked(LAYER, (2, 5, 8))["query"]
    assert (found.shape, found.axes) == ((3, 16, 4, 8), ("layers", "embed", "heads", "head_dim"))
    assert (found.inputs, found.layers) == (1, (2, 5, 8))
    values = initial_values(KEY, {"layers": stacked(LAYER, (2, 5, 8))})
    again = initial_values(KEY, {"layers": stacked(LAYER, (5,))})
    assert np.array_equal(values["layers"]["query"][1], again["layers"]["query"][0])


def test_a_spec_whose_axes_do_not_name_every_dimension_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 3\) needs 2 axis names, not \('embed',\)"):
        ParamSpec((2, 3), ("embed",))


def test_every_spec_of_a_transformer_says_what_is_contracted():
    for name, spec in named_leaves(specs(MODEL), is_leaf=is_spec).items():
        expected = 0
        if name.endswith("weight") or name == "head":
            expected = 2 if "attention/output" in name else 1
        assert spec.inputs == expected, name


def test_the_table_shows_each_parameter_once_and_the_sum():
    lines = table({"embed": ParamSpec((24, 16), ("vocab", "embed"), init=Normal(0.02)), "free": ParamSpec((3,), (None,))}).splitlines()
    assert len(lines) == 3
    assert lines[0].split() == ["embed", "vocab=24", "embed=16", "384", "Normal(stddev=0.02)"]
    assert "-=3" in lines[1]
    assert lines[2] == "387 parameters"
