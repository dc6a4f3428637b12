"""The engine over time: requests, cancellations and new weights in any order; nothing compiled once all is; texts keep to themselves."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmx.core.execution import Execution
from lmx.core.precision import POLICIES
from lmx.data.tokenizers import ByteTokenizer
from lmx.infer import score
from lmx.infer.engine import Engine
from lmx.infer.sampling import Sampling
from lmx.models.config import RWKV, EncoderDecoder, Transformer
from plain import SMALL, Plain, prompts_of, weights

VERSIONS = tuple(weights(SMALL, seed) for seed in (0, 1, 2))
PLAIN = Plain(SMALL, VERSIONS[0], length=32)
SIZES = {"rows": 4, "page": 4, "chunk": 5, "pages": 11, "longest": 32}
BEGINNING = [5, 3, 8, 1, 9, 2, 2, 7, 11]
PROMPTS = [BEGINNING, [*BEGINNING, 4, 6, 0], BEGINNING[:8] + [1] * 9, *prompts_of(3, seed=5)]
WISHES = [Sampling(0, log_probs="raw"), Sampling(1.3, seed=4, log_probs="raw")]

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, 5), st.integers(0, 1), st.integers(1, 3), st.integers(1, 12), st.integers(-1, 1)),
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.tuples(st.just("update"), st.integers(0, 2)),
    ),
    min_size=4,
    max_size=24,
)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(operations=OPERATIONS, host=st.sampled_from([0, 5, 16]))
def test_any_order_of_requests_cancellations_and_weights_is_as_fresh_engines_would_be(operations, host):
    """Each token is what the weights of its step make of all the text before it: the likeliest where greedy, and its log-probability."""
    engine, version, jobs, drawn = Engine(SMALL, VERSIONS[0], **SIZES, host_pages=host), 0, [], {}

    def step():
        engine.step()
        for job in jobs:
            for sample, one in enumerate(job.completions):
                versions = drawn.setdefault((job.number, sample), [])
                versions += [version] * (len(one.tokens) - len(versions))
        assert engine.statistics.in_use <= SIZES["pages"] - 1

    for what, *values in operations:
        if what == "submit":
            prompt, wish, n, new, priority = values
            jobs.append(engine.submit(PROMPTS[prompt], max_new_tokens=new, sampling=WISHES[wish], n=n, priority=priority))
        elif what == "step":
            for _ in range(values[0]):
                step()
        elif what == "cancel" and jobs:
            engine.cancel(jobs[values[0] % len(jobs)])
        elif what == "update":
            version = values[0]
            engine.update(VERSIONS[version])
    while engine.busy:
        step()
    engine.pages.check()
    assert engine.statistics.in_use == 0
    texts = [(job, sample, one) for job in jobs for sample, one in enumerate(job.completions)]
    assert all(
        one.finish == "cancelled" or (one.finish == "length" and len(one.tokens) == job.request.max_new_tokens) for job, _, one in texts
    )
    texts = [text for text in texts if text[2].tokens]
    whole = [[*job.request.prompt, *one.tokens] for job, _, one in texts]
    rows = {v: PLAIN.logits(whole, params=VERSIONS[v]) for v in {v for some in drawn.values() for v in some}}
    for i, (job, sample, one) in enumerate(texts):
        versions = drawn[job.number, sample]
        for k, token in enumerate(one.tokens):
            own = rows[versions[k]][i][len(job.request.prompt) - 1 + k].astype(np.float64)
            assert job.sampling.temperature > 0 or own[token] > own.max() - 1e-4
            assert one.log_probs[k] == pytest.approx(own[token] - np.log(np.exp(own).sum()), abs=1e-5)


def test_weights_are_replaced_while_texts_are_on_the_host():
    engine = Engine(SMALL, VERSIONS[0], **SIZES, host_pages=20, trace=True)
    jobs = [engine.submit(prompt, max_new_tokens=10) for prompt in PROMPTS]
    while not any(sequence.host_pages for sequence in engine._scheduler.waiting):
        engine.step()
    before = [list(job.completions[0].tokens) for job in jobs]
    engine.update(VERSIONS[1])
    engine.run()
    for prompt, old, job in zip(PROMPTS, before, jobs, strict=True):
        rest = PLAIN.greedy([prompt + old], 10 - len(old), VERSIONS[1])[0] if len(old) < 10 else []
        assert job.completions[0].tokens == old + rest


@pytest.mark.parametrize(
    "wishes",
    [
        {"temperature": 1e300}, {"temperature": 1e-300}, {"repetition_penalty": 1e-300}, {"repetition_penalty": 1e300},
        {"presence_penalty": 1e300}, {"frequency_penalty": -1e300}, {"logit_bias": ((3, 1e300), (4, -1e300), (5, -np.inf))},
    ],
    ids=lambda wishes: " ".join(f"{value}" for value in wishes.values()),
)  # fmt: skip
def test_numbers_beyond_fp32_are_its_largest(wishes, padded):
    """And what is drawn is a token that the tokenizer knows."""
    jobs = [padded.submit([5, 3, 5], max_new_tokens=5, sampling=Sampling(**{"temperature": t, "seed": 1, "log_probs": "tempered"} | wishes))
            for t in (0, 1)]  # fmt: skip
    beside = padded.submit([1, 2, 3], max_new_tokens=5)
    padded.run()
    assert beside.completions[0].tokens == padded.generate([[1, 2, 3]], max_new_tokens=5)[0][0].tokens
    for job in jobs:
        assert np.isfinite(job.completions[0].log_probs).all()
        assert len(job.completions[0].tokens) == 5


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"stop": [5]}, "stop=[5] has 5, which is no string"),
        ({"max_new_tokens": float("nan")}, "max_new_tokens=nan must be a whole number"),
        ({"top": 1.5}, "top=1.5 must be a whole number"),
        ({"priority": None}, "priority=None must be a whole number"),
        ({"stop_ids": ["2"]}, "stop_ids=['2'] must be token ids"),
        ({"prompt": [1.7, 2]}, "prompt=[1.7, 2] must be token ids"),
        ({"prompt": "a\udcff"}, "is no text at place 1"),
    ],
)
def test_what_is_no_number_or_text_is_refused_before_it_runs(wishes, words, padded):
    with pytest.raises(ValueError, match=re.escape(words)):
        padded.submit(**{"prompt": [4, 5], "max_new_tokens": 2} | wishes)
    assert not padded.busy


@pytest.mark.parametrize(
    "wishes", [{"top_k": 2.5}, {"seed": 1.5}, {"temperature": "1"}, {"logit_bias": {5: 1.0}}, {"logit_bias": ((1, "x"),)}]
)
def test_wishes_that_are_no_numbers_are_refused(wishes):
    with pytest.raises(ValueError, match=next(iter(wishes))):
        Sampling(**wishes)


@pytest.fixture(scope="module")
def padded():
    """An engine whose model has rows that only pad its vocabulary."""
    model = replace(SMALL, vocab=272)
    return Engine(model, weights(model), **SIZES, tokenizer=ByteTokenizer())


def test_a_text_of_numbers_that_are_none_has_tokens_that_the_tokenizer_knows(padded):
    good = weights(padded.model)
    padded.update(jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), good))
    jobs = [padded.submit([7], max_new_tokens=3, sampling=Sampling(t, seed=1, log_probs=kind)) for t in (0, 1) for kind in (None, "raw")]
    padded.run()
    padded.update(good)
    assert all(max(job.completions[0].tokens) < 257 for job in jobs)


def test_a_text_that_its_last_bytes_stop_says_so(padded):
    """They are no character, and nothing comes any more that might make them one."""
    job = padded.submit([7], max_new_tokens=2, sampling=Sampling(0, logit_bias=((0xE2, 1e4),)), stop=["\ufffd\ufffd"])
    other = padded.submit([7], max_new_tokens=2, sampling=Sampling(0, logit_bias=((0xE2, 1e4),)), stop=["a"])
    padded.run()
    assert [(one.text, one.finish) for one in (*job.completions, *other.completions)] == [("", "stop_string"), (2 * "\ufffd", "length")]


@pytest.mark.parametrize("cache", ["float32", "int8"])
def test_numbers_that_are_none_stay_with_the_texts_whose_they_are(cache):
    """A token whose embedding overflows poisons its own text; not those beside it, and not who gets its pages, or scrap, afterwards."""
    poisoned = VERSIONS[0] | {"embed": VERSIONS[0]["embed"].at[23].set(jnp.nan)}
    head = {"head": jnp.where(jnp.isnan(poisoned["embed"]), 0, poisoned["embed"]).T} if "head" not in VERSIONS[0] else {}
    model = replace(SMALL, tied=False) if head else SMALL
    good, bad = VERSIONS[0] | head, poisoned | head
    prompts = [[token for token in prompt if token != 23] for prompt in PROMPTS]
    wishes = {"max_new_tokens": 6, "sampling": Sampling(0, logit_bias=((23, -np.inf),))}
    wanted = [one.tokens for (one,) in Engine(model, good, **SIZES, cache=cache).generate(prompts, **wishes)]
    engine = Engine(model, bad, **SIZES, cache=cache)
    sick = [engine.submit([1, 23, 4, 23, 23], max_new_tokens=9, sampling=Sampling(0, log_probs="raw")) for _ in range(2)]
    jobs = [engine.submit(prompt, **wishes, priority=i % 2) for i, prompt in enumerate(prompts)]
    engine.run()
    assert [job.completions[0].tokens for job in jobs] == wanted
    assert np.isnan(sick[0].completions[0].log_probs).all()
    engine.update(jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), good))  # all pages, the scrap page too
    engine.generate(prompts, **wishes)
    engine.update(good)
    assert [one.tokens for (one,) in engine.generate(prompts, **wishes)] == wanted


def test_bfloat16_weights_and_pages_give_what_scoring_in_bfloat16_gives():
    execution = Execution(precision=POLICIES["bf16"])
    engine = Engine(SMALL, VERSIONS[0], **SIZES, execution=execution)
    assert jax.tree.leaves(engine._runner.stages[0].layers)[0].dtype == jnp.bfloat16
    found = engine.generate(PROMPTS, max_new_tokens=8, sampling=WISHES[1])
    exact = score(SMALL, VERSIONS[0], [p + one.tokens for p, (one,) in zip(PROMPTS, found, strict=True)])
    half = score(SMALL, VERSIONS[0], [p + one.tokens for p, (one,) in zip(PROMPTS, found, strict=True)], execution=execution)
    errors = [np.abs(np.array(one.log_probs) - own.log_probs[-8:]) for (one,), own in zip(found, exact, strict=True)]
    usual = [np.abs(a.log_probs[-8:] - b.log_probs[-8:]) for a, b in zip(half, exact, strict=True)]
    assert np.mean(errors) < 2 * np.mean(usual)
    assert np.max(errors) < 3 * np.max(usual)


COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, _, **more: COMPILED.append(name) if name.endswith("backend_compile_duration") else None
)

TINY = Transformer(vocab=24, layers=1, embed=8, heads=2, mlp=8, context=48)
ENCODER = replace(TINY, causal=False, head="none")
KINDS = {
    "decoder": (TINY, 500, {"pages": 16, "host_pages": 6}),
    "encoder-decoder": (EncoderDecoder(vocab=24, layers=1, embed=8, heads=2, mlp=8, context=48, encoder=ENCODER), 30, {"pages": 16}),
    "recurrent": (RWKV(vocab=24, layers=1, embed=8, context=48), 30, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_compiled_after_the_warm_up_and_pages_suffice(kind, record_property):
    model, many, room = KINDS[kind]
    params = weights(model)
    engine = Engine(model, params, rows=4, page=2, chunk=8, longest=24, top=2, trace=True, **room)
    before = len(COMPILED)
    engine.warm_up()
    assert len(COMPILED) > before
    rng, before = np.random.default_rng(0), len(COMPILED)
    wasted, jobs = [], []
    while len(jobs) < many or engine.busy:
        while len(jobs) < many and len(engine._scheduler.waiting) < 3:
            random, told = rng.integers(0, 2), rng.choice([None, "raw", "truncated"])
            sampling = Sampling(
                temperature=float(random), top_k=int(rng.choice([0, 5])), top_p=float(rng.choice([1.0, 0.8])), log_probs=told,
                repetition_penalty=float(rng.choice([1.0, 1.3])), logit_bias=((3, 1.0),) if random else (),
            )  # fmt: skip
            wishes = {"n": int(rng.integers(1, 4)), "top": 2 if told else 0, "stop_ids": (5,)} | (
                {"start_id": 0} if kind == "encoder-decoder" else {}
            )
            jobs.append(
                engine.submit(
                    rng.integers(0, 24, rng.integers(1, 16)).tolist(), max_new_tokens=int(rng.integers(1, 8)), sampling=sampling, **wishes
                )
            )
        engine.step()
        if rng.integers(0, 30) == 0:
            engine.cancel(jobs[-1])
        if rng.integers(0, 40) == 0:
            engine.update(params)
        if engine.statistics and (books := engine.statistics).in_use:
            assert books.in_use <= engine.pages.count - 1
            empty = books.fragmentation * books.in_use * 2
            assert empty <= len(engine._scheduler.running) * 2  # no text has more than one page that is not full, and one just taken
            wasted.append(books.fragmentation)
    assert len(COMPILED) == before
    assert all(job.done for job in jobs)
    record_property("fragmentation", float(np.mean(wasted or [0])))
    assert kind == "recurrent" or max(moment.pages for moment in engine.timeline) <= engine.pages.count - 1
