"""Requests on their way: what is known of each, what comes of it, and what every engine does with them."""

from collections.abc import Iterator
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import Literal

from lmx.infer.sampling import Drawn, Sampling
from lmx.infer.steps import Request, Sequence, Step
from lmx.infer.stopping import Stopper

Finish = Literal["length", "stop_id", "stop_string", "cancelled"]
GREEDY = Sampling(temperature=0)


@dataclass
class Completion:
    """One text of a request, as far as it is.

    Attributes:
      tokens: new ones; a stop token is not among them.
      text: what may be shown of them, with a tokenizer: a stop string and what may begin one is left out.
      log_probs: of each token, of the kind that the request's `Sampling` wishes; empty without.
      top: for each token the likeliest at its place and their log-probabilities.
      finish: why it ended; None while it goes on.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    log_probs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    finish: Finish | None = None


@dataclass(frozen=True)
class Piece:
    """What a step added to a text: a token, the text that may now be shown, the end."""

    job: "Job"
    sample: int
    token: int | None
    text: str
    finish: Finish | None


@dataclass(eq=False)
class Job:
    """A request on its way; `completions` are its texts."""

    number: int
    request: Request
    sampling: Sampling
    seed: int
    top: int
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    completions: list[Completion]
    arrived: float
    pieces: list[Piece] = field(default_factory=list, repr=False)
    """All that were given, of all its texts, in their order."""
    stoppers: list[Stopper | None] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return all(one.finish is not None for one in self.completions)


@dataclass(frozen=True)
class Moment:
    """One step in the engine's timeline: when (from the end of the one before, if it was begun by then), which requests decoded and which read
    prompts (how many tokens), pages in use then."""

    start: float
    end: float
    decoded: tuple[int, ...]
    read: tuple[tuple[int, int], ...]
    preempted: tuple[int, ...]
    pages: int


@dataclass
class Begun:
    """A step that the devices have been told to compute.

    Attributes:
      rows: those that get a token: the place of their chunk, the sequence, which of those that it is to become.
      drawn: their tokens, on the devices; None where none is drawn.
    """

    step: Step
    started: float
    rows: list[tuple[int, Sequence, int]]
    drawn: Drawn | None = None


class Door:
    """What is the same of one engine and of several, by what each has of its own."""

    def run(self) -> None:
        """Until nothing is left to do."""
        while self.busy:
            self.step()

    def stream(self, job: Job) -> Iterator[Piece]:
        """The pieces of a request, those that there are and then as they come, while all others go on too. Streams may run side by side."""
        given = 0
        while True:
            new = job.pieces[given:]
            yield from new
            given += len(new)
            if not new and job.done:
                return
            if given == len(job.pieces) and not job.done:
                self.step()

    def generate(self, prompts: Several[Several[int] | str], **wishes) -> list[list[Completion]]:
        """Each prompt's texts; `wishes` are those of `submit`."""
        jobs: list[Job] = []
        try:
            for prompt in prompts:
                jobs.append(self.submit(prompt, **wishes))
        except ValueError:
            for job in jobs:
                self.cancel(job)
            raise
        self.run()
        return [job.completions for job in jobs]
