"""Engines over several devices write what an engine on one does, preempted and with prefixes found as that is."""

from collections import Counter
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.execution import Execution
from lmx.core.params import is_spec
from lmx.core.tree import map_named
from lmx.infer import Engine, Replicas, Sampling, drawing, runners
from lmx.infer.search import beam_search
from lmx.interop.runs import run_params
from lmx.models.config import RWKV, EncoderDecoder, Transformer
from lmx.models.families import functions
from lmx.parallel import hlo
from lmx.parallel.layout import Layout, make_mesh
from lmx.parallel.rules import rules, shardings
from lmx.train.checkpoints import Checkpoints, Manager
from lmx.train.state import TrainState

GROUPED = Transformer(vocab=32, layers=2, embed=16, heads=4, kv_heads=2, mlp=16, context=32, window=6, pattern=("local", "global"))
MIXTURE = replace(GROUPED, layers=1, pattern=("global",), window=None, experts=4, expert_mlp=8, positions="alibi", tied=False)
HALF = {"vocab": 32, "layers": 1, "embed": 16, "heads": 4, "mlp": 16, "context": 32, "positions": "relative"}
PAIR = EncoderDecoder(**HALF, encoder=Transformer(**HALF, causal=False))
RECURRENT = RWKV(version=6, vocab=32, layers=1, embed=16, channels=16, head_dim=4, mlp=32, mix_rank=4, decay_rank=6, context=32)

PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [11, 12, 13], [1, 2, 3, 4, 5, 6, 7, 8, 20], [21, 22], list(range(3, 17))]
SCORED = Sampling(temperature=0, log_probs="raw")


@cache
def params_of(model, seed: int = 0):
    """Weights large enough that texts differ."""
    rng, table = np.random.default_rng(seed), functions(model).specs(model)
    return map_named(lambda _, spec: jnp.asarray(0.4 * rng.normal(size=spec.shape), jnp.float32), table, is_leaf=is_spec)


def options(model) -> dict:
    """Of an engine so small that texts put each other out."""
    pool = {"page": 2, "pages": 7} if isinstance(model, EncoderDecoder) else {"page": 4, "pages": 7}
    return {"rows": 2, "chunk": 8, "trace": True} | pool


def texts(door) -> list[tuple[list[int], list[float]]]:
    """What each prompt is continued by, and its log-probabilities."""
    model = getattr(door, "engines", [door])[0].model
    begun = {"start_id": 1} if isinstance(model, EncoderDecoder) else {}
    found = door.generate(PROMPTS, max_new_tokens=8, sampling=SCORED, **begun)
    return [(one.tokens, one.log_probs) for completions in found for one in completions]


@cache
def alone(model, seed: int = 0) -> list:
    """The same on one device."""
    return texts(Engine(model, params_of(model, seed), **options(model)))


def check(found: list, wanted: list) -> None:
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in wanted]
    assert len({log_probs[0] for _, log_probs in found}) == len(found), "texts differ"
    for (_, ours), (_, theirs) in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        (MIXTURE, Layout(tensor=2)),
        (GROUPED, Layout(tensor=4)),
        (GROUPED, Layout(pipeline=2)),
        (GROUPED, Layout(pipeline=2, tensor=2)),
        (PAIR, Layout(tensor=2)),
        (RECURRENT, Layout(tensor=2)),
    ],
    ids=lambda value: f"pipeline {value.pipeline}, tensor {value.tensor}" if isinstance(value, Layout) else type(value).__name__,
)
def test_tokens_and_log_probs_are_those_of_one_device(model, layout):
    made = Engine(model, params_of(model), layout=layout, **options(model))
    check(texts(made), alone(model))
    if not isinstance(model, RWKV):
        assert any(moment.preempted for moment in made.timeline)
        assert isinstance(model, EncoderDecoder) or made.statistics.hit_rate > 0


def test_replicas_compute_side_by_side_and_follow_new_weights():
    made = Replicas(GROUPED, params_of(GROUPED), layout=Layout(data=2), **options(GROUPED))
    job = made.submit(PROMPTS[0], max_new_tokens=8)
    made.step()
    made.cancel(job)
    assert job.done
    assert not made.busy
    check(texts(made), alone(GROUPED))
    first, second = (one.timeline for one in made.engines)
    assert first
    assert second
    assert any(a.start < b.start < a.end for a in first for b in second), "one begins while the other computes"
    made.update(params_of(GROUPED, 1))
    check(texts(made), alone(GROUPED, 1))
    sampled = Sampling(temperature=1.0)
    wanted = Engine(GROUPED, params_of(GROUPED, 1), seed=3, **options(GROUPED)).generate(PROMPTS, max_new_tokens=4, sampling=sampled)
    made._seeds = np.random.default_rng(3)
    assert made.generate(PROMPTS, max_new_tokens=4, sampling=sampled) == wanted


def test_batches_in_flight_share_the_stages_and_their_weights():
    made = Replicas(GROUPED, params_of(GROUPED), layout=Layout(pipeline=2), batches=2, **options(GROUPED))
    one, other = (of._runner.stages for of in made.engines)
    assert all(a.params is b.params and a.layers is not b.layers for a, b in zip(one, other, strict=True))
    check(texts(made), alone(GROUPED))
    made.update(params_of(GROUPED, 1))
    assert all(a.params is b.params for a, b in zip(one, other, strict=True))
    check(texts(made), alone(GROUPED, 1))


def test_requests_go_to_who_has_least_to_do_and_has_read_their_beginning():
    made = Replicas(GROUPED, params_of(GROUPED), layout=Layout(data=2), **options(GROUPED))
    one, other = made.engines
    jobs = [made.submit(PROMPTS[4], max_new_tokens=8), made.submit(PROMPTS[1], max_new_tokens=2), made.submit([1], max_new_tokens=2)]
    assert [one.holds(job) for job in jobs] == [True, False, False]
    made.run()
    again = made.submit(PROMPTS[4] + [1], max_new_tokens=2)
    assert one.holds(again)
    made.cancel(again)
    other.generate([PROMPTS[0]], max_new_tokens=2)
    assert other.holds(made.submit(PROMPTS[0], max_new_tokens=2))


def test_beams_over_several_engines_are_those_of_one():
    made = Replicas(GROUPED, params_of(GROUPED), batches=2, **options(GROUPED), top=4)
    found = beam_search(made, PROMPTS[:3], beams=2, max_new_tokens=3)
    assert all(engine.timeline for engine in made.engines)
    for ours, wanted in zip(found, beam_search(made.engines[0], PROMPTS[:3], beams=2, max_new_tokens=3), strict=True):
        assert [beam.tokens for beam in ours] == [beam.tokens for beam in wanted]
        np.testing.assert_allclose([beam.score for beam in ours], [beam.score for beam in wanted], atol=1e-5)
    with pytest.raises(ValueError, match="made for top=4; make it with top=6"):
        beam_search(made, PROMPTS[:1], beams=3, max_new_tokens=3)


def test_a_checkpoint_of_one_layout_is_read_into_another(tmp_path):
    trained, layout = Layout(fsdp=2, tensor=2), Layout(tensor=4)
    there = shardings(functions(GROUPED).specs(GROUPED), make_mesh(trained), rules(trained, split=True))
    params = jax.device_put(params_of(GROUPED), there)
    with Manager(tmp_path / "checkpoints", Checkpoints()) as manager:
        manager.save(0, TrainState(jnp.int32(0), jax.random.key(0), params, {}, {}), {"example": 0})
    loaded = run_params(tmp_path, GROUPED, mesh=make_mesh(layout), layout=layout)
    for given in (loaded, params):  # read where they are wanted, or moved
        made = Engine(GROUPED, given, layout=layout, **options(GROUPED))
        query = made._runner.params["layers"][0][0]["attention"]["query"]["weight"]
        assert {shard.data.shape for shard in query.addressable_shards} == {(16, 1, 4)}
        check(texts(made), alone(GROUPED))
    assert len(jax.tree.leaves(Engine(GROUPED, params, **options(GROUPED))._runner.params)[0].sharding.device_set) == 1


def test_what_travels_is_two_sums_a_layer_and_rows_of_logits(monkeypatch):
    made, found = Engine(GROUPED, params_of(GROUPED), layout=Layout(tensor=4), **options(GROUPED)), {}

    def spied(module, name):
        own = getattr(module, name)

        def run(*args):
            found[name] = hlo.collectives(own.lower(*args).compile().as_text(), made._place.mesh), args
            return own(*args)

        monkeypatch.setattr(module, name, run)

    spied(runners, "_compute")
    spied(drawing, "_pick")
    made.generate([[1, 2, 3]], max_new_tokens=1)
    (step, _), (pick, (*_, which, _, _, _, _, _, _)) = found["_compute"], found["_pick"]
    assert Counter(one.kind for one in step) == {"all-reduce": 1 + 2 * GROUPED.layers}, "the embedding's, and each sublayer's"
    assert all(one.size <= 8 * GROUPED.embed * 4 for one in step), "of the step's tokens"
    assert Counter(one.kind for one in pick) == {"all-gather": 1}
    assert pick[0].size == len(which) * GROUPED.vocab * 4
    pages = made._runner.stages[0].layers[0][0]["key"]
    assert {shard.data.shape for shard in pages.addressable_shards} == {(7, 1, 4, 4)}, "each device has the key head of its query heads"


@pytest.mark.parametrize(
    ("model", "layout", "words"),
    [
        (GROUPED, Layout(fsdp=2), r"layout\.fsdp=2 is training's alone: .* layout\.tensor"),
        (GROUPED, Layout(context=2), r"layout\.context=2 is training's alone"),
        (MIXTURE, Layout(expert=2), r"layout\.expert=2 is training's alone: .* layout\.tensor splits each expert"),
        (GROUPED, Layout(pipeline=2, rounds=2), r"layout\.rounds=2 is training's alone"),
        (GROUPED, Layout(offload=("params",)), r"layout\.offload=\('params',\) is training's alone"),
        (GROUPED, Layout(tensor=8), r"model\.heads=4 is not divisible by layout\.tensor=8; use 1, 2 or 4"),
        (GROUPED, Layout(tensor=16), r"needs 16 devices"),
        (GROUPED, Layout(pipeline=4), r"layout\.pipeline=4 stages are more than model\.layers=2"),
        (GROUPED, Layout(data=2), r"layout\.data=2 replicas are as many engines: lmx\.infer\.Replicas"),
        (PAIR, Layout(pipeline=2), r"layout\.pipeline=2 cuts one stack .* EncoderDecoder"),
        (RECURRENT, Layout(pipeline=2), r"layout\.pipeline=2 cuts one stack .* RWKV"),
    ],
)
def test_layouts_that_an_engine_cannot_have_are_refused_by_knob(model, layout, words):
    with pytest.raises(ValueError, match=words):
        Engine(model, params_of(model), layout=layout)


def test_replicas_and_executions_that_do_not_fit_are_refused_by_knob():
    params = params_of(GROUPED)
    with pytest.raises(ValueError, match=r"needs 12 devices .* but 8 are here"):
        Replicas(GROUPED, params, layout=Layout(data=3, tensor=4))
    with pytest.raises(ValueError, match=r"batches=0"):
        Replicas(GROUPED, params, layout=Layout(data=2), batches=0)
    with pytest.raises(ValueError, match=r"execution\.attention='cudnn' reads no pages; use auto, xla, flash"):
        Engine(GROUPED, params, execution=Execution(attention="cudnn"))
    with pytest.raises(ValueError, match=r"execution\.rules .* give layout"):
        Engine(GROUPED, params, layout=Layout(tensor=2), execution=Execution(rules=rules(Layout(tensor=2))))
