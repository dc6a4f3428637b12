"""Texts continued in one compiled loop over a dense cache, or the state of a recurrent model, by the parameters as they are.

The engine wants weights in a form and a place of its own. Here nothing is copied: parameters may be spread over a training mesh, over that of
several processes too, so a run looks at what it writes while it trains; and whatever a forward takes, edits of activations say, it takes.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmx.core.execution import Execution
from lmx.core.tree import Tree
from lmx.infer.jobs import GREEDY
from lmx.infer.sampling import Sampling, draw, knobs
from lmx.infer.texts import lead_of, openings
from lmx.infer.weights import decoding_params
from lmx.models import virtual
from lmx.models.config import Model
from lmx.models.families import functions
from lmx.models.losses import logits
from lmx.models.sites import Edits
from lmx.models.transformer import Source


def continued(
    model: Model,
    params: Tree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    start_id: int | None = None,
    limit: int | None = None,
    edits: Edits | None = None,
    execution: Execution = Execution(),
) -> list[list[int]]:
    """As `lmx.infer.generate`, of token ids; draws are others.

    Args:
      params: wherever they are, on devices of several processes too; stacked, or with layers as tuples (`decoding_params`).
      sampling: of each token; penalties have no meaning here.
      seed: row i's draws depend on (seed, i) alone, not on the rest of the batch.
      limit: tokens from here on are never drawn.
      edits: what is changed inside (`lmx.models.sites`), in every forward: of the prompts, and of each token.

    Raises:
      ValueError: as `lmx.infer.generate`; penalties.
    """
    model = getattr(model, "config", model)  # of a checkpoint (`lmx.interop.Model`)
    if sampling.penalised:
        raise ValueError("repetition, presence and frequency penalties are the engine's alone; leave them out, or use lmx.infer.generate")
    lead, limit = lead_of(model, params), model.vocab if limit is None else limit
    openings(model, lead, prompts, max_new_tokens, start_id=start_id)
    if not prompts:
        return []
    ids = [[0] * lead.prompt + list(prompt) for prompt in prompts]  # virtual tokens stand right before a prompt
    static = (model, limit, tuple(stop_ids), start_id, execution)
    params, key, wishes = decoding_params(params), jax.random.key(seed), knobs([sampling] * len(ids), limit)

    def run(texts: list[list[int]], first: int, count: int) -> list[list[int]]:
        """Each row's tokens first … first + count - 1, behind its text so far."""
        length = -(-max(map(len, texts)) // 16) * 16
        tokens, segments = np.zeros((len(texts), length), np.int32), np.zeros((len(texts), length), np.int32)
        for row, text in enumerate(texts):
            tokens[row, length - len(text) :], segments[row, length - len(text) :] = text, 1
        with jax.default_matmul_precision(execution.precision.products):
            keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(texts)))
            new, counts = jax.device_get(_run(*static, count, params, tokens, segments, wishes, keys, np.int32(first), edits))
        return [row[:count].tolist() for row, count in zip(new, counts, strict=True)]

    before = _before_turning(model, lead.prefix + max(map(len, ids)), max_new_tokens)
    found = run(ids, 0, before)
    if before < max_new_tokens and any(len(new) == before for new in found):
        rest = run([prompt + new for prompt, new in zip(ids, found, strict=True)], before, max_new_tokens - before)
        found = [new + more if len(new) == before else new for new, more in zip(found, rest, strict=True)]
    return found


def _before_turning(model: Model, longest: int, max_new_tokens: int) -> int:
    """How many tokens are drawn before the batch's longest text outgrows the context of training and LongRoPE turns otherwise: what a
    cache holds is of no use then, so it is made anew."""
    scaling = getattr(model, "rope_scaling", None)
    if scaling is None or scaling.kind != "longrope":
        return max_new_tokens
    within = scaling.original_context + 1 - longest
    return min(within, max_new_tokens) if within > 0 else max_new_tokens


@partial(jax.jit, static_argnums=tuple(range(6)))
def _run(
    model,
    limit,
    stop_ids,
    start_id,
    execution,
    max_new_tokens,
    params,
    tokens,
    segments,
    wishes,
    keys,
    drawn,
    edits,
) -> tuple[Array, Array]:
    rows, length = tokens.shape
    padding = length - segments.sum(-1, keepdims=True)
    positions = jnp.maximum(jnp.arange(length) - padding, 0)
    places = jnp.where(segments == 1, jnp.arange(length) - padding, -1)
    given = virtual.embedded(params, places)
    read = {} if given is None else {"given": given}
    if start_id is not None:
        read = {"source": Source(tokens, positions, segments, given)}
        tokens, length, padding = jnp.full((rows, 1), start_id, jnp.int32), 1, jnp.zeros((rows, 1), jnp.int32)
        positions, segments = padding, padding + 1
    prefix = virtual.prefix(params)
    slots = -(-(prefix + length + max_new_tokens) // 16) * 16
    forward, dtype = functions(model).forward, jnp.dtype(execution.precision.compute)
    cache = virtual.cache(params, model, rows, slots, dtype) if prefix else functions(model).empty_cache(model, rows, slots, dtype)
    positions = positions + prefix

    def pick(hidden: Array, count: Array) -> Array:
        draws = jax.vmap(lambda k: jax.random.fold_in(k, drawn + count))(keys)
        scores = logits(params, model, hidden[:, -1:])[:, 0, :limit]
        return draw(scores, wishes, draws).tokens

    def stopped(token: Array) -> Array:
        return jnp.isin(token, jnp.array(stop_ids, jnp.int32)) if stop_ids else jnp.zeros(rows, bool)

    output = forward(params, model, tokens, positions=positions, segments=segments, cache=cache, **read, edits=edits, execution=execution)
    first = pick(output.hidden, 0)
    new = jnp.zeros((rows, max_new_tokens), jnp.int32).at[:, 0].set(first)

    def going(carry) -> Array:
        _, _, done, _, count = carry
        return (count < max_new_tokens) & ~done.all()

    def step(carry):
        cache, new, done, lengths, count = carry
        token = jax.lax.dynamic_slice_in_dim(new, count - 1, 1, axis=1)
        position = prefix + length - padding + count - 1
        output = forward(params, model, token, positions=position, cache=cache, edits=edits, execution=execution)
        token = pick(output.hidden, count)
        new = jax.lax.dynamic_update_slice_in_dim(new, token[:, None], count, axis=1)
        now = done | stopped(token)
        return output.cache, new, now, jnp.where(now, lengths, count + 1), count + 1

    done = stopped(first)
    carry = (output.cache, new, done, jnp.where(done, 0, 1), jnp.int32(1))
    _, new, _, lengths, _ = jax.lax.while_loop(going, step, carry)
    return new, lengths
