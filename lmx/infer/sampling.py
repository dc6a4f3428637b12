"""Logits to tokens: what one request may wish, one program that serves any mix of wishes, and what a log-probability means.

A row's logits become its token in this order, which is that of vLLM and of transformers:

1. what is not allowed, and `logit_bias`;
2. penalties: repetition, then frequency and presence;
3. temperature;
4. top-k; top-p of what that keeps; min-p;
5. the draw, from the row's own key.

Log-probabilities are of one of three distributions on the way (`Kind`), here, in `lmx.infer.scoring` and where texts are served:

- `raw`: the model's own, the softmax of its logits. The negative of what training minimises.
- `tempered`: after steps 1 to 3.
- `truncated`: after step 4, of what is kept: what tokens are drawn from.

Temperature 0 takes the likeliest token after step 2 (the first of equals): `tempered` and `truncated` are the limit, 0 for it and -inf else.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Literal, NamedTuple, get_args

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from lmx.infer import truncation

Kind = Literal["raw", "tempered", "truncated"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Arrays = Array | np.ndarray

BIASES = 64
"""How many tokens' logits one request may change: programs have a place for each."""


@dataclass(frozen=True)
class Sampling:
    """One request's wishes. Raises ValueError for a value that means nothing."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens, and those just as likely as the last of them; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability (Holtzman et al., 2020)."""
    min_p: float = 0.0
    """Only tokens at least this many times as likely as the likeliest (Nguyen et al., 2024)."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens in the prompt or the output are divided by it, others multiplied (Keskar et al., 2019)."""
    presence_penalty: float = 0.0
    """Taken from logits of tokens in the output (OpenAI's)."""
    frequency_penalty: float = 0.0
    """Taken from logits of tokens in the output, once for each time they are there (OpenAI's)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, value): added to its logit; -inf bans it. At most 64 tokens."""
    seed: int | None = None
    """Decides the draws, whatever else is in the batch: in [0, 2^32). None: whoever runs the request takes one."""
    log_probs: Kind | None = None
    """Which log-probabilities come with the tokens, if any."""

    def __post_init__(self):
        for name, low, high, meaning in (
            ("temperature", 0, math.inf, "at least 0 (0 takes the likeliest token) and finite"),
            ("top_k", 0, math.inf, "at least 0 (0 keeps every token)"),
            ("min_p", 0, 1, "in [0, 1] (0 keeps every token)"),
            ("presence_penalty", -math.inf, math.inf, "finite (0 is none)"),
            ("frequency_penalty", -math.inf, math.inf, "finite (0 is none)"),
        ):
            if not (_number(value := getattr(self, name)) and low <= value <= high and math.isfinite(value)):
                raise ValueError(f"{name}={value!r} must be {meaning}")
        if not (_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p={self.top_p!r} must be above 0 and at most 1 (1 keeps every token)")
        if not (_number(self.repetition_penalty) and 0 < self.repetition_penalty < math.inf):
            raise ValueError(f"repetition_penalty={self.repetition_penalty!r} must be above 0 and finite (1 is none)")
        for name in ("top_k", "seed"):
            if not isinstance(value := getattr(self, name), Integral | None):
                raise ValueError(f"{name}={value!r} must be a whole number")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be at least 0 and below 2^32, or None")
        if self.log_probs not in (None, *KINDS):
            raise ValueError(f"log_probs={self.log_probs!r} must be one of {', '.join(KINDS)}, or None")
        if any(not isinstance(pair, Sequence) or len(pair) != 2 or not isinstance(pair[0], Integral) for pair in self.logit_bias):
            raise ValueError(f"logit_bias={self.logit_bias!r} must be pairs of a token and what is added to its logit")
        if len(self.logit_bias) > BIASES:
            raise ValueError(f"logit_bias has {len(self.logit_bias)} tokens; at most {BIASES} fit")
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise ValueError(f"logit_bias={self.logit_bias} names a token twice; add its values up")
        for token, value in self.logit_bias:
            if not _number(value) or math.isnan(value) or value == math.inf:
                raise ValueError(f"logit_bias of token {token} is {value!r}; give a finite number, or -inf to ban it")

    @property
    def penalised(self) -> bool:
        """Whether what was read or written before matters."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


def _number(value: object) -> bool:
    """Also one as an array has it."""
    return isinstance(value, Real) or getattr(value, "shape", None) == ()


def without(sampling: Sampling, token: int) -> Sampling:
    """The same wishes, and one token banned."""
    others = tuple(pair for pair in sampling.logit_bias if pair[0] != token)
    return replace(sampling, logit_bias=(*others, (token, -math.inf)))


def check(sampling: Sampling, vocab: int) -> None:
    """Raises ValueError for wishes that a vocabulary of this size cannot meet: a bias outside of it, all of it banned."""
    for token, _ in sampling.logit_bias:
        if not 0 <= token < vocab:
            raise ValueError(f"logit_bias has token {token}, outside the vocabulary of {vocab}")
    if sum(value == -math.inf for _, value in sampling.logit_bias) == vocab:
        raise ValueError(f"logit_bias bans each of the {vocab} tokens; leave one")


@flax.struct.dataclass
class Knobs:
    """Rows' wishes as arrays, so that one program serves any of them. `knobs` makes them."""

    temperature: Float[Arrays, "rows"]
    top_k: Int[Arrays, "rows"]
    top_p: Float[Arrays, "rows"]
    min_p: Float[Arrays, "rows"]
    repetition: Float[Arrays, "rows"]
    presence: Float[Arrays, "rows"]
    frequency: Float[Arrays, "rows"]
    bias_tokens: Int[Arrays, "rows biases"]
    """Past the vocabulary where there is none."""
    bias_values: Float[Arrays, "rows biases"]
    kind: Int[Arrays, "rows"]
    """Which of `KINDS` its log-probabilities are; -1: none."""
    plain: bool = flax.struct.field(pytree_node=False, default=False)
    """Whether no row wishes more than its likeliest token. Static: a GPU stops at each branch until the host has read which way it goes."""


LARGEST = float(np.finfo(np.float32).max)
NOTHING = np.iinfo(np.int32).max
"""A token outside of any vocabulary."""


def knobs(wishes: Sequence[Sampling | None], vocab: int) -> Knobs:
    """Arrays of one row for each wish; None: a row that is not used. Raises ValueError as `check` does."""
    for wish in wishes:
        if wish is not None:
            check(wish, vocab)
    # What cuts a distribution off changes nothing about its likeliest token.
    off = Sampling(temperature=0.0)
    rows = [off if w is None else replace(w, top_k=0, top_p=1.0, min_p=0.0) if w.temperature == 0 else w for w in wishes]
    tokens, values = np.full((len(rows), BIASES), NOTHING, np.int32), np.zeros((len(rows), BIASES), np.float32)
    for row, wish in enumerate(rows):
        for place, (token, value) in enumerate(wish.logit_bias):
            tokens[row, place], values[row, place] = token, value if value == -math.inf else np.clip(value, -LARGEST, LARGEST)
    tiny = float(np.finfo(np.float32).tiny)

    def floats(name: str, least: float = -LARGEST, most: float = LARGEST) -> np.ndarray:
        """Within what fp32 has, and divides by: an infinite temperature, or a penalty of 0, would make numbers that are none."""
        return np.array([min(max(value, least), most) if (value := getattr(wish, name)) else 0.0 for wish in rows], np.float32)

    return Knobs(
        temperature=floats("temperature", tiny, 1 / tiny),
        top_k=np.array([min(wish.top_k, vocab) for wish in rows], np.int32),
        top_p=floats("top_p", tiny),
        min_p=floats("min_p"),
        repetition=floats("repetition_penalty", tiny, 1 / tiny),
        presence=floats("presence_penalty"),
        frequency=floats("frequency_penalty"),
        bias_tokens=tokens,
        bias_values=values,
        kind=np.array([KINDS.index(wish.log_probs) if wish.log_probs else -1 for wish in rows], np.int32),
        plain=all(w.temperature == 0 and not (w.penalised or w.logit_bias or w.log_probs) for w in rows),
    )


@flax.struct.dataclass
class History:
    """What rows have read and written, which penalties ask for."""

    seen: Bool[Array, "rows vocab"]
    """Tokens of the prompt or the output."""
    counts: Int[Array, "rows vocab"]
    """How often each is in the output."""


def blank(rows: int, vocab: int) -> History:
    """Nothing read, nothing written."""
    return History(jnp.zeros((rows, vocab), bool), jnp.zeros((rows, vocab), jnp.int32))


def begun(history: History, row: Int[Array, ""] | int, tokens: Int[Arrays, "length"], written: Bool[Arrays, "length"]) -> History:
    """A row's history made anew: of its prompt, and of what it had written already (where it was stopped and goes on).

    Args:
      tokens: in any order; what is outside the vocabulary (padding, an image's places) is left out.
      written: which of them are output.
    """
    vocab = history.seen.shape[-1]
    tokens = jnp.where(tokens < 0, vocab, tokens)  # a negative index would count from the end
    seen = jnp.zeros(vocab, bool).at[tokens].set(True, mode="drop")
    counts = jnp.zeros(vocab, jnp.int32).at[tokens].add(written.astype(jnp.int32), mode="drop")
    return History(history.seen.at[row].set(seen), history.counts.at[row].set(counts))


def extended(
    history: History, tokens: Int[Arrays, "rows"], going: Bool[Arrays, "rows"], slots: Int[Arrays, "rows"] | None = None
) -> History:
    """With one token more in the output of the rows that are `going`; `slots` as of `draw`."""
    rows = jnp.arange(tokens.shape[0]) if slots is None else slots
    tokens = jnp.where(going, tokens, history.seen.shape[-1])
    seen = history.seen.at[rows, tokens].set(True, mode="drop")
    return History(seen, history.counts.at[rows, tokens].add(1, mode="drop"))


def row_keys(seeds: Int[Arrays, "rows"], drawn: Int[Arrays, "rows"]) -> Array:
    """Keys of rows' next draws, a function of a request's seed (unsigned, 32 bits) and how many tokens it has drawn, of nothing else."""
    return jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(seeds, drawn)


class Drawn(NamedTuple):
    """One token a row.

    Attributes:
      tokens: `[rows]`.
      log_probs: theirs, of the kind that a row wishes; 0 in rows that wish none.
      top_tokens: `[rows, top]`, the likeliest of that distribution, likeliest first.
      top_log_probs: theirs; -inf for what cannot be drawn.
    """

    tokens: Int[Array, "rows"]
    log_probs: Float[Array, "rows"]
    top_tokens: Int[Array, "rows top"]
    top_log_probs: Float[Array, "rows top"]


def draw(
    logits: Float[Array, "rows vocab"],
    knobs: Knobs,
    keys: Array,
    history: History | None = None,
    *,
    slots: Int[Array, "rows"] | None = None,
    allowed: Bool[Array, "#rows vocab"] | None = None,
    top: int = 0,
) -> Drawn:
    """One token a row, each from its own logits, wishes and key alone. What no row wishes costs nothing.

    Args:
      keys: a random key a row (`row_keys`); rows of temperature 0 do not use theirs.
      history: what rows have read and written, for penalties; None: nothing yet.
      slots: which row of the history is each row's; None: its own.
      allowed: which tokens may be drawn at all; None: any. `raw` does not heed it.
      top: how many alternatives come with rows that wish log-probabilities (static).
    """
    logits, rows = logits.astype(jnp.float32), logits.shape[0]

    def untold(tokens: Array) -> Drawn:
        return Drawn(tokens, jnp.zeros(rows, jnp.float32), jnp.zeros((rows, top), jnp.int32), jnp.zeros((rows, top), jnp.float32))

    if knobs.plain:
        return untold(likeliest(logits if allowed is None else jnp.where(allowed, logits, -jnp.inf)))
    random, wished = knobs.temperature > 0, knobs.kind >= 0
    scores = _adjusted(logits, knobs, history, allowed, slots)
    best = likeliest(scores)
    tempered = jax.lax.cond((random | (knobs.kind > 0)).any(), lambda: _tempered(scores, best, knobs), lambda: scores)
    truncated = _truncated(tempered, knobs)
    tokens = jax.lax.cond(random.any(), lambda: jnp.where(random, _picked(truncated, keys), best), lambda: best)

    def told() -> Drawn:
        kind = knobs.kind[:, None]
        log_probs = jax.nn.log_softmax(jnp.where(kind == 2, truncated, jnp.where(kind == 1, tempered, logits)), -1)
        log_probs = jnp.where(wished[:, None], log_probs, 0.0)
        values, ids = jax.lax.top_k(log_probs, top)
        return Drawn(tokens, taken(log_probs, tokens), ids.astype(jnp.int32), values)

    return jax.lax.cond(wished.any(), told, lambda: untold(tokens))


def log_probs(
    logits: Float[Array, "rows vocab"],
    knobs: Knobs,
    history: History | None = None,
    *,
    kind: Kind,
    allowed: Bool[Array, "#rows vocab"] | None = None,
) -> Float[Array, "rows vocab"]:
    """Log-probabilities of every token, in fp32; of what kind the beginning of this file says. The arguments are those of `draw`."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    rows = logits.astype(jnp.float32)
    if kind != "raw":
        scores = _adjusted(rows, knobs, history, allowed)
        rows = _tempered(scores, likeliest(scores), knobs)
    if kind == "truncated":
        rows = _truncated(rows, knobs)
    return jax.nn.log_softmax(rows, -1)


def likeliest(scores: Float[Array, "rows vocab"]) -> Int[Array, "rows"]:
    """The first of each row's largest. (XLA's argmax takes four times as long on a CPU, where it keeps pairs.)"""
    vocab = scores.shape[-1]
    first = jnp.where(scores == scores.max(-1, keepdims=True), jnp.arange(vocab, dtype=jnp.int32), vocab).min(-1)
    return jnp.minimum(first, vocab - 1)  # where a row is not a number, nothing equals its largest


def taken(rows: Float[Array, "rows vocab"], tokens: Int[Array, "rows"]) -> Float[Array, "rows"]:
    """Each row's value of its token."""
    return jnp.take_along_axis(rows, tokens[:, None], -1)[:, 0]


def _adjusted(logits: Array, knobs: Knobs, history: History | None, allowed: Array | None, slots: Array | None = None) -> Array:
    """Logits after bias and penalties."""
    scores = logits if allowed is None else jnp.where(allowed, logits, -jnp.inf)
    places = jnp.arange(logits.shape[0])[:, None], knobs.bias_tokens
    biased = (knobs.bias_tokens < logits.shape[-1]).any()
    scores = jax.lax.cond(biased, lambda: scores.at[places].add(knobs.bias_values, mode="drop"), lambda: scores)
    if history is None:
        return scores

    def penalised() -> Array:
        own = history if slots is None else jax.tree.map(lambda a: a[slots], history)
        factor = jnp.where(own.seen, knobs.repetition[:, None], 1.0)
        once = jnp.where(scores > 0, scores / factor, scores * factor)
        once = once - knobs.frequency[:, None] * own.counts - knobs.presence[:, None] * (own.counts > 0)
        return jnp.where(scores == -jnp.inf, scores, jnp.clip(once, -LARGEST, LARGEST))  # what is banned, and nothing else, is infinite

    wished = (knobs.repetition != 1) | (knobs.presence != 0) | (knobs.frequency != 0)
    return jax.lax.cond(wished.any(), penalised, lambda: scores)


def _tempered(scores: Array, best: Array, knobs: Knobs) -> Array:
    """Over the temperature, the largest at 0: so that no temperature is too small. At 0 all is one token's."""
    random = knobs.temperature[:, None] > 0
    below = scores - scores.max(-1, keepdims=True)
    single = jnp.where(jnp.arange(scores.shape[-1]) == best[:, None], 0.0, -jnp.inf)
    return jnp.where(random, below / jnp.where(random, knobs.temperature[:, None], 1.0), single)


def _truncated(scores: Array, knobs: Knobs) -> Array:
    """-inf where a token is not among those that top-k, top-p and min-p keep."""
    by_k, by_p = knobs.top_k > 0, knobs.top_p < 1

    def kept() -> Array:
        least = jnp.full(scores.shape[0], -jnp.inf, scores.dtype)
        least = jax.lax.cond(by_k.any(), lambda: truncation.of_top_k(scores, knobs.top_k), lambda: least)
        least = jax.lax.cond(by_p.any(), lambda: truncation.of_top_p(scores, knobs.top_p, least), lambda: least)
        least = jnp.maximum(least, truncation.of_min_p(scores, knobs.min_p))
        return jnp.where(scores >= least[:, None], scores, -jnp.inf)

    return jax.lax.cond((by_k | by_p | (knobs.min_p > 0)).any(), kept, lambda: scores)


def _picked(scores: Float[Array, "rows vocab"], keys: Array) -> Int[Array, "rows"]:
    """A token a row, as likely as its scores say: first a block of the vocabulary, then one of its tokens.

    Each is a draw by Gumbel noise, of about the square root of the vocabulary's many: noise for all of it costs ten times as much. A token at
    -inf is never drawn, however sums are rounded.
    """
    rows, vocab = scores.shape
    width = 2 ** -(-(vocab - 1).bit_length() // 2)
    blocks = jnp.pad(scores, ((0, 0), (0, -vocab % width)), constant_values=-jnp.inf).reshape(rows, -1, width)
    keys = jax.vmap(jax.random.split)(keys)
    # 23 random bits, the default, would be too few for a token that is drawn once in millions.
    drawn = jax.vmap(lambda key, logits: jax.random.categorical(key, logits, mode="high"))
    block = drawn(keys[:, 0], jax.nn.logsumexp(blocks, -1))
    within = drawn(keys[:, 1], jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0])
    return (block * width + within).astype(jnp.int32)
