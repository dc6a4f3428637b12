"""Transformer-XL's positions where the NumPy transformer does not see them: in a cache, in texts with gaps, on eight devices, in fp8."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.execution import Execution
from lmx.core.params import initial_values
from lmx.core.precision import POLICIES
from lmx.core.tree import disagreement
from lmx.infer import generate
from lmx.infer.weights import decoding_params
from lmx.kernels.masks import Mask
from lmx.models import transformer_xl
from lmx.models.config import EncoderDecoder, Transformer, check
from lmx.models.transformer import empty_cache, flops_per_token, specs
from lmx.models.transformer import forward as _forward

MODEL = Transformer(
    vocab=19, layers=2, embed=12, heads=4, kv_heads=2, head_dim=6, mlp=16, context=32, positions="transformer_xl", init_std=0.4
)
forward = partial(jax.jit, static_argnums=1, static_argnames="execution")(_forward)


@cache
def start():
    return jax.jit(lambda: initial_values(jax.random.key(0), specs(MODEL)))()


def tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 19, (rows, length)).astype(np.int32)


@pytest.mark.parametrize("both_ways", [False, True])
def test_shifted_products_are_those_of_any_positions(both_ways):
    rng = np.random.default_rng(0)
    query, projection = (rng.normal(size=size).astype(np.float32) for size in ((2, 7, 3, 4), (10, 3, 4)))
    positions = np.tile(np.arange(7) + 5, (2, 1))
    shifted = transformer_xl._shifted(query, projection, both_ways=both_ways)
    seen = np.tril(np.ones((7, 7), bool)) | both_ways
    exact = transformer_xl.by_positions(query, projection, positions, positions)
    np.testing.assert_allclose(np.where(seen, shifted, 0), np.where(seen, exact, 0), atol=2e-5)


def test_order_is_that_of_what_is_seen():
    packed, padded, gap = ([[0, 1, 2, 0, 1]], [[0, 0, 0, 1, 2]], [[0, 1, 5, 6, 7]])
    for positions, segments, expected in (
        (packed, [[1, 1, 1, 2, 2]], True),
        (padded, [[0, 0, 1, 1, 1]], True),
        (gap, [[1, 1, 2, 2, 2]], True),
        (gap, [[1, 1, 1, 1, 1]], False),
        (packed, [[1, 1, 1, 1, 1]], False),
    ):
        positions, segments = jnp.array(positions), jnp.array(segments)
        mask = Mask(query_positions=positions, key_positions=positions, query_segments=segments, key_segments=segments)
        assert bool(transformer_xl.in_order(mask, 5)) == expected


@pytest.mark.parametrize("cuts", [range(1, 9), (1, 5, 8)], ids=["token by token", "in chunks"])
def test_a_cache_gives_what_the_whole_gives(cuts):
    params, read = start(), tokens(2, 8)
    whole = forward(params, MODEL, read).hidden
    params, cache, parts, begin = decoding_params(params), empty_cache(MODEL, 2, 16), [], 0
    for end in cuts:
        output = forward(params, MODEL, read[:, begin:end], cache=cache)
        cache, begin = output.cache, end
        parts.append(output.hidden)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)


def test_prompts_of_unequal_lengths_are_continued_as_each_alone():
    params, prompts = start(), [[1, 2, 3, 4, 5, 6, 7], [3], [9, 8, 4]]
    together = generate(MODEL, params, prompts, max_new_tokens=5)
    assert together == [generate(MODEL, params, [prompt], max_new_tokens=5)[0] for prompt in prompts]


def test_a_text_with_gaps_is_read_by_its_positions():
    """A row out of its order, with gaps, is that of a longer text whose missing tokens are hidden."""
    params, read = start(), tokens(1, 9)
    segments = np.array([[1, 1, 0, 0, 1, 1, 1, 0, 1]])
    model = replace(MODEL, causal=False)

    def run(read, positions, segments):
        return forward(params, model, read, positions=positions, segments=segments).hidden

    whole = run(read, np.arange(9)[None], segments)[:, segments[0] == 1]
    kept = np.flatnonzero(segments[0])[::-1]
    found = run(read[:, kept], kept[None], np.ones((1, len(kept)), int))
    np.testing.assert_allclose(found[:, ::-1], whole, atol=1e-5)


@pytest.mark.parametrize("attention", ["dense", "chunked"])
def test_implementations_agree_on_gradients(attention):
    params, read = start(), tokens(2, 8)

    def gradient(attention):
        run = Execution(attention=attention)
        return jax.jit(jax.grad(lambda p: jnp.sum(forward(p, MODEL, read, execution=run).hidden ** 3)))(params)

    assert max(disagreement(gradient(attention), gradient("reference")).values()) < 1e-5


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_low_precision_is_the_same_but_for_rounding(precision):
    params, read = start(), tokens(2, 12)
    exact = forward(params, MODEL, read).hidden
    found = forward(params, MODEL, read, execution=Execution(precision=POLICIES[precision])).hidden.astype(jnp.float32)
    assert np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)) < (0.03 if precision == "bf16" else 0.2)


def test_flops_are_those_of_the_formula():
    other = replace(MODEL, positions="none")
    assert flops_per_token(MODEL, 64) == flops_per_token(other, 64) + 6 * MODEL.layers * MODEL.heads * 6 * 64


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (replace(MODEL, embed=13), "model.embed=13 is odd"),
        (replace(MODEL, attention_softcap=3.0), "model.attention_softcap=3.0"),
        (EncoderDecoder(**vars(MODEL), encoder=replace(MODEL, causal=False)), "not of an encoder-decoder"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(model, said):
    with pytest.raises(ValueError, match=said):
        check(model)


def test_an_implementation_that_takes_no_bias_is_refused_by_name():
    model = replace(MODEL, head_dim=8)
    with pytest.raises(ValueError, match="attention='cudnn' takes no learned bias"):
        forward(
            initial_values(jax.random.key(0), specs(model)),
            model,
            tokens(1, 8),
            execution=Execution(attention="cudnn", precision=POLICIES["bf16"]),
        )
