"""The transformer against a float64 NumPy one written from the papers: logits, loss, and the gradient of every parameter."""

from dataclasses import fields, replace
from functools import partial
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import numpy_transformer
import pytest

from lmx.core.params import is_spec
from lmx.core.tree import map_named, named_leaves
from lmx.models import config as model_config
from lmx.models.config import EncoderDecoder, Transformer
from lmx.models.losses import cross_entropy, logits
from lmx.models.rope import RopeScaling
from lmx.models.transformer import Source, forward, specs

pytestmark = pytest.mark.usefixtures("optimised")

BATCH, LENGTH = 2, 8
PARTS = ("tokens", "positions", "segments")
LAYERS = {"g": (("global",), 2), "lg": (("local", "global"), 5), "llg": (("local", "local", "global"), 4)}
"""Patterns and depths, two of which the pattern does not divide."""


def pair(encoder: Transformer, decoder: Transformer) -> EncoderDecoder:
    return EncoderDecoder(**vars(decoder), encoder=replace(encoder, causal=False))


def model(pattern: str, **knobs) -> Transformer:
    kinds, layers = LAYERS[pattern]
    window = 3 if "local" in kinds else None
    return Transformer(**{"vocab": 19, "layers": layers, "embed": 24, "mlp": 20, "context": 11, "pattern": kinds, "window": window} | knobs)


OF_EXPERTS = ("shared_gate", "renormalize_experts", "expert_mlp", "expert_capacity", "shared_mlp", "mlp")
"""Knobs that `test_experts` has cases of; and a width, which is always given here."""
# Nearly every pair of values of two knobs is in one of these.
PLAIN = {"gated": False, "norm": "layernorm"}
CASES = {
    "a": ("right", model("g", kv_heads=1, positions="learned", norm_placement="sandwich", activation="relu_squared", attention_softcap=1.5,
                         qk_norm=True, first_position=2, norm_offset=True)),
    "b": ("plain", model("g", **PLAIN, positions="none", activation="gelu", parallel=True, bias=True, tied=False, logit_softcap=3.0,
                         embed_scale=True, head_dim=10)),
    "c": ("packed", model("llg", kv_heads=2, norm="layernorm", norm_placement="post", tied=False, logit_softcap=3.0, qk_norm=True,
                          head_dim=10, rope_theta=50.0)),
    "d": ("left", model("lg", kv_heads=2, positions="sinusoidal", norm_placement="post", gated=False, activation="gelu_tanh", bias=True,
                        attention_softcap=1.5, embed_scale=True, output_bias=False, attention_scale=0.5)),
    "e": ("packed", model("llg", heads=6, kv_heads=1, positions="alibi", norm_placement="sandwich", gated=False, activation="relu",
                          parallel=True, bias=True, tied=False, attention_softcap=1.5, head_dim=10, alibi_scaled=True, attention_scale=0.4,
                          mlp_bias=False)),
    "f": ("left", model("lg", heads=6, positions="alibi", norm="layernorm", activation="relu", parallel=True, logit_softcap=3.0,
                        qk_norm=True, embed_scale=True, embed_norm=True, parallel_norms=True, logit_scale=0.5)),
    "g": ("right", model("llg", gated=False, parallel=True, bias=True, attention_softcap=1.5, embed_scale=True)),
    "h": ("plain", model("lg", kv_heads=1, positions="sinusoidal", norm="layernorm", norm_placement="sandwich", activation="gelu_tanh",
                         parallel=True, tied=False, logit_softcap=3.0, qk_norm=True, head_dim=10)),
    "i": ("right", model("lg", kv_heads=2, positions="none", activation="gelu", tied=False, qk_norm=True)),
    "j": ("plain", model("llg", **PLAIN, positions="learned", norm_placement="post", activation="relu_squared", bias=True, tied=False,
                         logit_softcap=3.0, attention_softcap=1.5, qk_norm=True, embed_scale=True, head_dim=10)),
    "k": ("right", model("g", kv_heads=1, positions="none", norm="layernorm", norm_placement="post", activation="relu",
                         attention_softcap=1.5, embed_scale=True, head_dim=10)),
    "l": ("packed", model("lg", kv_heads=2, positions="learned", gated=False, activation="relu_squared", parallel=True, logit_softcap=3.0,
                          embed_scale=True, norm_epsilon=0.1)),
    "m": ("left", model("llg", kv_heads=1, norm="layernorm", norm_placement="sandwich", activation="gelu", parallel=True, bias=True,
                        tied=False, logit_softcap=3.0, attention_softcap=1.5, head_dim=10)),
    "n": ("plain", model("g", kv_heads=2, positions="alibi", norm_placement="sandwich", gated=False, attention_softcap=1.5,
                         embed_scale=True)),
    "o": ("left", model("g", **PLAIN, positions="sinusoidal", activation="gelu_tanh", bias=True, tied=False, logit_softcap=3.0,
                        head_dim=10, embed_norm=True, head_bias=True)),
    "p": ("right", model("lg", kv_heads=2, head_dim=16, norm_offset=True, qk_norm=True, activation="gelu_quick", attention_scale=0.3,
                         rope_scaling=RopeScaling("linear", 3.0), local_rope_theta=30.0, embed_scale=True, mlp_bias=True)),
    "q": ("packed", model("g", heads=6, kv_heads=2, head_dim=10, rope_dims=8, rope_interleaved=True, qk_norm=True, qk_norm_joint=True,
                          rope_scaling=RopeScaling("dynamic", 2.0, 3), norm_placement="output", activation="tanh", tied=False,
                          projection_bias=True)),
    "r": ("left", model("g", **PLAIN, head_dim=18, rope_dims=16, rope_theta=50.0, rope_scaling=RopeScaling("yarn", 4.0, 20, 0.1, 1.0),
                        parallel=True, parallel_norms=True, bias=True, projection_bias=False, head_bias=True, logit_scale=2.0,
                        activation="gelu")),
    "s": ("plain", model("lg", head_dim=16, rope_theta=50.0, rope_scaling=RopeScaling("llama3", 4.0, 20, 0.5, 2.0), parallel=True,
                         norm_placement="output", qk_norm=True, qk_norm_joint=True, norm_offset=True)),
    "t": ("right", model("lg", kv_heads=1, norm="layernorm", norm_placement="sandwich", rope_interleaved=True, attention_scale=0.2,
                         rope_scaling=RopeScaling("longrope", 3.0, 5, short_factors=(1.0, 1.5, 2.0), long_factors=(1.2, 3.0, 4.0)))),
    "u": ("left", model("g", block_positions=True,
                        rope_scaling=RopeScaling("longrope", 3.0, 9, short_factors=(1.0, 1.5, 2.0), long_factors=(1.2, 3.0, 4.0)))),
    "v": ("packed", model("g", **PLAIN, causal=False, positions="learned", norm_placement="post", activation="gelu_quick", bias=True,
                          token_types=3, embed_norm=True, head="masked", head_bias=True)),
    "w": ("right", model("g", causal=False, kv_heads=2, activation="tanh", tied=False, embed_size=10, embed_norm=True, shared_layers=True,
                         head="masked", head_activation="gelu", attention_softcap=1.5)),
    "x": ("left", model("lg", layers=4, norm="layernorm", positions="learned", embed_size=10, token_types=2, shared_layers=True,
                        head_bias=True, tied=False)),
    "y": ("packed", model("g", causal=False, positions="sinusoidal", norm_placement="post", bias=True, embed_size=10, head="masked")),
    "z": ("packed", model("g", kv_heads=2, positions="relative", relative_buckets=6, relative_distance=5, attention_softcap=1.5)),
    "A": ("right", model("g", **PLAIN, positions="relative", relative_buckets=8, relative_distance=5, causal=False, bias=True)),
    "B": ("packed", pair(model("g", positions="relative", relative_buckets=8, relative_distance=5, kv_heads=1, norm_placement="sandwich"),
                         model("lg", positions="relative", relative_buckets=6, relative_distance=5, kv_heads=2, norm_placement="sandwich",
                               qk_norm=True, tied=False))),
    "C": ("left", pair(model("g", **PLAIN, positions="learned", activation="gelu", norm_placement="post", bias=True),
                       model("g", **PLAIN, positions="rope", activation="gelu", norm_placement="post", bias=True, logit_softcap=3.0))),
    "D": ("packed", model("lg", kv_heads=2, positions="transformer_xl", attention_scale=0.4, qk_norm=True, tied=False)),
    "E": ("left", model("g", positions="transformer_xl", activation="gelu", gated=False, head_dim=10)),
    "F": ("right", model("g", kv_heads=1, positions="transformer_xl", causal=False, head="masked", shared_layers=True, embed_size=10)),
}  # fmt: skip


def rows(kind: str) -> dict[str, np.ndarray]:
    """Tokens with positions and segments: one text a row, several packed, padded on the left or on the right."""
    rng = np.random.default_rng(len(kind))
    positions, segments = np.tile(np.arange(LENGTH), (BATCH, 1)), np.ones((BATCH, LENGTH), int)
    if kind == "packed":
        positions[0, 3:], segments[0, 3:] = np.arange(5), 2
        positions[1, 6:], segments[1, 6:] = 0, 0
        positions[1, 2:6], segments[1, 2:6] = np.arange(4), 2
    elif kind == "left":
        positions[1] = np.maximum(np.arange(LENGTH) - 3, 0)
        segments[1, :3] = 0
    elif kind == "right":
        segments[0, 6:] = 0
    tokens, targets = rng.integers(0, 19, (2, BATCH, LENGTH))
    weights = rng.uniform(0, 1, (BATCH, LENGTH)) * (segments > 0)
    # A source that is longer, with as many texts of other lengths.
    source = {name: np.concatenate([a[:, :1], a[:, :1], a[:, :1], a], 1) for name, a in (("tokens", targets), ("segments", segments))}
    source["positions"] = np.concatenate([np.tile(np.arange(3), (BATCH, 1)), np.where(segments == segments[:, :1], 3, 0) + positions], 1)
    batch = {"tokens": tokens, "positions": positions, "segments": segments, "targets": targets, "weights": weights}
    batch |= {"token_types": rng.integers(0, 2, (BATCH, LENGTH)), "block_positions": rng.integers(0, 4, (BATCH, LENGTH))}
    return batch | {f"source_{name}": a for name, a in source.items()}


def random_parameters(config: Transformer, seed: int):
    """Values that hide nothing behind ones and zeros, as float32 numbers in float64 arrays."""
    rng = np.random.default_rng(seed)

    def value(name, spec):
        noise = rng.normal(size=spec.shape)
        noise = 1 + 0.3 * noise if name.endswith("scale") else 0.4 * noise
        return noise.astype(np.float32).astype(np.float64)

    return map_named(value, specs(config), is_leaf=is_spec)


def for_numpy(params, config: Transformer) -> dict:
    """lmx's parameters under the NumPy transformer's names."""
    found = {}
    outer = {name: value for name, value in params.items() if name not in ("layers", "encoder")}
    for path, value in named_leaves(outer).items():
        found[path.removesuffix("/weight").replace("/", "_")] = value
    if "encoder" in params:
        found["encoder"] = for_numpy(params["encoder"] | {"embed": params["embed"]}, config.encoder)
    found["layers"] = [None] * (len(config.pattern) if config.shared_layers else config.layers)
    first = 0
    for group in params["layers"]:
        repeats, places = len(group["0"]["attention"]["query"]["weight"]), len(group)
        for place in range(places):
            for repeat in range(repeats):
                found["layers"][first + repeat * places + place] = one_layer(group[str(place)], repeat)
        first += repeats * places
    return found


def one_layer(tree, repeat: int) -> dict:
    flat = {}
    for path, value in named_leaves(tree).items():
        *before, layer, leaf = path.split("/")
        name = layer if leaf == "weight" or layer in ("query_norm", "key_norm") else f"{layer}_{leaf}"
        flat[f"cross_{name}" if before[-1:] == ["cross"] else name] = value[repeat]
    return flat


@partial(jax.jit, static_argnums=1, compiler_options={"xla_backend_optimization_level": 0})  # half the time to compile
def loss_gradient_logits(params, config, batch):
    def loss(params):
        source = Source(*(batch[f"source_{n}"] for n in PARTS)) if isinstance(config, EncoderDecoder) else None
        more = {"block_positions": batch["block_positions"]} if config.block_positions else {}
        more |= {"token_types": batch["token_types"], "source": source}
        hidden = forward(params, config, batch["tokens"], positions=batch["positions"], segments=batch["segments"], **more).hidden
        total, sums = cross_entropy(params, config, hidden, batch["targets"], batch["weights"], z_loss=0.01)
        return total, (sums, logits(params, config, hidden))

    (total, (sums, rows)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return total, sums, rows, gradient


def ours(config, params, batch):
    narrow = {name: value.astype(np.float32 if value.dtype == np.float64 else np.int32) for name, value in batch.items()}
    return jax.device_get(loss_gradient_logits(jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params), config, narrow))


def theirs(config, params, batch):
    source = tuple(batch[f"source_{n}"] for n in PARTS) if isinstance(config, EncoderDecoder) else None
    kinds = batch["token_types"], batch["block_positions"]
    rows = numpy_transformer.logits(for_numpy(params, config), config, *(batch[n] for n in PARTS), source, *kinds)
    return *numpy_transformer.loss(rows, batch["targets"], batch["weights"], z_loss=0.01), rows


def test_every_value_of_every_choice_is_in_some_case():
    configs = [config for _, config in CASES.values()]
    choices = {"activation": "Activation", "norm": "Norm", "norm_placement": "Placement", "positions": "Positions"}
    for knob, name in choices.items():
        assert {getattr(config, knob) for config in configs} == set(get_args(getattr(model_config, name)))
    switches = [field.name for field in fields(Transformer) if isinstance(field.default, bool)]
    for knob in (*(knob for knob in switches if knob not in OF_EXPERTS), "first_position"):
        assert {bool(getattr(config, knob)) for config in configs} == {True, False}, knob
    kinds = {config.rope_scaling.kind for config in configs if config.rope_scaling is not None}
    assert kinds == set(get_args(get_type_hints(RopeScaling)["kind"]))
    for knob in (field.name for field in fields(Transformer) if field.default is None and field.name not in OF_EXPERTS):
        assert any(getattr(config, knob) is None for config in configs)
        assert any(getattr(config, knob) is not None for config in configs)


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_are_those_of_the_papers(case):
    kind, config = CASES[case]
    model_config.check(config)
    batch, params = rows(kind), random_parameters(config, ord(case))
    total, sums, found, gradient = ours(config, params, batch)
    expected_total, expected_correct, expected = theirs(config, params, batch)
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()
    assert total == pytest.approx(expected_total, rel=2e-5)
    assert sums["correct"] == pytest.approx(expected_correct, rel=1e-6)
    assert sums["cross_entropy"] + sums["z_loss"] == pytest.approx(total, rel=1e-6)

    # Along a random direction of each parameter, the gradient's slope is that of central differences in float64.
    rng, step, slopes = np.random.default_rng(0), 1e-6, {}
    gradients = named_leaves(gradient)
    for name, value in named_leaves(params).items():
        direction = rng.normal(size=value.shape)

        def at(sign, name=name, direction=direction):
            moved = map_named(lambda n, a: a + sign * step * direction if n == name else a, params)
            return theirs(config, moved, batch)[0]

        slopes[name] = (float((gradients[name] * direction).sum()), (at(1) - at(-1)) / (2 * step))
    largest = max(abs(expected) for _, expected in slopes.values())
    wrong = {name: pair for name, pair in slopes.items() if abs(pair[0] - pair[1]) > 1e-4 * max(abs(pair[1]), 1e-2 * largest)}
    assert not wrong
