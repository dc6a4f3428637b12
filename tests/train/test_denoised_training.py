"""Denoising objectives through a whole run: numbers do not depend on the layout, and the run's parts fit together."""

from dataclasses import replace

import numpy as np
import pytest

from lmx.data.denoising import BlankInfilling, MaskedLM, PrefixLM, SpanCorruption, TextInfilling, ul2
from lmx.data.pipeline import batch_hash
from lmx.data.recipe import make_batches, prepare
from lmx.models.config import EncoderDecoder, Transformer
from lmx.parallel.feed import batch_sharding, local_rows, place
from lmx.parallel.layout import Layout
from lmx.train import loop, objectives
from lmx.train.experiment import Samples, check, resolve
from lmx.train.loop import prepare_run, run
from lmx.train.optimizers import AdamW, Schedule
from lmx.train.program import build

OBJECTIVES = {"prefix": PrefixLM(), "blanks": BlankInfilling(mask=259, start=260, end=261)}

END, START, MODES, SENTINELS = 256, 260, (261, 262, 263), tuple(range(295, 263, -1))
PAIRS = {
    "t5": SpanCorruption(SENTINELS, eos=END, start=START),
    "bart": TextInfilling(mask=259, eos=END, start=END, begin=START, sentence_ends=(ord("\n"), ord("."))),
    "ul2": ul2(sentinels=SENTINELS, modes=MODES, eos=END, start=START),
}
SIZES = {"vocab": 296, "layers": 2, "embed": 32, "heads": 4, "mlp": 64, "context": 48, "gated": False, "init_std": 0.1}
T5 = SIZES | {"positions": "relative", "relative_buckets": 8, "relative_distance": 20, "activation": "relu"}
BART = SIZES | {"positions": "learned", "norm": "layernorm", "norm_placement": "post", "bias": True, "activation": "gelu"}


def paired(experiment, name: str, **changes):
    """The tiny run with an encoder-decoder."""
    fields = BART if name == "bart" else T5
    model = EncoderDecoder(**fields, encoder=Transformer(**fields, causal=False))
    made = experiment(**{"model": model, "objective": objectives.Seq2Seq()} | changes)
    # A text of UL2 may be all target; the two packings differ in what ends a row.
    sides = {"length": 48, "decoder_length": 48, "packing": "stream" if name == "ul2" else "first_fit"}
    return replace(made, data=replace(made.data, denoising=PAIRS[name], **sides))


def denoised(experiment, name: str, **changes):
    if name in PAIRS:
        return paired(experiment, name, **changes)
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


@pytest.mark.parametrize("name", [*OBJECTIVES, *PAIRS])
def test_losses_are_those_of_one_device(experiment, name):
    alone = losses(denoised(experiment, name))
    assert np.isfinite(alone).all()
    layouts = {
        "prefix": Layout(data=2, fsdp=2, tensor=2),
        "blanks": Layout(pipeline=2, context=2, data=2),
        "t5": Layout(data=2, fsdp=2, tensor=2),
        "bart": Layout(fsdp=4, tensor=2, zero=1, sequence=False),
        "ul2": Layout(data=4, tensor=2),
    }
    split = losses(denoised(experiment, name, layout=layouts[name], microbatches=2))
    np.testing.assert_allclose(split, alone, rtol=2e-5)


def test_a_run_trains_and_evaluates(experiment, tmp_path):
    made = denoised(experiment, "prefix", steps=2)
    result = run(prepare_run(replace(made, folder=str(tmp_path))))
    assert np.isfinite(result.validation["loss"])
    assert "nats_per_byte" not in result.validation


def test_an_encoder_decoder_learns_evaluates_writes_and_resumes_exactly(experiment, monkeypatch):
    fed = []

    def watched(batch, *rest):
        if len(rest[1]) == 2:  # training, not evaluation
            fed.append(batch_hash(batch))
        return place(batch, *rest)

    monkeypatch.setattr(loop, "place", watched)
    adam = AdamW(learning_rate=1e-2, schedule=Schedule(kind="constant", warmup=0))
    asked = Samples(prompt="To be, or not to be", tokens=8)
    made = paired(experiment, "t5", optimizer=adam, batch=8, steps=30, samples=asked)
    whole = run(prepare_run(made))
    alone, fed[:] = fed.copy(), []
    # A target is half sentinels, ends and bytes that stand often: what is learned first.
    assert whole.metrics["loss"] < np.log(made.model.vocab) - 2.5
    assert whole.validation["loss"] < np.log(made.model.vocab) - 2
    assert "nats_per_byte" not in whole.validation
    read, _, _ = whole.sample.partition(" \u2192 ")
    assert f"<{SENTINELS[0]}>" in read

    made = replace(made, name="cut", evaluation=replace(made.evaluation, batches=1), samples=Samples())
    run(prepare_run(replace(made, steps=11)))
    again = run(prepare_run(replace(made, start="resume")))
    assert fed == alone
    assert {name: again.metrics[name] for name in ("loss", "grad_norm")} == {name: whole.metrics[name] for name in ("loss", "grad_norm")}


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
    pairs = paired(experiment, "t5")
    refused = [
        (
            replace(pairs, data=replace(pairs.data, denoising=None, decoder_length=None)),
            "Seq2Seq, and nothing else, reads rows of a source",
        ),
        (replace(made, data=replace(made.data, denoising=PAIRS["t5"])), "objective=CausalLM with data.denoising=SpanCorruption"),
        (replace(pairs, data=replace(pairs.data, decoder_length=64)), "data.decoder_length=64 is longer than model.context=48"),
        (replace(pairs, data=replace(pairs.data, length=64)), "data.length=64 is longer than model.encoder.context=48"),
        (replace(pairs, samples=Samples(prompt="x")), "samples.prompt is corrupted as data.denoising says, but text 0"),
    ]
    for wrong, message in refused:
        with pytest.raises(ValueError, match=message):
            prepare_run(wrong)
    odd = replace(pairs, data=replace(pairs.data, decoder_length=13), layout=Layout(tensor=2))
    with pytest.raises(ValueError, match=r"data.decoder_length=13 .* set it to 14"):
        check(odd)
    blanks = denoised(experiment, "blanks")
    with pytest.raises(ValueError, match=r"set model\.block_positions"):
        losses(replace(blanks, model=replace(blanks.model, block_positions=False)))
