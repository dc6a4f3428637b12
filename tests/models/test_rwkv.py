"""RWKV: as transformers computes it, in parallel and token by token, packed and alone, on one device and on eight."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from slopes import check_gradients

from lmx.core.execution import Execution
from lmx.core.params import abstract, initial_values
from lmx.core.precision import POLICIES
from lmx.core.tree import disagreement, named_leaves, size
from lmx.infer import generate
from lmx.infer.weights import decoding_params
from lmx.models import stack
from lmx.models.config import RWKV, check
from lmx.models.dropout import Dropout
from lmx.models.losses import cross_entropy, logits
from lmx.models.rwkv import block, empty_cache, enter, leave, share, specs
from lmx.models.rwkv import forward as _forward

forward = partial(jax.jit, static_argnums=1, static_argnames="execution")(_forward)


GOLDEN = RWKV(vocab=160, layers=3, embed=48, mlp=96, context=64, rescale_every=6)
END = 2
SMALL = RWKV(vocab=17, layers=3, embed=8, channels=12, mlp=16, init_std=0.5, rescale_every=2)


def same(a):
    return a


def turned(a):
    return a.T


def flat(a):
    return a.reshape(-1)


def names() -> tuple[dict, dict]:
    """`{lmx name: (checkpoint's name, function of the tensor)}` outside the layers and, `{}` standing for the layer, of one."""

    def norm(ours, theirs):
        return {f"{ours}/scale": (f"{theirs}.weight", same), f"{ours}/bias": (f"{theirs}.bias", same)}

    outside = {"embed": ("rwkv.embeddings.weight", same), "head": ("head.weight", turned)}
    outside |= norm("embed_norm", "rwkv.blocks.0.pre_ln") | norm("norm", "rwkv.ln_out")
    at = "rwkv.blocks.{}."
    layer = norm("attention_norm", at + "ln1") | norm("feedforward_norm", at + "ln2")
    projections = {"attention": ("key", "value", "receptance", "output"), "feedforward": ("key", "value", "receptance")}
    for ours, theirs in (("attention", "attention"), ("feedforward", "feed_forward")):
        for name in projections[ours]:
            layer[f"{ours}/{name}/weight"] = (f"{at}{theirs}.{name}.weight", turned)
        for name in ("key", "value", "receptance") if ours == "attention" else ("key", "receptance"):
            layer[f"{ours}/shift/{name}"] = (f"{at}{theirs}.time_mix_{name}", flat)
    times = {"attention/time/decay": (at + "attention.time_decay", same), "attention/time/bonus": (at + "attention.time_first", same)}
    return outside, layer | times


def mapped(tensors: dict[str, np.ndarray], layers: int):
    """lmx's parameters, or their gradients, of a checkpoint's tensors."""
    outside, layer = names()
    found = {ours: function(tensors[theirs]) for ours, (theirs, function) in outside.items() if theirs in tensors}
    for ours, (theirs, function) in layer.items():
        found[f"layers/0/0/{ours}"] = np.stack([function(tensors[theirs.format(i)]) for i in range(layers)])
    return found


def as_tree(found: dict[str, np.ndarray], config: RWKV):
    shapes = abstract(specs(config))
    assert {n: a.shape for n, a in named_leaves(shapes).items()} == {n: a.shape for n, a in found.items()}
    return jax.tree.unflatten(jax.tree.structure(shapes), [jnp.asarray(found[n]) for n in named_leaves(shapes)])


@pytest.fixture(scope="module")
def golden(shared):
    """lmx's parameters, and what transformers computed."""
    folder = shared / "goldens" / "rwkv"
    if not folder.exists():
        pytest.skip("the reference case rwkv is not in ../shared/goldens")
    tensors = load_file(folder / "model.safetensors")
    return as_tree(mapped(tensors, GOLDEN.layers), GOLDEN), load_file(folder / "golden.safetensors")


def far(a, b) -> float:
    return float(np.abs(np.asarray(a) - b).max() / np.abs(b).max())


def test_logits_and_hidden_states_are_those_of_transformers(golden):
    params, found = golden
    hidden = forward(params, GOLDEN, found["input.input_ids"]).hidden
    assert far(hidden, found["hidden_states.3"]) < 1e-5
    assert far(logits(params, GOLDEN, hidden), found["logits"]) < 1e-5


def test_every_layer_gives_what_that_of_transformers_gives(golden):
    params, found = golden
    tokens, execution = jnp.asarray(found["input.input_ids"]), Execution()
    context = share(GOLDEN, tokens, None, None, execution)
    x = enter(params, GOLDEN, tokens, None, None, execution)
    for i, layer in enumerate(stack.unstack(params["layers"])[0]):
        x, _, _ = block(x, layer, GOLDEN, context, execution, kind="recurrent", layer=i)
        assert far(x, found[f"hidden_states.{i}"]) < 1e-5
    assert far(leave(params, GOLDEN, x, execution), found["hidden_states.3"]) < 1e-5


def test_the_loss_and_its_gradients_are_those_of_transformers(golden):
    params, found = golden
    tokens, targets, weights = next_tokens(found["input.labels"])

    def loss(params):
        hidden = forward(params, GOLDEN, tokens).hidden
        return cross_entropy(params, GOLDEN, hidden, targets, weights)[0] / weights.sum()

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert float(value) == pytest.approx(float(found["loss"]), rel=1e-6)
    outside, layer = names()
    leaves = named_leaves(gradients)
    ours = {theirs: (leaves[name], function) for name, (theirs, function) in outside.items()}
    for name, (theirs, function) in layer.items():
        ours |= {theirs.format(i): (leaves[f"layers/0/0/{name}"][i], function) for i in range(GOLDEN.layers)}
    # The case has three gradients; those of every other parameter are compared with differences of the float64 recurrence below.
    given = {name.removeprefix("grad."): a for name, a in found.items() if name.startswith("grad.")}
    assert given
    for name, expected in given.items():
        gradient, function = ours[name]
        assert far(gradient, function(expected)) < 1e-5, name


def test_greedy_ids_and_the_logits_before_each_are_those_of_transformers(golden):
    params, found = golden
    prompt, greedy = found["input.prompt"], found["greedy"]
    never = params | {"head": params["head"].at[:, END].set(0.0)}
    ids = greedy[:, prompt.shape[1] :].tolist()
    assert generate(GOLDEN, never, prompt.tolist(), max_new_tokens=16) == ids
    params = decoding_params(params)
    output = forward(params, GOLDEN, prompt, cache=empty_cache(GOLDEN, 1))
    for i, token in enumerate(ids[0]):
        assert far(logits(params, GOLDEN, output.hidden[:, -1:])[:, 0], found["greedy_logits"][:, i]) < 1e-5
        output = step(params, jnp.full((1, 1), token), output.cache)


@jax.jit
def step(params, token, state):
    return forward(params, GOLDEN, token, cache=state)


def test_prompts_of_unequal_lengths_are_continued_as_each_alone():
    params, prompts = start(SMALL), [[1, 2, 3, 4, 5, 6, 7], [3], [9, 8, 4]]
    together = generate(SMALL, params, prompts, max_new_tokens=5)
    assert together == [generate(SMALL, params, [prompt], max_new_tokens=5)[0] for prompt in prompts]


def start(config: RWKV):
    """Random values, none of them a one or a zero."""
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(lambda a: a + 0.3 * jax.random.normal(next(keys), a.shape), initial_values(jax.random.key(0), specs(config)))


def reference(params, config: RWKV, tokens: np.ndarray) -> np.ndarray:
    """Logits of one text in float64, token by token, as the paper has it (section 3), sums kept as they are."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    layers = stack.unstack(params["layers"])[0]

    def norm(x, p, epsilon):
        return (x - x.mean()) / np.sqrt(x.var() + epsilon) * p["scale"] + p["bias"]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def mixed(p, name, x, before):
        mu = p["shift"][name]
        return (mu * x + (1 - mu) * before) @ p[name]["weight"]

    before = np.zeros((config.layers, 2, config.embed))
    sums = np.zeros((config.layers, 2, config.width))
    rows = []
    for token in tokens:
        x = norm(params["embed"][token], params["embed_norm"], config.norm_epsilon)
        for i, p in enumerate(layers):
            a, f, scale = p["attention"], p["feedforward"], 2.0 ** -(i // config.rescale_every if config.rescale_every else 0)
            y = norm(x, p["attention_norm"], config.norm_epsilon)
            r, k, v = (mixed(a, name, y, before[i, 0]) for name in ("receptance", "key", "value"))
            own = np.exp(a["time"]["bonus"] + k)
            wkv = (sums[i, 0] + own * v) / (sums[i, 1] + own)
            sums[i] = np.exp(-np.exp(a["time"]["decay"])) * sums[i] + np.exp(k) * np.stack([v, np.ones_like(v)])
            x, before[i, 0] = x + scale * (sigmoid(r) * wkv) @ a["output"]["weight"], y
            y = norm(x, p["feedforward_norm"], config.norm_epsilon)
            hidden = np.maximum(mixed(f, "key", y, before[i, 1]), 0) ** 2
            x, before[i, 1] = x + scale * sigmoid(mixed(f, "receptance", y, before[i, 1])) * (hidden @ f["value"]["weight"]), y
            if config.rescale_every and (i + 1) % config.rescale_every == 0:
                x = x / 2
        x = norm(x, params["norm"], config.final_norm_epsilon)
        rows.append(x @ (params["embed"].T if config.tied else params["head"]))
    return np.stack(rows)


@pytest.mark.parametrize("knobs", [{}, {"tied": True, "rescale_every": 0, "channels": None, "norm_epsilon": 1e-2}])
def test_logits_are_those_of_the_papers_recurrence_in_float64(knobs):
    config = replace(SMALL, **knobs)
    params, tokens = start(config), random_tokens(1, 11)
    found = logits(params, config, forward(params, config, tokens).hidden)[0]
    assert far(found, reference(params, config, tokens[0])) < 1e-5


def test_every_gradient_is_how_the_float64_loss_changes():
    params, tokens = start(SMALL), random_tokens(1, 9)
    targets, weights = np.roll(tokens, -1, 1), np.linspace(0.5, 1.5, 9, dtype=np.float32)[None]

    def loss(params):
        return cross_entropy(params, SMALL, forward(params, SMALL, tokens).hidden, targets, weights)[0]

    def exact(params) -> float:
        rows = reference(params, SMALL, tokens[0])
        rows = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
        return -(weights[0] * rows[np.arange(9), targets[0]]).sum()

    check_gradients(loss, exact, params, rel=1e-4)


def random_tokens(rows: int, length: int, vocab: int = SMALL.vocab, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, (rows, length)).astype(np.int32)


def next_tokens(labels):
    weights = np.ones(labels.shape, np.float32)
    weights[:, -1] = 0
    return labels, np.roll(labels, -1, 1), weights


@pytest.mark.parametrize("unrolled", [True, False])
@pytest.mark.parametrize("cuts", [range(1, 13), (1, 6, 7, 12), (5, 12)], ids=["token by token", "in uneven chunks", "in two"])
def test_the_recurrent_form_gives_what_the_parallel_one_gives(cuts, unrolled):
    params, tokens = start(SMALL), random_tokens(2, 12)
    whole = forward(params, SMALL, tokens).hidden
    params = decoding_params(params) if unrolled else params
    state, parts, begin = empty_cache(SMALL, 2, unrolled=unrolled), [], 0
    for end in cuts:
        output = forward(params, SMALL, tokens[:, begin:end], cache=state)
        assert jax.tree.map(jnp.shape, output.cache) == jax.tree.map(jnp.shape, state), "the state does not grow"
        state, begin = output.cache, end
        parts.append(output.hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=2e-6)


def test_the_state_has_one_size_whatever_the_length_and_slots():
    assert {size(empty_cache(SMALL, 1, slots)) for slots in (0, 16, 1 << 20)} == {1 + SMALL.layers * (2 * SMALL.embed + 3 * SMALL.width)}


def test_gradients_flow_through_the_state():
    params, tokens = start(SMALL), random_tokens(2, 10)

    def parallel(params):
        return jnp.sum(forward(params, SMALL, tokens).hidden ** 3)

    def in_parts(params):
        first = forward(params, SMALL, tokens[:, :4], cache=empty_cache(SMALL, 2, unrolled=False))
        second = forward(params, SMALL, tokens[:, 4:], cache=first.cache)
        return jnp.sum(first.hidden**3) + jnp.sum(second.hidden**3)

    assert max(disagreement(jax.jit(jax.grad(in_parts))(params), jax.jit(jax.grad(parallel))(params)).values()) < 1e-5


SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3], [0, 0, 0, 1, 1, 1, 1, 0, 2, 2, 2, 2], [0] * 12], np.int32)


def test_packed_texts_give_what_each_gives_alone():
    params, tokens = start(SMALL), random_tokens(3, 12)

    def loss(params, tokens, segments):
        hidden = forward(params, SMALL, tokens, segments=segments).hidden
        return jnp.sum(jnp.where(segments[..., None] > 0, hidden**3, 0)), hidden

    texts = np.stack([tokens[row, SEGMENTS[row] == s] for row, s in ((0, 1), (0, 2), (0, 3), (1, 1), (1, 2))])
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (packed, hidden), gradient = run(params, tokens, SEGMENTS)
    (alone, expected), reference = run(params, texts, np.ones_like(texts))
    assert float(packed) == pytest.approx(float(alone), rel=1e-5)
    np.testing.assert_allclose(hidden[SEGMENTS > 0], expected.reshape(-1, SMALL.embed), atol=2e-6)
    assert np.isfinite(hidden).all(), "padding gives numbers too"
    assert max(disagreement(gradient, reference).values()) < 1e-5


@pytest.mark.parametrize(
    "mask", [[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0, 0]], ids=["left", "right", "both"]
)
def test_padding_is_passed_over_and_the_state_goes_on_behind_it(mask):
    mask, text, more = np.array([mask]), random_tokens(1, 5), random_tokens(1, 4, seed=1)
    params, padded = decoding_params(start(SMALL)), np.zeros((1, 8), np.int32)
    padded[mask == 1] = text[0]
    alone = forward(params, SMALL, np.concatenate([text, more], 1)).hidden
    first = forward(params, SMALL, padded, segments=jnp.asarray(mask), cache=empty_cache(SMALL, 1))
    np.testing.assert_allclose(first.hidden[mask == 1], alone[0, :5], atol=2e-6)
    again = np.concatenate([np.zeros((1, 2), np.int32), more], 1)
    second = forward(params, SMALL, again, segments=jnp.asarray([[0, 0, 1, 1, 1, 1]]), cache=first.cache)
    np.testing.assert_allclose(second.hidden[:, 2:], alone[:, 5:], atol=2e-6)
    other = forward(params, SMALL, more, segments=jnp.full((1, 4), 2), cache=first.cache)
    np.testing.assert_allclose(other.hidden, forward(params, SMALL, more).hidden, atol=2e-6)


@pytest.mark.parametrize("knobs", [{"remat": "full"}, {"remat": "dots"}, {"remat": "sites", "sites": ("key", "mixed", "hidden")}], ids=str)
def test_rematerialisation_changes_no_gradient(knobs):
    params, tokens = start(SMALL), random_tokens(2, 8)

    def gradient(execution: Execution):
        return jax.jit(jax.grad(lambda p: jnp.sum(forward(p, SMALL, tokens, execution=execution).hidden ** 3)))(params)

    assert max(disagreement(gradient(Execution(**knobs)), gradient(Execution())).values()) < 1e-5


def test_bf16_is_the_same_but_for_rounding():
    params, tokens = start(SMALL), random_tokens(4, 16)
    exact = forward(params, SMALL, tokens).hidden
    found = forward(params, SMALL, tokens, execution=Execution(precision=POLICIES["bf16"])).hidden
    assert found.dtype == jnp.bfloat16
    assert np.sqrt(np.mean((found.astype(jnp.float32) - exact) ** 2) / np.mean(exact**2)) < 0.02


def test_dropout_drops_and_a_row_loses_the_same_whatever_stands_beside_it():
    params, tokens = start(SMALL), random_tokens(3, 8)

    def run(rows):
        return forward(params, SMALL, tokens[rows], dropout=Dropout(jax.random.key(0), jnp.asarray(rows), 0.3)).hidden

    np.testing.assert_allclose(run(np.array([2])), run(np.arange(3))[2:], atol=1e-6)
    assert far(run(np.arange(3)), np.asarray(forward(params, SMALL, tokens).hidden)) > 0.1


def test_initial_decays_and_shifts_are_the_papers():
    config = RWKV(vocab=8, layers=3, embed=8, channels=12)
    layers = jax.device_get(initial_values(jax.random.key(0), specs(config)))["layers"][0]["0"]
    for i in range(3):
        near, deep = 1 - i / 3, i / 2
        share, attention = np.arange(8) / 8, layers["attention"]
        np.testing.assert_allclose(attention["time"]["decay"][i], -5 + 8 * (np.arange(12) / 11) ** (0.7 + 1.3 * deep), atol=1e-5)
        bonus = np.log(0.3) + np.tile([0.0, 0.5, -0.5], 4)
        np.testing.assert_allclose(attention["time"]["bonus"][i], bonus, atol=1e-6)
        np.testing.assert_allclose(attention["shift"]["key"][i], share**near, atol=1e-6)
        np.testing.assert_allclose(attention["shift"]["value"][i], share**near + 0.3 * deep, atol=1e-6)
        np.testing.assert_allclose(attention["shift"]["receptance"][i], share ** (0.5 * near), atol=1e-6)
        np.testing.assert_allclose(layers["feedforward"]["shift"]["receptance"][i], share**near, atol=1e-6)


def test_depth_does_not_change_the_program():
    def text(layers: int) -> int:
        config = replace(SMALL, layers=layers)
        return len(jax.jit(lambda p, t: forward(p, config, t).hidden).lower(abstract(specs(config)), random_tokens(1, 8)).as_text())

    assert abs(text(40) / text(4) - 1) < 0.02


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"channels": 0}, "model.channels=0"),
        ({"rescale_every": -1}, "model.rescale_every=-1"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"layers": 0}, "model.layers=0"),
    ],
)
def test_a_config_that_is_no_model_is_refused_by_name(knobs, said):
    with pytest.raises(ValueError, match=said):
        check(replace(SMALL, **knobs))
