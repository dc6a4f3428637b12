"""The engine's timeline as a picture."""

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.figure import Figure

from lmx.infer.jobs import Completion, Job, Moment
from lmx.infer.pictures import draw, spans
from lmx.infer.sampling import Sampling
from lmx.infer.steps import Request


def job(number: int, prompt: int, arrived: float) -> Job:
    request = Request(tuple(range(prompt)), 5, 1, 0, b"", True)
    return Job(number, request, Sampling(), 0, 0, (), (), [Completion()], arrived)


def moments(*steps) -> list[Moment]:
    """One a second, from second 100 on: who decodes, who reads, who is put out, pages."""
    return [Moment(100.0 + i, 101.0 + i, *step) for i, step in enumerate(steps)]


TIMELINE = moments(
    ((), ((4, 8),), (), 2),
    ((4,), ((5, 2),), (), 4),
    ((5,), (), (4,), 2),
    ((5,), (), (), 3),
    ((), ((4, 3),), (), 2),
    ((4,), (), (), 1),
)


def test_a_request_reads_writes_waits_and_reads_again():
    assert spans(TIMELINE, job(4, 8, 99.0)) == {"reads": [(0, 1), (4, 1)], "writes": [(1, 1), (5, 1)], "waits": [(2, 2)]}


def test_a_request_waits_from_its_arrival_to_its_last_token():
    assert spans(TIMELINE, job(5, 10, 100.25)) == {"waits": [(0.25, 0.75)], "reads": [(1, 1)], "writes": [(2, 2)]}
    assert spans(TIMELINE, job(6, 10, 100.0)) == {"waits": [], "reads": [], "writes": []}


def test_every_second_since_a_request_came_is_told_once():
    rng = np.random.default_rng(0)
    for _ in range(50):
        doing = rng.integers(3, size=12)
        timeline = moments(*(((1,) if kind == 2 else (), ((1, 4),) if kind == 1 else (), (), 1) for kind in doing))
        arrived = 100 + float(rng.uniform(-1, np.flatnonzero(doing)[0]))
        found = spans(timeline, job(1, 4, arrived))
        edges = sorted((begun, begun + length) for several in found.values() for begun, length in several)
        assert edges[-1][1] == pytest.approx(np.flatnonzero(doing)[-1] + 1)
        assert edges[0][0] == pytest.approx(max(arrived - 100, 0))
        assert all(end == pytest.approx(begun) for (_, end), (begun, _) in pairwise(edges))


def test_the_picture_shows_requests_crosses_pages_and_what_was_found():
    figure = Figure()
    draw(TIMELINE, [job(4, 8, 99.0), job(5, 10, 100.25)], 4, figure)
    above, below = figure.axes
    assert [label.get_text() for label in above.get_yticklabels()] == ["1: 8 + 5", "2: 10 + 5"]
    assert [note.get_text() for note in above.texts] == ["8 tokens found"]
    crosses = [tuple(map(float, line.get_xydata()[0])) for line in above.lines if len(line.get_xydata())]
    assert crosses == [(2000, 0)]
    assert list(below.patches[0].get_data().values) == [2, 4, 2, 3, 2, 1]


def test_an_empty_timeline_is_refused():
    with pytest.raises(ValueError, match="trace=True"):
        draw([], [], 4, Figure())
