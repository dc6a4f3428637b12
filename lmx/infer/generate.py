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
from lmx.infer.sampling import Sampling, draw, knobs
from lmx.models import stack, virtual
from lmx.models.config import EncoderDecoder, Model
from lmx.models.families import functions
from lmx.models.losses import logits
from lmx.models.sites import Edits
from lmx.models.transformer import Source
from lmx.models.vision_config import LLaVA


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
    pixel_values: Array | np.ndarray | None = None,
    tokenizer: Tokenizer | None = None,
    edits: Edits | None = None,
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
      edits: what is changed inside (`lmx.models.sites`), in every forward: of the prompts, and of each token.
      pixel_values: images `[images, channels, height, width]`, for a model that reads them: in the order in which the prompts, one after
        another, have places for them, each as many image tokens as an image takes (`LLaVA.image_tokens`).
      seed: row i's draws depend on (seed, i) alone, not on the rest of the batch.

    Returns:
      each prompt's new ids, or its new text when the prompts are strings.

    Raises:
      ValueError: an empty prompt, a token outside the vocabulary, more tokens than the model has positions for; an encoder-decoder without
        start_id, or another model with one; images for a model that reads none, or prompts that have not just as
        many places for them.
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
    virtual_tokens, prefix = virtual.prompt(params), virtual.prefix(params)
    _check(model, ids, max_new_tokens, virtual_tokens, prefix)
    _check_images(model, ids, pixel_values)
    if not ids:
        return []
    ids = [[0] * virtual_tokens + prompt for prompt in ids]  # these stand right before a prompt
    static = (model, limit, tuple(stop_ids), tuple(suppress_ids), start_id, execution)
    params, key, wishes = decoding_params(params), jax.random.key(seed), knobs([sampling] * len(ids), limit)

    def run(texts: list[list[int]], first: int, count: int) -> list[list[int]]:
        """Each row's tokens first … first + count - 1, behind its text so far."""
        length = -(-max(map(len, texts)) // 16) * 16
        tokens, segments = np.zeros((len(texts), length), np.int32), np.zeros((len(texts), length), np.int32)
        for row, text in enumerate(texts):
            tokens[row, length - len(text) :], segments[row, length - len(text) :] = text, 1
        with jax.default_matmul_precision(execution.precision.products):
            keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(texts)))
            new, counts = jax.device_get(_run(*static, count, params, tokens, segments, wishes, keys, np.int32(first), edits, pixel_values))
        return [row[:count].tolist() for row, count in zip(new, counts, strict=True)]

    before = _before_turning(model, prefix + max(map(len, ids)), max_new_tokens)
    found = run(ids, 0, before)
    if before < max_new_tokens and any(len(new) == before for new in found):
        rest = run([prompt + new for prompt, new in zip(ids, found, strict=True)], before, max_new_tokens - before)
        found = [new + more if len(new) == before else new for new, more in zip(found, rest, strict=True)]
    return [tokenizer.decode(row) for row in found] if texts else found


def decoding_params(params: Tree) -> Tree:
    """Parameters in the form that decoding runs on: each group of layers as a tuple. Does nothing to those that are."""
    if any(isinstance(group, dict) for group in params["layers"]):
        return jax.jit(lambda p: p | {"layers": stack.unstack(p["layers"])})(params)
    return params


def _before_turning(model: Model, longest: int, max_new_tokens: int) -> int:
    """How many tokens are drawn before the batch's longest text outgrows the context of training and LongRoPE turns otherwise: what a
    cache holds is of no use then, so it is made anew."""
    scaling = getattr(model, "rope_scaling", None)
    if scaling is None or scaling.kind != "longrope":
        return max_new_tokens
    within = scaling.original_context + 1 - longest
    return min(within, max_new_tokens) if within > 0 else max_new_tokens


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
        if strange := [token for token in prompt if not 0 <= token < model.vocab and token != getattr(model, "image_token", None)]:
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


def _check_images(model: Model, ids: list[list[int]], pixels: Array | np.ndarray | None) -> None:
    if not isinstance(model, LLaVA):
        if pixels is not None:
            raise ValueError(f"pixel_values for a {type(model).__name__}, which reads no images; leave them out")
        return
    places, images = sum(prompt.count(model.image_token) for prompt in ids), 0 if pixels is None else len(pixels)
    if places != images * model.image_tokens:
        raise ValueError(
            f"the prompts have {places} image tokens ({model.image_token}), and pixel_values has {images} images, each of {model.image_tokens}"
        )


@partial(jax.jit, static_argnums=tuple(range(7)))
def _run(
    model,
    limit,
    stop_ids,
    suppress_ids,
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
    pixels,
) -> tuple[Array, Array]:
    rows, length = tokens.shape
    padding = length - segments.sum(-1, keepdims=True)
    positions = jnp.maximum(jnp.arange(length) - padding, 0)
    places = jnp.where(segments == 1, jnp.arange(length) - padding, -1)
    given = virtual.embedded(params, places)
    read = {} if given is None else {"given": given}
    read |= {} if pixels is None else {"pixels": pixels}
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
        scores = scores.at[:, list(suppress_ids)].set(-jnp.inf) if suppress_ids else scores
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
