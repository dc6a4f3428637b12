"""Tokens from hidden states, all on the devices: what a step draws goes into the next one, and into what penalties remember, before the host
has read it."""

from collections.abc import Sequence as Several
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from lmx.core.tree import Tree
from lmx.infer import sampling as draws
from lmx.infer.places import Place
from lmx.infer.sampling import Drawn, History, Knobs, Sampling
from lmx.infer.sizes import Sizes
from lmx.infer.steps import Request, Sequence
from lmx.models.config import Model
from lmx.models.losses import logits
from lmx.parallel.rules import constrain


class Row(NamedTuple):
    """One token to be drawn: from which hidden state, whose it is, how, and by which seed."""

    hidden: int
    sequence: Sequence
    sampling: Sampling
    seed: int


class Drawing:
    """What is drawn, by the slots of those who draw.

    Args:
      place: where hidden states are.
      limit: tokens from here on are never drawn.
      top: how many alternatives come with each token.
    """

    def __init__(self, model: Model, place: Place, sizes: Sizes, *, limit: int, top: int):
        self._latest = place.put(jnp.zeros(sizes.rows + 1, jnp.int32))
        self._place, self._sizes, self._limit = place, sizes, limit
        self._static = model, limit, top, place.execution.rules
        self._history = place.put(draws.blank(sizes.rows + 1, model.vocab))
        self._in_history: dict[int, Sequence] = {}
        self._knobs: tuple[list[Sampling | None], Knobs | None] = [], None

    @property
    def latest(self) -> Int[Array, "slots"]:
        """What each slot drew last."""
        return self._latest

    def draw(self, params: Tree, hidden: Float[Array, "rows embed"], rows: Several[Row]) -> Drawn:
        """One token for each row, on its way to the host. (A sequence that is to become several has as many rows.)"""
        size = self._sizes.least(len(rows), 0)[0]
        which, drawn, slots, seeds = *(np.zeros(size, np.int32) for _ in range(3)), np.zeros(size, np.uint32)
        wishes: list[Sampling | None] = [None] * size
        remembered, forking = np.zeros(size, bool), []
        for place, (index, sequence, sampling, seed) in enumerate(rows):
            wishes[place], which[place], slots[place], seeds[place] = sampling, index, sequence.slot, seed
            drawn[place] = len(sequence.tokens) - len(sequence.request.prompt)
            if sampling.penalised:
                self._remember(sequence)
                remembered[place] = sequence.rows == 1
                if sequence.rows > 1:  # it and those that it becomes begin with what each has drawn
                    forking.append(sequence)
        if len(self._knobs[0]) != size or any(a is not b for a, b in zip(self._knobs[0], wishes, strict=True)):
            self._knobs = wishes, draws.knobs(wishes, self._limit)
        found = self._picked(params, hidden, which, self._knobs[1], seeds, drawn, slots)
        if remembered.any():
            self._extend(found.tokens, remembered, slots)
        for sequence in forking:
            self._in_history.pop(sequence.slot, None)
        for array in found:
            array.copy_to_host_async()
        return found

    def forget(self, requests: Several[Request]) -> None:
        """What their sequences draw from now on does not go on where they were."""
        self._in_history = {slot: s for slot, s in self._in_history.items() if s.request not in requests}

    def warm_up(self, params: Tree, hidden: Float[Array, "rows embed"], longest: int) -> None:
        """Compiles every program, for texts of at most so many tokens."""
        for rows in self._sizes.decodes:
            nothing = np.zeros(rows, np.int32)
            for wish in (None, Sampling()):
                wishes = draws.knobs([wish] * rows, self._limit)
                found = self._picked(params, hidden, nothing, wishes, nothing.astype(np.uint32), nothing, nothing)
            self._extend(found.tokens, nothing > 0, nothing)
        for length in {_length(tokens) for tokens in range(1, longest + 1)}:
            self._begin(0, np.full(length, -1, np.int32), np.zeros(length, bool))

    def _picked(self, params: Tree, hidden: Array, which, knobs: Knobs, seeds, drawn, slots) -> Drawn:
        with self._place.entered():
            found, latest = _pick(self._static, params, hidden, which, knobs, seeds, drawn, self._history, slots, self._latest)
        self._latest = self._place.put(latest)
        return found

    def _extend(self, tokens: Array, going, slots) -> None:
        with self._place.entered():
            self._history = _extended(self._history, tokens, going, slots)

    def _remember(self, sequence: Sequence) -> None:
        """The history of a sequence that is new to its slot: all of its tokens are known then."""
        if self._in_history.get(sequence.slot) is sequence:
            return
        # What another slot has of it, from before it was put out, lacks what it draws from now on.
        self._in_history = {slot: s for slot, s in self._in_history.items() if s is not sequence} | {sequence.slot: sequence}
        length = _length(len(sequence.tokens))
        tokens, written = np.full(length, -1, np.int32), np.zeros(length, bool)
        tokens[: len(sequence.tokens)], written[len(sequence.request.prompt) : len(sequence.tokens)] = sequence.tokens, True
        self._begin(sequence.slot, tokens, written)

    def _begin(self, slot: int, tokens: np.ndarray, written: np.ndarray) -> None:
        with self._place.entered():
            self._history = _begun(self._history, np.int32(slot), tokens, written)


def _length(tokens: int) -> int:
    """So many places a program has for a text that is to be remembered."""
    return max(16, 1 << (tokens - 1).bit_length())


@partial(jax.jit, static_argnums=0)
def _pick(
    static, params: Tree, hidden: Array, which, knobs: Knobs, seeds, drawn, history: History, slots, latest: Array
) -> tuple[Drawn, Array]:
    model, limit, top, rules = static
    # Each device has logits of its part of the vocabulary; drawing wants a row as a whole.
    rows = constrain(logits(params, model, hidden[which][:, None]), (None, None, None), rules)[:, 0]
    # What only pads the vocabulary is never drawn, and has its part in what `raw` means, as where the model is trained and scored.
    allowed = None if limit == model.vocab else jnp.arange(model.vocab)[None] < limit
    found = draws.draw(rows, knobs, draws.row_keys(seeds, drawn), history, slots=slots, allowed=allowed, top=top)
    # Where logits are no numbers, any token is as good, but for one that the tokenizer does not know.
    found = found._replace(tokens=jnp.minimum(found.tokens, limit - 1))
    return found, latest.at[slots].set(found.tokens)


@partial(jax.jit, donate_argnums=0)
def _begun(history: History, slot: Array, tokens: Array, written: Array) -> History:
    return draws.begun(history, slot, tokens, written)


@partial(jax.jit, donate_argnums=0)
def _extended(history: History, tokens: Array, going: Array, slots: Array) -> History:
    return draws.extended(history, tokens, going, slots)
