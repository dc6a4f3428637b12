"""Nats a byte of texts, against the plain forward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.params import initial_values
from lmx.data.tokenizers import ByteTokenizer
from lmx.infer.perplexity import nats_per_byte
from lmx.models.config import RWKV, EncoderDecoder, Transformer
from lmx.models.families import functions
from lmx.models.losses import logits

SIZES = {"vocab": 257, "layers": 1, "embed": 16, "heads": 2, "mlp": 16, "context": 24}
MODEL = Transformer(**SIZES)
TEXTS = [
    "To be, or not to be, that is the question: whether 'tis nobler",
    "caf\u00e9 \u4e2d",
    "x",
    "a" * 24,
    "b" * 25,
    "The rest is silence.",
]


def weights(model):
    params = initial_values(jax.random.key(0), functions(model).specs(model))
    return jax.tree.map(lambda a: 4 * a if a.ndim > 1 else a, params)


def plain(model, params):
    """Span by span, a forward of its own, from the definition."""

    @jax.jit
    def found(tokens):
        return jax.nn.log_softmax(logits(params, model, functions(model).forward(params, model, tokens[None]).hidden)[0])

    def score(text, length):
        tokens, total = list(text.encode()), 0.0
        while len(tokens) > 1:
            span, tokens = tokens[:length], tokens[length - 1 :]
            log_probs = np.asarray(found(jnp.array(span + [9] * (24 - len(span)))))
            total -= sum(float(log_probs[i, token]) for i, token in enumerate(span[1:]))
        return total / len(text.encode())

    return score


@pytest.mark.parametrize(("model", "length"), [(MODEL, None), (RWKV(vocab=257, layers=1, embed=16, head_dim=8, mlp=16), 20)])
def test_equals_the_plain_forward_whatever_the_batch(model, length):
    params, encode = weights(model), ByteTokenizer().encode
    score = plain(model, params)
    expected = [score(text, length or model.context) for text in TEXTS]
    together = nats_per_byte(model, params, encode, TEXTS, length=length, rows=4)
    alone = nats_per_byte(model, params, encode, TEXTS[:1], length=length)
    np.testing.assert_allclose(together, expected, rtol=2e-5)
    np.testing.assert_allclose(alone, expected[:1], rtol=2e-5)
    assert together[2] == 0
    assert 1 < together[0] < 30


def test_a_checkpoint_puts_a_beginning_before_a_text():
    params = weights(MODEL)
    began = nats_per_byte(MODEL, params, lambda text: [97, *text.encode()], ["bc"])[0]
    assert began == pytest.approx(nats_per_byte(MODEL, params, ByteTokenizer().encode, ["abc"])[0] * 3 / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("model", "texts", "how", "message"),
    [
        (MODEL, ["a", ""], {}, "text 1 is empty"),
        (MODEL, ["a"], {"length": 25}, r"length=25 must be from 2 to model\.context=24"),
        (MODEL, ["a"], {"rows": 0}, "rows=0 at least 1"),
        (Transformer(**SIZES, causal=False), ["a"], {}, "causal=False"),
        (EncoderDecoder(**SIZES, encoder=Transformer(**SIZES, causal=False)), ["a"], {}, "encoder-decoder"),
    ],
)
def test_what_it_refuses(model, texts, how, message):
    with pytest.raises(ValueError, match=message):
        nats_per_byte(model, {}, ByteTokenizer().encode, texts, **how)
    assert nats_per_byte(MODEL, {}, ByteTokenizer().encode, []).shape == (0,)
