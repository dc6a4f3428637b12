"""Denoising objectives in the settings that their tests go through, and rows of them."""

import numpy as np
import pytest
from hypothesis import strategies as st

from lmx.data import (
    BlankInfilling,
    MaskedLM,
    PrefixLM,
    SpanCorruption,
    TextInfilling,
    denoise,
    ul2,
)

VOCAB, FIRST = 400, 100  # ids from FIRST on are text
START, EOS, BEGIN, MASK, PIECE, END, R, S, X = range(1, 10)
STOPS = (101, 102)
SENTINELS = tuple(range(99, 19, -1))
WORDS = np.arange(VOCAB) % 3 != 0  # which ids begin a word

CASES = {
    "prefix": PrefixLM(),
    "prefix_eos": PrefixLM(eos=EOS, least=0.2, most=0.7),
    "prefix_two_sides": PrefixLM(form="encoder_decoder", eos=EOS, start=START),
    "masked": MaskedLM(mask=MASK, vocab=VOCAB),
    "masked_words": MaskedLM(mask=MASK, vocab=VOCAB, rate=0.3, whole_word=True, begin=BEGIN, eos=EOS),
    "spans": SpanCorruption(SENTINELS, EOS, START),
    "spans_dense": SpanCorruption(SENTINELS, EOS, START, density=0.5, mean_span=1.5),
    "spans_prefix": SpanCorruption(SENTINELS, EOS, density=0.3, mean_span=2, form="prefix"),
    "infilling": TextInfilling(MASK, EOS, EOS, BEGIN, STOPS),
    "infilling_prefix": TextInfilling(MASK, EOS, sentence_ends=STOPS, rate=0.6, mean_span=1.2, form="prefix"),
    "blanks": BlankInfilling(MASK, PIECE, END),
    "blanks_dense": BlankInfilling(MASK, PIECE, END, rate=0.7, mean_span=1),
    "ul2": ul2(sentinels=SENTINELS, modes=(R, S, X), eos=EOS, start=START),
    "ul2_prefix": ul2(sentinels=SENTINELS, modes=(R, S, X), eos=EOS, form="prefix"),
}
case = pytest.mark.parametrize("name", CASES)
TEXT = st.lists(st.integers(FIRST, FIRST + 30), min_size=2, max_size=80).map(np.array)
SEED, ID = st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1)


def make(name, texts, example_id=3, seed=0, padding=0, **options):
    """A row that is as long as the objective says that its texts may need, and some padding."""
    objective = CASES[name]
    need = [objective.sizes(len(text)) for text in texts]
    sizes = {"length": sum(first for first, _ in need) + padding}
    if any(second for _, second in need):
        sizes["decoder_length"] = sum(second for _, second in need) + padding
    return denoise(objective, example_id, texts, **{"seed": seed, "words": WORDS, **sizes, **options})
