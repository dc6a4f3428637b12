"""Continuations of prompts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.execution import Execution
from lmx.core.params import is_spec
from lmx.core.precision import POLICIES
from lmx.core.tree import map_named
from lmx.infer import decoding_params, generate
from lmx.models.config import Transformer
from lmx.models.losses import logits
from lmx.models.transformer import forward, specs

MODEL = Transformer(vocab=24, layers=3, embed=16, heads=4, kv_heads=2, mlp=16, context=48, window=4, pattern=("local", "global"))
A, B, C = [1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11] * 12


@pytest.fixture(scope="module")
def params():
    """Weights large enough that texts differ."""
    rng = np.random.default_rng(0)
    return map_named(lambda _, spec: jnp.asarray(0.4 * rng.normal(size=spec.shape), jnp.float32), specs(MODEL), is_leaf=is_spec)


@pytest.fixture(scope="module")
def next_logits(params):
    """Logits after a text by the full forward, without a cache."""

    @jax.jit
    def rows(tokens):
        return logits(params, MODEL, forward(params, MODEL, tokens).hidden)

    def of(text):
        padded = np.zeros((1, 24), np.int32)
        padded[0, : len(text)] = text
        return np.asarray(rows(padded))[0, len(text) - 1]

    return of


def test_greedy_text_is_what_the_full_forward_finds_likeliest_at_every_step(params, next_logits):
    found = generate(MODEL, params, [A, B], max_new_tokens=8)
    for prompt, new in zip((A, B), found, strict=True):
        text = list(prompt)
        assert len(new) == 8
        for token in new:
            rows = next_logits(text)
            top = np.sort(rows)[-2:]
            assert token == rows.argmax() or top[1] - top[0] < 1e-4
            text.append(token)


def test_parameters_may_come_in_either_form(params):
    unrolled = decoding_params(params)
    assert all(isinstance(group, tuple) for group in unrolled["layers"])
    assert decoding_params(unrolled) is unrolled
    assert generate(MODEL, unrolled, [A, B], max_new_tokens=8) == generate(MODEL, params, [A, B], max_new_tokens=8)


KNOBS = {"max_new_tokens": 8, "temperature": 1.0}


def test_a_rows_text_does_not_depend_on_the_rows_beside_it(params):
    both = generate(MODEL, params, [A, B], **KNOBS)
    assert generate(MODEL, params, [A], **KNOBS) == both[:1]
    assert generate(MODEL, params, [C, B], **KNOBS)[1] == both[1]


def test_the_seed_decides_the_draws(params):
    first = generate(MODEL, params, [A, B], **KNOBS)
    assert generate(MODEL, params, [A, B], **KNOBS) == first
    other = generate(MODEL, params, [A, B], **KNOBS, seed=1)
    assert other[0] != first[0]
    assert other[1] != first[1]
    # Rows draw apart even where their prompts are the same.
    same = generate(MODEL, params, [A, A], **KNOBS)
    assert same[0] == first[0]
    assert same[0] != same[1]


def test_steps_of_one_row_draw_apart(params):
    """Under a flat distribution every step is a fresh draw."""
    flat = jax.tree.map(jnp.zeros_like, params)
    new = generate(MODEL, flat, [A], max_new_tokens=32, temperature=1.0)[0]
    assert len(set(new)) > 8


def test_a_stop_token_ends_its_row_and_is_no_part_of_it(params):
    greedy = generate(MODEL, params, [A, B], max_new_tokens=8)
    stop = next(token for token in greedy[0] if token not in greedy[1])
    stopped = generate(MODEL, params, [A, B], max_new_tokens=8, stop_ids=[stop])
    assert stopped == [greedy[0][: greedy[0].index(stop)], greedy[1]]
    first = sorted({row[0] for row in greedy})
    assert generate(MODEL, params, [A, B], max_new_tokens=8, stop_ids=first) == [[], []]


def test_the_number_of_new_tokens_is_the_one_asked_for_up_to_the_last_position(params):
    assert [len(row) for row in generate(MODEL, params, [A, B], max_new_tokens=1)] == [1, 1]
    assert len(generate(MODEL, params, [[1] * 40], max_new_tokens=8)[0]) == 8
    assert generate(MODEL, params, [], max_new_tokens=8) == []


def test_bfloat16_generates_with_a_bfloat16_cache(params):
    found = generate(MODEL, params, [A, B], max_new_tokens=4, execution=Execution(precision=POLICIES["bf16"]))
    assert all(len(row) == 4 and all(0 <= token < 24 for token in row) for row in found)


class Letters:
    """A tokenizer of the first letters of the alphabet."""

    vocab = MODEL.vocab

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids) -> str:
        return "".join(chr(ord("a") + i) for i in ids)


def test_strings_go_in_and_come_out_through_the_tokenizer(params):
    letters = Letters()
    ids = generate(MODEL, params, [A, B], max_new_tokens=8)
    texts = generate(MODEL, params, [letters.decode(A), letters.decode(B)], max_new_tokens=8, tokenizer=letters)
    assert texts == [letters.decode(row) for row in ids]


@pytest.mark.parametrize(
    ("prompts", "knobs", "said"),
    [
        ([A, []], {}, "prompt 1: the prompt is empty"),
        ([A, [1, 24]], {}, "prompt 1: the prompt has token 24, outside the model's vocabulary of 24"),
        ([[3, -1, 5]], {}, "prompt 0: the prompt has token -1, outside the model's vocabulary of 24"),
        ([A, [1] * 41], {"max_new_tokens": 8}, "prompt 1 begins with 41 tokens and max_new_tokens=8: longer than model.context=48"),
        ([A], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ([A], {"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ([A], {"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ([A], {"top_k": -2}, "top_k=-2 must be at least 0"),
        (["abc"], {}, "prompts are strings, so generate needs a tokenizer"),
    ],
)
def test_what_cannot_be_continued_is_refused_in_one_line_by_value(params, prompts, knobs, said):
    with pytest.raises(ValueError, match=said) as error:
        generate(MODEL, params, prompts, **{"max_new_tokens": 2} | knobs)
    assert "\n" not in str(error.value)


def test_rows_that_pad_the_vocabulary_are_never_drawn():
    from lmx.core.params import initial_values
    from lmx.data.tokenizers import ByteTokenizer
    from lmx.infer import generate
    from lmx.models.config import Transformer
    from lmx.models.transformer import specs

    model = Transformer(vocab=320, layers=1, embed=8, heads=1, context=64)
    params = initial_values(jax.random.key(0), specs(model))
    params["embed"] = params["embed"].at[257:].mul(1e3)  # most of the probability is on rows that are no token
    assert max(generate(model, params, [[65]], max_new_tokens=20, temperature=1.0)[0]) >= 257
    new = generate(model, params, [[65]], max_new_tokens=20, temperature=1.0, tokenizer=ByteTokenizer())[0]
    assert max(new) < 257
    assert isinstance(generate(model, params, ["A"], max_new_tokens=20, temperature=1.0, tokenizer=ByteTokenizer())[0], str)


def test_an_encoder_continues_nothing(params):
    with pytest.raises(ValueError, match="causal=False and head=lm predicts no next token"):
        generate(replace(MODEL, causal=False), params, [A], max_new_tokens=2)
