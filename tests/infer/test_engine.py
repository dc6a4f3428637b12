"""The engine: what a request may wish, what it is given piece by piece, and what is refused."""

import numpy as np
import pytest

from lmx.data.tokenizers import ByteTokenizer
from lmx.infer import score
from lmx.infer.engine import Engine
from lmx.infer.sampling import Sampling
from lmx.infer.sizes import Sizes
from lmx.models.config import Transformer
from plain import SMALL, Plain, prompts_of, weights

SIZES = {"rows": 4, "page": 4, "chunk": 8, "longest": 48, "pages": 40, "top": 3}
PROMPTS = prompts_of(6, seed=1)


@pytest.fixture(scope="module")
def params():
    return weights(SMALL)


@pytest.fixture(scope="module")
def plain(params):
    return Plain(SMALL, params, length=48)


@pytest.fixture
def engine(params):
    return Engine(SMALL, params, **SIZES)


WARM = Sampling(temperature=1.5, seed=7, log_probs="raw")


def texts(engine, prompts, **wishes):
    return [[one.tokens for one in some] for some in engine.generate(prompts, **wishes)]


def test_a_seed_gives_the_same_text_whatever_runs_beside_it(engine, params):
    alone = [texts(engine, [prompt], max_new_tokens=12, sampling=WARM)[0] for prompt in PROMPTS]
    assert texts(engine, PROMPTS, max_new_tokens=12, sampling=WARM) == alone
    jobs = [engine.submit(PROMPTS[0], max_new_tokens=12, sampling=WARM)]
    for i in range(5):
        engine.step()
        jobs.append(engine.submit(PROMPTS[i + 1], max_new_tokens=12, sampling=WARM, priority=-i))
    engine.run()
    assert [[one.tokens for one in job.completions] for job in jobs] == alone
    tight = Engine(SMALL, params, **SIZES | {"pages": 12, "host_pages": 8}, trace=True)
    assert texts(tight, PROMPTS, max_new_tokens=12, sampling=WARM) == alone
    assert any(moment.preempted for moment in tight.timeline)
    other = texts(engine, PROMPTS, max_new_tokens=12, sampling=Sampling(temperature=1.5, seed=8))
    assert all(a != b for a, b in zip(alone, other, strict=True))


@pytest.mark.parametrize("new", [1, 2, 9])
def test_n_texts_of_a_prompt_differ_and_do_not_depend_on_their_number(engine, params, new):
    prompts = PROMPTS[:3]
    four = texts(engine, prompts, max_new_tokens=new, sampling=WARM, n=4)
    assert texts(engine, prompts, max_new_tokens=new, sampling=WARM, n=2) == [some[:2] for some in four]
    assert texts(engine, prompts, max_new_tokens=new, sampling=WARM) == [some[:1] for some in four]
    assert all(len(one) == new for some in four for one in some)
    assert new < 9 or all(len(set(map(tuple, some))) == 4 for some in four)
    tight = Engine(SMALL, params, **SIZES | {"pages": 12}, trace=True)
    assert texts(tight, prompts, max_new_tokens=new, sampling=WARM, n=4) == four
    assert new < 9 or any(moment.preempted for moment in tight.timeline)
    engine.pages.check()
    assert engine.statistics.in_use == tight.statistics.in_use == 0


def test_every_text_of_a_request_says_why_it_ended(engine):
    for new in (1, 3):
        job = engine.submit(PROMPTS[0], max_new_tokens=new, sampling=WARM, n=3)
        engine.run()
        assert [one.finish for one in job.completions] == ["length"] * 3
        assert job.done


def test_stop_ids_end_each_text_by_itself(engine):
    free = texts(engine, PROMPTS[:2], max_new_tokens=12, sampling=WARM, n=4)
    stop = free[0][0][0], free[1][2][5]  # the first ends at once, its siblings may go on
    for some, given in zip(engine.generate(PROMPTS[:2], max_new_tokens=12, sampling=WARM, n=4, stop_ids=stop), free, strict=True):
        for one, whole in zip(some, given, strict=True):
            end = next((i for i, token in enumerate(whole) if token in stop), None)
            assert one.tokens == whole[:end]
            assert len(one.log_probs) == len(one.tokens)
            assert one.finish == ("length" if end is None else "stop_id")


def test_log_probs_of_each_kind_are_those_that_score_finds(engine, params):
    prompt = PROMPTS[1]
    for kind in ("raw", "tempered", "truncated"):
        wish = Sampling(
            temperature=1.3, top_k=9, top_p=0.9, repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2, seed=3, log_probs=kind
        )
        ((one,),) = engine.generate([prompt], max_new_tokens=12, sampling=wish, top=3)
        (scored,) = score(SMALL, params, [prompt + one.tokens], kind=kind, top=3, sampling=wish, prompts=[len(prompt)])
        np.testing.assert_allclose(one.log_probs, scored.log_probs[-12:], atol=1e-5)
        assert [[token for token, _ in places] for places in one.top] == scored.top_tokens[-12:].tolist()
        np.testing.assert_allclose([[p for _, p in places] for places in one.top], scored.top_log_probs[-12:], atol=1e-5)


def by_hand(plain, prompt, count, *, repetition=1.0, presence=0.0, frequency=0.0, bias=()):
    """Greedy, penalties by the letter of the papers."""
    text = list(prompt)
    for _ in range(count):
        scores = plain.logits([text])[0][-1].astype(np.float64)
        for token, value in bias:
            scores[token] += value
        for token in set(text):
            scores[token] = scores[token] / repetition if scores[token] > 0 else scores[token] * repetition
        new = text[len(prompt) :]
        for token in set(new):
            scores[token] -= presence + frequency * new.count(token)
        assert np.diff(np.sort(scores)[-2:])[0] > 1e-4
        text.append(int(scores.argmax()))
    return text[len(prompt) :]


PENALTIES = [
    {"repetition": 1.6},
    {"presence": 1.5},
    {"frequency": 0.8},
    {"repetition": 1.2, "presence": -0.3, "frequency": 0.9, "bias": ((3, 2.0), (11, -np.inf))},
]


def penal(repetition=1.0, presence=0.0, frequency=0.0, bias=()):
    return Sampling(0, repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, logit_bias=tuple(bias))


@pytest.fixture(scope="module")
def penalised(plain):
    return [[by_hand(plain, prompt, 14, **kinds) for prompt in PROMPTS] for kinds in PENALTIES]


@pytest.mark.parametrize("sizes", [{}, {"pages": 12}, {"pages": 12, "host_pages": 8}])
def test_penalties_are_those_of_a_loop_by_hand(params, plain, penalised, sizes):
    """Also where texts are put out and come back, in whatever slots."""
    engine = Engine(SMALL, params, **SIZES | sizes)
    jobs = [[engine.submit(prompt, max_new_tokens=14, sampling=penal(**kinds)) for prompt in PROMPTS] for kinds in PENALTIES]
    engine.run()
    assert [[job.completions[0].tokens for job in some] for some in jobs] == penalised
    free = plain.greedy(PROMPTS, 14)
    assert all(some != free for some in penalised)


@pytest.mark.parametrize("ahead", [False, True])
def test_penalties_survive_slots_that_change_hands(params, plain, penalised, ahead):
    """One text, put out over and over by others that come first, is in one slot, in another, and in the first again: with what it has drawn,
    and without what is on its way when it is put out."""
    engine = Engine(SMALL, params, **SIZES)
    if not ahead:
        engine._scheduler.ahead = lambda: None
    late, slots = engine.submit(PROMPTS[2], max_new_tokens=14, sampling=penal(**PENALTIES[2]), priority=9), []
    while not late.done:
        engine.submit(PROMPTS[4], max_new_tokens=2)
        engine.update(params)  # the same weights: what runs is put out, and read again behind who comes first
        drawn = len(late.completions[0].tokens)
        while not late.done and len(late.completions[0].tokens) < drawn + 2:
            engine.step()
        slots += [s.slot for s in engine._scheduler.running if s.request is late.request]
    assert late.completions[0].tokens == penalised[2][2]
    assert any(a != b and a == c for a, b, c in zip(slots, slots[1:], slots[2:], strict=False)), slots


def test_penalties_of_n_texts_are_each_ones_own(engine, params):
    wish = Sampling(1.0, repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=0.2, seed=5, log_probs="tempered")
    (some,) = engine.generate([PROMPTS[0]], max_new_tokens=10, sampling=wish, n=4)
    assert len({tuple(one.tokens) for one in some}) == 4
    start = len(PROMPTS[0])
    scored = score(SMALL, params, [PROMPTS[0] + one.tokens for one in some], kind="tempered", sampling=wish, prompts=[start] * 4)
    for one, own in zip(some, scored, strict=True):
        np.testing.assert_allclose(one.log_probs, own.log_probs[-10:], atol=1e-5)


def test_lower_priorities_come_first_and_nobody_is_forgotten(params):
    engine = Engine(SMALL, params, **SIZES | {"rows": 1})
    ended, jobs = [], [engine.submit(prompt, max_new_tokens=3, priority=p) for prompt, p in zip(PROMPTS, (2, 1, 0, 1, 2, 0), strict=True)]
    while engine.busy:
        ended += [jobs.index(piece.job) for piece in engine.step() if piece.finish]
    assert ended == [2, 5, 1, 3, 0, 4]


def test_what_is_cancelled_ends_and_the_rest_goes_on(engine, plain):
    wanted = plain.greedy(PROMPTS, 12)
    jobs = [engine.submit(prompt, max_new_tokens=12) for prompt in PROMPTS]
    forks = engine.submit(PROMPTS[0], max_new_tokens=12, sampling=WARM, n=3, priority=-1)
    for step in range(60):
        engine.step()
        if step == 3:
            engine.cancel(jobs[1])
        if step == 5:
            engine.cancel(forks)
            engine.cancel(jobs[5])
            engine.cancel(forks)
    assert not engine.busy
    for i, (job, tokens) in enumerate(zip(jobs, wanted, strict=True)):
        (one,) = job.completions
        assert one.finish == ("cancelled" if i in (1, 5) else "length")
        assert one.tokens == tokens[: len(one.tokens)]
        assert len(one.tokens) == 12 or i in (1, 5)
    assert [one.finish for one in forks.completions] == ["cancelled"] * 3
    engine.pages.check()
    assert engine.statistics.in_use == 0


BYTES = Transformer(vocab=260, layers=1, embed=16, heads=2, mlp=16, context=96)
"""Three tokens more than bytes have: a text never has them."""


@pytest.fixture(scope="module")
def writer():
    return Engine(BYTES, weights(BYTES, 3), tokenizer=ByteTokenizer(), rows=4, page=8, chunk=16, longest=64, pages=40)


LOOSE = Sampling(temperature=1.2, seed=11, logit_bias=tuple((byte, 30.0) for byte in (*b"abcdefghij  "[:11], 0xC3, 0xA4, 0xB6)))
"""Letters mostly, some of them of two bytes."""


def test_pieces_put_together_are_the_text(writer):
    jobs = [writer.submit(prompt, max_new_tokens=30, sampling=LOOSE, n=2) for prompt in ("abc", "de ä", "ö b")]
    pieces = []
    while writer.busy:
        pieces += writer.step()
    for job in jobs:
        for sample, one in enumerate(job.completions):
            own = [piece for piece in pieces if piece.job is job and piece.sample == sample]
            assert "".join(piece.text for piece in own) == one.text == writer.tokenizer.decode(one.tokens)
            assert [piece.token for piece in own if piece.token is not None] == one.tokens
            assert [piece.finish for piece in own] == [None] * (len(own) - 1) + ["length"]


def test_streams_side_by_side_lose_nothing(writer):
    """Each step is of all requests, whoever asks for it; and a stream may begin late."""
    jobs = [writer.submit(prompt, max_new_tokens=n, sampling=LOOSE) for prompt, n in (("abc", 12), ("de", 20), ("b", 5))]
    first, second = (writer.stream(job) for job in jobs[:2])
    found = {0: [next(first)], 1: [next(second)], 2: []}
    for a in first:
        found[0].append(a)
        found[1] += [piece for piece in (next(second, None),) if piece]
    found[1] += list(second)
    found[2] += list(writer.stream(jobs[2]))
    for i, job in enumerate(jobs):
        (one,) = job.completions
        assert "".join(piece.text for piece in found[i]) == one.text
        assert [piece.token for piece in found[i] if piece.token is not None] == one.tokens
        assert found[i][-1].finish == "length"


def test_a_stream_whose_request_is_cancelled_ends(writer):
    job = writer.submit("abc", max_new_tokens=30)
    found = []
    for piece in writer.stream(job):
        found.append(piece)
        if len(found) == 4:
            writer.cancel(job)
    assert [piece.finish for piece in found] == [None] * 4 + ["cancelled"]
    assert not writer.busy


def test_stop_strings_end_texts_wherever_tokens_are_cut(writer):
    ((free,),) = writer.generate(["abc"], max_new_tokens=40, sampling=LOOSE)
    text = free.text
    places = [i for i in range(8, 28) if text[i : i + 3] not in text[: i + 2] and "\ufffd" not in text[i : i + 3]]
    assert places
    for at in places[:3]:
        stop = text[at : at + 3]
        ((one,),) = writer.generate(["abc"], max_new_tokens=40, sampling=LOOSE, stop=["never there", stop])
        assert (one.text, one.finish) == (text[:at], "stop_string")
        assert one.tokens == free.tokens[: len(one.tokens)]
        assert stop in writer.tokenizer.decode(one.tokens)
    # What may begin a stop string is given out in the end, where it does not.
    ((one,),) = writer.generate(["abc"], max_new_tokens=40, sampling=LOOSE, stop=[text[-2:] + "!", "zz"])
    assert (one.text, one.finish) == (text, "length")


def test_raw_log_probs_are_of_the_whole_vocabulary_though_padding_of_it_is_never_drawn(writer):
    ((one,),) = writer.generate(["abc"], max_new_tokens=20, sampling=Sampling(1.5, seed=2, log_probs="raw"))
    assert max(one.tokens) < 257
    (scored,) = score(BYTES, writer._runner.params, [list(b"abc") + one.tokens])
    np.testing.assert_allclose(one.log_probs, scored.log_probs[-20:], atol=1e-5)


REFUSED = [
    ({"prompt": []}, "prompt is empty"),
    ({"prompt": [1, 24]}, "token 24, outside the model's vocabulary of 24"),
    ({"prompt": [1] * 40, "max_new_tokens": 9}, "40 tokens and max_new_tokens=9 are longer than the engine's longest=48"),
    ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    ({"n": 0}, "n=0 must be at least 1"),
    ({"n": 5}, "n=5 .* rows=4"),
    ({"prompt": "text"}, "needs a tokenizer"),
    ({"stop": ["x"]}, "needs a tokenizer; or give stop_ids"),
    ({"top": 4, "sampling": WARM}, "top=4 .* top=3"),
    ({"top": 2}, "log_probs"),
    ({"start_id": 0}, "start_id=0"),
    ({"sampling": Sampling(logit_bias=((24, 1.0),))}, "token 24, outside the vocabulary of 24"),
]


def test_what_cannot_be_done_is_refused_by_name_and_the_rest_goes_on(params, plain):
    engine = Engine(SMALL, params, **SIZES | {"pages": 11})
    wanted = plain.greedy(PROMPTS, 10)
    jobs = []
    refused = [*REFUSED, ({"prompt": [1] * 30, "max_new_tokens": 12}, "need 11 pages of 4 tokens, and the pool has 10")]
    for i, (wishes, said) in enumerate(refused):
        if i < len(PROMPTS):
            jobs.append(engine.submit(PROMPTS[i], max_new_tokens=10))
        with pytest.raises(ValueError, match=said) as error:
            engine.submit(**{"prompt": [1], "max_new_tokens": 2} | wishes)
        assert "\n" not in str(error.value)
        engine.step()
    for values in ({"temperature": -0.1}, {"top_p": 0.0}, {"temperature": float("nan")}, {"seed": -1}):
        ((name, value),) = values.items()
        with pytest.raises(ValueError, match=f"{name}={value}"):
            Sampling(**values)
    engine.run()
    assert [job.completions[0].tokens for job in jobs] == wanted
    assert engine.statistics.in_use == 0


def test_a_list_of_prompts_with_a_bad_one_leaves_nothing_behind(engine):
    with pytest.raises(ValueError, match="token 99"):
        engine.generate([PROMPTS[0], [99]], max_new_tokens=4)
    assert not engine.busy


def test_an_empty_stop_string_is_refused(writer):
    for stop, said in (([""], "empty string"), ("ab", "is one string")):
        with pytest.raises(ValueError, match=said):
            writer.submit("abc", max_new_tokens=4, stop=stop)
    assert not writer.busy


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"page": 0}, "page=0 must be at least 1"),
        ({"rows": 0}, "rows=0 must be at least 1"),
        ({"pages": 1}, "pages=1 must be at least 2"),
        ({"longest": 65}, "longest=65 .* model.context=64"),
        ({"longest": 0}, "longest=0"),
        ({"cache": "int16"}, "cache='int16'"),
        ({"top": 25}, "top=25"),
        ({"host_pages": -1}, "host_pages=-1"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(params, sizes, said):
    with pytest.raises(ValueError, match=said):
        Engine(SMALL, params, **SIZES | sizes)


@pytest.mark.parametrize(
    ("chunk", "halves", "eighths"),
    [(8, (8,), (8,)), (16, (16,), (16,)), (100, (25, 50, 100), (100,)), (1024, (64, 128, 256, 512, 1024), (16, 128, 1024))],
)
def test_a_short_prompt_is_not_computed_as_a_long_one(chunk, halves, eighths):
    assert Sizes(16, chunk, 4).prefills == halves
    assert Sizes(16, chunk, 4, wide=True).prefills == eighths


@pytest.mark.parametrize(("rows", "decodes"), [(1, (16,)), (16, (16,)), (24, (16, 24)), (64, (16, 32, 64))])
def test_the_smallest_program_has_as_many_rows_as_are_worth_having(rows, decodes):
    """Whatever a step has, one of the programs that there are holds it."""
    sizes = Sizes(rows, 64, 4, wide=True)
    assert sizes.decodes == decodes
    assert Sizes(rows, 64, 4).decodes[-1] == rows
    for some in range(rows + 1):
        for tokens in (0, 1, 8, 9, 64):
            held = sizes.least(some, tokens)
            assert held in sizes.all
            assert held[0] >= some
            assert held[1] >= tokens
