"""Log-probabilities of texts: what training minimises, and what drawing says of its own tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.execution import Execution
from lmx.core.params import initial_values
from lmx.infer import Engine, scoring
from lmx.infer.sampling import KINDS, Sampling, begun, blank, draw, knobs, row_keys
from lmx.infer.scoring import score
from lmx.models.config import RWKV, EncoderDecoder, Transformer
from lmx.models.families import functions
from lmx.models.losses import cross_entropy, logits
from lmx.models.transformer import Source
from lmx.parallel import tensor

SIZES = {"vocab": 19, "layers": 2, "embed": 16, "heads": 2, "mlp": 16, "context": 32}
MODEL = Transformer(**SIZES, logit_softcap=5.0)
RECURRENT = RWKV(vocab=19, layers=2, embed=16, head_dim=8, mlp=16)
ENCODER = Transformer(**SIZES, causal=False)
PAIR = EncoderDecoder(**SIZES, encoder=ENCODER)
SOURCES = [[3, 4, 5], [9, 1, 2], [1] * 20, [7] * 20]
TEXTS = [[1, 2, 3, 2, 2, 7], [5], list(range(18, 0, -1)), [4, 4, 4, 4]]
ALL = Sampling(0.7, 9, 0.9, 0.02, 1.4, 0.3, 0.2, ((3, 0.5), (6, float("-inf"))))


def weights(model):
    params = initial_values(jax.random.key(0), functions(model).specs(model))
    return jax.tree.map(lambda a: 4 * a if a.ndim > 1 else a, params)  # so that tokens differ in likelihood


@pytest.fixture(scope="module")
def params():
    return weights(MODEL)


@pytest.mark.parametrize("model", [MODEL, RECURRENT, PAIR], ids=lambda model: type(model).__name__)
def test_the_raw_score_is_what_training_minimises(model):
    params, padded = weights(model), np.zeros((len(TEXTS), 32), np.int32)
    for row, text in enumerate(TEXTS):
        padded[row, : len(text)] = text

    sources = SOURCES if model is PAIR else None
    read = [Source(jnp.array([source])) for source in sources or ()]

    @jax.jit
    def losses(params):
        """Of each token, a batch of its own."""
        forward = functions(model).forward
        if sources is None:
            hidden = forward(params, model, padded).hidden
        else:
            hidden = jnp.concatenate([forward(params, model, padded[i : i + 1], source=s).hidden for i, s in enumerate(read)])
        hidden = hidden[:, :-1].reshape(-1, 1, 1, model.embed)
        one = jax.vmap(lambda h, t: cross_entropy(params, model, h, t, jnp.ones((1, 1)))[0])
        return one(hidden, jnp.asarray(padded)[:, 1:].reshape(-1, 1, 1)).reshape(len(TEXTS), 31)

    for text, scored, loss in zip(TEXTS, score(model, params, TEXTS, sources=sources), np.asarray(losses(params)), strict=True):
        assert scored.log_probs.shape == (len(text) - 1,)
        assert scored.top_tokens.shape == (len(text) - 1, 0)
        np.testing.assert_allclose(-scored.log_probs, loss[: len(text) - 1], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_what_drawing_says_of_its_own_tokens(params, kind):
    """A text drawn token by token with all knobs on, prompt and penalties and all: scored afterwards, it has the same log-probabilities."""
    sampling = Sampling(**{**vars(ALL), "log_probs": kind})
    text, prompt, told, tops = [5, 2, 2, 9], 4, [], []
    forward = jax.jit(lambda tokens, at: logits(params, MODEL, functions(MODEL).forward(params, MODEL, tokens).hidden)[:, at])
    drawing, wish = jax.jit(lambda *a: draw(*a, top=3)), knobs([sampling], MODEL.vocab)
    for count in range(14):
        tokens = np.zeros((1, 32), np.int32)
        tokens[0, : len(text)] = text
        past = begun(blank(1, MODEL.vocab), 0, np.where(np.arange(32) < len(text), tokens[0], -1), np.arange(32) >= prompt)
        drawn = drawing(forward(tokens, len(text) - 1), wish, row_keys(np.array([11], np.uint32), np.array([count])), past)
        text.append(int(drawn.tokens[0]))
        told.append(float(drawn.log_probs[0]))
        tops.append((drawn.top_tokens[0], drawn.top_log_probs[0]))
    assert len(set(text[prompt:])) > 4
    assert 6 not in text
    first, other = score(MODEL, params, [text, [3, 3]], kind=kind, top=3, sampling=sampling, prompts=[prompt, 1])
    np.testing.assert_allclose(first.log_probs[prompt - 1 :], told, atol=2e-5)
    np.testing.assert_allclose(first.top_log_probs[prompt - 1 :], [values for _, values in tops], atol=2e-5)
    finite = np.isfinite(first.top_log_probs[prompt - 1 :])
    assert np.array_equal(first.top_tokens[prompt - 1 :][finite], np.array([ids for ids, _ in tops])[finite])
    assert other.log_probs.shape == (1,)


def test_parts_of_any_size_say_the_same(params, monkeypatch):
    whole = score(MODEL, params, TEXTS, kind="truncated", top=2, sampling=ALL, prompts=[3, 0, 5, 1])
    monkeypatch.setitem(tensor.CHUNKS, "cpu", 4 * 2 * 19)
    jax.clear_caches()
    args = (params, np.zeros((4, 32), np.int32), np.ones((4, 32), np.int32), np.ones((4, 32), bool), None, knobs([ALL] * 4, 19))
    program = str(jax.make_jaxpr(scoring._run, static_argnums=tuple(range(5)))(MODEL, "truncated", 2, True, Execution(), *args))
    assert "f32[8,19]" in program
    assert "[128,19]" not in program
    assert "[4,32,19]" not in program
    parts = score(MODEL, params, TEXTS, kind="truncated", top=2, sampling=ALL, prompts=[3, 0, 5, 1])
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)
        np.testing.assert_allclose(one.top_log_probs, other.top_log_probs, atol=1e-5)


def test_a_text_is_scored_alike_beside_others(params):
    together = score(MODEL, params, TEXTS, kind="tempered", sampling=ALL)
    for text, scored in zip(TEXTS[:2], together[:2], strict=True):
        alone = score(MODEL, params, [text], kind="tempered", sampling=ALL)[0]
        np.testing.assert_allclose(alone.log_probs, scored.log_probs, atol=1e-5)


@pytest.mark.parametrize(
    ("texts", "how", "said"),
    [
        ([[1], []], {}, "text 1 is empty"),
        (["ab"], {}, "text 0 is a string"),
        ([[1, 19]], {}, "text 0 has token 19, outside the model's vocabulary of 19"),
        ([[1] * 33], {}, "text 0 has 33 tokens: longer than model.context=32"),
        ([[1]], {"kind": "cooked"}, "kind='cooked' must be one of"),
        ([[1]], {"top": 20}, "top=20 must be at least 0 and at most the vocabulary's 19"),
        ([[1]], {"prompts": []}, "prompts has 0 lengths, and there are 1 texts"),
        ([[1]], {"prompts": [2]}, r"prompts\[0\]=2 must be at least 0 and at most the text's 1"),
        ([[1]], {"sampling": Sampling(logit_bias=((19, 1.0),))}, "logit_bias has token 19"),
        ([[1]], {"model": ENCODER}, "predicts no next token; that takes a causal one with logits"),
        ([[1]], {"model": PAIR}, "sources=None of model=EncoderDecoder"),
        ([[1]], {"sources": [[1]]}, r"sources=\[\[1\]\] of model=Transformer"),
        ([[1]], {"model": PAIR, "sources": []}, "there are 0 sources and 1 texts"),
        ([[1]], {"model": PAIR, "sources": [[19]]}, "source 0 has token 19, outside the model's vocabulary of 19"),
        ([[1] * 31], {"params": {"virtual": {"embeddings": np.zeros((2, 16))}}}, "text 0 has 31 tokens behind 2 virtual ones: longer than"),
        ([[1]], {"model": RECURRENT, "params": {"virtual": {"embeddings": np.zeros((2, 16))}}}, "a recurrent model reads none"),
    ],
)
def test_bad_input_is_refused_by_value(params, texts, how, said):
    how = {"model": MODEL, "params": params} | how
    with pytest.raises(ValueError, match=said) as error:
        score(how.pop("model"), how.pop("params"), texts, **how)
    assert "\n" not in str(error.value)


def adapted(model, kind):
    """With a soft prompt, a prefix of keys and values, or both."""
    rng, shape = np.random.default_rng(1), (2, 2, 3, 8)
    parts = {"embeddings": rng.normal(size=(4, 16))} if kind != "prefix" else {}
    parts |= {name: rng.normal(size=shape) for name in ("key", "value")} if kind != "prompt" else {}
    return weights(model) | {"virtual": jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), parts)}


@pytest.mark.parametrize(("model", "kind"), [(MODEL, "prefix"), (MODEL, "both"), (PAIR, "both")], ids=["prefix", "both", "pair"])
def test_behind_virtual_tokens_scores_are_what_the_engine_says_of_what_it_draws(model, kind):
    """Of every kind of log-probability, with all knobs on; and what an adapter does not leave as it was."""
    params, reads = adapted(model, kind), model is PAIR
    engine = Engine(model, params, rows=2, page=4, chunk=16, longest=32)
    start = {"start_id": 1} if reads else {}
    for said in KINDS:
        sampling = Sampling(**{**vars(ALL), "log_probs": said, "seed": 3})
        ((drawn,),) = engine.generate([[5, 2, 2, 9]], max_new_tokens=6, sampling=sampling, **start)
        before = [1] if reads else [5, 2, 2, 9]
        how = {"kind": said, "sampling": sampling, "prompts": [len(before)], "sources": [[5, 2, 2, 9]] if reads else None}
        text = [before + drawn.tokens]
        (scored,) = score(model, params, text, **how)
        np.testing.assert_allclose(scored.log_probs[len(before) - 1 :], drawn.log_probs, atol=1e-4)
    (plain,) = score(model, {name: part for name, part in params.items() if name != "virtual"}, text, **how | {"kind": "raw"})
    (scored,) = score(model, params, text, **how | {"kind": "raw"})
    assert np.abs(plain.log_probs - scored.log_probs).max() > 0.01


def test_no_texts_are_no_scores(params):
    assert score(MODEL, params, []) == []
