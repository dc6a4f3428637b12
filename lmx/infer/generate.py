"""Text from a model: prompts in, continuations out, in one compiled loop over a dense cache (or the state of a recurrent model)."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmx.core.execution import Execution
from lmx.core.tree import Tree
from lmx.data.tokenizers import Tokenizer
from lmx.infer.sampling import Sampling, sample
from lmx.models import stack, virtual
from lmx.models.config import EncoderDecoder, Model
from lmx.models.families import functions
from lmx.models.losses import logits
from lmx.models.transformer import Source


def generate(
    model: Model,
    params: Tree,
    prompts: Sequence[Sequence[int]] | Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    start_id: int | None = None,
    suppress_ids: Sequence[int] = (),
    tokenizer: Tokenizer | None = None,
    execution: Execution = Execution(),
) -> list[list[int]] | list[str]:
    """Continues each prompt by at most `max_new_tokens`; the encoder of an encoder-decoder reads it, and a text is begun.

    Args:
      params: stacked, or with layers as tuples (what it runs on: a caller who generates often converts once, `decoding_params`); under an
        adapter or not. Virtual tokens stand right before each prompt, so that a row does not depend on the others' lengths.
      prompts: lists of token ids, or strings with a tokenizer.
      tokenizer: with one, rows that only pad the model's vocabulary are never drawn.
      stop_ids: tokens that end a continuation; they are not part of it.
      start_id: the token behind which an encoder-decoder's texts begin.
      suppress_ids: tokens that are never drawn.
      seed: row i's draws depend on (seed, i) alone, not on the rest of the batch.

    Returns:
      each prompt's new ids, or its new text when the prompts are strings.

    Raises:
      ValueError: an empty prompt, a token outside the vocabulary, more tokens than the model has positions for; an encoder-decoder without
        start_id, or another model with one.
    """
    model = getattr(model, "config", model)  # of a checkpoint (`lmx.interop.Model`)
    sampling = Sampling(temperature, top_k, top_p)
    if isinstance(prompts, str):
        raise ValueError("prompts is one string; give a list of them")
    limit = model.vocab if tokenizer is None else min(tokenizer.vocab, model.vocab)
    texts = bool(prompts) and isinstance(prompts[0], str)
    if texts and tokenizer is None:
        raise ValueError("prompts are strings, so generate needs a tokenizer")
    ids = [list(tokenizer.encode(p)) if texts else list(p) for p in prompts]
    if isinstance(model, EncoderDecoder) != (start_id is not None):
        raise ValueError(
            f"start_id={start_id} of model={type(model).__name__}: an encoder-decoder begins its texts behind one, others have none"
        )
    before = virtual.prompt(params)
    _check(model, ids, max_new_tokens, before, virtual.prefix(params))
    if not ids:
        return []
    ids = [[0] * before + prompt for prompt in ids]  # virtual tokens stand right before a prompt
    length = -(-max(map(len, ids)) // 16) * 16
    tokens, segments = np.zeros((len(ids), length), np.int32), np.zeros((len(ids), length), np.int32)
    for row, prompt in enumerate(ids):
        tokens[row, length - len(prompt) :], segments[row, length - len(prompt) :] = prompt, 1
    static = (model, limit, max_new_tokens, sampling, tuple(stop_ids), tuple(suppress_ids), start_id, execution)
    with jax.default_matmul_precision(execution.precision.products):
        new, counts = jax.device_get(_run(*static, decoding_params(params), tokens, segments, jax.random.key(seed)))
    found = [row[:count].tolist() for row, count in zip(new, counts, strict=True)]
    return [tokenizer.decode(row) for row in found] if texts else found


def decoding_params(params: Tree) -> Tree:
    """Parameters in the form that decoding runs on: each group of layers as a tuple. Does nothing to those that are."""
    if any(isinstance(group, dict) for group in params["layers"]):
        return jax.jit(lambda p: p | {"layers": stack.unstack(p["layers"])})(params)
    return params


def _check(model: Model, ids: list[list[int]], max_new_tokens: int, prompt_tokens: int = 0, prefix: int = 0) -> None:
    if not model.causal or not model.vocabulary_head:
        raise ValueError(
            f"a model with causal={model.causal} and head={model.head} continues nothing; generate needs a causal one with logits"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    scaling = getattr(model, "rope_scaling", None)
    longest = model.context if scaling is None or scaling.kind != "dynamic" else int(model.context * scaling.factor)
    for i, prompt in enumerate(ids):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; begin it with at least one token")
        if strange := [token for token in prompt if not 0 <= token < model.vocab]:
            raise ValueError(f"prompt {i} has token {strange[0]}, outside the model's vocabulary of {model.vocab}")
        if isinstance(model, EncoderDecoder):
            for name, tokens, limit in (
                (f"prompt {i}", prompt_tokens + len(prompt), model.encoder.context),
                ("max_new_tokens", prefix + max_new_tokens, model.context),
            ):
                if tokens > limit:
                    raise ValueError(
                        f"{name} has {tokens} tokens, and model.{'encoder.' if name != 'max_new_tokens' else ''}context={limit}"
                    )
        elif prompt_tokens + prefix + len(prompt) + max_new_tokens > longest:
            soft = f", {prompt_tokens + prefix} virtual tokens" if prompt_tokens + prefix else ""
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens{soft} and max_new_tokens={max_new_tokens}: longer than model.context={model.context}"
            )


@partial(jax.jit, static_argnums=tuple(range(8)))
def _run(
    model, limit, max_new_tokens, sampling, stop_ids, suppress_ids, start_id, execution, params, tokens, segments, key
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
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))
    prefix = virtual.prefix(params)
    slots = -(-(prefix + length + max_new_tokens) // 16) * 16
    forward, dtype = functions(model).forward, jnp.dtype(execution.precision.compute)
    cache = virtual.cache(params, model, rows, slots, dtype) if prefix else functions(model).empty_cache(model, rows, slots, dtype)
    positions = positions + prefix

    def pick(hidden: Array, count: Array) -> Array:
        draws = jax.vmap(lambda k: jax.random.fold_in(k, count))(keys)
        scores = logits(params, model, hidden[:, -1:])[:, 0, :limit]
        return sample(scores.at[:, list(suppress_ids)].set(-jnp.inf) if suppress_ids else scores, sampling, draws)

    def stopped(token: Array) -> Array:
        return jnp.isin(token, jnp.array(stop_ids, jnp.int32)) if stop_ids else jnp.zeros(rows, bool)

    output = forward(params, model, tokens, positions=positions, segments=segments, cache=cache, **read, execution=execution)
    first = pick(output.hidden, 0)
    new = jnp.zeros((rows, max_new_tokens), jnp.int32).at[:, 0].set(first)

    def going(carry) -> Array:
        _, _, done, _, count = carry
        return (count < max_new_tokens) & ~done.all()

    def step(carry):
        cache, new, done, lengths, count = carry
        token = jax.lax.dynamic_slice_in_dim(new, count - 1, 1, axis=1)
        position = prefix + length - padding + count - 1
        output = forward(params, model, token, positions=position, cache=cache, execution=execution)
        token = pick(output.hidden, count)
        new = jax.lax.dynamic_update_slice_in_dim(new, token[:, None], count, axis=1)
        now = done | stopped(token)
        return output.cache, new, now, jnp.where(now, lengths, count + 1), count + 1

    done = stopped(first)
    carry = (output.cache, new, done, jnp.where(done, 0, 1), jnp.int32(1))
    _, new, _, lengths, _ = jax.lax.while_loop(going, step, carry)
    return new, lengths
