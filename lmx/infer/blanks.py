"""Blanks filled while decoding (GLM: Du et al., 2022), by a model with `block_positions` that was trained on `lmx.data.denoising.BlankInfilling`.

A prompt with mask tokens ([MASK] of a span, [gMASK] of all that is to come) is read in both directions. Behind it each blank's piece is
written from left to right: first comes the start token, and the end token ends it, which nothing reads. Of a piece's tokens the first
position is that of its mask, the second counts 1, 2, ... from the start token on. A later piece sees those before it. So it was in training,
where pieces stood in random order: any order of `places` will do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lmx.models.config import Model
from lmx.models.rope import by_length

if TYPE_CHECKING:
    from lmx.infer.jobs import Door, Job

POSITIONS = ("learned", "sinusoidal", "rope", "none")
"""Kinds of positions that pages can count otherwise than from token to token."""


@dataclass(frozen=True)
class Marks:
    """The special tokens of blanks, by their ids."""

    masks: tuple[int, ...]
    """Each stands for a blank: GLM's [MASK], [sMASK] and [gMASK]."""
    start: int
    """First input of a piece (GLM's <|startofpiece|>). It is never drawn, as it is never a target of training."""
    end: int
    """What a piece ends with (GLM's <|endofpiece|>)."""

    def blanks(self, prompt: Sequence[int]) -> "Blanks":
        """Those of a prompt, from left to right. Raises ValueError where there is none."""
        places = tuple(i for i, token in enumerate(prompt) if token in self.masks)
        if not places:
            raise ValueError(f"the prompt has no blank to fill; put one of the mask tokens {self.masks} where text is to come")
        return Blanks(self.start, places)


@dataclass(frozen=True)
class Blanks:
    """Which blanks of a prompt are filled, and how far that is: what comes next fills the first that has no piece yet.

    Attributes:
      start: the first input of each piece.
      places: of mask tokens in the prompt, in the order in which they are filled.
      pieces: of the first of them, without start and end.
    """

    start: int
    places: tuple[int, ...]
    pieces: tuple[tuple[int, ...], ...] = ()

    def behind(self, tokens: tuple[int, ...], lead: int) -> tuple[tuple[int, ...], np.ndarray]:
        """Tokens with all pieces behind them, the one to come too; and `[2, pieces]`, where each begins and its blank's position. `lead`: how
        many stand before the prompt."""
        begins = []
        for piece in (*self.pieces, ()):
            begins.append(len(tokens))
            tokens = (*tokens, self.start, *piece)
        return tokens, np.array([begins, [lead + place for place in self.places[: len(begins)]]], np.int32)

    def filled(self, prompt: Sequence[int]) -> list[int]:
        """The prompt with its pieces in place of the masks."""
        there = dict(zip(self.places, self.pieces, strict=False))
        return [token for i, one in enumerate(prompt) for token in there.get(i, (one,))]


def check_blanks(model: Model, prompt: Sequence[int], blanks: Blanks) -> None:
    """Raises ValueError for a model that fills none, or other blanks than the prompt has."""
    if not getattr(model, "block_positions", False):
        raise ValueError("blanks are filled by a model with block positions, and this has none (model.block_positions)")
    if model.positions not in POSITIONS or by_length(model.rope_scaling) is not None:
        scaling = model.rope_scaling and model.rope_scaling.kind
        raise ValueError(
            f"model.positions={model.positions} (model.rope_scaling={scaling}) counts from token to token in pages, and a piece has its blank's"
            f" position; blanks are filled with {', '.join(POSITIONS)}, of wavelengths that depend on no length"
        )
    if not 0 <= blanks.start < model.vocab:
        raise ValueError(f"blanks.start={blanks.start} is outside the model's vocabulary of {model.vocab}")
    if len(set(blanks.places)) < len(blanks.places) or any(not 0 <= place < len(prompt) for place in blanks.places):
        raise ValueError(f"blanks.places={blanks.places} are not different places of the prompt's {len(prompt)} tokens")
    if len(blanks.pieces) >= len(blanks.places):
        raise ValueError(f"blanks has {len(blanks.pieces)} pieces for {len(blanks.places)} places: none is left to fill")
    for i, piece in enumerate(blanks.pieces):
        if strange := [token for token in piece if not 0 <= token < model.vocab or token == blanks.start]:
            raise ValueError(f"blanks.pieces[{i}] has token {strange[0]}, which is blanks.start or outside the vocabulary of {model.vocab}")


def at_last(prompts: Sequence[Sequence[int]], marks: Marks, most: int) -> list[Blanks]:
    """Each prompt's before its last piece, all others being as long as `most` tokens. Raises ValueError for a prompt without any."""
    piece = (int(marks.start == 0),) * most  # which tokens does not matter, but that start is none
    several = [_numbered(i, marks, prompt) for i, prompt in enumerate(prompts)]
    return [replace(one, pieces=(piece,) * (len(one.places) - 1)) for one in several]


def fill(
    engine: "Door",
    prompts: Sequence[Sequence[int]],
    marks: Marks,
    each: Sequence[dict[str, Any]],
    *,
    stop_ids: Sequence[int] = (),
    **wishes: Any,
) -> list[Blanks]:
    """Every blank of every prompt, from left to right.

    Args:
      engine: what it has read for one blank it finds again in its pages for the next.
      each: of each prompt, wishes of its own, its `sampling` among them. From a seed come others for its blanks.
      stop_ids: tokens that end a piece, besides the end token.
      wishes: those of `Engine.submit` that all share; `max_new_tokens` is of each blank.
    """
    several = [_numbered(i, marks, prompt) for i, prompt in enumerate(prompts)]

    def submit(i: int) -> "Job":
        blanks, own = several[i], dict(each[i])
        if (seed := own["sampling"].seed) is not None:
            mixed = np.random.SeedSequence((seed, len(blanks.pieces)))
            own["sampling"] = replace(own["sampling"], seed=int(mixed.generate_state(1)[0]))
        return engine.submit(prompts[i], blanks=blanks, stop_ids=(*stop_ids, marks.end), **own, **wishes)

    jobs = {i: submit(i) for i in range(len(prompts))}
    while jobs:
        engine.step()
        for i in [i for i, job in jobs.items() if job.done]:
            piece = tuple(jobs.pop(i).completions[0].tokens)
            several[i] = replace(several[i], pieces=(*several[i].pieces, piece))
            if len(several[i].pieces) < len(several[i].places):
                jobs[i] = submit(i)
    return several


def _numbered(i: int, marks: Marks, prompt: Sequence[int]) -> Blanks:
    try:
        return marks.blanks(prompt)
    except ValueError as error:
        raise ValueError(f"prompt {i}: {error}") from None
