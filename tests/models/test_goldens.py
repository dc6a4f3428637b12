"""Checkpoints of transformers' models, as lmx computes them: logits, loss, gradients, greedy continuations."""

import json
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lmx.core.params import abstract
from lmx.core.tree import named_leaves
from lmx.infer import generate
from lmx.models.config import Transformer
from lmx.models.losses import cross_entropy, logits
from lmx.models.transformer import forward, specs

pytestmark = pytest.mark.usefixtures("optimised")


@dataclass
class Names:
    """How a checkpoint's tensors become lmx's: `{lmx name: (checkpoint's name, function of the tensor)}`, `{}` standing for the layer.

    The functions only rearrange, so they rearrange gradients too. Beside them, one is added to what is `moved` (its gradient stays),
    and `scaled` is multiplied by a factor (its gradient divided).
    """

    outside: dict
    layer: dict
    moved: tuple[str, ...] = ()
    scaled: dict[str, float] = field(default_factory=dict)


def same(a):
    return a


def turned(a):
    return a.T


def into_heads(heads: int):
    """A Linear's `[heads * dim, embed]` as `[embed, heads, dim]`, or its bias as `[heads, dim]`."""
    return lambda a: a.T.reshape(*a.shape[1:], heads, -1)


def from_heads(heads: int):
    """A Linear's `[embed, heads * dim]` as `[heads, dim, embed]`."""
    return lambda a: a.T.reshape(heads, -1, a.shape[0])


def third(i: int, heads: int):
    """Query, key or value of GPT-2's fused projection, whose input comes first."""
    return lambda a: np.split(a, 3, -1)[i].reshape(*a.shape[:-1], heads, -1)


def llama(heads: int, kv_heads: int, *, tied: bool, sandwich: bool = False) -> tuple[dict, dict]:
    outside = {"embed": ("model.embed_tokens.weight", same), "norm/scale": ("model.norm.weight", same)}
    if not tied:
        outside["head"] = ("lm_head.weight", turned)
    norms = {"attention_norm": "input_layernorm", "feedforward_norm": "post_attention_layernorm"}
    if sandwich:
        norms = {
            "attention_norm": "input_layernorm",
            "attention_norm_post": "post_attention_layernorm",
            "feedforward_norm": "pre_feedforward_layernorm",
            "feedforward_norm_post": "post_feedforward_layernorm",
        }
    layer = {f"{ours}/scale": (f"model.layers.{{}}.{theirs}.weight", same) for ours, theirs in norms.items()}
    for ours, theirs, function in (
        ("attention/query", "self_attn.q_proj", into_heads(heads)),
        ("attention/key", "self_attn.k_proj", into_heads(kv_heads)),
        ("attention/value", "self_attn.v_proj", into_heads(kv_heads)),
        ("attention/output", "self_attn.o_proj", from_heads(heads)),
        ("feedforward/gate", "mlp.gate_proj", turned),
        ("feedforward/up", "mlp.up_proj", turned),
        ("feedforward/down", "mlp.down_proj", turned),
    ):
        layer[f"{ours}/weight"] = (f"model.layers.{{}}.{theirs}.weight", function)
    return outside, layer


def mixtral(heads: int, kv_heads: int) -> tuple[dict, dict]:
    outside, layer = llama(heads, kv_heads, tied=False)
    at = "model.layers.{}.block_sparse_moe."
    layer = {ours: entry for ours, entry in layer.items() if not ours.startswith("feedforward/")}
    for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        layer[f"experts/{ours}/weight"] = (f"{at}experts.*.{theirs}.weight", lambda a: a.swapaxes(1, 2))
    return outside, layer | {"experts/router/weight": (at + "gate.weight", turned)}


def gpt2() -> tuple[dict, dict]:
    def pairs(ours, theirs, weight, bias=same, scale="weight"):
        return {f"{ours}/{scale}": (f"{theirs}.weight", weight), f"{ours}/bias": (f"{theirs}.bias", bias)}

    at = "transformer.h.{}."
    layer = pairs("attention_norm", at + "ln_1", same, scale="scale") | pairs("feedforward_norm", at + "ln_2", same, scale="scale")
    for i, name in enumerate(("query", "key", "value")):
        layer |= pairs(f"attention/{name}", at + "attn.c_attn", third(i, 4), third(i, 4))
    layer |= pairs("attention/output", at + "attn.c_proj", lambda a: a.reshape(4, -1, a.shape[-1]))
    layer |= pairs("feedforward/up", at + "mlp.c_fc", same) | pairs("feedforward/down", at + "mlp.c_proj", same)
    outside = {"embed": ("transformer.wte.weight", same), "positions": ("transformer.wpe.weight", same)}
    return outside | pairs("norm", "transformer.ln_f", same, scale="scale"), layer


def opt() -> tuple[dict, dict]:
    def pairs(ours, theirs, weight, bias=same, scale="weight"):
        return {f"{ours}/{scale}": (f"model.decoder.{theirs}.weight", weight), f"{ours}/bias": (f"model.decoder.{theirs}.bias", bias)}

    layer = pairs("attention_norm", "layers.{}.self_attn_layer_norm", same, scale="scale")
    layer |= pairs("feedforward_norm", "layers.{}.final_layer_norm", same, scale="scale")
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        layer |= pairs(f"attention/{ours}", f"layers.{{}}.self_attn.{theirs}", into_heads(4), into_heads(4))
    layer |= pairs("attention/output", "layers.{}.self_attn.out_proj", from_heads(4))
    layer |= pairs("feedforward/up", "layers.{}.fc1", turned) | pairs("feedforward/down", "layers.{}.fc2", turned)
    # OPT's table begins with two rows that no token of an unpadded text uses.
    outside = {
        "embed": ("model.decoder.embed_tokens.weight", same),
        "positions": ("model.decoder.embed_positions.weight", lambda a: a[2:]),
    }
    return outside | pairs("norm", "final_layer_norm", same, scale="scale"), layer


SIZES = {"vocab": 160, "layers": 3, "embed": 48, "heads": 4, "context": 64}
GPT2 = {"positions": "learned", "norm": "layernorm", "gated": False, "bias": True}
GEMMA = {"mlp": 96, "activation": "gelu_tanh", "embed_scale": True, "head_dim": 16}
LLAMA = {"kv_heads": 2, "mlp": 96, "tied": False, "norm_epsilon": 1e-6}
END = 2
PLUS_ONE = ("norm/scale", "attention_norm/scale", "feedforward_norm/scale", "attention_norm_post/scale", "feedforward_norm_post/scale")

MODELS = {
    "gpt2": (Transformer(**SIZES | GPT2, activation="gelu_tanh"), Names(*gpt2())),
    "llama": (Transformer(**SIZES | LLAMA), Names(*llama(4, 2, tied=False))),
    "mistral": (Transformer(**SIZES | LLAMA, window=6, pattern=("local",)), Names(*llama(4, 2, tied=False))),
    "opt": (Transformer(**SIZES | GPT2, mlp=96, activation="relu"), Names(*opt())),
    "mixtral": (Transformer(**SIZES | LLAMA | {"norm_epsilon": 1e-5}, experts=4, rope_theta=1e6), Names(*mixtral(4, 2))),
    # Gemma's norms multiply by one plus their parameter.
    "gemma": (Transformer(**SIZES | GEMMA, kv_heads=1, norm_epsilon=1e-4), Names(*llama(4, 1, tied=True), PLUS_ONE)),
    # Gemma 2 scales scores by query_pre_attn_scalar ** -0.5, which the query projection can carry.
    "gemma2": (
        Transformer(
            **SIZES | GEMMA | {"layers": 4}, kv_heads=2, norm_epsilon=1e-6, norm_placement="sandwich", window=6,
            pattern=("local", "global"), attention_softcap=20.0, logit_softcap=15.0,
        ),
        Names(*llama(4, 2, tied=True, sandwich=True), PLUS_ONE, {"attention/query/weight": (16 / 24) ** 0.5}),
    ),
}  # fmt: skip


def load(file) -> dict[str, np.ndarray]:
    """A file's tensors; those of numbered experts, where all are there, as one that has `*` for the number."""
    tensors = load_file(file)
    for name in sorted(name for name in tensors if ".experts.0." in name):
        each = [name.replace(".experts.0.", f".experts.{e}.") for e in range(4)]
        tensors[name.replace(".experts.0.", ".experts.*.")] = np.stack([tensors.pop(n) for n in each])
    return tensors


def mapped(names: Names, config: Transformer, tensors: dict[str, np.ndarray]):
    """lmx's parameters of a checkpoint's tensors."""

    def put(tree, ours, tensor):
        *folders, last = ours.split("/")
        for folder in folders:
            tree = tree.setdefault(folder, {})
        tree[last] = tensor * names.scaled.get(ours, 1.0) + (1 if ours in names.moved else 0)

    tree, layers = {}, [{} for _ in range(config.layers)]
    for ours, (theirs, function) in names.outside.items():
        put(tree, ours, function(tensors[theirs]))
    for i, layer in enumerate(layers):
        for ours, (theirs, function) in names.layer.items():
            put(layer, ours, function(tensors[theirs.format(i)]))
    period = len(config.pattern)
    assert config.layers % period == 0
    tree["layers"] = ({str(p): jax.tree.map(lambda *a: jnp.stack(a), *layers[p::period]) for p in range(period)},)
    return jax.tree.map(jnp.asarray, tree)


@pytest.fixture(scope="module", params=MODELS)
def case(request, shared):
    """The config, the mapping, lmx's parameters, and what transformers computed."""
    folder = shared / "goldens" / request.param
    if not folder.exists():
        pytest.skip(f"the reference case {request.param} is not in ../shared/goldens")
    config, names = MODELS[request.param]
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == config.vocab
    tensors = load(folder / "model.safetensors")
    used = {theirs.format(i) for theirs, _ in (names.outside | names.layer).values() for i in range(config.layers)}
    assert used == set(tensors), "every tensor of the checkpoint has a place"
    params = mapped(names, config, tensors)
    table = {name: leaf.shape for name, leaf in named_leaves(abstract(specs(config))).items()}
    assert {name: leaf.shape for name, leaf in named_leaves(params).items()} == table
    return config, names, params, load_file(folder / "golden.safetensors")


def never(token: int, config: Transformer, params):
    """The same model, but the given token's logit is 0: as in the reference, whose continuations never choose the end of the text."""
    head = params["embed"].T if config.tied else params["head"]
    return replace(config, tied=False), params | {"head": head.at[:, token].set(0.0)}


@pytest.fixture(scope="module")
def computed(case):
    """Loss, logits and gradients of lmx."""
    config, _, params, golden = case
    tokens, labels, seen = (golden[f"input.{name}"] for name in ("input_ids", "labels", "attention_mask"))
    targets = np.roll(labels, -1, 1)
    targets[:, -1] = -100
    weights = (targets != -100).astype(np.float32)

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # half the time to compile
    def compute(params):
        def loss(params):
            hidden = forward(params, config, tokens, segments=seen).hidden
            total, _ = cross_entropy(params, config, hidden, jnp.maximum(targets, 0), weights)
            return total / weights.sum(), logits(params, config, hidden)

        return jax.value_and_grad(loss, has_aux=True)(params)

    return jax.device_get(compute(params))


def test_logits_are_those_of_transformers(case, computed):
    (_, rows), _ = computed
    golden = case[3]
    seen = golden["input.attention_mask"] == 1
    assert np.abs(rows - golden["logits"])[seen].max() <= 1e-5 * np.abs(golden["logits"][seen]).max()


def test_the_loss_is_that_of_transformers(case, computed):
    assert computed[0][0] == pytest.approx(float(case[3]["loss"]), rel=1e-6)


def test_gradients_are_those_of_transformers(case, computed):
    config, names, _, golden = case
    found, compared = named_leaves(computed[1]), 0
    period = len(config.pattern)
    entries = [(found[ours], ours, *entry) for ours, entry in names.outside.items()]
    for i in range(config.layers):
        for ours, (theirs, function) in names.layer.items():
            gradient = found[f"layers/0/{i % period}/{ours}"][i // period]
            if "*" not in theirs:
                entries.append((gradient, ours, theirs.format(i), function))
                continue
            for e, own in enumerate(gradient):
                entries.append((own, ours, theirs.format(i).replace("*", str(e)), lambda a, function=function: function(a[None])[0]))
    for gradient, ours, theirs, function in entries:
        if f"grad.{theirs}" in golden:
            expected = function(golden[f"grad.{theirs}"]) / names.scaled.get(ours, 1.0)
            assert np.abs(gradient - expected).max() <= 1e-4 * np.abs(expected).max(), theirs
            compared += 1
    assert compared == sum(name.startswith("grad.") for name in golden)


def test_greedy_continuations_are_those_of_transformers(case):
    config, _, params, golden = case
    prompts, seen = golden["batch.input_ids"], golden["batch.attention_mask"]
    ids = [row[mask == 1].tolist() for row, mask in zip(prompts, seen, strict=True)]
    found = generate(*never(END, config, params), ids, max_new_tokens=16)
    assert found == golden["batch.greedy"][:, prompts.shape[1] :].tolist()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_prompt_alone_is_continued_as_in_transformers(name, shared):
    folder = shared / "goldens" / name
    if not folder.exists():
        pytest.skip(f"the reference case {name} is not in ../shared/goldens")
    config, names = MODELS[name]
    params, golden = mapped(names, config, load_file(folder / "model.safetensors")), load_file(folder / "golden.safetensors")
    found = generate(*never(END, config, params), golden["input.prompt"].tolist(), max_new_tokens=16)
    assert found == golden["greedy"][:, golden["input.prompt"].shape[1] :].tolist()
