"""The mask language against its definition, one query and one key at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmx.kernels.masks import Mask

BATCH, QUERIES, KEYS = 2, 5, 7


def ints(low: int, high: int, *shape: int):
    return st.lists(st.integers(low, high), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))).map(
        lambda values: np.array(values, np.int32).reshape(shape)
    )


@st.composite
def masks(draw) -> Mask:
    causal = draw(st.booleans())
    window = draw(st.sampled_from([None, 1, 2, 4, 100])) if causal else None
    order = draw(st.sampled_from(["index", "positions"]))
    segments, positions = (None, None), (None, None)
    if draw(st.booleans()):
        segments = (draw(ints(0, 2, BATCH, QUERIES)), draw(ints(0, 2, BATCH, KEYS)))
    if order == "positions" or draw(st.booleans()):
        positions = (draw(ints(0, 9, BATCH, QUERIES)), draw(ints(0, 9, BATCH, KEYS)))
    prefix = draw(ints(0, 1, BATCH, KEYS)) if window is None and draw(st.booleans()) else None
    return Mask(causal, window, order, *segments, *positions, key_prefix=prefix)


@given(masks())
@settings(deadline=None, max_examples=60)
def test_a_query_sees_exactly_what_every_condition_allows(mask):
    dense = np.broadcast_to(mask.dense(QUERIES, KEYS), (BATCH, QUERIES, KEYS))
    for row in range(BATCH):
        for i in range(QUERIES):
            for j in range(KEYS):
                query, key = (i, j) if mask.order == "index" else (mask.query_positions[row, i], mask.key_positions[row, j])
                sees = True
                if mask.causal and key > query:
                    sees = False
                if mask.window is not None and not query - mask.window < key:
                    sees = False
                if mask.key_prefix is not None and mask.key_prefix[row, j]:
                    sees = True
                if mask.query_segments is not None:
                    own, other = mask.query_segments[row, i], mask.key_segments[row, j]
                    sees = sees and own == other and own != 0
                assert dense[row, i, j] == sees


@given(ints(0, 9, BATCH, QUERIES), ints(0, 9, BATCH, KEYS))
@settings(deadline=None, max_examples=10)
def test_distances_are_of_positions_where_they_are_given(queries, keys):
    found = Mask(query_positions=queries, key_positions=keys).distances(QUERIES, KEYS)
    assert all(found[r, i, j] == queries[r, i] - keys[r, j] for r in range(BATCH) for i in range(QUERIES) for j in range(KEYS))


def test_distances_without_positions_are_of_places():
    found = Mask().distances(3, 4)
    assert found.tolist() == [[[0, -1, -2, -3], [1, 0, -1, -2], [2, 1, 0, -1]]]


def test_a_window_of_one_sees_itself_alone():
    assert np.array_equal(Mask(window=1).dense(4, 4)[0], np.eye(4, dtype=bool))


def test_a_window_with_a_prefix_is_refused():
    with pytest.raises(ValueError, match="a window hides what a prefix shows"):
        Mask(window=2, key_prefix=np.zeros((1, 3), np.int32))


def test_a_window_that_does_not_count_back_is_refused():
    with pytest.raises(ValueError, match=r"window.*causal"):
        Mask(causal=False, window=3)
