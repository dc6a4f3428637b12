"""Optimizers against independent NumPy versions, schedules against their formulas."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from lmx.core.params import ParamSpec, initial_values, is_spec
from lmx.core.tree import named_leaves
from lmx.models import transformer
from lmx.models.config import Transformer
from lmx.train.optimizers import SGD, Adafactor, Adam8bit, AdamW, Lion, Muon, Schedule, build, decayed

SPECS = transformer.specs(
    Transformer(vocab=16, layers=2, embed=8, heads=2, mlp=12, bias=True, norm="layernorm", positions="learned", context=8)
)
FLAT = Schedule(kind="constant", warmup=0)
STEPS = 3


def trajectory(recipe):
    """Parameters before, the gradients, and parameters after three steps, by name in float64."""
    params = initial_values(jax.random.key(0), SPECS)
    params = jax.tree.map(lambda a: a + 0.3, params)
    transform, _ = build(recipe, 10, SPECS)
    state, gradients, start = transform.init(params), [], params
    for step in range(STEPS):
        keys = iter(jax.random.split(jax.random.key(step + 1), 100))
        gradient = jax.tree.map(lambda a: jax.random.normal(next(keys), a.shape), params)  # noqa: B023
        gradients.append(gradient)
        updates, state = jax.jit(transform.update)(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)

    def named(tree):
        return {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(tree).items()}

    return named(start), [named(g) for g in gradients], named(params)


def adamw(p, gradients, r, decay):
    m = v = 0.0
    for t, g in enumerate(gradients, 1):
        m, v = r.b1 * m + (1 - r.b1) * g, r.b2 * v + (1 - r.b2) * g * g
        step = (m / (1 - r.b1**t)) / (np.sqrt(v / (1 - r.b2**t)) + r.epsilon)
        p = p - r.learning_rate * (step + decay * p)
    return p


def lion(p, gradients, r, decay):
    m = 0.0
    for g in gradients:
        step, m = np.sign(r.b1 * m + (1 - r.b1) * g), r.b2 * m + (1 - r.b2) * g
        p = p - r.learning_rate * (step + decay * p)
    return p


def sgd(p, gradients, r, decay):
    m = 0.0
    for g in gradients:
        m = r.momentum * m + (g + decay * p)
        p = p - r.learning_rate * m
    return p


def newton_schulz(matrix):
    """Muon's five quintic iterations on one matrix, from the published coefficients."""
    flip = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if flip else matrix
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x.T if flip else x


def muon(p, gradients, r, decay, inputs):
    """Each layer's weight as a matrix of what it contracts against the rest."""
    shape = p.shape
    p = p.reshape(shape[0], int(np.prod(shape[1 : 1 + inputs])), -1)
    m = np.zeros_like(p)
    for t, g in enumerate(gradients, 1):
        g = g.reshape(p.shape)
        m = r.momentum * m + (1 - r.momentum) * g
        nesterov = r.momentum * m / (1 - r.momentum ** (t + 1)) + (1 - r.momentum) * g / (1 - r.momentum**t)
        step = np.stack([newton_schulz(layer) for layer in nesterov]) * np.sqrt(max(p.shape[1:])) * 0.2
        p = p - r.learning_rate * (step + decay * p)
    return p.reshape(shape)


RULES = {AdamW: adamw, Lion: lion, SGD: sgd}


@pytest.mark.parametrize(
    "recipe",
    [AdamW(schedule=FLAT), Lion(schedule=FLAT), SGD(schedule=FLAT, weight_decay=0.01), Muon(schedule=FLAT)],
    ids=lambda r: type(r).__name__,
)
def test_three_steps_equal_an_independent_version(recipe):
    start, gradients, after = trajectory(recipe)
    decays = named_leaves(decayed(SPECS))
    specs = named_leaves(SPECS, is_leaf=is_spec)
    for name, p in start.items():
        decay, own = (recipe.weight_decay if decays[name] else 0.0), [g[name] for g in gradients]
        if isinstance(recipe, Muon) and specs[name].inputs:
            expected = muon(p, own, recipe, decay, specs[name].inputs)
        elif isinstance(recipe, Muon):
            expected = adamw(p, own, AdamW(recipe.learning_rate, b1=recipe.b1, b2=recipe.b2), decay)
        else:
            expected = RULES[type(recipe)](p, own, recipe, decay)
        np.testing.assert_allclose(after[name], expected, rtol=2e-5, atol=2e-6, err_msg=name)


def test_adafactor_equals_an_independent_version_where_it_factors():
    recipe = Adafactor(learning_rate=0.01, schedule=FLAT, weight_decay=0.0)
    random = np.random.default_rng(0)
    specs = {"w": ParamSpec((130, 140), ("embed", "mlp"), 1)}
    p = random.normal(size=(130, 140))
    transform, _ = build(recipe, 10, specs)
    params = {"w": jnp.asarray(p, jnp.float32)}
    state, rows, columns = transform.init(params), np.zeros(130), np.zeros(140)
    assert sum(a.size for a in jax.tree.leaves(state)) < 130 + 140 + 20, "second moments must be factored"
    for t in range(1, 4):
        g = random.normal(size=p.shape)
        updates, state = transform.update({"w": jnp.asarray(g, jnp.float32)}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        beta = 1 - t**-0.8
        rows = beta * rows + (1 - beta) * (g * g + 1e-30).mean(1)
        columns = beta * columns + (1 - beta) * (g * g + 1e-30).mean(0)
        step = g / np.sqrt(np.outer(rows, columns) / rows.mean())
        p = p - 0.01 * step / max(1.0, np.sqrt((step**2).mean()))
    np.testing.assert_allclose(params["w"], p, rtol=1e-4, atol=1e-5)


def test_what_decays_is_weights_and_tables_of_words_not_biases_norms_or_positions():
    names = {name for name, decays in named_leaves(decayed(SPECS)).items() if decays}
    parts = (
        "attention/query",
        "attention/key",
        "attention/value",
        "attention/output",
        "feedforward/gate",
        "feedforward/up",
        "feedforward/down",
    )
    assert names == {"embed"} | {f"layers/0/0/{part}/weight" for part in parts}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", {0: 0.0, 5: 0.5, 10: 1.0, 55: 1.0, 100: 1.0}),
        ("linear", {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.55, 100: 0.1}),
        ("cosine", {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.55, 100: 0.1}),
        ("wsd", {0: 0.0, 5: 0.5, 10: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
    ],
)
def test_schedules_are_their_formulas(kind, expected):
    rate = Schedule(kind=kind, warmup=10, final=0.1, decay=0.2).rate(2.0, 100)
    for step, share in expected.items():
        np.testing.assert_allclose(rate(step), 2.0 * share, rtol=1e-5, atol=1e-7, err_msg=f"step {step}")


def test_a_run_shorter_than_its_warmup_still_has_a_schedule():
    for kind in ("constant", "linear", "cosine", "wsd"):
        rate = Schedule(kind=kind, warmup=50).rate(1.0, 10)
        assert np.isfinite([float(rate(step)) for step in range(11)]).all()


def test_recipes_have_no_field_without_a_reader():
    """Every knob of every optimizer changes what it does."""
    for recipe in (AdamW(), Adam8bit(), Adafactor(), Lion(), Muon(), SGD(weight_decay=0.01)):
        _, _, plain = trajectory(dataclasses.replace(recipe, schedule=FLAT))
        for field in dataclasses.fields(recipe):
            if field.name in ("schedule", "clip"):  # read by build and by the step
                continue
            value = getattr(recipe, field.name)
            changed = dataclasses.replace(recipe, schedule=FLAT, **{field.name: value * 0.7 + 1e-3})
            _, _, other = trajectory(changed)
            assert any((plain[name] != other[name]).any() for name in plain), f"{type(recipe).__name__}.{field.name} does nothing"


MIXED = transformer.specs(
    Transformer(vocab=160, layers=2, embed=136, heads=8, kv_heads=2, mlp=192, experts=2, expert_mlp=144, shared_experts=1, tied=False)
)
ROWS_AND_COLUMNS = partial(jax.tree.map, lambda _: optax.contrib.MuonDimensionNumbers(0, 1))
TO_ADAMS_SIZE = optax.stateless(lambda updates, _: jax.tree.map(lambda u: 0.2 * math.sqrt(max(u.shape)) * u, updates))
ALONE = {
    Adafactor: optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
    Muon: optax.chain(optax.contrib.scale_by_muon(weight_dimension_numbers=ROWS_AND_COLUMNS), TO_ADAMS_SIZE),
}
"""What optax does of one matrix, or vector."""


@pytest.mark.parametrize("kind", ALONE)
def test_each_layers_and_experts_matrix_is_one_of_its_own(kind):
    """Stacked parameters move as each layer's and expert's `[in, out]` does by itself."""
    specs = {
        name: spec for name, spec in named_leaves(MIXED, is_leaf=is_spec).items() if kind is Adafactor or (spec.layers and spec.inputs)
    }

    def apart(tree):
        found = {}
        for name, spec in specs.items():
            stacked = spec.shape[: sum(axis in ("layers", "experts") for axis in spec.axes)]
            shape = spec.shape[len(stacked) :]
            rows = math.prod(shape[: spec.inputs or 1])
            found |= {(name, place): tree[name][place].reshape((rows, -1) if len(shape) > 1 else rows) for place in np.ndindex(*stacked)}
        return found

    together, _ = build(kind(learning_rate=1.0, weight_decay=0.0, schedule=FLAT), 10, specs)
    params = initial_values(jax.random.key(0), specs)
    state, alone = together.init(params), ALONE[kind].init(apart(params))
    for step in range(STEPS):
        keys = dict(zip(specs, jax.random.split(jax.random.key(step + 1), len(specs)), strict=True))
        gradient = {
            name: jax.random.normal(keys[name], spec.shape) * 10.0 ** -jnp.arange(spec.shape[0]).reshape([-1] + [1] * (len(spec.shape) - 1))
            for name, spec in specs.items()
        }
        updates, state = jax.jit(together.update)(gradient, state, params)
        expected, alone = jax.jit(ALONE[kind].update)(apart(gradient), alone, apart(params))
        for place, update in apart(updates).items():
            np.testing.assert_allclose(-update, expected[place], rtol=1e-4, atol=1e-4, err_msg=str(place))
    assert any("experts" in spec.axes for spec in specs.values())
