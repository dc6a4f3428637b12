"""Encoder-decoders trained: the numbers of one device on eight, packed pairs as pairs alone, and what is refused."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.config import ConfigError, from_json, to_json
from lmx.core.execution import Execution
from lmx.core.params import initial_values
from lmx.data.recipe import Data
from lmx.models.config import EncoderDecoder, Transformer
from lmx.models.transformer import specs
from lmx.parallel.layout import Layout
from lmx.train.experiment import Experiment, check
from lmx.train.objectives import CausalLM, Seq2Seq
from lmx.train.planning import plan
from lmx.train.step import Task
from lmx.verify import verify

SIZES = {"vocab": 48, "layers": 2, "embed": 16, "heads": 4, "head_dim": 8, "mlp": 32, "context": 32, "init_std": 0.1}
T5 = SIZES | {"positions": "relative", "relative_buckets": 8, "relative_distance": 20, "attention_scale": 1.0, "gated": False}
BART = SIZES | {"positions": "learned", "norm": "layernorm", "norm_placement": "post", "bias": True, "gated": False, "embed_norm": True}
MODELS = {
    "t5": EncoderDecoder(**T5, logit_scale=0.25, encoder=Transformer(**T5, causal=False)),
    "bart": EncoderDecoder(**BART, dropout=0.1, head_bias=True, encoder=Transformer(**BART, dropout=0.1, causal=False)),
}


def experiment(name: str, **changes) -> Experiment:
    data = Data(train="README.md", length=32)  # named, never read
    return Experiment(**({"name": "x", "data": data, "model": MODELS[name], "objective": Seq2Seq(), "batch": 16} | changes))


def test_eight_devices_have_the_numbers_of_one():
    run = experiment("bart", layout=Layout(fsdp=4, tensor=2))
    check(run)
    report = verify(run)
    assert report.right, {name: value for name, value in report.worst.items() if not value <= report.bound}
    assert any(name.startswith("gradients/encoder/layers") for name in report.worst)


@pytest.mark.parametrize("model", MODELS)
def test_packed_pairs_are_pairs_alone(model):
    config = replace(MODELS[model], dropout=0.0, encoder=replace(MODELS[model].encoder, dropout=0.0))
    task, params = Task(config, Seq2Seq(), Execution()), initial_values(jax.random.key(0), specs(config))
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 48, n), rng.integers(0, 48, m + 1), rng.uniform(0.5, 1, m)) for n, m in ((7, 5), (4, 9))]

    def row(chosen, source: int, target: int) -> dict:
        kinds = {"tokens": source, "segments": source, "positions": source} | dict.fromkeys(
            ("decoder_tokens", "decoder_segments", "decoder_positions", "targets", "weights"), target
        )
        found = {name: np.zeros((1, size), np.float32 if name == "weights" else np.int32) for name, size in kinds.items()}
        i = j = 0
        for number, (source, target, weights) in enumerate(chosen, 1):
            n, m = len(source), len(weights)
            parts = {"tokens": source, "segments": number, "positions": np.arange(n)}
            for name, value in parts.items():
                found[name][0, i : i + n] = value
            parts = {"decoder_tokens": target[:-1], "decoder_segments": number, "decoder_positions": np.arange(m)}
            for name, value in (parts | {"targets": target[1:], "weights": weights}).items():
                found[name][0, j : j + m] = value
            i, j = i + n, j + m
        return found

    def loss(params, batch):
        return task.sums(params, batch, None)[0]

    run = jax.jit(jax.value_and_grad(loss))
    together = run(params, row(pairs, 13, 16))
    apart = jax.tree.map(jnp.add, *(run(params, row([pair], 9, 10)) for pair in pairs))
    assert float(together[0]) == pytest.approx(float(apart[0]), rel=1e-6)
    for a, b in zip(jax.tree.leaves(together[1]), jax.tree.leaves(apart[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()) + 1e-7)
    other = run(params, row([(pairs[1][0], *pairs[0][1:]), (pairs[0][0], *pairs[1][1:])], 13, 16))
    assert abs(float(other[0]) - float(together[0])) > 1e-3  # a target reads its own source


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layout": Layout(pipeline=2)}, "layout.pipeline=2"),
        ({"layout": Layout(context=2)}, "layout.context=2"),
        ({"objective": CausalLM()}, "objective=CausalLM is not for model=EncoderDecoder"),
        ({"model": replace(MODELS["t5"], vocab=40)}, "model.encoder.vocab=48 is not model.vocab=40"),
        ({"model": replace(MODELS["t5"], encoder=replace(MODELS["t5"].encoder, heads=0))}, "model.encoder.heads=0"),
        ({"model": replace(MODELS["t5"], relative_buckets=1)}, "model.relative_buckets=1"),
        ({"model": replace(MODELS["t5"], encoder=replace(MODELS["t5"].encoder, dropout=0.5))}, "model.encoder.dropout=0.5"),
        ({"layout": Layout(tensor=8), "model": replace(MODELS["t5"], heads=8)}, "model.encoder.heads=4"),
    ],
)
def test_what_cannot_be_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        check(experiment("t5", **changes))


def test_a_plan_wants_rows_of_two_sides():
    with pytest.raises(ConfigError, match="Seq2Seq, and nothing else, reads rows of a source and a target"):
        plan(experiment("t5"))


def test_an_experiment_is_written_and_read():
    run = experiment("bart")
    assert from_json(Experiment, to_json(run)) == run
    before = to_json(Experiment(name="x", data=run.data))
    del before["model"]["class"], before["objective"]["class"]  # as it was written when there was one of each
    assert from_json(Experiment, before) == Experiment(name="x", data=run.data)
