"""Masked language models under further kinds of layout: loss, gradients and parameters after three steps are one device's."""

from dataclasses import replace

import pytest

import runs
from lmx import verify
from lmx.parallel.layout import Layout
from lmx.train.experiment import check
from lmx.train.objectives import CausalLM, MaskedLM
from lmx.verify import BOUND, differences

pytestmark = pytest.mark.usefixtures("scanned")

BERT = replace(
    runs.MODEL,
    causal=False,
    positions="learned",
    token_types=2,
    embed_norm=True,
    norm_placement="post",
    gated=False,
    activation="gelu",
    head="masked",
    head_bias=True,
    kv_heads=None,
)
ALBERT = replace(BERT, embed_size=8, shared_layers=True, activation="gelu_tanh")
MODELS = {"bert": BERT, "albert": ALBERT, "bert, untied": replace(BERT, tied=False)}
CASES = [
    ("bert", Layout(fsdp=4, zero=1, tensor=2, sequence=True), 1),
    ("bert", Layout(context=2, fsdp=2, tensor=2), 1),
    ("bert", Layout(context=4, exchange="alltoall", data=2), 1),
    ("bert", Layout(pipeline=2, data=2, tensor=2), 4),
    ("bert, untied", Layout(data=2, fsdp=2, tensor=2), 1),
    ("albert", Layout(data=2, fsdp=2, tensor=2, remat="full"), 2),
    ("albert", Layout(context=2, fsdp=4), 1),
]


@pytest.fixture(autouse=True)
def sentences(monkeypatch):
    """Batches tell sentences apart, too."""
    packed = verify.packed

    def kinds(run, step: int) -> dict:
        batch = packed(run, step)
        return batch | {"token_types": batch["segments"] % 2}

    monkeypatch.setattr(verify, "packed", kinds)


def one_device(model: str) -> dict:
    return runs.train_from_shared_start(runs.experiment(model=MODELS[model], objective=MaskedLM()))


@pytest.mark.parametrize(("model", "layout", "microbatches"), CASES)
def test_numbers_do_not_depend_on_the_layout(model, layout, microbatches, once):
    run = runs.experiment(model=MODELS[model], objective=MaskedLM(), layout=layout, microbatches=microbatches)
    check(run)
    found = differences(runs.train_from_shared_start(run), once(one_device, model))
    assert max(found.values()) < BOUND, {name: value for name, value in found.items() if not value < BOUND}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": BERT, "objective": CausalLM()}, "objective=CausalLM with model.causal=False; use MaskedLM"),
        ({"model": runs.MODEL, "objective": MaskedLM()}, "objective=MaskedLM with model.causal=True; use CausalLM"),
        ({"model": replace(BERT, head="none", head_bias=False)}, "model.head=none gives no logits"),
        ({"model": ALBERT, "layout": Layout(pipeline=2)}, "model.shared_layers has one set of parameters"),
    ],
)
def test_what_cannot_be_trained_so_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check(runs.experiment(**{"objective": MaskedLM()} | changes))
