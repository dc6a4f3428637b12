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
from lmx.infer.texts import check_continues, lead_of
from lmx.kernels import devices
from lmx.models import virtual
from lmx.models.config import EncoderDecoder, Model
from lmx.models.families import functions
from lmx.models.losses import logits
from lmx.models.transformer import Source
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
    sources: Sequence[Sequence[int]] | None = None,
    execution: Execution = Execution(),
) -> list[Scored]:
    """Log-probabilities of each text's tokens, in one batch, behind the virtual tokens of an adapter in `params` where there are any (they are
    given, as the first token is); logits of a few positions at a time, so those of long texts never exist.

    Args:
      texts: lists of token ids.
      kind: which log-probabilities (`lmx.infer.sampling`).
      top: how many alternatives come with each token.
      sampling: what `tempered` and `truncated` are of; `raw` does not heed it.
      prompts: how many of each text's tokens were its prompt, which presence and frequency penalties do not count; None: none of them.
      sources: what the encoder of an encoder-decoder reads, one for each text, which then begins with its start token.

    Raises:
      ValueError: an empty text, one longer than the model's context, with virtual tokens before it, a token outside the vocabulary, a kind
        that is none, more alternatives than there are tokens, a model that predicts no next token; an encoder-decoder without sources, or
        another model with; a recurrent model with virtual tokens.
    """
    model = getattr(model, "config", model)  # of a checkpoint (`lmx.interop.Model`)
    _check(model, params, texts, kind, top, prompts, sources)
    if not texts:
        return []
    tokens, segments = _padded(texts)
    written = np.arange(tokens.shape[1]) >= (0 if prompts is None else np.asarray(prompts)[:, None])
    written = np.broadcast_to(written, tokens.shape)
    read = None if sources is None else _padded(sources)
    wishes = knobs([sampling] * len(texts), model.vocab)
    with jax.default_matmul_precision(execution.precision.products):
        found = _run(model, kind, top, sampling.penalised, execution, params, tokens, segments, written, read, wishes)
    found = jax.device_get(found)
    return [Scored(*(a[row, : len(text) - 1] for a in found)) for row, text in enumerate(texts)]


def _padded(texts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segments, to a multiple of 16 tokens: few programs serve many lengths."""
    length = -(-max(map(len, texts)) // 16) * 16
    tokens, segments = np.zeros((2, len(texts), length), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)], segments[row, : len(text)] = text, 1
    return tokens, segments


def _check(
    model: Model,
    params: Tree,
    texts: Sequence,
    kind: Kind,
    top: int,
    prompts: Sequence[int] | None,
    sources: Sequence | None,
) -> None:
    check_continues(model)
    lead = lead_of(model, params)
    if isinstance(model, EncoderDecoder) != (sources is not None):
        raise ValueError(f"sources={sources} of model={type(model).__name__}: an encoder-decoder reads one for each text, others read none")
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    if not 0 <= top <= model.vocab:
        raise ValueError(f"top={top} must be at least 0 and at most the vocabulary's {model.vocab}")
    if prompts is not None and len(prompts) != len(texts):
        raise ValueError(f"prompts has {len(prompts)} lengths, and there are {len(texts)} texts")
    if sources is not None and len(sources) != len(texts):
        raise ValueError(f"there are {len(sources)} sources and {len(texts)} texts")
    own, read = (lead.prefix, lead.prompt) if sources is not None else (lead.prefix + lead.prompt, 0)
    for i, text in enumerate(texts):
        _check_text(f"text {i}", text, model.vocab, model.context, "model.context", own)
        if prompts is not None and not 0 <= prompts[i] <= len(text):
            raise ValueError(f"prompts[{i}]={prompts[i]} must be at least 0 and at most the text's {len(text)} tokens")
    for i, source in enumerate(sources or ()):
        _check_text(f"source {i}", source, model.encoder.vocab, model.encoder.context, "model.encoder.context", read)


def _check_text(name: str, text: Sequence[int], vocab: int, context: int, knob: str, virtual: int) -> None:
    if isinstance(text, str):
        raise ValueError(f"{name} is a string; give its token ids")
    if not len(text):
        raise ValueError(f"{name} is empty; begin it with at least one token")
    if len(text) + virtual > context:
        behind = f" behind {virtual} virtual ones" if virtual else ""
        raise ValueError(f"{name} has {len(text)} tokens{behind}: longer than {knob}={context}")
    if strange := [token for token in text if not 0 <= token < vocab]:
        raise ValueError(f"{name} has token {strange[0]}, outside the model's vocabulary of {vocab}")


def _hidden(model, execution: Execution, params: Tree, tokens: Array, segments: Array, read) -> Array:
    """Of the texts' own tokens, behind the adapter's virtual ones: those of an encoder-decoder's soft prompt are its encoder's."""
    rows, more = tokens.shape[0], {}

    def behind(tokens: Array, segments: Array) -> dict[str, Array]:
        wide = {
            name: jnp.pad(a, ((0, 0), (soft, 0)), constant_values=i)
            for i, (name, a) in enumerate((("tokens", tokens), ("segments", segments)))
        }
        places = jnp.broadcast_to(jnp.arange(wide["tokens"].shape[1]), wide["tokens"].shape)
        return wide | ({"given": virtual.embedded(params, places)} if soft else {})

    soft, prefix = virtual.prompt(params), virtual.prefix(params)
    own = {"tokens": tokens, "segments": segments}
    if read is None:
        own = behind(tokens, segments)
    else:
        more["source"] = Source(**behind(*read))
    if prefix:
        dtype, width = jnp.dtype(execution.precision.compute), own["tokens"].shape[1]
        more["cache"] = virtual.cache(params, model, rows, prefix + width, dtype)
        more["positions"] = jnp.broadcast_to(prefix + jnp.arange(width), own["tokens"].shape)
    hidden = functions(model).forward(params, model, own.pop("tokens"), **own, **more, execution=execution).hidden
    return hidden[:, hidden.shape[1] - tokens.shape[1] :]


@partial(jax.jit, static_argnums=tuple(range(5)))
def _run(model, kind, top, penalised, execution, params, tokens, segments, written, read, wishes: Knobs) -> tuple[Array, Array, Array]:
    """Of each position's next token; of the last there is none, and what is told of it means nothing."""
    rows, length = tokens.shape
    hidden = _hidden(model, execution, params, tokens, segments, read)
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
        told = taken(found, flat(targets)), ids.astype(jnp.int32), values
        return (seen, counts), tuple(a.reshape(rows, length // parts, *a.shape[1:]) for a in told)

    none = jnp.zeros((rows, model.vocab if penalised else 0), jnp.int32)
    _, found = jax.lax.scan(step, (none, none), tuple(map(split, (hidden, tokens, targets, segments, written))))
    return tuple(jnp.moveaxis(a, 0, 1).reshape(rows, length, *a.shape[3:]) for a in found)
