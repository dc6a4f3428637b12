"""What models that see are made of, against loops in NumPy."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.core.execution import Execution
from lmx.core.params import is_spec
from lmx.models import clip, llava, stack, transformer, vision
from lmx.models.config import Transformer
from lmx.models.families import check
from lmx.models.transformer import Embedded
from lmx.models.vision_config import CLIP, CaptionTransformer, LLaVA, VisionTransformer

SIZES = {"layers": 3, "embed": 8, "heads": 2, "mlp": 12, "init_std": 0.3}

SEES = VisionTransformer(**SIZES, image_size=(5, 6), patch_size=(2, 3), channels=2)
READS = Transformer(**SIZES, vocab=11, context=16)


def started(specs):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda spec: jnp.asarray(rng.normal(0, 0.3, spec.shape), jnp.float32), specs, is_leaf=is_spec)


@given(st.tuples(*[st.integers(1, 3)] * 6))
@settings(max_examples=6, deadline=None)
def test_patches_are_cut_row_by_row(sizes):
    down, across, rows, columns, channels, rest = sizes
    pixels = np.random.default_rng(0).normal(size=(2, channels, down * rows + (rest - 1) % rows, across * columns + (rest - 1) % columns))
    found = vision.cut(jnp.asarray(pixels, jnp.float32), (rows, columns))
    assert found.shape == (2, down * across, channels, rows, columns)
    for i in range(down):
        for j in range(across):
            patch = pixels[:, :, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            np.testing.assert_array_equal(found[:, i * across + j], patch.astype(np.float32))


def test_a_forward_stops_where_it_is_told_to():
    params, pixels = started(vision.specs(SEES)), jnp.ones((1, 2, 5, 6))
    tapped = jax.jit(lambda params: vision.forward(params, SEES, pixels, execution=Execution(taps=("layers/*/*",))))(params)
    states = [*(tapped.taps[f"layers/{i}/input"] for i in range(3)), tapped.taps["layers/2/output"]]
    unrolled = params | {"layers": stack.unstack(params["layers"])}
    for depth, form in ((0, params), (1, unrolled), (3, params)):
        found = jax.jit(vision.forward, static_argnums=1, static_argnames="depth")(form, SEES, pixels, depth=depth).hidden
        np.testing.assert_allclose(found, states[depth], rtol=1e-5, atol=1e-6)


def test_what_is_given_stands_in_place_of_embeddings():
    params = started(transformer.specs(READS))
    tokens, others = jnp.array([[3, 4, 5, 6]]), jnp.array([[3, 9, 5, 2]])
    where = tokens != others
    vectors = jnp.where(where[..., None], params["embed"][tokens], jnp.nan)
    forward = jax.jit(partial(transformer.forward, config=READS))
    found = forward(params, tokens=others, given=Embedded(vectors, where)).hidden
    np.testing.assert_array_equal(found, forward(params, tokens=tokens).hidden)


def test_what_is_given_and_tapped_beside_images():
    config = LLaVA(**SIZES, vocab=11, context=16, image_token=3, image=SEES, image_layers=(0, -1))
    params, tokens = started(llava.specs(config)), jnp.array([[5, *[3] * 4, 6, 7]])
    soft = Embedded(jnp.ones((1, 7, 8)), tokens == 6)
    execution = Execution(taps=("layers/0/input", "image/layers/1/*put"))
    run = jax.jit(lambda pixels: llava.forward(params, config, tokens, pixels=pixels, given=soft, execution=execution).taps)
    pixels = jnp.ones((1, 2, 5, 6))
    taps = run(pixels)
    assert set(taps) == {"layers/0/input", "image/layers/1/input", "image/layers/1/output"}
    np.testing.assert_allclose(taps["layers/0/input"][0, 1:5], llava.features(params, config, pixels)[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(taps["layers/0/input"][0, 5], 1.0)
    np.testing.assert_array_equal(taps["layers/0/input"][0, 6], params["embed"][7])


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_features_are_read_in_order(seed, images, patches):
    rng = np.random.default_rng(seed)
    config = LLaVA(**SIZES, vocab=11, image_token=3, image=SEES)
    tokens = rng.integers(4, 11, (2, 8))
    places = np.sort(rng.permutation(16)[: images * patches])
    tokens.reshape(-1)[places] = 3
    features = rng.normal(size=(images, patches, 8)).astype(np.float32)
    found = llava.among(config, jnp.asarray(tokens), jnp.asarray(features))
    taken = iter(features.reshape(-1, 8))
    for row in range(2):
        for column in range(8):
            assert bool(found.where[row, column]) == (tokens[row, column] == 3)
            if tokens[row, column] == 3:
                np.testing.assert_array_equal(found.vectors[row, column], next(taken))
    tokens.reshape(-1)[places[0]] = 4
    assert np.isnan(llava.among(config, jnp.asarray(tokens), jnp.asarray(features)).vectors).all()


@pytest.mark.parametrize("pad", [0, 9], ids=["padding of its own", "padding that is the end token"])
@pytest.mark.parametrize("left", [False, True])
def test_a_text_is_read_at_its_end(pad, left):
    tokens = np.array([[1, 2, 9, 3], [4, 5, 6, 9]])
    real = np.ones_like(tokens)
    widths = ((0, 0), (2, 0) if left else (0, 2))
    tokens, real = np.pad(tokens, widths, constant_values=pad), np.pad(real, widths)
    hidden = np.arange(tokens.size * 8, dtype=np.float32).reshape(*tokens.shape, 8)
    for end_token in (9, None):
        found = clip.pooled(CaptionTransformer(end_token=end_token), jnp.asarray(tokens), jnp.asarray(hidden), jnp.asarray(real))
        np.testing.assert_array_equal(found, hidden[[0, 1], [2 + 2 * left, 3 + 2 * left]])


def test_the_contrastive_loss():
    logits = np.random.default_rng(0).normal(size=(4, 4))

    def entropy(rows):
        return np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(rows)])

    found = clip.contrastive_loss(jnp.asarray(logits, jnp.float32))
    assert float(found) == pytest.approx((entropy(logits) + entropy(logits.T)) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (replace(SEES, patch_size=(6, 3)), r"model.patch_size=\(6, 3\)"),
        (replace(SEES, labels=3), "model.labels=3 with model.head=none"),
        (replace(SEES, class_token=False, head="pooler"), "model.head=pooler and model.summary_norm=False read a class token"),
        (replace(SEES, head="lm"), "model.head=lm of an encoder of images"),
        (replace(SEES, causal=True), "model.causal=True is not of an encoder of images"),
        (replace(SEES, heads=3), "model.embed=8 is not divisible by model.heads=3"),
        (Transformer(vocab=8, head="projection"), "model.head=projection is of what reads images or captions"),
        (CLIP(replace(CLIP().image, summary=8), CLIP().text), "model.image.summary=8 is not model.text.summary=None"),
        (CLIP(replace(CLIP().image, channels=0), CLIP().text), "model.image.channels=0"),
        (LLaVA(vocab=8, image=SEES, image_layers=(-5,)), "model.image_layers has -5, and model.image has 3 layers"),
        (LLaVA(vocab=8, image=replace(SEES, embed=9)), "model.image.embed=9 is not divisible by model.image.heads=2"),
    ],
)
def test_what_is_no_model_is_refused(config, said):
    with pytest.raises(ValueError, match=said):
        check(config)


def test_defaults_are_models():
    for config in (VisionTransformer(), CLIP(), LLaVA(vocab=8)):
        check(config)
