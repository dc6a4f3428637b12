"""The one forward over a cache of pages: hidden states are those of the forward over whole texts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.execution import Execution
from lmx.core.params import is_spec
from lmx.core.tree import map_named
from lmx.infer import decoding_params
from lmx.kernels.paged import View
from lmx.models.attention import Pages
from lmx.models.config import EncoderDecoder, Transformer
from lmx.models.transformer import Paged, Source, empty_pages, forward, read_source, specs

PLAIN = Transformer(vocab=24, layers=2, embed=16, heads=4, kv_heads=2, mlp=16, context=64)
CONFIGS = {
    "rope, windows": replace(PLAIN, layers=3, window=4, pattern=("local", "global"), local_rope_theta=100.0),
    "learned, post": replace(PLAIN, positions="learned", norm="layernorm", norm_placement="post", bias=True),
    "ALiBi, soft cap": replace(PLAIN, positions="alibi", attention_softcap=2.0),
    "relative": replace(PLAIN, positions="relative", relative_buckets=8, relative_distance=12),
    "Transformer-XL": replace(PLAIN, positions="transformer_xl", kv_heads=None),
    "experts": replace(PLAIN, experts=4, experts_per_token=2),
    "parallel, joint norms": replace(PLAIN, parallel=True, qk_norm=True, qk_norm_joint=True),
}
SIZE, POOL = 4, 32


def weights(config):
    rng = np.random.default_rng(0)
    return map_named(lambda _, spec: jnp.asarray(0.3 * rng.normal(size=spec.shape), jnp.float32), specs(config), is_leaf=is_spec)


class Rows:
    """Texts and the pages that they lie in."""

    def __init__(self, texts, seed=0):
        self.texts, self.done = texts, [0] * len(texts)
        free = list(np.random.default_rng(seed).permutation(np.arange(1, 25)))
        self.pages = [[free.pop() for _ in range(-(-len(text) // SIZE))] for text in texts]

    def slot(self, row, at):
        return self.pages[row][at // SIZE] * SIZE + at % SIZE

    def call(self, counts, singles, padding=0):
        """`(tokens, pages)` of the next so many tokens of each row; `singles` rows come first with one or none."""
        tokens, slots, queries = [], [], [0]
        for row, count in enumerate(counts):
            at = range(self.done[row], self.done[row] + count)
            own = [self.texts[row][i] for i in at], [self.slot(row, i) for i in at]
            if row < singles and not count:
                own = [0], [0]
            tokens, slots = tokens + own[0], slots + own[1]
            queries.append(len(tokens))
            self.done[row] += count
        held = [n if counts[row] else 0 for row, n in enumerate(self.done)]
        pages = [self.pages[row][: -(-n // SIZE)] for row, n in enumerate(held)]
        flat, first = [p for row in pages for p in row], np.cumsum([0, *map(len, pages)])
        view = View(*(jnp.asarray(a, jnp.int32) for a in (flat + [0] * (POOL - len(flat)), first, held, queries)), singles)
        return jnp.asarray([tokens + [0] * padding], jnp.int32), Pages(view, jnp.asarray(slots + [0] * padding, jnp.int32))


TEXTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [2, 7, 1, 8, 2], [1, 1, 2, 3, 5, 8, 13, 21]]
CALLS = [([0, 0, 5], 2, 2), ([1, 0, 3], 2, 0), ([1, 4, 0], 1, 3), ([1, 1, 0], 2, 1), ([8, 0, 0], 0, 0)]
"""Tokens of each row, how many rows decode, padding: each text is read in its own pieces."""


@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_of_texts_over_pages_give_what_whole_texts_give(name):
    config = CONFIGS[name]
    params = weights(config)
    length = max(map(len, TEXTS))
    padded = jnp.asarray([text + [0] * (length - len(text)) for text in TEXTS])
    segments = jnp.asarray([[1] * len(text) + [0] * (length - len(text)) for text in TEXTS])
    wanted = np.asarray(forward(params, config, padded, segments=segments).hidden)

    rows, params = Rows(TEXTS), decoding_params(params)
    layers, run = empty_pages(config, POOL, SIZE), jax.jit(lambda tokens, cache: forward(params, config, tokens, cache=cache))
    for counts, singles, padding in CALLS:
        before = list(rows.done)
        tokens, pages = rows.call(counts, singles, padding)
        output = run(tokens, Paged(layers, pages))
        layers, found = output.cache.layers, np.asarray(output.hidden[0])
        for row, count in enumerate(counts):
            start = int(pages.view.queries[row])
            got = found[start : start + count]
            np.testing.assert_allclose(got, wanted[row, before[row] : before[row] + count], atol=2e-5 * np.abs(wanted).max())
    assert rows.done == list(map(len, TEXTS))


def test_a_decoder_reads_the_pages_of_its_source():
    config = EncoderDecoder(
        vocab=24, layers=2, embed=16, heads=4, mlp=16, context=64, positions="relative", relative_buckets=8, relative_distance=12,
        encoder=Transformer(
            vocab=24, layers=1, embed=16, heads=4, mlp=16, context=64, causal=False, head="none", positions="relative", relative_buckets=8
        ),
    )  # fmt: skip
    params = weights(config)
    sources = [[4, 4, 2, 9, 11, 3], [7, 2]]
    wanted = [
        np.asarray(forward(params, config, jnp.asarray([text]), source=Source(jnp.asarray([source]))).hidden[0])
        for text, source in zip(TEXTS[:2], sources, strict=True)
    ]
    params, execution = decoding_params(params), Execution()
    layers = empty_pages(config, POOL, SIZE)
    rows, read = Rows(TEXTS[:2]), [[25, 26], [27]]
    for source, pages in zip(sources, read, strict=True):
        slots = [pages[i // SIZE] * SIZE + i % SIZE for i in range(len(source))]
        padded, real = source + [0] * (8 - len(source)), [1] * len(source) + [0] * (8 - len(source))
        layers = read_source(
            params, config, Source(jnp.asarray([padded]), segments=jnp.asarray([real])), layers,
            jnp.asarray(slots + [0] * (8 - len(source))), execution,
        )  # fmt: skip
    for counts, singles in (([3, 1], 0), ([1, 1], 2), ([1, 3], 1), ([6, 0], 0)):
        before = list(rows.done)
        tokens, pages = rows.call(counts, singles)
        lengths = [len(source) if count else 0 for source, count in zip(sources, counts, strict=True)]
        flat, first = read[0] + read[1], jnp.asarray([0, 2, 3])
        source = View(jnp.asarray(flat), first, jnp.asarray(lengths), pages.view.queries, singles)
        output = forward(params, config, tokens, cache=Paged(layers, pages.replace(source=source)))
        layers = output.cache.layers
        for row, count in enumerate(counts):
            start = int(pages.view.queries[row])
            got = np.asarray(output.hidden[0, start : start + count])
            np.testing.assert_allclose(got, wanted[row][before[row] : before[row] + count], atol=2e-5 * np.abs(wanted[row]).max())
