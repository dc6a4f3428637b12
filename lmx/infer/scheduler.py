"""Which requests run next, in which pages: continuous batching with chunked prefill, preemption, forks and prefix hits. Nothing here is random.

A step first decodes every running sequence (one token each), then gives what is left of its token budget to prompts, a chunk each, and then
to those who wait, in order (Orca: Yu et al., 2022; chunked prefill: Sarathi-Serve, Agrawal et al., 2024). When pages run out, the sequence
that comes last in the order loses its own: they move to host memory where there is room for them, or its tokens are computed again when it
is back at its turn. So the first in the order always goes on, and everything ends.

The step after the one that runs may be planned before it is known what that draws (`ahead`): who draws in it has one token more, which is
`PENDING`. Whoever might not go on with just one waits for what is drawn; and where somebody would have to be put out, all wait.
"""

from bisect import insort
from collections.abc import Callable
from collections.abc import Sequence as Several
from itertools import count

from lmx.infer.pages import Pages, Slots, child, root
from lmx.infer.steps import PENDING, Chunk, Move, Outcome, Request, Sequence, Step


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.order


class Scheduler:
    """Requests in by `add`, then `plan`, run it, `advance`, until nothing is left. Or `plan`, then `ahead` and `advance` by turns: each step is
    planned while the one before it runs.

    Args:
      pages: of the K and V cache, or None for a model that has only states.
      rows: sequences that run at a time.
      chunk: tokens of prompts in one step, at most.
      prompts: prompts that share a step, at most; as many as there are rows when it is not given.
      budget: tokens of a step, at most, decoded ones among them; rows + chunk when it is not given.
      window: where no layer sees farther back than so many keys (itself among them), pages behind it are given up early.
      states: each sequence has a slot with something that only it has read: the state of a recurrent model, what an encoder said. Then no
        page is found again for another.
      host_pages: pages in host memory, 1 … host_pages, for the sequences that are preempted (with states, `rows` slots too); where they
        do not suffice, tokens are computed again.
    """

    def __init__(
        self,
        pages: Pages | None,
        rows: int,
        *,
        chunk: int = 512,
        budget: int | None = None,
        prompts: int | None = None,
        window: int | None = None,
        states: bool = False,
        host_pages: int = 0,
    ):
        budget = rows + chunk if budget is None else budget
        for name, value in (("rows", rows), ("chunk", chunk), ("window", 1 if window is None else window)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if budget < rows:
            raise ValueError(f"budget={budget} tokens a step are fewer than rows={rows}, of which each decodes one")
        if pages is None and not states:
            raise ValueError("pages=None and states=False: a sequence has pages, a state, or both")
        if pages is None and (host_pages or window):
            raise ValueError(f"host_pages={host_pages} and window={window} are about pages, and pages=None")
        self.pages, self.rows, self.chunk, self.budget, self.window, self.states = pages, rows, chunk, budget, window, states
        self.prompts = rows if prompts is None else prompts
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self._slots, self._host_pages, self._host_slots = Slots(rows), Slots(host_pages), Slots(rows if states else 0)
        self._finds = pages is not None and not states
        self._arrivals = count()
        self._forks: list[Move] = []
        self._planned: list[Step] = []  # one, or two of which the second is ahead
        self._counted: Step | None = None  # the first of them, once its chunks count as computed

    def add(self, request: Request) -> Sequence:
        """The request waits for its turn. Raises ValueError for one that can never have it."""
        if request.n > self.rows:
            raise ValueError(f"n={request.n} continuations at a time need as many rows, and rows={self.rows}")
        if request.whole > min(self.chunk, self.budget):
            raise ValueError(
                f"the first {request.whole} tokens are computed in one step (whole), and chunk={self.chunk}, budget={self.budget} allow fewer"
            )
        if self.pages is not None:
            tokens, size = len(request.prompt) + request.max_new_tokens - 1, self.pages.size
            need = -(-tokens // size)
            if self.window is not None:
                need = min(need, max((self.window - 2) // size + 2, -(-request.whole // size)))
            if request.written and self.window is not None:
                raise ValueError(
                    f"the first {request.written} tokens are given (written), which a window={self.window} would give up; leave it out"
                )
            if need > self.pages.count - 1:
                raise ValueError(
                    f"a prompt of {len(request.prompt)} tokens and max_new_tokens={request.max_new_tokens} need {need} pages of {size} tokens,"
                    f" and the pool has {self.pages.count - 1}; raise pages={self.pages.count}, or ask for fewer tokens"
                )
        sequence = Sequence(request, (request.priority, next(self._arrivals), 0), list(request.prompt), request.fingerprint)
        insort(self.waiting, sequence, key=_order)
        return sequence

    def cancel(self, request: Request) -> list[Sequence]:
        """Ends all sequences of a request, also while a step that computes them runs; returns them."""
        ended = [s for s in self.running + self.waiting if s.request is request]
        for sequence in ended:
            self._end(sequence, "cancelled")
        return ended

    def restart(self, rename: Callable[[bytes], bytes]) -> None:
        """Something that all K and V depend on has changed, the weights say: every sequence is computed anew, and its fingerprint is what
        `rename` makes of it. What has been drawn stays. (`Pages.forget` or `clear` gives up what is only cached.)"""
        if self._planned:
            raise ValueError("restart() while a step runs; advance() it first")
        for sequence in self.running:
            self._give_up(sequence)
            insort(self.waiting, sequence, key=_order)
        self.running, self._forks = [], []
        for sequence in self.waiting:
            self._leave_host(sequence)
            sequence.fingerprint, sequence.keys, sequence.computed = rename(sequence.fingerprint), [], 0

    def drop(self) -> None:
        """What is planned is never advanced: what it draws will be drawn anew. What it has written where is not known any more, so `restart`
        comes next."""
        for sequence in self.running:
            if sequence.pending:
                sequence.tokens.pop()
        self._planned, self._counted = [], None

    def renew(self, sequence: Sequence, fingerprint: bytes) -> None:
        """What a sequence's K and V depend on has changed: it is computed anew under another fingerprint, when its turn comes."""
        if self._planned:
            raise ValueError("renew() while a step runs; advance() it first")
        if sequence.status == "running":
            self.running.remove(sequence)
            self._give_up(sequence)
            insort(self.waiting, sequence, key=_order)
        self._leave_host(sequence)
        sequence.fingerprint, sequence.keys, sequence.computed = fingerprint, [], 0

    def plan(self) -> Step:
        """The next step. Nothing is computed in it only when nothing is left."""
        if self._planned:
            raise ValueError("plan() before the last step was advanced")
        step = self._next()
        self._planned.append(step)
        return step

    def ahead(self) -> Step | None:
        """The step after the one that `plan` or this gave last, while that runs, as far as it depends on nothing that is drawn: tokens are
        `PENDING` until that one is advanced. None where there is no such step, or somebody would have to be put out for it: `plan` it then."""
        if len(self._planned) != 1:
            raise ValueError("ahead() is of the step after the one that runs, and there is not just one")
        if (before := self._planned[0]) is not self._counted:
            self._count(before)
            for sequence in before.draws:
                made = len(sequence.tokens) + 1 - len(sequence.request.prompt)
                if sequence.status == "running" and sequence.rows == 1 and made < sequence.request.max_new_tokens:
                    sequence.tokens.append(PENDING)
        if not self._suffices():
            return None
        step = self._next()
        if not step.chunks:
            return None
        self._planned.append(step)
        return step

    def _suffices(self) -> bool:
        """Whether there are pages for everybody who runs to go on for a step."""
        if self.pages is None:
            return True
        size, readers, needed = self.pages.size, self.pages.readers, 0
        for sequence in self.running:
            if remaining := sequence.remaining:
                copied = sequence.computed % size and readers[sequence.pages[-1]] > 1
                last = -(-(sequence.computed + min(remaining, self.chunk)) // size)
                needed += max(0, last - len(sequence.pages)) + bool(copied)
        return needed <= self.pages.available

    def _next(self) -> Step:
        step, left = Step(forks=self._forks), self.budget
        self._forks = []
        for sequence in [s for s in self.running if s.remaining == 1]:
            if sequence.status == "running" and self._room(sequence, 1, step):
                step.decodes.append(self._chunk(sequence, 1))
                left -= 1
        left = min(left, self.chunk)
        for sequence in [s for s in self.running if s.remaining > 1]:
            wanted = min(left, sequence.remaining)
            if sequence.status == "running" and wanted and len(step.prefills) < self.prompts:
                tokens = self._room(sequence, wanted, step)
                left -= tokens
                if tokens:
                    step.prefills.append(self._chunk(sequence, tokens))
        # Who would come in now might take what somebody was just put out for.
        while self.waiting and left and not step.preempted and len(step.prefills) < self.prompts:
            tokens = self._admit(self.waiting[0], left, step)
            if not tokens:
                break
            left -= tokens
        return step

    def advance(self, step: Step, drawn: Several[Several[int]]) -> Outcome:
        """What `plan` gave has been computed. For each of `step.draws`, in their order, `drawn` has its next tokens: none (an empty list) ends the
        sequence, one is how it goes on, of several each goes on as a sequence of its own. (What is drawn for a sequence cancelled meanwhile
        does not matter.)

        Raises ValueError, and changes nothing, for another step, another number of draws, more sequences than rows, or several that a text in
        the step ahead would go on as.
        """
        if not self._planned or step is not self._planned[0]:
            raise ValueError("advance() of a step that is not the one that plan() gave last")
        draws = step.draws
        if len(drawn) != len(draws):
            raise ValueError(f"drawn has {len(drawn)} entries for the {len(draws)} sequences of step.draws")
        drawing = [(s, new) for s, new in zip(draws, drawn, strict=True) if s.status == "running"]
        rows = self._rows_taken() + sum(len(new) - s.rows for s, new in drawing)
        if rows > self.rows:
            raise ValueError(
                f"drawn goes on as {rows} sequences, and rows={self.rows}; a request of n may become n when it is first drawn for"
            )
        if any(len(new) > 1 and s.pending for s, new in drawing):
            raise ValueError("drawn goes on as several sequences, and the next token of the one that there was is on its way already")
        if self._counted is not step:
            self._count(step)
        self._planned.pop(0)
        outcome = Outcome([], [])
        for sequence, new in drawing:
            if sequence.pending:
                sequence.tokens.pop()
            if not len(new):  # before others fork into their rows
                self._end(sequence, "finished")
                outcome.finished.append(sequence)
        for sequence, new in drawing:
            if sequence.status != "running":
                continue
            sequence.forked = True
            together = [sequence, *(self._fork(sequence) for _ in new[1:])]
            outcome.forked.extend((sequence, other) for other in together[1:])
            for member, token in zip(together, new, strict=True):
                member.tokens.append(int(token))
                if len(member.tokens) - len(member.request.prompt) >= member.request.max_new_tokens:
                    self._end(member, "finished")
                    outcome.finished.append(member)
        return outcome

    def _count(self, step: Step) -> None:
        """A step's chunks as computed, which whatever is planned from now on comes after."""
        self._counted = step
        for chunk in step.chunks:
            if chunk.sequence.status == "running":
                self._computed(chunk.sequence, chunk.count)

    def _rows_taken(self) -> int:
        return sum(s.rows for s in self.running)

    def _room(self, sequence: Sequence, wanted: int, step: Step) -> int:
        """Pages for the next `wanted` tokens of a running sequence; returns for how many there are. Who comes after it and has no part in the
        step yet is preempted for it; so is a decode itself, when it comes last."""
        pages = self.pages
        if pages is None:
            return wanted
        size, offset = pages.size, sequence.computed % pages.size
        # The page that it writes on in, when others read it too, is copied.
        if offset and offset + wanted <= size and pages.readers[sequence.pages[-1]] == 1:
            return wanted
        while True:
            copied = bool(offset) and pages.readers[sequence.pages[-1]] > 1
            held, last = len(sequence.pages) - copied, -(-(sequence.computed + wanted) // size)
            if last - held <= pages.available:
                break
            victim = self._victim(sequence)
            if victim is None:
                wanted = (held + pages.available) * size - sequence.computed
                break
            self._preempt(victim, step)
            if victim is sequence:
                return 0
        if wanted < 1:
            return 0
        if copied:
            target, source = pages.writable(sequence.pages[-1])
            step.copies.append(Move(source, target))
            sequence.pages[-1] = target
        self._grow(sequence, wanted)
        return wanted

    def _grow(self, sequence: Sequence, tokens: int) -> None:
        sequence.pages += self.pages.allocate(-(-(sequence.computed + tokens) // self.pages.size) - len(sequence.pages))

    def _victim(self, sequence: Sequence) -> Sequence | None:
        for victim in reversed(self.running):
            if victim is sequence:
                return sequence if sequence.remaining == 1 else None
            # All that decode are in the step before a prompt asks for room, and a decode asks in order.
            if sequence.remaining == 1 or victim.remaining != 1:
                return victim
        raise AssertionError("a sequence that runs is among those that run")

    def _preempt(self, sequence: Sequence, step: Step) -> None:
        self.running.remove(sequence)
        held = [page for page in sequence.pages if page]
        fits = len(held) <= self._host_pages.available and (not self.states or self._host_slots.available)
        if fits and sequence.computed:
            sequence.host_pages = [self._host_pages.take() if page else 0 for page in sequence.pages]
            step.pages_out += [Move(page, host) for page, host in zip(sequence.pages, sequence.host_pages, strict=True) if page]
            if self.states:
                sequence.host_slot = self._host_slots.take()
                step.slots_out.append(Move(sequence.slot, sequence.host_slot))
            self._give_up(sequence)
        else:
            self._give_up(sequence)
            sequence.computed = 0
        insort(self.waiting, sequence, key=_order)
        step.preempted.append(sequence)

    def _give_up(self, sequence: Sequence) -> None:
        if self.pages is not None:
            self.pages.release(sequence.pages)
        self._slots.release(sequence.slot)
        # The slot may be somebody's before what it was forked from is copied.
        self._forks = [move for move in self._forks if move.target != sequence.slot]
        sequence.pages, sequence.slot, sequence.registered, sequence.status = [], 0, 0, "waiting"

    def _leave_host(self, sequence: Sequence) -> None:
        for host in sequence.host_pages:
            if host:
                self._host_pages.release(host)
        if sequence.host_slot:
            self._host_slots.release(sequence.host_slot)
        sequence.host_pages, sequence.host_slot = [], 0

    def _end(self, sequence: Sequence, status: str) -> None:
        if sequence.status == "running":
            self.running.remove(sequence)
            self._give_up(sequence)
        else:
            self.waiting.remove(sequence)
            self._leave_host(sequence)
        sequence.status = status

    def _admit(self, sequence: Sequence, left: int, step: Step) -> int:
        """The first of those who wait runs, if there is room; returns how many tokens of it the step computes."""
        if self._rows_taken() + sequence.rows > self.rows:
            return 0
        request, size = sequence.request, self.pages.size if self.pages is not None else 1
        # What waits and is computed waits in host memory.
        keys = self._keys(sequence, (len(sequence.tokens) - 1) // size) if self._finds and request.reuse and not sequence.computed else []
        found = self.pages.found(keys) if keys else []
        start = sequence.computed or max(len(found) * size, request.written)
        wanted = min(left, len(sequence.tokens) - start)
        if start + wanted < request.whole:
            return 0
        behind = self._behind(start)
        if self.pages is not None:
            moved = sum(1 for host in sequence.host_pages if host) + sum(1 for page in found[behind:] if not self.pages.readers[page])
            # A page more for each who runs: else the newcomer is put out again as soon as they go on.
            room = self.pages.available - moved - (len(self.running) if step.chunks else 0)
            fits = (len(found) + len(sequence.host_pages) + room) * size - start
            if fits < wanted and step.chunks:
                return 0
            wanted = min(wanted, fits)
            if wanted < 1 or start + wanted < request.whole:
                return 0
        self.waiting.pop(0)
        sequence.status, sequence.slot = "running", self._slots.take()
        insort(self.running, sequence, key=_order)
        if sequence.computed:
            self._swap_in(sequence, step)
        else:
            step.started.append(sequence)
            sequence.computed = start
            if keys:
                sequence.pages, sequence.registered = self.pages.take(keys, behind), len(found)
        if self.pages is not None:
            self._grow(sequence, wanted)
            self.pages.fill(sequence.pages, sequence.registered * size, start)
        chunks = step.decodes if sequence.remaining == 1 else step.prefills
        chunks.append(self._chunk(sequence, wanted))
        return wanted

    def _chunk(self, sequence: Sequence, tokens: int) -> Chunk:
        """Its next tokens, which are on their way to its pages."""
        start = sequence.computed
        if self.pages is not None:
            self.pages.fill(sequence.pages, start, start + tokens)
        return Chunk(sequence, start, tokens, tokens == sequence.remaining)

    def _swap_in(self, sequence: Sequence, step: Step) -> None:
        for host in sequence.host_pages:
            page = self.pages.allocate(1)[0] if host else 0
            sequence.pages.append(page)
            if host:
                step.pages_in.append(Move(host, page))
        if self.states:
            step.slots_in.append(Move(sequence.host_slot, sequence.slot))
        sequence.registered = self._behind(sequence.computed)
        self.pages.fill(sequence.pages, sequence.registered * self.pages.size, sequence.computed)
        self._leave_host(sequence)

    def _behind(self, computed: int) -> int:
        """How many of the first pages the next token does not see."""
        return 0 if self.window is None else max(0, computed - self.window + 1) // self.pages.size

    def _computed(self, sequence: Sequence, tokens: int) -> None:
        start = sequence.computed
        sequence.computed = stop = start + tokens
        pages = self.pages
        if pages is None:
            return
        full = stop // pages.size
        if self._finds and full > sequence.registered:
            keys = self._keys(sequence, full)
            for i in range(sequence.registered, full):
                pages.register(sequence.pages[i], keys[i - 1] if i else root(sequence.fingerprint), keys[i])
            sequence.registered = full
        if self.window is not None:
            begin, end = self._behind(start), self._behind(stop)
            pages.release(sequence.pages[begin:end])
            sequence.pages[begin:end] = [0] * (end - begin)

    def _keys(self, sequence: Sequence, pages: int) -> list[bytes]:
        keys, size = sequence.keys, self.pages.size
        for i in range(len(keys), pages):
            keys.append(child(keys[-1] if keys else root(sequence.fingerprint), sequence.tokens[i * size : (i + 1) * size]))
        return keys[:pages]

    def _fork(self, sequence: Sequence) -> Sequence:
        other = Sequence(
            sequence.request,
            (*sequence.order[:2], next(sequence.samples)),
            list(sequence.tokens),
            sequence.fingerprint,
            computed=sequence.computed,
            pages=list(sequence.pages),
            slot=self._slots.take(),
            status="running",
            forked=True,
            keys=list(sequence.keys),
            registered=sequence.registered,
            samples=sequence.samples,
        )
        if self.pages is not None:
            self.pages.share(other.pages)
        if self.states:
            self._forks.append(Move(sequence.slot, other.slot))
        insort(self.running, other, key=_order)
        return other
