"""Best-of, and beam search against transformers'."""

import json
from collections import Counter
from pathlib import Path

import beam_models
import numpy as np
import pytest

from lmx import interop
from lmx.data.tokenizers import ByteTokenizer
from lmx.infer.engine import Engine
from lmx.infer.sampling import Sampling
from lmx.infer.search import beam_search, best_of
from lmx.models.config import EncoderDecoder

GOLDEN = json.loads((Path(__file__).parent / "transformers_beams.json").read_text())
HOW = ("beams", "early_stopping", "max_new_tokens", "length_penalty", "stop_ids")


@pytest.fixture(scope="module", params=beam_models.CONFIGS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def loaded(name, tmp_path_factory):
    folder = tmp_path_factory.mktemp(name)
    beam_models.write(name, folder)
    return interop.load(folder)


@pytest.fixture(scope="module")
def engine(loaded):
    return Engine(*loaded, rows=8, page=4, chunk=32, top=35)


def test_finds_what_transformers_finds(name, engine):
    finishes = Counter()
    for case in GOLDEN[name]:
        found = beam_search(engine, case["prompts"], **{knob: case[knob] for knob in HOW})
        for texts, expected in zip(found, case["texts"], strict=True):
            assert [beam.score for beam in texts] == pytest.approx([score for _, score in expected], rel=2e-6, abs=1e-4)
            for beam, (tokens, _) in zip(texts, expected, strict=True):
                stopped = tokens[-1] in case["stop_ids"]
                assert (list(beam.tokens), beam.finish) == (tokens[:-1], "stop_id") if stopped else (tokens, "length")
                finishes[beam.finish] += 1
    assert min(finishes["stop_id"], finishes["length"]) > 30
    assert not engine.busy
    assert engine.statistics.in_use == 0
    assert engine.statistics.hit_rate > 0.3
    engine.pages.check()


def test_others_are_served_meanwhile(name, engine):
    case = max(GOLDEN[name], key=lambda case: case["beams"] * case["max_new_tokens"])
    alone = engine.generate([[1, 2, 3]], max_new_tokens=40)[0][0].tokens
    other = engine.submit([1, 2, 3], max_new_tokens=40)
    found = beam_search(engine, case["prompts"], **{knob: case[knob] for knob in HOW})
    assert [[list(b.tokens) for b in texts] for texts in found] == [
        [t[:-1] if t[-1] in case["stop_ids"] else t for t, _ in texts] for texts in case["texts"]
    ]
    engine.run()
    assert other.completions[0].tokens == alone


def test_a_single_beam_that_stops_early_is_greedy(engine):
    prompts = [[1, 2, 3], [7], [30, 8, 5, 5]]
    found = beam_search(engine, prompts, beams=1, max_new_tokens=12, early_stopping=True, stop_ids=[5, 8])
    plain = engine.generate(prompts, max_new_tokens=12, stop_ids=[5, 8])
    assert [[(list(beam.tokens), beam.finish) for beam in texts] for texts in found] == [
        [(text.tokens, text.finish) for text in texts] for texts in plain
    ]


def test_best_of_are_the_likeliest_of_those_that_are_drawn(engine):
    sampling = Sampling(seed=3)
    ((*every,),) = engine.generate([[4, 5]], n=6, max_new_tokens=5, sampling=Sampling(seed=3, log_probs="raw"))
    best = best_of(engine, [4, 5], 2, 6, max_new_tokens=5, sampling=sampling)
    ranked = sorted(every, key=lambda text: -np.sum(text.log_probs))
    assert [text.tokens for text in best] == [text.tokens for text in ranked[:2]]
    assert len({tuple(text.tokens) for text in every}) == 6
    tempered = best_of(engine, [4, 5], 1, 6, max_new_tokens=5, sampling=Sampling(temperature=0.7, seed=3, log_probs="tempered"))
    assert sum(tempered[0].log_probs) > sum(best[0].log_probs)  # of a sharper distribution


def test_with_a_tokenizer_prompts_and_beams_are_texts(engine, monkeypatch):
    class Letters(ByteTokenizer):
        vocab = beam_models.VOCAB

        def encode(self, text):
            return [ord(letter) - 64 for letter in text]

        def decode(self, ids):
            return "".join(chr(64 + id) for id in ids)

    monkeypatch.setattr(engine, "tokenizer", Letters())
    ((best, *_),) = beam_search(engine, ["ABC"], beams=3, max_new_tokens=4)
    ((same, *_),) = beam_search(engine, [[1, 2, 3]], beams=3, max_new_tokens=4)
    assert best == same
    assert best.text == "".join(chr(64 + id) for id in best.tokens)


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"beams": 0}, "beams=0 and max_new_tokens=4 must be at least 1"),
        ({"beams": 18}, "beams=18 choose among 36 tokens, and the engine was made for top=35; make it with top=36"),
        ({"beams": 21}, "the vocabulary has 40; use fewer beams"),
        ({"early_stopping": "always"}, "early_stopping='always' must be True, False or 'never'"),
        ({"max_new_tokens": 62}, "prompt 0 has 3 tokens and max_new_tokens=62: longer than engine.longest=64"),
        ({"prompts": ["abc"]}, "the prompt is a string, so the engine needs a tokenizer"),
        ({"prompts": [[1, 2], [40]]}, "token 40, outside the model's vocabulary of 40"),
    ],
)
def test_what_beam_search_cannot_do_is_told_by_name(engine, wishes, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        beam_search(engine, **{"prompts": [[1, 2, 3]], "beams": 2, "max_new_tokens": 4} | wishes)
    assert not engine.busy


def test_engines_that_find_no_texts_again_are_refused(loaded):
    with pytest.raises(ValueError, match="make it with reuse=True"):
        beam_search(Engine(*loaded, rows=2, top=4, reuse=False), [[1]], beams=2, max_new_tokens=2)


def test_an_encoder_decoder_is_refused(engine, monkeypatch):
    monkeypatch.setattr(engine, "model", EncoderDecoder(vocab=40))
    with pytest.raises(ValueError, match="behind start_id alone"):
        beam_search(engine, [[1]], beams=2, max_new_tokens=2)


@pytest.mark.parametrize(
    ("n", "of", "temperature", "message"),
    [(3, 2, 1.0, "n=3 must be at least 1 and at most best_of=2"), (1, 2, 0.0, "best_of=2 texts at temperature=0 would all be the same")],
)
def test_what_best_of_cannot_do_is_told_by_name(engine, n, of, temperature, message):
    with pytest.raises(ValueError, match=message):
        best_of(engine, [1], n, of, max_new_tokens=2, sampling=Sampling(temperature))
