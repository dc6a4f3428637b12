"""`verify` cries out over bugs alone, in every precision."""

from dataclasses import replace

import pytest

import runs
from lmx.parallel.layout import Layout
from lmx.verify import BOUND, compared_in, verify

pytestmark = pytest.mark.usefixtures("scanned")


def test_what_rounding_does_to_the_choice_of_experts_is_no_bug():
    """In bf16 the gradient of an expert is off by a fifth on this layout, and by a seventieth on one device."""
    model = replace(runs.MODEL, experts=4, experts_per_token=1, pattern=("global",))
    run = runs.experiment(model=model, precision="bf16", layout=Layout(expert=4, remat="full"))
    assert compared_in(run) == "fp32"
    assert compared_in(replace(run, model=runs.MODEL)) == "bf16"
    report = verify(run)
    assert report.bound == BOUND
    assert report.right, report.worst


def test_where_a_narrower_precision_is_none_the_bound_is_that_of_fp32():
    report = verify(runs.experiment(precision="tf32", layout=Layout(tensor=2)))  # on a CPU
    assert report.bound == BOUND
    assert report.right, report.worst
