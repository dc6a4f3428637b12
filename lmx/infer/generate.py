"""Text from a model: prompts in, continuations out."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np
from jax import Array

from lmx.core.execution import Execution
from lmx.core.tree import Tree
from lmx.data.tokenizers import Tokenizer
from lmx.infer import dense
from lmx.infer.blanks import Marks, at_last, fill
from lmx.infer.engine import Engine
from lmx.infer.sampling import Sampling
from lmx.infer.texts import context_of, lead_of, openings
from lmx.models.config import Model
from lmx.models.sites import Edits
from lmx.models.vision_config import LLaVA

ROWS, CHUNK = 16, 512
"""Texts that run at a time, and tokens of prompts in one step: at most."""


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
    bidirectional: bool = False,
    pixel_values: Array | np.ndarray | None = None,
    blanks: Marks | None = None,
    tokenizer: Tokenizer | None = None,
    edits: Edits | None = None,
    execution: Execution = Execution(),
) -> list[list[int]] | list[str]:
    """Continues each prompt by at most `max_new_tokens`; the encoder of an encoder-decoder reads it, and a text is begun.

    An engine is made for it (`lmx.infer.Engine`), with weights in a form of its own: who generates often makes one. Parameters that several
    devices share go to one; `lmx.infer.dense` takes them where they are.

    Args:
      params: under an adapter or not. Its virtual tokens stand right before each prompt.
      prompts: lists of token ids, or strings with a tokenizer.
      tokenizer: with one, rows that only pad the model's vocabulary are never drawn.
      stop_ids: tokens that end a continuation; they are not part of it.
      start_id: the token behind which an encoder-decoder's texts begin.
      suppress_ids: tokens that are never drawn.
      bidirectional: whether the tokens of a prompt see each other in both directions.
      pixel_values: images `[images, channels, height, width]`, for a model that reads them: in the order in which the prompts, one after
        another, have places for them, each as many image tokens as an image takes (`LLaVA.image_tokens`).
      blanks: the mask tokens of prompts stand for blanks, which are filled (`lmx.infer.blanks`), `max_new_tokens` for each at most; prompts are
        then read in both directions.
      edits: what is changed inside (`lmx.models.sites`), in every forward. They are of a dense cache's rows, so there is no engine then
        (`lmx.infer.dense`), and none of what it alone can do.
      seed: row i's draws depend on (seed, i) alone, not on the rest of the batch.

    Returns:
      each prompt's new ids, or its new text when the prompts are strings; with `blanks` all of each prompt, its masks replaced.

    Raises:
      ValueError: an empty prompt, a token outside the vocabulary, more tokens than the model has positions for; an encoder-decoder without
        start_id, or another model with one; images for a model that reads none, or prompts that have not just as many places for them;
        a prompt without a blank, or blanks for a model that fills none; edits together with what they cannot be with.
    """
    model = getattr(model, "config", model)  # of a checkpoint (`lmx.interop.Model`)
    if isinstance(prompts, str):
        raise ValueError("prompts is one string; give a list of them")
    texts = bool(prompts) and isinstance(prompts[0], str)
    if texts and tokenizer is None:
        raise ValueError("prompts are strings, so generate needs a tokenizer")
    limit = model.vocab if tokenizer is None else min(tokenizer.vocab, model.vocab)
    bias = tuple((token, -np.inf) for token in suppress_ids if token < limit)
    sampling = Sampling(temperature, top_k, top_p, logit_bias=bias)
    ids = [list(tokenizer.encode(p)) if texts else list(map(int, p)) for p in prompts]
    how = {"max_new_tokens": max_new_tokens, "stop_ids": stop_ids, "start_id": start_id}
    if edits is not None:
        if bidirectional or pixel_values is not None or blanks is not None:
            raise ValueError("edits are of prompts of tokens, read from left to right; leave out bidirectional, pixel_values and blanks")
        found = dense.continued(model, params, ids, **how, sampling=sampling, seed=seed, limit=limit, edits=edits, execution=execution)
        return [tokenizer.decode(row) for row in found] if texts else found
    images = _images_of(model, ids, pixel_values)
    last = None if blanks is None else at_last(ids, blanks, max_new_tokens)
    lead = lead_of(model, params)
    begun = openings(model, lead, ids, max_new_tokens, start_id=start_id, bidirectional=bidirectional, images=images, blanks=last)
    if not ids:
        return []
    # Sizes that few programs serve.
    lengths = [len(one.tokens) for one in begun]
    longest = min(context_of(model), -(-(max(lengths) + max_new_tokens) // 16) * 16)
    chunk = max(16, min(CHUNK, 1 << (sum(lengths) - 1).bit_length()), 1 << (max(one.whole for one in begun) - 1).bit_length())
    engine = Engine(model, params, tokenizer=tokenizer, rows=min(ROWS, len(ids)), longest=longest, chunk=chunk, execution=execution)
    seeds = [int(np.random.SeedSequence((seed % 2**32, row)).generate_state(1)[0]) for row in range(len(ids))]
    each = [{"sampling": replace(sampling, seed=own), "images": seen} for own, seen in zip(seeds, images, strict=True)]
    how |= {"bidirectional": bidirectional}
    if blanks is None:
        jobs = [engine.submit(prompt, **how, **own) for prompt, own in zip(ids, each, strict=True)]
        engine.run()
        found = [job.completions[0].tokens for job in jobs]
    else:
        found = [one.filled(prompt) for one, prompt in zip(fill(engine, ids, blanks, each, **how), ids, strict=True)]
    return [tokenizer.decode(row) for row in found] if texts else found


def _images_of(model: Model, prompts: Sequence[Sequence[int]], pixels: Array | np.ndarray | None) -> list[np.ndarray | None]:
    """Those of each prompt, by its places."""
    if pixels is None or not isinstance(model, LLaVA):
        return [pixels] * len(prompts)
    places = [sum(token == model.image_token for token in prompt) for prompt in prompts]
    if sum(places) != len(pixels) * model.image_tokens:
        raise ValueError(
            f"the prompts have {sum(places)} image tokens ({model.image_token}), and pixel_values has {len(pixels)} images, each of "
            f"{model.image_tokens}"
        )
    ends = np.cumsum([count // model.image_tokens for count in places])
    return [own if len(own) else None for own in np.split(jax.device_get(pixels), ends[:-1])] if prompts else []
