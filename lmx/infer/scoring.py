"""Log-probabilities of given texts: the plain forward, with the meaning that they have where texts are drawn (`lmx.infer.sampling`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmx.core.execution import Execution
from lmx.core.tree import Tree
from lmx.infer.sampling import KINDS, History, Kind, Knobs, Sampling, knobs, log_probs, taken
from lmx.kernels import devices
from lmx.models import virtual
from lmx.models.config import EncoderDecoder, Model
from lmx.models.families import functions
from lmx.models.losses import logits
from lmx.parallel.tensor import chunks


@dataclass(frozen=True)
class Scored:
    """What a model makes of one text. Entry i is of its token i + 1, given those before: the first is given.

    Attributes:
      log_probs: `[tokens - 1]`, of the text's own tokens.
      top_tokens: `[tokens - 1, top]`, what is likeliest there, likeliest first.
      top_log_probs: theirs.
    """

    log_probs: np.ndarray
    top_tokens: np.ndarray
    top_log_probs: np.ndarray


def score(
    model: Model,
    params: Tree,
    texts: Sequence[Sequence[int]],
    *,
    kind: Kind = "raw",
    top: int = 0,
    sampling: Sampling = Sampling(),
    prompts: Sequence[int] | None = None,
    execution: Execution = Execution(),
) -> list[Scored]:
    """Log-probabilities of each text's tokens, in one batch; logits of a few positions at a time, so those of long texts never exist.

    Args:
      texts: lists of token ids.
      kind: which log-probabilities (`lmx.infer.sampling`).
      top: how many alternatives come with each token.
      sampling: what `tempered` and `truncated` are of; `raw` does not heed it.
      prompts: how many of each text's tokens were its prompt, which presence and frequency penalties do not count; None: none of them.

    Raises:
      ValueError: an empty text, one longer than the model's context, a token outside the vocabulary, a kind that is none, more
        alternatives than there are tokens, a model that predicts no next token or reads another text.
    """
    model = getattr(model, "config", model)  # of a checkpoint (`lmx.interop.Model`)
    _check(model, params, texts, kind, top, prompts)
    if not texts:
        return []
    length = -(-max(map(len, texts)) // 16) * 16
    tokens, segments = np.zeros((len(texts), length), np.int32), np.zeros((len(texts), length), np.int32)
    written = np.zeros((len(texts), length), bool)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], segments[row, : len(text)] = text, 1
        written[row, 0 if prompts is None else prompts[row] : len(text)] = True
    wishes = knobs([sampling] * len(texts), model.vocab)
    with jax.default_matmul_precision(execution.precision.products):
        found = _run(model, kind, top, sampling.penalised, execution, params, tokens, segments, written, wishes)
    found = jax.device_get(found)
    return [Scored(*(a[row, : len(text) - 1] for a in found)) for row, text in enumerate(texts)]


def _check(model: Model, params: Tree, texts: Sequence, kind: Kind, top: int, prompts: Sequence[int] | None) -> None:
    if isinstance(model, EncoderDecoder) or not model.causal or not model.vocabulary_head:
        raise ValueError(f"model={type(model).__name__} with causal={model.causal}, head={model.head}: score needs a decoder with logits")
    if virtual.prompt(params) or virtual.prefix(params):
        raise ValueError("params have virtual tokens, behind which score reads no texts; leave out their entry `virtual`")
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    if not 0 <= top <= model.vocab:
        raise ValueError(f"top={top} must be at least 0 and at most the vocabulary's {model.vocab}")
    if prompts is not None and len(prompts) != len(texts):
        raise ValueError(f"prompts has {len(prompts)} lengths, and there are {len(texts)} texts")
    for i, text in enumerate(texts):
        if isinstance(text, str):
            raise ValueError(f"text {i} is a string; give its token ids")
        if not len(text):
            raise ValueError(f"text {i} is empty; begin it with at least one token")
        if len(text) > model.context:
            raise ValueError(f"text {i} has {len(text)} tokens: longer than model.context={model.context}")
        if strange := [token for token in text if not 0 <= token < model.vocab]:
            raise ValueError(f"text {i} has token {strange[0]}, outside the model's vocabulary of {model.vocab}")
        if prompts is not None and not 0 <= prompts[i] <= len(text):
            raise ValueError(f"prompts[{i}]={prompts[i]} must be at least 0 and at most the text's {len(text)} tokens")


@partial(jax.jit, static_argnums=tuple(range(5)))
def _run(model, kind, top, penalised, execution, params, tokens, segments, written, wishes: Knobs) -> tuple[Array, Array, Array]:
    """Of each position's next token; of the last there is none, and what is told of it means nothing."""
    rows, length = tokens.shape
    hidden = functions(model).forward(params, model, tokens, segments=segments, execution=execution).hidden
    targets = jnp.roll(tokens, -1, axis=1)
    parts = chunks(rows, length, model.vocab, cpu=devices.on_cpu())
    wishes = jax.tree.map(lambda a: jnp.repeat(a, length // parts, axis=0), wishes)  # one for each position of a part

    def split(a: Array) -> Array:
        return jnp.moveaxis(a.reshape(rows, parts, length // parts, *a.shape[2:]), 1, 0)

    def flat(a: Array) -> Array:
        return a.reshape(-1, *a.shape[2:])

    def step(before: tuple[Array, Array], part):
        hidden, tokens, targets, segments, written = part
        history, seen, counts = None, *before
        if penalised:
            here = jax.nn.one_hot(jnp.where(segments > 0, tokens, -1), model.vocab, dtype=jnp.int32)
            seen = seen[:, None] + jnp.cumsum(here, 1)
            counts = counts[:, None] + jnp.cumsum(here * written[..., None], 1)
            history = History(flat(seen) > 0, flat(counts))
            seen, counts = seen[:, -1], counts[:, -1]
        found = log_probs(flat(logits(params, model, hidden)), wishes, history, kind=kind)
        values, ids = jax.lax.top_k(found, top)
        of_parts = (a.reshape(rows, length // parts, *a.shape[1:]) for a in (taken(found, flat(targets)), ids.astype(jnp.int32), values))
        return (seen, counts), tuple(of_parts)

    none = jnp.zeros((rows, model.vocab if penalised else 0), jnp.int32)
    _, found = jax.lax.scan(step, (none, none), tuple(map(split, (hidden, tokens, targets, segments, written))))
    return tuple(jnp.moveaxis(a, 0, 1).reshape(rows, length, *a.shape[3:]) for a in found)
