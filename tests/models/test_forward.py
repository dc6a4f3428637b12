"""One forward: stacked or as a tuple of layers, with a cache or without, packed or apart, recomputed or kept, with a mesh or without."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lmx.core.execution import Execution
from lmx.core.params import is_spec
from lmx.core.precision import policy
from lmx.core.tree import disagreement, map_named, named_leaves
from lmx.models import stack
from lmx.models.config import Transformer
from lmx.models.dropout import Dropout
from lmx.models.losses import cross_entropy
from lmx.models.transformer import Cache, empty_cache, flops_per_token, forward, specs
from lmx.parallel.layout import Layout, make_mesh
from lmx.parallel.rules import rules, shardings

RULES = rules(Layout())

LENGTH, SLOTS = 12, 16
SIZES = {"vocab": 24, "embed": 16, "heads": 4, "mlp": 24, "context": 16}
MODELS = {
    "rope, grouped, windows": Transformer(**SIZES, layers=5, kv_heads=2, pattern=("local", "global"), window=4, qk_norm=True),
    "alibi, multi-query": Transformer(**SIZES, layers=2, kv_heads=1, positions="alibi", attention_softcap=2.0, norm_placement="post"),
    "learned, biases": Transformer(
        **SIZES, layers=2, positions="learned", norm="layernorm", gated=False, bias=True, parallel=True, window=3, pattern=("local",)
    ),
}
WINDOWS = MODELS["rope, grouped, windows"]


def parameters(config: Transformer):
    """Weights large enough that every part of the model matters."""
    rng = np.random.default_rng(0)

    def value(name, spec):
        noise = 0.3 * rng.normal(size=spec.shape)
        return jnp.asarray(1 + noise if name.endswith("scale") else noise, jnp.float32)

    return map_named(value, specs(config), is_leaf=is_spec)


def tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 24, shape).astype(np.int32)


run = jax.jit(forward, static_argnames=("config", "execution"))


def close(a, b, tolerance=2e-5) -> bool:
    return float(np.abs(a - b).max()) <= tolerance * float(np.abs(b).max())


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param], parameters(MODELS[request.param])


@pytest.fixture(scope="module")
def windows():
    return WINDOWS, parameters(WINDOWS)


LEFT = {
    "positions": np.stack([np.arange(LENGTH), np.maximum(np.arange(LENGTH) - 5, 0)]).astype(np.int32),
    "segments": np.stack([np.ones(LENGTH), np.arange(LENGTH) >= 5]).astype(np.int32),
}
"""Two rows, the second padded with five tokens on the left."""


def test_a_stack_is_its_pattern_as_often_as_it_fits_and_the_rest_of_it():
    config = Transformer(layers=26, window=4, pattern=("local",) * 5 + ("global",))
    whole, rest = stack.groups(config)
    assert (whole.repeats, whole.pattern, whole.first) == (4, config.pattern, 0)
    assert (rest.repeats, rest.pattern, rest.first) == (1, ("local", "local"), 24)
    assert [whole.layer(r, p) for r in range(4) for p in range(6)] == list(range(24))
    short = stack.groups(Transformer(layers=1, window=4, pattern=("local", "global")))
    assert [(g.pattern, g.repeats) for g in short] == [(("local",), 1)]


def test_stack_undoes_unstack_to_the_bit(windows):
    config, params = windows
    layers = stack.unstack(params["layers"])
    assert [len(group) for group in layers] == [4, 1]
    back = stack.stack(layers, config)
    assert jax.tree.structure(back) == jax.tree.structure(params["layers"])
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, back, params["layers"])))
    # Layers keep their order: layer i of the tuple is place i % 2 of repeat i // 2.
    for i in range(4):
        expected = params["layers"][0][str(i % 2)]["feedforward"]["up"]["weight"][i // 2]
        assert np.array_equal(layers[0][i]["feedforward"]["up"]["weight"], expected)


def test_a_tuple_of_layers_computes_what_the_scanned_stack_does(model):
    config, params = model
    unrolled = params | {"layers": stack.unstack(params["layers"])}
    rows = tokens(1, 2, LENGTH)
    assert close(run(unrolled, config, rows, **LEFT).hidden, run(params, config, rows, **LEFT).hidden, 5e-6)


@pytest.mark.parametrize("unrolled", [False, True], ids=["stacked", "unrolled"])
def test_a_cache_filled_in_pieces_gives_the_full_forward(model, unrolled):
    config, params = model
    rows = tokens(1, 2, LENGTH)
    full = np.asarray(run(params, config, rows, **LEFT).hidden)
    if unrolled:
        params = params | {"layers": stack.unstack(params["layers"])}
    real = LEFT["segments"] > 0
    for pieces in ([1] * LENGTH, [4, 4, 4], [4, 4, 1, 1, 1, 1]):
        cache, found, at = empty_cache(config, 2, SLOTS, unrolled=unrolled), [], 0
        structure = jax.tree.structure(cache)
        for size in pieces:
            piece = slice(at, at + size)
            output = run(params, config, rows[:, piece], **{n: a[:, piece] for n, a in LEFT.items()}, cache=cache)
            cache, at = output.cache, at + size
            found.append(np.asarray(output.hidden))
        assert close(np.concatenate(found, 1)[real], full[real])
        assert jax.tree.structure(cache) == structure
        assert int(cache.used) == LENGTH
        assert np.array_equal(cache.segments, np.pad(LEFT["segments"], ((0, 0), (0, SLOTS - LENGTH))))


def test_a_cache_is_as_exact_as_the_forward_in_64_bits():
    config, read = MODELS["alibi, multi-query"], tokens(0, 2, LENGTH)
    with jax.enable_x64(True):
        precise = Execution(precision=policy("fp64"))
        params = jax.tree.map(lambda a: np.asarray(a, np.float64), parameters(config))
        prefix = (np.arange(LENGTH) < 3).astype(np.int32) * np.ones((2, 1), np.int32)
        cache = empty_cache(config, 2, SLOTS, jnp.float64, unrolled=False)
        found = run(params, config, read, prefix=prefix, cache=cache, execution=precise)
        expected = run(params, config, read, prefix=prefix, execution=precise)
    assert found.cache.positions.dtype == jnp.int32
    assert close(found.hidden, expected.hidden, 1e-12)


def test_positions_go_on_where_the_cache_ends(windows):
    config, params = windows
    rows = tokens(2, 2, LENGTH)
    full = run(params, config, rows).hidden
    cache = empty_cache(config, 2, SLOTS, unrolled=False)
    first = run(params, config, rows[:, :4], cache=cache)
    second = run(params, config, rows[:, 4:8], cache=first.cache)
    assert isinstance(second.cache, Cache)
    assert np.array_equal(second.cache.positions[0, :8], np.arange(8))
    assert close(second.hidden, full[:, 4:8])


def test_a_text_padded_on_the_left_is_the_text_alone(model):
    config, params = model
    rows = tokens(1, 2, LENGTH)
    padded = run(params, config, rows, **LEFT).hidden[1, 5:]
    alone = run(params, config, np.pad(rows[1:, 5:], ((0, 1), (0, 5)))).hidden[0, :7]
    assert close(padded, alone, 5e-6)


PACKED = {
    "positions": np.array([[*range(5), *range(6), 0]], np.int32),
    "segments": np.array([[1] * 5 + [2] * 6 + [0]], np.int32),
}


def test_packed_texts_are_what_they_are_apart(model):
    config, params = model
    row = tokens(3, 1, LENGTH)
    packed = run(params, config, row, **PACKED).hidden
    apart = np.zeros((2, LENGTH), np.int32)
    apart[0, :5], apart[1, :6] = row[0, :5], row[0, 5:11]
    found = run(params, config, apart).hidden
    assert close(packed[0, :5], found[0, :5], 5e-6)
    assert close(packed[0, 5:11], found[1, :6], 5e-6)
    assert bool(jnp.isfinite(packed).all())


def test_a_packed_text_does_not_see_its_neighbour(model):
    config, params = model
    row = tokens(3, 1, LENGTH)
    before = np.asarray(run(params, config, row, **PACKED).hidden)
    for changed, kept in ((slice(0, 5), slice(5, 11)), (slice(5, 11), slice(0, 5)), (slice(11, 12), slice(0, 11))):
        other = row.copy()
        other[:, changed] = (other[:, changed] + 1) % 24
        after = np.asarray(run(params, config, other, **PACKED).hidden)
        assert np.array_equal(after[:, kept], before[:, kept])
        assert not np.array_equal(after[:, changed], before[:, changed])


def test_the_past_does_not_see_the_future(model):
    config, params = model
    rows = tokens(4, 2, LENGTH)
    before = np.asarray(run(params, config, rows, **LEFT).hidden)
    other = rows.copy()
    other[:, 7] = (other[:, 7] + 1) % 24
    after = np.asarray(run(params, config, other, **LEFT).hidden)
    assert np.array_equal(after[:, :7], before[:, :7])
    assert all(not np.array_equal(after[:, i], before[:, i]) for i in range(7, 7 + (config.window or 4)))


def test_a_local_layer_sees_its_window_and_no_more():
    config = MODELS["learned, biases"]
    params = parameters(config)
    rows = tokens(5, 2, LENGTH)
    before = np.asarray(run(params, config, rows, **LEFT).hidden)[0]
    other = rows.copy()
    other[0, 2] = (other[0, 2] + 1) % 24
    after = np.asarray(run(params, config, other, **LEFT).hidden)[0]
    # Two layers of window 3 carry a token four places on.
    changed = [i for i in range(LENGTH) if not np.array_equal(after[i], before[i])]
    assert changed == [2, 3, 4, 5, 6]


@partial(
    jax.jit,
    static_argnames=("config", "execution"),
    compiler_options={"xla_backend_optimization_level": 0},  # half the time to compile
)
def loss_and_gradient(params, config, batch, execution=Execution(), dropout=None):
    def loss(params):
        inputs = {name: batch[name] for name in ("positions", "segments")}
        hidden = forward(params, config, batch["tokens"], **inputs, execution=execution, dropout=dropout).hidden
        return cross_entropy(params, config, hidden, batch["targets"], batch["weights"], execution=execution)[0]

    return jax.value_and_grad(loss)(params)


def batch_of(rows: int) -> dict[str, np.ndarray]:
    inputs = {name: np.tile(a, (rows // 2, 1)) for name, a in LEFT.items()}
    weights = (inputs["segments"] > 0).astype(np.float32)
    return inputs | {"tokens": tokens(6, rows, LENGTH), "targets": tokens(7, rows, LENGTH), "weights": weights}


@pytest.fixture(scope="module")
def kept(windows):
    return loss_and_gradient(windows[1], WINDOWS, batch_of(2))


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputing_changes_neither_loss_nor_gradients(windows, kept, remat):
    loss, gradient = loss_and_gradient(windows[1], WINDOWS, batch_of(2), Execution(remat=remat))
    assert float(loss) == pytest.approx(float(kept[0]), rel=1e-6)
    far = disagreement(gradient, kept[1])
    assert all(value <= 1e-5 for value in far.values()), far


def test_recomputing_keeps_less_the_more_it_recomputes(windows):
    config, params = windows

    def kept_numbers(remat):
        def hidden(params):
            return forward(params, config, tokens(6, 2, LENGTH), execution=Execution(remat=remat)).hidden

        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(hidden, p)[1], params)))

    none, dots, full = (kept_numbers(remat) for remat in ("none", "dots", "full"))
    assert full < 0.75 * dots
    assert dots < 0.75 * none


def test_rules_without_a_mesh_do_nothing(windows):
    config, params = windows
    rows = tokens(1, 2, LENGTH)

    def jaxpr(execution):
        return str(jax.make_jaxpr(lambda p: forward(p, config, rows, execution=execution).hidden)(params))

    assert jaxpr(Execution(rules=RULES)) == jaxpr(Execution())


@pytest.mark.usefixtures("compiled_here")
def test_a_mesh_changes_neither_loss_gradients_nor_dropout():
    config = Transformer(**SIZES, layers=2, kv_heads=2)
    params, batch = parameters(config), batch_of(4)
    dropout = Dropout(jax.random.key(3), np.arange(10, 14, dtype=np.int32), 0.3)
    loss, gradient = jax.device_get(loss_and_gradient(params, config, batch, dropout=dropout))
    mesh = make_mesh(Layout(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(params, shardings(specs(config), mesh, RULES))
    there, examples = jax.device_put((batch, dropout.example_id), NamedSharding(mesh, P(("data", "fsdp"))))
    with jax.set_mesh(mesh):
        found = loss_and_gradient(placed, config, there, Execution(rules=RULES), dropout.replace(example_id=examples))
    assert float(found[0]) == pytest.approx(float(loss), rel=1e-5)
    far = disagreement(found[1], gradient)
    assert all(value <= 2e-5 for value in far.values()), far
    # Another key drops others: what agrees above is no model without dropout.
    other = loss_and_gradient(params, config, batch, dropout=dropout.replace(key=jax.random.key(4)))[0]
    assert abs(float(other) - float(loss)) > 1e-3 * float(loss)


def test_the_parameter_table_has_what_the_config_says_and_nothing_else():
    def names(**knobs):
        return set(named_leaves(specs(Transformer(**SIZES, layers=1, **knobs)), is_leaf=is_spec))

    plain = {f"layers/0/0/attention/{n}/weight" for n in ("query", "key", "value", "output")}
    plain |= {f"layers/0/0/feedforward/{n}/weight" for n in ("gate", "up", "down")}
    norms = {"layers/0/0/attention_norm/scale", "layers/0/0/feedforward_norm/scale", "norm/scale"}
    assert names() == plain | norms | {"embed"}
    assert names(parallel=True) == names() - {"layers/0/0/feedforward_norm/scale"}
    assert names(gated=False) == names() - {"layers/0/0/feedforward/gate/weight"}
    assert names(tied=False) == names() | {"head"}
    assert names(positions="learned") == names() | {"positions"}
    assert names(qk_norm=True) == names() | {f"layers/0/0/attention/{n}_norm/scale" for n in ("query", "key")}
    post = {"layers/0/0/attention_norm_post/scale", "layers/0/0/feedforward_norm_post/scale"}
    assert names(norm_placement="post") == plain | post | {"embed"}
    assert names(norm_placement="sandwich") == names() | post
    assert names(bias=True) == names() | {n.replace("weight", "bias") for n in plain}
    assert names(bias=True, norm="layernorm") == names(bias=True) | {n.replace("scale", "bias") for n in norms}


def test_flops_of_gpt2_small_are_those_of_the_formula():
    config = Transformer(vocab=50257, layers=12, embed=768, heads=12, positions="learned", norm="layernorm", gated=False, bias=True)
    multiplied = 12 * 12 * 768**2 + 50257 * 768
    assert flops_per_token(config, 1024) == 6 * multiplied + 12 * 12 * 768 * 1024
