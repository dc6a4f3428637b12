"""A step ahead: texts are those of an engine that waits for each step before it begins the next, and steps are begun before the last is read."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lmx.data.tokenizers import ByteTokenizer
from lmx.infer import drawing, runners
from lmx.infer import engine as engines
from lmx.infer.engine import Engine
from lmx.infer.sampling import Sampling
from lmx.infer.scheduler import Scheduler
from lmx.infer.steps import PENDING
from lmx.models.config import RWKV, EncoderDecoder, Transformer
from plain import weights

MODEL = Transformer(vocab=260, layers=1, embed=16, heads=2, mlp=16, context=64)
ENCODER = replace(MODEL, causal=False, head="none")
MODELS = {
    "decoder": (MODEL, {"pages": 16, "host_pages": 6}),
    "int8": (MODEL, {"pages": 40, "cache": "int8"}),
    "window": (replace(MODEL, pattern=("local",), window=6), {"pages": 12}),
    "recurrent": (RWKV(vocab=260, layers=1, embed=16, context=64), {}),
    "encoder-decoder": (EncoderDecoder(vocab=260, layers=1, embed=16, heads=2, mlp=16, context=64, encoder=ENCODER), {"pages": 24}),
}
PARAMS = {name: weights(model, 3) for name, (model, _) in MODELS.items()}
LETTERS = tuple((byte, 30.0) for byte in b"abcdefgh ")
WISHES = [
    Sampling(0, logit_bias=LETTERS, log_probs="raw"),
    Sampling(1.2, seed=4, logit_bias=LETTERS, log_probs="tempered"),
    Sampling(1.0, seed=9, logit_bias=LETTERS, repetition_penalty=1.5, frequency_penalty=2.0, presence_penalty=1.0),
]
BEGINNING = "abcd efgh ab"
PROMPTS = [BEGINNING, BEGINNING + "c", BEGINNING[:8] + "gg", "h", "cab bage dead", "fed"]
STOPS = [{}, {"stop": ["b", "ha", "g", "e", "f"]}, {"stop_ids": tuple(b"ce")}, {"stop": ["aaa"], "stop_ids": (ord("d"),)}]


def made(name: str, *, ahead: bool = True) -> Engine:
    model, room = MODELS[name]
    engine = Engine(model, PARAMS[name], tokenizer=ByteTokenizer(), rows=3, page=4, chunk=8, longest=32, **room)
    if not ahead:
        engine._scheduler.ahead = lambda: None
    return engine


def submitted(engine: Engine, prompt: int, wish: int, n: int, new: int, stop: int, priority: int = 0):
    start = {"start_id": 1} if isinstance(engine.model, EncoderDecoder) else {}
    wishes = {"sampling": WISHES[wish], "n": n, "priority": priority} | STOPS[stop] | start
    return engine.submit(PROMPTS[prompt], max_new_tokens=new, **wishes)


def after(engine: Engine, operations, name: str) -> list:
    """The requests, when all is done."""
    jobs = []
    for what, *values in operations:
        if what == "submit":
            jobs.append(submitted(engine, *values))
        elif what == "step":
            for _ in range(values[0]):
                engine.step()
        elif what == "cancel" and jobs:
            engine.cancel(jobs[values[0] % len(jobs)])
        elif what == "update":
            engine.update(PARAMS[name])
    engine.run()
    return jobs


def check(operations, name: str) -> list:
    ahead, plain = made(name), made(name, ahead=False)
    both = after(ahead, operations, name), after(plain, operations, name)
    for job, other in zip(*both, strict=True):
        for sample, (one, wanted) in enumerate(zip(job.completions, other.completions, strict=True)):
            some = min(len(one.tokens), len(wanted.tokens))
            cancelled = "cancelled" in (one.finish, wanted.finish)  # then who had come how far may differ by a step
            assert one.tokens[: some if cancelled else None] == wanted.tokens[: some if cancelled else None]
            np.testing.assert_allclose(one.log_probs[:some], wanted.log_probs[:some], atol=1e-5)
            assert cancelled or (one.text, one.finish) == (wanted.text, wanted.finish)
            own = [piece for piece in job.pieces if piece.sample == sample]
            assert [piece.token for piece in own if piece.token is not None] == one.tokens
            assert "".join(piece.text for piece in own) == one.text
            assert [piece.finish for piece in own] == [None] * (len(own) - 1) + [one.finish]
    assert not ahead.busy
    if ahead.pages is not None:
        ahead.pages.check()
        assert ahead.statistics.in_use == 0
    return both[0]


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"), st.integers(0, 5), st.integers(0, 2), st.integers(1, 3), st.integers(1, 12), st.integers(0, 3),
            st.integers(-1, 1),
        ),
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.tuples(st.just("update")),
    ),
    min_size=4,
    max_size=20,
)  # fmt: skip


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(operations=OPERATIONS)
@example(operations=[*(("submit", i, 2, 1, 12, 0, 0) for i in (0, 3, 5)), *[("step", 3), ("update",)] * 3])
def test_any_order_of_requests_cancellations_and_updates_is_as_without(operations):
    check(operations, "decoder")


def some_traffic(seed: int, count: int = 8) -> list:
    rng, found = np.random.default_rng(seed), []
    for i in range(count):
        submit = ("submit", rng.integers(6), rng.integers(3), rng.choice([1, 1, 1, 2, 3]), rng.integers(4, 13), i % 4)
        found += [tuple(submit[:1]) + tuple(map(int, submit[1:])), ("step", int(rng.integers(0, 5)))]
        if i % 3 == 2:
            found += [("cancel", int(rng.integers(20))), ("submit", 1, 0, 1, 6, 0), ("step", 2)]
        if i == 4:
            found.append(("update",))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_writes_as_without(name):
    jobs = check(some_traffic(1), name)
    ends = {one.finish for job in jobs for one in job.completions}
    assert ends > {"length", "cancelled"}, "and by what stops them"


@pytest.fixture
def events(monkeypatch):
    """What is told to the devices, and what is waited for."""
    seen, read = [], engines.jax.device_get

    def noted(runner, name):
        own = getattr(runner, name)

        def run(self, *args):
            seen.append("begun")
            return own(self, *args)

        monkeypatch.setattr(runner, name, run)

    noted(runners.PagedRunner, "compute")
    noted(runners.StateRunner, "compute")
    monkeypatch.setattr(engines.jax, "device_get", lambda tree: [read(tree), seen.append("read")][0])
    return seen


@pytest.mark.parametrize("name", ["decoder", "recurrent"])
def test_the_next_step_is_begun_before_the_last_is_read(events, name):
    engine, plain = made(name), made(name, ahead=False)
    events.clear()
    engine.generate(PROMPTS[3:4], max_new_tokens=8, sampling=WISHES[1])
    assert events == ["begun", *["begun", "read"] * 7, "read"], "and none in vain: where it ends is known"
    events.clear()
    plain.generate(PROMPTS[3:4], max_new_tokens=8, sampling=WISHES[1])
    assert events == ["begun", "read"] * 8


def test_a_text_that_ends_early_is_computed_for_one_step_too_many_and_nothing_of_it_is_left(events):
    engine = made("decoder")
    ((free,),) = engine.generate(PROMPTS[:1], max_new_tokens=12, sampling=WISHES[1])
    events.clear()
    stop = next(i for i in range(2, 12) if free.tokens[i] not in free.tokens[:i])
    ((one,),) = engine.generate(PROMPTS[:1], max_new_tokens=12, sampling=WISHES[1], stop_ids=free.tokens[stop : stop + 1])
    assert one.tokens == free.tokens[:stop]
    assert events.count("begun") == events.count("read") + 1
    assert not engine.busy
    assert engine.statistics.in_use == 0
    events.clear()
    assert engine.step() == []  # what nobody waits for is not waited for
    assert events == []
    ((again,),) = engine.generate(PROMPTS[:1], max_new_tokens=12, sampling=WISHES[1])
    assert again == free


def test_what_is_begun_may_be_cancelled_or_overtaken_by_new_weights_before_it_is_finished():
    engine, wanted = made("decoder"), made("decoder", ahead=False)
    ((whole,),) = wanted.generate(PROMPTS[:1], max_new_tokens=10, sampling=WISHES[0])
    first, second = (submitted(engine, i, 0, 1, 10, 0) for i in (0, 4))
    for _ in range(3):
        engine.step()
    begun = engine.begin()
    assert engine.begin() is begun
    engine.cancel(second)
    assert [piece.finish for piece in engine.finish(begun)] == ["cancelled", None]
    assert engine.finish(begun) == []
    begun, told = engine.begin(), list(first.completions[0].tokens)
    engine.update(PARAMS["decoder"])
    assert engine.finish(begun) == []
    assert first.completions[0].tokens == told
    engine.run()
    (one,) = first.completions
    assert (one.tokens, one.text, one.finish) == (whole.tokens, whole.text, whole.finish)
    np.testing.assert_allclose(one.log_probs, whole.log_probs, atol=1e-5)


def test_pages_written_ahead_are_found_again_by_their_text():
    engine = made("int8")
    ((one,),) = engine.generate(PROMPTS[:1], max_new_tokens=12, sampling=WISHES[1])
    text = [*PROMPTS[0].encode(), *one.tokens]
    assert len(engine.pages.match(engine._fingerprint + bytes(8), text)) == (len(text) - 1) // 4


THREE = [("submit", i, i % 3, 1, 12, 0) for i in (0, 3, 5)]
UPDATED = [*(("submit", i, 2, 1, 12, 0) for i in (0, 3, 5)), *[("step", 3), ("update",)] * 3]


def stale_token(patch):
    """The device feeds what nobody drew."""
    patch.setattr(runners, "_read_from", lambda slot: 0)


def early_key(patch):
    """A page counts as full, and gets its key, when its last token is pending."""
    own = Scheduler._computed

    def computed(self, sequence, tokens):
        early = int(sequence.remaining == tokens and (sequence.computed + tokens + 1) % self.pages.size == 0)
        sequence.tokens += [PENDING] * early
        own(self, sequence, tokens + early)
        sequence.computed -= early
        del sequence.tokens[len(sequence.tokens) - early :]

    patch.setattr(Scheduler, "_computed", computed)


def dropped_draw(patch):
    """Penalties go on behind what was drawn in a step that is dropped."""
    patch.setattr(drawing.Drawing, "forget", lambda *_: None)


@pytest.mark.parametrize(
    ("mistake", "seen_by"),
    [
        (stale_token, lambda: check(THREE, "decoder")),
        (stale_token, lambda: check(THREE, "recurrent")),
        (early_key, test_pages_written_ahead_are_found_again_by_their_text),
        (dropped_draw, lambda: check(UPDATED, "decoder")),
    ],
)
def test_mistakes_would_be_seen(monkeypatch, mistake, seen_by):
    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        seen_by()
