"""Short rows first: a schedule of lengths over batches that are packed once, at the full length.

A row of the full length is cut into `length / short` rows where rows are short, and nothing else changes: it is the same example, so every
target still comes once in an epoch, mixtures keep their shares and caps theirs. What a cut takes from a target is only what it could see.
Li, Zhang, He 2022 ("The Stability-Efficiency Dilemma", where it is called sequence length warmup) do the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from lmx.data.pipeline import EXAMPLES, Batch, Numbered
from lmx.data.store import TokenStore

Keep = Literal["tokens", "rows"]


@dataclass(frozen=True)
class Shorter:
    """Rows of a run's first steps."""

    until: int
    """The step before which, after the stage in front of this one, rows are so short."""
    length: int
    """Tokens that such a row predicts: a divisor of data.length."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """Where each stage of a run begins, the last one with full rows. Made by `schedule`; int64 `[stages]` all."""

    steps: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    """Rows of a batch."""
    parts: np.ndarray
    """Rows that a full one is cut into."""
    first: np.ndarray
    """Rows before the stage."""
    full: np.ndarray
    """Full rows before the stage."""

    def begin(self, step: int) -> int:
        """Rows before a step."""
        s = self._at(self.steps, step)
        return int(self.first[s] + (step - self.steps[s]) * self.rows[s])

    def examples(self, step: int) -> int:
        """Full rows that are used up before a step, or begun to be."""
        s = self._at(self.steps, step)
        return int(self.full[s] + -(-(step - self.steps[s]) * self.rows[s] // self.parts[s]))

    def step(self, row: int) -> int:
        """The step that begins with a row. Raises ValueError where none does."""
        s = self._at(self.first, row)
        steps, within = divmod(row - int(self.first[s]), int(self.rows[s]))
        if within:
            raise ValueError(
                f"data position {row}: no batch of this schedule of lengths (data.lengths) begins there; resume with the batch size that "
                "the run had"
            )
        return int(self.steps[s]) + steps

    def counted(self, full: int) -> int:
        """Rows that so many full ones give, cut as their steps say."""
        s = self._at(self.full, full)
        return int(self.first[s] + (full - self.full[s]) * self.parts[s])

    @staticmethod
    def _at(begins: np.ndarray, value: int) -> int:
        return int(np.searchsorted(begins, value, side="right")) - 1


def check_lengths(stages: Sequence[Shorter], *, length: int, keep: Keep) -> None:
    """Raise ValueError for a length that does not divide the full one, or stages out of order."""
    if keep not in get_args(Keep):
        raise ValueError(f"data.keep={keep!r} is not one of {', '.join(get_args(Keep))}")
    before = 0
    for i, stage in enumerate(stages):
        if stage.length < 1 or stage.length >= length or length % stage.length:
            raise ValueError(f"data.lengths.{i}.length={stage.length} must divide data.length={length} and be less")
        if stage.until <= before:
            raise ValueError(f"data.lengths.{i}.until={stage.until} must be a step after {before}, where this stage begins")
        before = stage.until


def schedule(stages: Sequence[Shorter], *, rows: int, length: int, keep: Keep) -> Schedule:
    """The stages of a run whose batches have, in the end, `rows` rows of `length`.

    `keep="tokens"`: a batch of short rows has more of them, so that it predicts as many tokens; `"rows"`: it has as many rows. Raises
    ValueError as `check_lengths` does, and for a stage that ends within a full row.
    """
    check_lengths(stages, length=length, keep=keep)
    steps, lengths, sizes, parts, first, full = [0], [], [], [], [0], [0]
    for i, stage in enumerate(stages):
        cut = length // stage.length
        each, count = rows * cut if keep == "tokens" else rows, stage.until - steps[-1]
        if each * count % cut:
            raise ValueError(
                f"data.lengths.{i}.until={stage.until} is within a full row, which is cut into {cut}: {count} steps of {each} rows are "
                f"{each * count}; let the stage last a multiple of {cut // math.gcd(each, cut)} steps"
            )
        steps.append(stage.until)
        lengths.append(stage.length)
        sizes.append(each)
        parts.append(cut)
        first.append(first[-1] + each * count)
        full.append(full[-1] + each * count // cut)
    columns = (steps, [*lengths, length], [*sizes, rows], [*parts, 1], first, full)
    return Schedule(*(np.array(column, np.int64) for column in columns))


class ScheduledBatches(Numbered):
    """Batches whose rows are short at first. A global example is here a row, of whatever length; a cursor must be where a batch begins.

    Raises ValueError for rows of denoising objectives, which are not cut.
    """

    def __init__(self, batches: Numbered, schedule: Schedule):
        self.batches, self.schedule = batches, schedule
        self.rows_per_batch, self.length = batches.rows_per_batch, batches.length
        self.total = min(schedule.counted(batches.total), EXAMPLES)

    def begin(self, cursor: int, j: int) -> int:
        return self.schedule.begin(self.schedule.step(cursor) + j)

    def left(self, cursor: int) -> int:
        if cursor >= self.total:
            return 0
        s = Schedule._at(self.schedule.first, self.total - 1)
        last = self.schedule.steps[s] + (self.total - 1 - self.schedule.first[s]) // self.schedule.rows[s]
        return int(last) + 1 - self.schedule.step(cursor)

    def origin(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of rows by number, int64 `[rows]`: the full row, and the column of it that each begins at."""
        ids = np.asarray(ids, np.int64)
        s = np.searchsorted(self.schedule.first, ids, side="right") - 1
        full, part = np.divmod(ids - self.schedule.first[s], self.schedule.parts[s])
        return full + self.schedule.full[s], part * self.schedule.lengths[s]

    @property
    def stores(self) -> list[TokenStore]:
        return self.batches.stores

    def place(self, example: int) -> tuple[int, int]:
        s = Schedule._at(self.schedule.first, example)
        step, row = divmod(example - int(self.schedule.first[s]), int(self.schedule.rows[s]))
        return int(self.schedule.steps[s]) + step, row

    def spans(self, example: int) -> list[tuple[TokenStore, int, int]]:
        full, column = (int(a[0]) for a in self.origin(np.array([example])))
        end = column + int(self.schedule.lengths[Schedule._at(self.schedule.first, example)])
        found, at = [], 0
        for store, start, stop in self.batches.spans(full):
            low, high = max(column - at, 0), min(end - at, stop - start - 1)  # pairs of a token and its target
            if low < high:
                found.append((store, start + low, start + high + 1))
            at += stop - start - 1
        return found

    def holding(self, store: TokenStore, start: int, stop: int, until: int) -> list[int]:
        full = self.batches.holding(store, start, stop, int(self.origin(np.array([until]))[0][0]) + 1)
        rows = [row for f in full for row in range(self.schedule.counted(f), self.schedule.counted(f + 1)) if row < until]
        return [row for row in rows if any(s is store and a < stop and b > start for s, a, b in self.spans(row))]

    def examples(self, ids: np.ndarray) -> Batch:
        """Rows by number, all of one length, as a batch. Those past the end of a finite run are padding, and so may the last of a full row
        be. Raises ValueError for rows of several lengths."""
        ids = np.asarray(ids, np.int64)
        stages = np.unique(np.searchsorted(self.schedule.first, ids, side="right") - 1)
        if len(stages) > 1:
            raise ValueError(f"rows {ids.min()} to {ids.max()} are of several lengths, {self.schedule.lengths[stages].tolist()}")
        length = int(self.schedule.lengths[stages[0]]) if len(stages) else self.length
        examples, column = self.origin(ids)
        full, which = np.unique(examples, return_inverse=True)
        batch = self.batches.examples(full)
        part = column // length
        cut = {n: a.reshape(len(full), -1, length)[which, part] for n, a in batch.items() if n != "example_id"}
        cut["example_id"] = ids.astype(np.uint32)
        # What a row begins in the middle of begins there: its positions, and its segment is the first.
        segments = cut.get("segments", cut["weights"] > 0)
        cut["positions"] -= np.where(segments == segments[:, :1], cut["positions"][:, :1], 0) * (segments > 0)
        if "segments" in cut:
            cut["segments"] = np.where(segments > 0, segments - segments[:, :1] + 1, 0)
        return cut
