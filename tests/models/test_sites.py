"""Named sites against the NumPy transformer, and what must hold of reading and editing them."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy_transformer
import pytest
from test_against_numpy import CASES, PARTS, for_numpy, random_parameters, rows

from lmx.core.execution import Execution
from lmx.core.params import initial_values
from lmx.infer import generate
from lmx.models import sites, stack, transformer
from lmx.models.config import RWKV, EncoderDecoder, Transformer
from lmx.models.families import functions
from lmx.models.losses import logits
from lmx.models.sites import ablate, patch, steer
from lmx.models.transformer import Source, forward
from lmx.parallel.context import arrange, as_read
from lmx.parallel.layout import Layout, make_mesh
from lmx.parallel.rules import rules, shardings

SMALL = Transformer(vocab=17, layers=3, embed=16, heads=4, kv_heads=2, mlp=12, context=16, pattern=("global", "local"), window=4)
POST = replace(SMALL, norm_placement="post", pattern=("global",), window=None, positions="learned", causal=False, bias=True)
MODELS = {
    "decoder": SMALL,
    "encoder": POST,
    "pair": EncoderDecoder(**vars(replace(SMALL, positions="relative")), encoder=replace(POST, norm_placement="pre", positions="relative")),
    "parallel": replace(SMALL, parallel=True, norm_placement="sandwich"),
    "mixture": replace(SMALL, pattern=("global_dense", "global"), window=None, experts=4, expert_mlp=12),
    "rwkv": RWKV(vocab=17, layers=3, embed=16, mlp=12, rescale_every=2),
}
TOKENS = jax.random.randint(jax.random.key(1), (2, 8), 0, 17)
OTHERS = jax.random.randint(jax.random.key(2), (2, 8), 0, 17)


def of(name: str):
    """A model, and parameters larger than initial ones, so that what is read from afar matters."""
    model = MODELS[name]
    params = initial_values(jax.random.key(0), functions(model).specs(model))
    return model, jax.tree.map(lambda a: 8 * a if a.ndim > 2 else a, params)


def run(model, params, tokens=TOKENS, taps=(), edits=None, execution=Execution(), **more):
    if isinstance(model, EncoderDecoder) and "cache" not in more:
        more = {"source": Source(OTHERS[:, ::-1])} | more
    return functions(model).forward(params, model, tokens, edits=edits, execution=replace(execution, taps=taps), **more)


@cache
def whole(name: str):
    """One program that reads every site of a model, and can patch each of them: with `at` False it does not."""
    model, params = of(name)
    known = sites.names(model)
    shapes = jax.eval_shape(lambda params: run(model, params, taps=known), params).taps
    idle = {site: patch(jnp.zeros(shape.shape, shape.dtype), at=jnp.array(False)) for site, shape in shapes.items()}

    @jax.jit
    def compiled(params, tokens, segments, edits):
        return run(model, params, tokens, known, edits, segments=segments)

    def call(params=params, tokens=TOKENS, segments=jnp.ones_like(TOKENS), **patches):
        put = {site: patch(jnp.broadcast_to(value, idle[site].value.shape), at=jnp.array(True)) for site, value in patches.items()}
        return compiled(params, tokens, segments, idle | put)

    return call


def apart(a, b) -> float:
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


def alike(found: dict, expected: dict, bound: float = 2e-6) -> None:
    """Each value by name, as close as `bound` of its largest number."""
    assert set(found) == set(expected)
    for name, exact in expected.items():
        assert apart(found[name], exact) < bound, name


class Rows:
    """What the NumPy transformer calls: it keeps what has a name, by row, and changes what `edits` say, `{name: function of a value}`."""

    def __init__(self, edits=None):
        self.found, self.edits = [{} for _ in range(2)], edits or {}

    def sites(self):
        def of_row(row):
            def site(name, value):
                value = self.edits.get(name, lambda value, row: value)(value, row)
                self.found[row][name] = value.copy()
                return value

            return site

        return [of_row(row) for row in range(2)]


def papers(config, params, batch, edits=None):
    """Logits and the values at every site, from NumPy."""
    source = tuple(batch[f"source_{n}"] for n in PARTS) if isinstance(config, EncoderDecoder) else None
    rows = Rows(edits)
    kinds = batch["token_types"], batch["block_positions"]
    found = numpy_transformer.logits(for_numpy(params, config), config, *(batch[n] for n in PARTS), source, *kinds, rows.sites())
    return found, {name: np.stack([row[name] for row in rows.found]) for name in rows.found[0]}


@partial(jax.jit, static_argnums=(1, 3))
def ours(params, config, batch, taps, edits):
    source = Source(*(batch[f"source_{n}"] for n in PARTS)) if isinstance(config, EncoderDecoder) else None
    more = {"block_positions": batch["block_positions"]} if config.block_positions else {}
    execution = Execution(taps=taps)
    places = {name: batch[name] for name in ("positions", "segments", "token_types")}
    output = forward(params, config, batch["tokens"], **places, **more, source=source, edits=edits, execution=execution)
    return logits(params, config, output.hidden), output.taps


def narrow(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32 if a.dtype == np.float64 else jnp.int32), tree)


@pytest.mark.parametrize("case", ["d", "q", "x", "B"])
def test_every_site_and_edit_is_as_in_numpy(case):
    """All sites by name; then, of some, edits of every kind made in both."""
    kind, config = CASES[case]
    batch, params = rows(kind), random_parameters(config, ord(case))
    known = sites.names(config)
    _, exact = papers(config, params, batch)
    assert set(exact) == set(known)

    rng = np.random.default_rng(0)
    last = config.layers - 1
    vector, mean = rng.normal(size=config.embed), rng.normal(size=config.head_size)
    given = rng.normal(size=exact["layers/0/feedforward/hidden"].shape)
    head, at = np.arange(config.heads) == 1, rng.uniform(size=(2, 8, 1)) < 0.3
    plain = {
        "layers/0/attention/scores": lambda a, row: np.where(head[:, None, None], a + np.arange(8), a),
        f"layers/{last}/attention/mixed": lambda a, row: np.where(head[:, None], mean, a),
        "layers/0/feedforward/hidden": lambda a, row: np.where(at[row], given[row], a),
        "layers/1/output": lambda a, row: a + vector,
    }
    edits = {
        "layers/0/attention/scores": steer(np.arange(8.0), at=head[:, None, None]),
        f"layers/{last}/attention/mixed": ablate(mean, at=head[:, None]),
        "layers/0/feedforward/hidden": patch(given, at=at),
        "layers/1/output": steer(vector),
    }
    if isinstance(config, EncoderDecoder):
        plain["layers/1/cross/weights"] = lambda a, row: np.where(head[:, None, None], 0.0, a)
        edits["layers/*/cross/weights"] = ablate(at=head[:, None, None], layer=jnp.array(1))
        plain["encoder/layers/1/residual"] = lambda a, row: a - vector
        edits["encoder/layers/*/residual"] = steer(-vector, layer=jnp.array(1))
    expected, changed = papers(config, params, batch, plain)
    found, values = ours(narrow(params), config, narrow(batch), known, edits)
    np.testing.assert_allclose(found, expected, atol=3e-5 * np.abs(expected).max())
    for name in known:
        np.testing.assert_allclose(values[name], changed[name], atol=3e-5 * np.abs(changed[name]).max(), err_msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_sums_of_their_sites(name):
    """What a sublayer gives is what is added to the residual stream, and of a post-norm layer what is normalised with it."""
    model, params = of(name)
    values = whole(name)().taps
    assert set(values) == set(sites.names(model))
    for i in range(model.layers):
        at = {site: values[f"layers/{i}/{site}"] for site in sites.of_layer(model, model.pattern[i % len(model.pattern)])}
        if i:
            np.testing.assert_array_equal(at["input"], values[f"layers/{i - 1}/output"])
        if name == "encoder":
            assert apart(at["residual"].mean(-1), 1.0) > 0.1
            continue
        total = at["input"] + at["attention/output"]
        if "cross/input" in at:
            assert apart(at["cross/input"], total) < 1e-6
            total += at["cross/output"]
        if "residual" in at:
            assert apart(at["residual"], total) < 1e-6
        halved = isinstance(model, RWKV) and (i + 1) % model.rescale_every == 0
        assert apart(at["output"], (total + at["feedforward/output"]) / (2 if halved else 1)) < 1e-6
        if "attention/weights" in at:
            weights = at["attention/weights"]
            assert apart(weights.sum(-1), 1.0) < 1e-6
            value = jnp.repeat(at["attention/value"], model.heads // model.key_heads, 2)
            assert apart(jnp.einsum("bhqk,bkhd->bqhd", weights, value), at["attention/mixed"]) < 1e-6
    np.testing.assert_array_equal(values["layers/0/input"], values["embeddings"])
    assert apart(values["final"], run(model, params).hidden) < 2e-6
    assert not run(model, params).taps


@pytest.mark.parametrize("name", MODELS)
def test_what_was_read_and_is_written_back_changes_nothing(name):
    before = whole(name)()
    after = whole(name)(**before.taps)
    jax.tree.map(np.testing.assert_array_equal, after.taps | {"": after.hidden}, before.taps | {"": before.hidden})


@pytest.mark.parametrize("name", MODELS)
def test_a_patched_residual_stream_is_the_other_run_from_there_on(name):
    model, params = of(name)
    own, other = whole(name)(), whole(name)(tokens=OTHERS)
    for layer in range(model.layers):
        site = f"layers/{layer}/output"
        found = whole(name)(**{site: other.taps[site]})
        assert apart(logits(params, model, found.hidden), logits(params, model, other.hidden)) < 2e-6
        np.testing.assert_array_equal(found.taps[f"layers/{layer}/input"], own.taps[f"layers/{layer}/input"])
        assert apart(own.taps[site], other.taps[site]) > 0.1


def test_a_head_ablated_is_one_whose_output_projection_is_zero():
    _, params = of("decoder")
    mixed = whole("decoder")().taps["layers/0/attention/mixed"]
    found = whole("decoder")(**{"layers/0/attention/mixed": mixed.at[:, :, 2].set(0)})
    weight = params["layers"][0]["0"]["attention"]["output"]["weight"]
    params["layers"][0]["0"]["attention"]["output"]["weight"] = weight.at[0, 2].set(0)
    assert apart(found.hidden, whole("decoder")(params).hidden) < 2e-6


def test_an_expert_that_the_router_never_picks():
    _, params = of("mixture")
    site = "layers/1/router/logits"
    before = whole("mixture")()
    patched = {site: before.taps[site].at[..., 0].set(-1e9)}
    found = whole("mixture")(**patched).hidden
    for weight in ("gate", "up", "down"):
        params["layers"][0]["1"]["experts"][weight]["weight"] *= jnp.array([0.0, 1, 1, 1])[:, None, None]
    assert apart(whole("mixture")(params, **patched).hidden, found) < 1e-6
    assert apart(before.hidden, found) > 1e-3


def test_attention_to_one_token_knocked_out():
    """The first layer's scores of minus infinity are a segment of its own."""
    apart_ = jnp.arange(8) == 5
    knocked = {
        "layers/0/attention/scores": jnp.where(apart_ ^ apart_[:, None], -jnp.inf, whole("encoder")().taps["layers/0/attention/scores"])
    }
    found = whole("encoder")(**knocked).taps["layers/0/attention/output"]
    exact = whole("encoder")(segments=jnp.where(apart_, 2, 1)[None].repeat(2, 0)).taps["layers/0/attention/output"]
    assert apart(found, exact) < 2e-6


@pytest.mark.parametrize(("name", "remat"), [("decoder", "sites"), ("rwkv", "full")])
def test_the_gradient_of_steering_is_the_slope_of_the_loss(name, remat):
    """Of a vector for each layer, token and row; whatever is kept for the backward pass."""
    model, params = of(name)
    execution = Execution(remat=remat, sites=("query", "key", "value", "mixed", "hidden") if remat == "sites" else ())
    weights = jax.random.normal(jax.random.key(5), (2, 8, 16))

    @jax.jit
    @jax.value_and_grad
    def loss(vectors):
        edits = {"layers/*/residual": steer(vectors, layer=jnp.arange(model.layers))}
        return (run(model, params, edits=edits, execution=execution).hidden * weights).sum()

    at = jnp.zeros((model.layers, 2, 8, 16))
    _, gradient = loss(at)
    direction = jax.random.normal(jax.random.key(6), at.shape)
    for layer in range(model.layers):
        step = 1e-3 * direction * (jnp.arange(model.layers) == layer)[:, None, None, None]
        slope = (loss(step)[0] - loss(-step)[0]) / 2
        assert float((gradient * step).sum()) == pytest.approx(float(slope), rel=0.03, abs=2e-4)


def test_the_gradient_of_a_vector_of_zeros_is_that_of_the_residual_stream():
    """After the last layer: that of the final norm and the head alone."""
    model, params = of("decoder")
    output = whole("decoder")()

    def after(x):
        return logits(params, model, transformer.leave(params, model, x, Execution()))[..., 3].sum()

    def all_of_it(vector):
        edits = {"layers/2/output": steer(vector)}
        return logits(params, model, run(model, params, edits=edits).hidden)[..., 3].sum()

    exact = jax.grad(after)(output.taps["layers/2/output"])
    assert apart(jax.jit(jax.grad(all_of_it))(jnp.zeros((2, 8, 16))), exact) < 1e-5


@pytest.mark.parametrize("form", ["scanned", "unrolled"])
def test_a_layer_by_its_number_and_many_at_once(form):
    """Names, dynamic numbers and vectors for many layers say the same; other values and layers are the same program."""
    model, params = of("decoder")
    if form == "unrolled":
        params = params | {"layers": stack.unstack(params["layers"])}
    vectors = jax.random.normal(jax.random.key(3), (3, 16))
    traced = []

    @jax.jit
    def found(edits):
        traced.append(edits)
        return run(model, params, edits=edits).hidden

    numbered = [found({"layers/*/output": steer(vectors[i], layer=jnp.array(i))}) for i in range(3)]
    assert len(traced) == 1
    assert apart(numbered[1], numbered[0]) > 0.01
    at = (jnp.arange(8) % 2 == 0)[:, None]
    three = found({f"layers/{i}/output": steer(vectors[i], at=at) for i in range(3)})
    order = jnp.array([2, 0, 1])
    many = {"layers/*/output": steer(vectors[order][:, None, None], at=jnp.stack([at[None]] * 3), layer=order)}
    np.testing.assert_allclose(found(many), three, atol=1e-6)
    swept = jax.vmap(lambda v, i: found({"layers/*/output": steer(v, layer=i)}))(vectors, jnp.arange(3))
    np.testing.assert_allclose(swept, jnp.stack(numbered), atol=1e-6)


@pytest.mark.parametrize("name", ["decoder", "pair", "mixture", "rwkv"])
def test_token_by_token_all_is_as_in_the_full_forward(name):
    """With edits of the values that are kept for later tokens."""
    model, params = of(name)
    params = params | {"layers": stack.unstack(params["layers"])}
    taps = tuple(site for site in sites.names(model) if not site.startswith("encoder/") and "/cross/" not in site)
    taps += ("layers/*/cross/weights",) if name == "pair" else ()
    shapes = whole(name)().taps
    edited = {site: jax.random.normal(jax.random.key(7), shapes[site].shape) for site in ("layers/0/attention/value", "layers/1/residual")}
    exact = whole(name)(**edited)

    @jax.jit
    def step(cache, token, edits, more):
        return run(model, params, token, taps=taps, edits=edits, cache=cache, **more)

    cache, found = functions(model).empty_cache(model, 2, 8), []
    for i in range(8):
        more = {"source": Source(OTHERS[:, ::-1])} if name == "pair" and i == 0 else {}
        output = step(cache, TOKENS[:, i : i + 1], {site: patch(value[:, i : i + 1]) for site, value in edited.items()}, more)
        cache = output.cache
        found.append(output)
    assert apart(jnp.concatenate([output.hidden for output in found], 1), exact.hidden) < 1e-5
    for site in found[0].taps:
        mine = jnp.concatenate([output.taps[site] for output in found], 2 if site.endswith(("scores", "weights")) else 1)
        there = exact.taps[site]
        if site.endswith("attention/scores"):  # of keys to come there are none yet
            mine, there = jnp.tril(mine), jnp.tril(there)
        assert apart(mine, there) < 1e-5, site


def test_generation_is_steered():
    model, params = of("decoder")
    prompts = [[1, 2, 3], [4, 5]]
    edits = {"final": patch(params["embed"][7])}
    assert generate(model, params, prompts, max_new_tokens=3) != generate(model, params, prompts, max_new_tokens=3, edits=edits)
    best = int(jnp.argmax(params["embed"] @ params["embed"][7]))
    assert generate(model, params, prompts, max_new_tokens=3, edits=edits) == [[best] * 3] * 2


def in_order(execution: Execution, a):
    """Values by token, and by query and key, as texts are read: every dimension of eight is one of tokens."""
    for d in (d for d, n in enumerate(a.shape) if n == 8):
        a = jnp.moveaxis(as_read(jnp.moveaxis(a, d, 0)[None], execution)[0], 0, d)
    return a


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("decoder", Layout(data=2, fsdp=2, tensor=2)),
        ("pair", Layout(fsdp=2, tensor=4, sequence=True)),
        ("mixture", Layout(context=2, data=2, tensor=2)),
        ("mixture", Layout(context=2, data=2, tensor=2, exchange="alltoall")),
        ("rwkv", Layout(data=2, fsdp=2, tensor=2)),
    ],
)
def test_eight_devices_read_and_edit_what_one_does(name, layout):
    model = replace(MODELS[name], layers=2)
    model = replace(model, encoder=replace(model.encoder, layers=2)) if name == "pair" else model
    params = initial_values(jax.random.key(0), functions(model).specs(model))
    known = sites.names(model)
    tokens = jnp.tile(TOKENS, (2, 1))
    source = {"source": Source(jnp.tile(OTHERS, (2, 1)))} if name == "pair" else {}
    edits = {"layers/*/output": steer(jax.random.normal(jax.random.key(3), (2, 1, 1, 16)), layer=jnp.arange(2))}
    edits |= {"layers/1/attention/mixed": ablate(at=jnp.arange(16) < 4 if name == "rwkv" else (jnp.arange(4) == 2)[:, None])}
    third = jnp.arange(8) == 3

    @partial(jax.jit, static_argnums=2)
    def found(params, edits, execution):
        placed = arrange({"tokens": tokens, "third": third[None]}, execution)
        at = placed["third"][0, :, None] if name == "rwkv" else placed["third"][0, :, None, None]
        edits = edits | {"layers/0/attention/key": patch(0.5, at=at)}
        output = run(model, params, placed["tokens"], taps=known, edits=edits, execution=execution, **source)
        return jax.tree.map(partial(in_order, execution), output.taps | {"hidden": output.hidden})

    one = found(params, edits, Execution())
    mesh, table = make_mesh(layout), functions(model).specs(model)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(table, mesh, rules(layout, split=True)))
        execution = Execution(rules=rules(layout), split=rules(layout, split=True), exchange=layout.exchange)
        eight = found(placed, edits, execution)
    alike(eight, one, 1e-5)


@pytest.mark.parametrize(
    ("name", "taps", "edits", "attention", "words"),
    [
        ("decoder", ("layers/*/residuals",), {}, "auto", ("execution.taps", "'layers/*/residuals'", "layers/*/residual")),
        ("decoder", ("layers/3/input",), {}, "auto", ("'layers/3/input'", "layers/2/input")),
        ("decoder", (), {"layer/1/output": steer(1.0)}, "auto", ("edits", "'layer/1/output'", "layers/1/output")),
        ("parallel", ("layers/0/residual",), {}, "auto", ("no site of this model",)),
        ("rwkv", ("layers/0/attention/weights",), {}, "auto", ("no site of this model", "layers/0/attention/")),
        ("mixture", ("layers/1/feedforward/hidden",), {}, "auto", ("no site", "layers/0/feedforward/hidden")),
        ("pair", ("encoder/layers/0/cross/key",), {}, "auto", ("no site", "layers/0/cross/key")),
        ("decoder", ("layers/0/attention/weights",), {}, "chunked", ("attention='chunked' never forms", "reference")),
        ("decoder", (), {"layers/*/attention/scores": ablate()}, "dense", ("attention='dense' never forms",)),
        ("decoder", (), {"layers/0/output": steer(jnp.ones(15))}, "auto", ("output'].value has shape (15,)", "(2, 8, 16)")),
        ("decoder", (), {"layers/0/output": steer(1.0, at=jnp.ones(8, bool))}, "auto", (".at has shape (8,)", "(2, 8, 16)")),
        ("decoder", (), {"final": steer(1.0, layer=jnp.array(1))}, "auto", ("edits['final'].layer",)),
        ("decoder", (), {"layers/*/output": steer(1.0, layer=3)}, "auto", (".layer=3", "layers 0, 1, 2")),
        ("mixture", (), {"layers/*/router/logits": steer(1.0, layer=np.array([0, 1]))}, "auto", (".layer=[0, 1]", "of layers 1")),
        ("decoder", (), {"layers/*/output": steer(jnp.ones((3, 16)), layer=np.arange(2))}, "auto", ("2 layers at once", "(3, 16)")),
    ],
)
def test_what_is_asked_in_vain_is_refused(name, taps, edits, attention, words):
    model, params = of(name)
    with pytest.raises(ValueError, match=r"site|layer") as error:
        jax.eval_shape(lambda params: run(model, params, taps=taps, edits=edits, execution=Execution(attention=attention)).hidden, params)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_what_nobody_asks_for_costs_nothing():
    """Not one operation: the program is the same, letter by letter, whatever a site could give."""
    model, params = of("decoder")
    plain, one = (
        str(jax.make_jaxpr(lambda params, taps=taps: run(model, params, taps=taps).hidden)(params)) for taps in ((), ("layers/1/input",))
    )
    named = str(jax.make_jaxpr(lambda params: run(model, params, edits={}).hidden)(params))
    assert plain == named
    assert abs(len(one) - len(plain)) < 0.1 * len(plain)
