"""Eight-bit moments: the quantiser against brute force, the optimizer against AdamW in fp32, on one device and on meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from test_layouts import train

from lmx.core import params as parameters
from lmx.core.params import ParamSpec
from lmx.core.tree import named_leaves
from lmx.models import transformer
from lmx.models.config import Transformer
from lmx.parallel import cost
from lmx.parallel.layout import AXES, Layout
from lmx.parallel.rules import like_parameters, rules
from lmx.train import loop, quantised
from lmx.train.optimizers import Adam8bit, AdamW, Schedule, build

FLAT = Schedule(kind="constant", warmup=0)
TINY = np.finfo(np.float32).tiny


def numbers(signed: bool) -> np.ndarray:
    """The codes as the paper draws them (figure 2): a sign, zeros that are a power of ten, a bit, and a linear fraction of what is left."""
    found = {0.0, 1.0}
    for word in range(1, 2**7 if signed else 2**8):
        exponent = word.bit_length() - (1 if signed else 2)
        if exponent < 0:  # without a sign, there are two fractions in the lowest decade
            continue
        bits = exponent if signed else exponent + 1
        fraction = word - 2**bits
        value = 10.0 ** (exponent - 6) * (0.1 + 0.9 * (fraction + 0.5) / 2**bits)
        found |= {value, -value} if signed else {value}
    return np.array(sorted(found)).astype(np.float32)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_papers(signed):
    mine = quantised.codes(signed=signed)
    assert len(mine) == 256 == len(set(mine))
    np.testing.assert_allclose(mine, numbers(signed), rtol=2e-7)


def brute(x: np.ndarray, tile: tuple[int, ...], signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Block after block and number after number, the nearest of all codes (the lower of two) in float64."""
    table = quantised.codes(signed=signed).astype(np.float64)
    x = np.where(np.abs(x) < TINY, np.float32(0), x)
    found, scales = np.empty(x.shape, np.uint8), np.empty([n // t for n, t in zip(x.shape, tile, strict=True)], np.float32)
    for place in np.ndindex(*scales.shape):
        block = tuple(slice(p * t, (p + 1) * t) for p, t in zip(place, tile, strict=True))
        scales[place] = np.abs(x[block]).max()
        shares = x[block] / (scales[place] or np.float32(1))
        nearest = np.abs(shares.astype(np.float64)[..., None] - table).argmin(-1)
        found[block] = nearest if signed else np.maximum(nearest, x[block] > 0)
    return found, scales


@pytest.mark.parametrize("tile", [(1, 256), (16, 16), (4, 64)])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_equal_brute_force_bit_by_bit(signed, tile):
    random = np.random.default_rng(0)
    x = (random.normal(size=(64, 512)) * 10.0 ** random.uniform(-12, 1, (64, 512))).astype(np.float32)
    table, rows = quantised.codes(signed=True), slice(32, 48)
    x[:16, :256] = 0
    x[16:32, :256] = random.uniform(-1, 1, (16, 256)) * TINY  # denormals
    x[rows, :256] = random.choice((table[1:] + table[:-1]) / 2, (16, 256)) * 4.0  # halfway between codes
    x[rows, :256:4] = 4.0
    x[48, :] *= 1e30
    x[49, :] *= 1e-25
    x = x if signed else np.abs(x)
    found, scales = jax.jit(quantised.quantise, static_argnums=1, static_argnames="signed")(x, tile, signed=signed)
    expected, largest = brute(x, tile, signed)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(scales, largest)
    back = np.asarray(quantised.dequantise(found, scales, tile, signed=signed))
    grown = np.kron(largest, np.ones(tile))
    assert (np.abs(back - x) <= np.abs(x) * 0.15)[np.abs(x) > 0.01 * grown + TINY].all()
    assert signed or (back[x >= TINY] > 0).all()


@pytest.mark.parametrize(
    ("shape", "axes", "tile"),
    [
        ((2, 4096, 14336), ("layers", "embed", "mlp"), (1, 16, 16)),
        ((2, 8, 4096, 14336), ("layers", "experts", "embed", "mlp"), (1, 1, 16, 16)),
        ((2, 4096, 32, 128), ("layers", "embed", "heads", "head_dim"), (1, 2, 1, 128)),
        ((2, 32, 128, 4096), ("layers", "heads", "head_dim", "embed"), (1, 1, 128, 2)),
        ((128256, 4096), ("vocab", "embed"), (16, 16)),
        ((50304, 768), ("vocab", "embed"), (32, 8)),
        ((64, 4096), ("layers", "embed"), None),
        ((2, 63, 65), ("layers", "embed", "mlp"), None),
        ((2, 100, 100), ("layers", "embed", "mlp"), None),
    ],
)
def test_blocks(shape, axes, tile):
    assert quantised.tile(ParamSpec(shape, axes, len(shape) > 2, layers=(0, 1) if axes[0] == "layers" else ())) == tile


MODEL = Transformer(vocab=128, layers=2, embed=64, heads=4, kv_heads=2, mlp=128, context=64)


def test_bytes_of_the_state_are_two_a_parameter_and_a_scale_a_block():
    specs = transformer.specs(MODEL)
    recipe = Adam8bit()
    state = jax.eval_shape(build(recipe, 10, specs)[0].init, parameters.abstract(specs))
    held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
    leaves = named_leaves(specs, is_leaf=parameters.is_spec).values()
    large = sum(np.prod(s.shape) for s in leaves if np.prod(s.shape[1:] if s.layers else s.shape) >= 4096)
    small = parameters.count(specs) - large
    assert small < 0.15 * large
    counts = 3 * 4  # of both kinds, and of the schedule
    assert held == large * (2 + 2 * 4 / 256) + 8 * small + counts


@pytest.mark.parametrize("layout", [Layout(fsdp=64, tensor=8), Layout(fsdp=8, zero=1), Layout(data=4, tensor=8)])
def test_scales_and_codes_are_split_as_parameters_are(layout):
    model = dataclasses.replace(MODEL, embed=4096, heads=32, kv_heads=8, mlp=14336, vocab=128256)
    specs = transformer.specs(model)
    mesh = AbstractMesh(tuple(getattr(layout, a) for a in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    shapes = {kind: jax.eval_shape(build(kind(), 10, specs)[0].init, parameters.abstract(specs)) for kind in (AdamW, Adam8bit)}
    here = {}
    for kind, state in shapes.items():
        shardings = like_parameters(state, specs, mesh, rules(layout, split=layout.zero >= 1))
        here[kind] = cost.held(jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings))
    assert here[Adam8bit] == pytest.approx(here[AdamW] * (2 + 2 / 64) / 8, rel=1e-2)


def losses_and_state(experiment, recipe, steps, **changes):
    losses, _, state = train(experiment(model=dataclasses.replace(MODEL, vocab=0), optimizer=recipe, **changes), steps)
    return losses, state


def test_a_hundred_steps_learn_as_adamw_does(experiment):
    rate = {"learning_rate": 1e-3, "schedule": FLAT}
    eight, state = losses_and_state(experiment, Adam8bit(**rate), 100)
    full, _ = losses_and_state(experiment, AdamW(**rate), 100)
    assert sum(a.size for a in jax.tree.leaves(state.optimizer) if a.dtype == jnp.uint8) > 100_000
    assert full[-1] < full[0] - 1.5
    assert (eight != full)[2:].all()
    np.testing.assert_allclose(eight[:20], full[:20], rtol=0.01)
    np.testing.assert_allclose(eight.reshape(10, 10).mean(1), full.reshape(10, 10).mean(1), rtol=0.03)


@pytest.mark.parametrize(
    "layout", [Layout(data=2, fsdp=2, zero=1), Layout(fsdp=4, tensor=2), Layout(fsdp=2, tensor=4, zero=2), Layout(data=2, pipeline=2)]
)
def test_steps_do_not_depend_on_the_layout(layout, experiment):
    recipe = Adam8bit(learning_rate=3e-3, schedule=FLAT)
    expected, one = losses_and_state(experiment, recipe, 10)
    losses, many = losses_and_state(experiment, recipe, 10, layout=layout, microbatches=2 if layout.pipeline > 1 else 1)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    for name, a in named_leaves(one.optimizer).items():
        if a.dtype == jnp.uint8:  # rounding may tip a number to the next code
            b = named_leaves(many.optimizer)[name]
            assert (np.abs(np.asarray(a, int) - np.asarray(b, int)) > 1).mean() < 0.02, name


def test_what_is_seen_no_more_takes_no_large_steps():
    """A mean square far below its block's largest is rounded up, not to zero: a step divides by its root."""
    spec = {"w": ParamSpec((64, 64), ("vocab", "embed"))}
    transform, _ = build(Adam8bit(learning_rate=1.0, schedule=FLAT, weight_decay=0.0), 300, spec)
    params = {"w": jnp.zeros((64, 64))}
    state, update = transform.init(params), jax.jit(transform.update)
    random = np.random.default_rng(0)
    for step in range(150):
        gradient = 100 * random.normal(size=(64, 64)).astype(np.float32)
        gradient[3] = 0.1 if step == 0 else 0.0
        updates, state = update({"w": jnp.asarray(gradient)}, state, params)
        assert np.abs(updates["w"]).max() < 5


def test_resuming_is_bit_exact(experiment):
    changes = {"model": dataclasses.replace(MODEL, vocab=0), "optimizer": Adam8bit(schedule=FLAT), "layout": Layout(fsdp=2, tensor=2)}
    whole = loop.run(loop.prepare_run(experiment(name="whole", **changes)))
    loop.run(loop.prepare_run(experiment(name="cut", steps=3, **changes)))
    resumed = loop.run(loop.prepare_run(experiment(name="cut", start="resume", **changes)))
    for a, b in zip(
        jax.tree.leaves((whole.state.params, whole.state.optimizer)),
        jax.tree.leaves((resumed.state.params, resumed.state.optimizer)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
