"""Denoising objectives of one stream through a whole run: numbers do not depend on the layout, and the run's parts fit together."""

from dataclasses import replace

import numpy as np
import pytest

from lmx.data.denoising import BlankInfilling, MaskedLM, PrefixLM
from lmx.data.recipe import make_batches, prepare
from lmx.parallel.feed import batch_sharding, local_rows, place
from lmx.parallel.layout import Layout
from lmx.train import objectives
from lmx.train.experiment import resolve
from lmx.train.loop import prepare_run, run
from lmx.train.program import build

OBJECTIVES = {"prefix": PrefixLM(), "blanks": BlankInfilling(mask=259, start=260, end=261)}


def denoised(experiment, name: str, **changes):
    made = experiment(**changes)
    model = replace(made.model, vocab=264, block_positions=name == "blanks", dropout=0.0)
    return replace(made, model=model, data=replace(made.data, denoising=OBJECTIVES[name], packing="first_fit"))


def losses(experiment, steps: int = 3) -> np.ndarray:
    prepared = prepare(experiment.data)
    experiment = resolve(experiment, prepared)
    program = build(experiment)
    shape = (experiment.microbatches, experiment.batch // experiment.microbatches)
    sharding = batch_sharding(program.mesh, microbatches=True)
    rows = local_rows(sharding, shape)
    source = make_batches(experiment.data, prepared.train, prepared.tokenizer, vocab=experiment.model.vocab, rows=experiment.batch, seed=0)
    state, found = program.initial(), []
    for k in range(steps):
        state, metrics = program.step(state, place(source.rows(k, rows), rows, shape, sharding))
        found.append(float(metrics["loss"]))
    return np.array(found)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_those_of_one_device(experiment, name):
    alone = losses(denoised(experiment, name))
    assert np.isfinite(alone).all()
    layouts = {"prefix": Layout(data=2, fsdp=2, tensor=2), "blanks": Layout(pipeline=2, context=2, data=2)}
    split = losses(denoised(experiment, name, layout=layouts[name], microbatches=2))
    np.testing.assert_allclose(split, alone, rtol=2e-5)


def test_a_run_trains_and_evaluates(experiment, tmp_path):
    made = denoised(experiment, "prefix", steps=2)
    result = run(prepare_run(replace(made, folder=str(tmp_path))))
    assert np.isfinite(result.validation["loss"])
    assert "nats_per_byte" not in result.validation


def test_an_encoder_trains_on_masked_text(experiment, tmp_path):
    made = experiment(steps=3, layout=Layout(data=2, tensor=2))
    made = replace(
        made,
        model=replace(made.model, vocab=264, causal=False, head="masked", token_types=2),
        data=replace(made.data, denoising=MaskedLM(mask=259, vocab=256), packing="first_fit"),
        objective=objectives.MaskedLM(),
        folder=str(tmp_path),
    )
    assert np.isfinite(run(prepare_run(made)).validation["loss"])


def test_what_does_not_fit_is_refused(experiment):
    made = denoised(experiment, "prefix")
    with pytest.raises(ValueError, match=r"is not one of first_fit, stream"):
        losses(replace(made, data=replace(made.data, packing="concatenate")))
    blanks = denoised(experiment, "blanks")
    with pytest.raises(ValueError, match=r"set model\.block_positions"):
        losses(replace(blanks, model=replace(blanks.model, block_positions=False)))
