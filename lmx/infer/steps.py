"""What the scheduler and the engine tell each other: requests, the sequences that they become, and the steps that compute them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, NamedTuple

PENDING = -2
"""Stands for the last of a text's tokens where that is drawn, and not known yet on the host."""


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to be continued. Two requests are never equal, whatever they say."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    n: int = 1
    """Continuations: how many sequences it may become when its first token is drawn. So many rows are kept for it until then."""
    priority: int = 0
    """Lower runs first; among equals, first come, first served."""
    fingerprint: bytes = b""
    """Stands for all that the prompt's K and V depend on besides its tokens (`lmx.infer.pages`)."""
    reuse: bool = True
    """Whether pages computed for others may be read. Who wants something of every token of the prompt, its log-probability say, wants them
    computed."""
    whole: int = 0
    """So many of the first tokens attend to each other in both directions, and are computed in one step."""
    written: int = 0
    """The K and V of so many of the first tokens are given, and written when it starts: they are not computed."""
    beside: Any = None
    """What its prompt has besides tokens; only who computes it looks at it (`lmx.infer.texts.Opening`)."""

    def __post_init__(self):
        if not self.prompt:
            raise ValueError("prompt is empty; begin it with at least one token")
        for name in ("max_new_tokens", "n"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.whole <= len(self.prompt):
            raise ValueError(f"whole={self.whole} is not between 0 and the {len(self.prompt)} tokens of the prompt")
        if not 0 <= self.written < len(self.prompt):
            raise ValueError(f"written={self.written} of the {len(self.prompt)} tokens of the prompt; the last at least is computed")


@dataclass(eq=False, slots=True)
class Sequence:
    """One text on its way. The scheduler writes here; others read."""

    request: Request
    order: tuple[int, int, int]
    """Who comes first: priority, arrival, sample."""
    tokens: list[int]
    """The prompt and what has been drawn since; last a `PENDING` one, between two steps of which the second is planned ahead."""
    fingerprint: bytes
    computed: int = 0
    """So many of the first tokens are in its pages, or its state has read them."""
    pages: list[int] = field(default_factory=list)
    """Where tokens 0 … size - 1 are, size … 2 size - 1, and so on; 0 where a page behind the window is given up."""
    slot: int = 0
    """Its own among the running: of its recurrent state or encoder output, 1 … rows. 0: it does not run."""
    status: Literal["waiting", "running", "finished", "cancelled"] = "waiting"
    forked: bool = False
    """Whether the request's first token has been drawn: what it may become, it is."""
    host_pages: list[int] = field(default_factory=list)
    """While it is swapped out: where its pages are in host memory."""
    host_slot: int = 0
    keys: list[bytes] = field(default_factory=list)
    """Of its first full pages, as far as they were needed."""
    registered: int = 0
    """So many of its first pages have been registered."""
    samples: Iterator[int] = field(default_factory=lambda: count(1))
    """Numbers for forks, one series a request."""

    @property
    def sample(self) -> int:
        """Its number among the request's sequences."""
        return self.order[2]

    @property
    def remaining(self) -> int:
        """Tokens not computed. One: the next step draws its next token. None, while a step is planned ahead: how it goes on is not known."""
        return len(self.tokens) - self.computed

    @property
    def pending(self) -> bool:
        """Whether its last token is not known yet."""
        return self.tokens[-1] == PENDING

    @property
    def rows(self) -> int:
        """Rows that are its own: until it has forked, one for each that it may become."""
        return 1 if self.forked else self.request.n


class Move(NamedTuple):
    source: int
    target: int


class Chunk(NamedTuple):
    """`count` tokens of a sequence from its token `start` on, to be computed in one step."""

    sequence: Sequence
    start: int
    count: int
    draws: bool
    """Whether its next token is drawn then: all that it has are computed."""


@dataclass(slots=True)
class Step:
    """What runs next. The moves come first, in the order in which they stand here (in each list, all that is read is read before anything is
    written), then the state of what has `started` is set, then all is computed: the tokens of a row are written to its pages, and attend
    to what these hold before."""

    forks: list[Move] = field(default_factory=list)
    """Slots copied to slots: for states only."""
    slots_out: list[Move] = field(default_factory=list)
    """Slots to host slots: for states only."""
    pages_out: list[Move] = field(default_factory=list)
    """Pages to host pages."""
    copies: list[Move] = field(default_factory=list)
    """Pages to pages: copies on write."""
    pages_in: list[Move] = field(default_factory=list)
    """Host pages to pages."""
    slots_in: list[Move] = field(default_factory=list)
    started: list[Sequence] = field(default_factory=list)
    """Whose slot still holds what another left: an empty state goes there, or the encoder's output; and to its pages what is `written`."""
    decodes: list[Chunk] = field(default_factory=list)
    """Of those who lack just their last token."""
    prefills: list[Chunk] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    """Who lost its pages for want of them, and waits again."""

    @property
    def chunks(self) -> list[Chunk]:
        """All that is computed, decodes first."""
        return self.decodes + self.prefills

    @property
    def draws(self) -> list[Sequence]:
        """Whose next token is drawn, in the order of `chunks`."""
        return [chunk.sequence for chunk in self.chunks if chunk.draws]

    @property
    def vain(self) -> bool:
        """Whether all that it computes have ended since."""
        return not any(chunk.sequence.status == "running" for chunk in self.chunks)


class Outcome(NamedTuple):
    """What a step led to."""

    finished: list[Sequence]
    forked: list[tuple[Sequence, Sequence]]
    """Who went on as several: the sequence that there was, and each new one."""
