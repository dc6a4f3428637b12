"""An engine that computes nothing: it keeps, page by page, which text each token's K and V come from, and holds a scheduler to its word."""

from collections import Counter
from collections.abc import Callable

import pytest

from lmx.infer.pages import Pages, chain
from lmx.infer.scheduler import Scheduler
from lmx.infer.steps import Outcome, Request, Sequence, Step


def drawn_after(tokens) -> int:
    """What the model that is none says next; 0 ends the text."""
    return hash(tuple(tokens)) % 9


class Engine:
    """Runs steps. The K and V of a token are (fingerprint, the text up to it), and so is a state."""

    def __init__(self, scheduler: Scheduler, forks: Callable[[int], int] = lambda free: 0, seen: Counter | None = None):
        self.scheduler, self.pages, self.forks = scheduler, scheduler.pages, forks
        self.cells, self.host, self.states, self.host_states = {}, {}, {}, {}
        self.texts: dict[Sequence, list[int]] = {}
        self.latest: dict[int, int] = {}
        self.seen = Counter() if seen is None else seen

    def add(self, request: Request) -> Sequence:
        sequence = self.scheduler.add(request)
        self.texts[sequence] = list(request.prompt)
        return sequence

    def read(self, sequence: Sequence) -> list[int]:
        """A text's tokens, the pending one as its slot drew it."""
        return [*sequence.tokens[:-1], self.latest[sequence.slot]] if sequence.pending else sequence.tokens

    def move(self, moves, source: dict, target: dict) -> None:
        target |= {move.target: list(content) for move, content in zip(moves, [source[move.source] for move in moves], strict=True)}

    def run(self, step: Step) -> None:
        for moves, source, target in (
            (step.forks, self.states, self.states),
            (step.slots_out, self.states, self.host_states),
            (step.pages_out, self.cells, self.host),
            (step.copies, self.cells, self.cells),
            (step.pages_in, self.host, self.cells),
            (step.slots_in, self.host_states, self.states),
        ):
            assert len({move.target for move in moves}) == len(moves)
            assert 0 not in {place for move in moves for place in move}
            self.move(moves, source, target)
        written = set()
        for sequence in step.started:
            given = sequence.request.written
            self.states[sequence.slot] = [(sequence.fingerprint, tuple(sequence.tokens[:given]))]
            for i in range(sequence.registered * self.pages.size if given else 0, given):
                self.put(sequence, i, written)
        for sequence, start, count, _ in step.chunks:
            tokens = self.read(sequence)
            texts = [(sequence.fingerprint, tuple(tokens[:i])) for i in range(start + count + 1)]
            if self.scheduler.states:
                assert self.states[sequence.slot] == [texts[start]]
                self.states[sequence.slot] = [texts[start + count]]
            if self.pages is None:
                continue
            size, window = self.pages.size, self.scheduler.window or len(texts)
            for i in range(start, start + count):
                self.put(sequence, i, written)
            for i in range(max(0, start - window + 1), start):
                assert self.cells[sequence.pages[i // size]][i % size] == texts[i + 1], "each token attends to its own text"
        for sequence in step.draws:  # what was read is read by now
            self.latest[sequence.slot] = drawn_after(self.read(sequence))

    def put(self, sequence: Sequence, i: int, written: set) -> None:
        """A token's K and V go to its page."""
        page, at = sequence.pages[i // self.pages.size], i % self.pages.size
        assert page
        assert self.pages.readers[page] == 1, "who writes in a page is alone there"
        assert (page, at) not in written
        written.add((page, at))
        self.cells.setdefault(page, [None] * self.pages.size)[at] = (sequence.fingerprint, tuple(self.read(sequence)[: i + 1]))

    def draw(self, step: Step) -> list[list[int]]:
        free, drawn = self.scheduler.rows - sum(s.rows for s in self.scheduler.running), []
        for sequence in step.draws:
            first = drawn_after(self.texts[sequence])
            several = 1 if sequence.pending else sequence.request.n if not sequence.forked else 1 + self.forks(max(free, 0))
            if sequence.forked:
                free -= several - 1
            drawn.append([first + i for i in range(several)] if first else [])
        return drawn

    def advance(self, step: Step, drawn: list[list[int]]) -> None:
        before = {s: list(s.tokens[:-1] if s.pending else s.tokens) for s in step.draws}
        live = [(s, new) for s, new in zip(step.draws, drawn, strict=True) if s.status == "running"]
        self.note(before, live, self.scheduler.advance(step, drawn))

    def note(self, before: dict[Sequence, list[int]], drawn: list, outcome: Outcome) -> None:
        for sequence, new in drawn:
            members = [sequence, *(other for parent, other in outcome.forked if parent is sequence)]
            assert len(members) == max(1, len(new))
            for member, token in zip(members, new, strict=False):
                self.texts[member] = [*before[sequence], token]
        self.seen["forks"] += len(outcome.forked)
        for sequence in outcome.finished:
            request = sequence.request
            assert sequence.tokens == self.texts[sequence]
            made, ended = len(sequence.tokens) - len(request.prompt), [s for s, new in drawn if not new]
            assert (made == request.max_new_tokens) != (sequence in ended)
            assert made <= request.max_new_tokens

    def step(self) -> Step:
        step = self.scheduler.plan()
        self.run(step)
        self.advance(step, self.draw(step))
        return step

    def drain(self, limit: int = 10_000) -> int:
        """Steps until nothing is left."""
        for steps in range(limit):
            if not self.scheduler.running and not self.scheduler.waiting:
                return steps
            assert self.step().chunks, "while anything is left, something is computed"
        raise AssertionError("it never ends")

    def nothing_is_held(self) -> None:
        scheduler = self.scheduler
        if self.pages is not None:
            self.pages.check()
            assert not any(self.pages.readers)
        for slots in (scheduler._slots, scheduler._host_pages, scheduler._host_slots):
            assert slots.available == slots.count


class World:
    """A scheduler and an engine, where requests come and go while steps are planned, run and advanced. `seen` counts what happened."""

    def __init__(self, *, kind: str, size: int, pages: int, rows: int, chunk: int, budget: int, window: int, host_pages: int, forks: bool):
        pool = None if kind == "states" else Pages(pages, size)
        self.scheduler = Scheduler(
            pool,
            rows,
            chunk=chunk,
            budget=rows + budget,
            window=window if kind == "window" else None,
            states=kind in ("states", "both"),
            host_pages=0 if pool is None else host_pages,
        )
        self.seen = Counter()
        self.engine = Engine(self.scheduler, (lambda free: min(free, 1)) if forks else (lambda free: 0), self.seen)
        self.step, self.later, self.requests, self.version = None, None, [], 0

    def add(self, prompt: list[int], new: int, n: int, priority: int, image: bytes, reuse: bool, whole: int, written: int) -> None:
        whole = min(whole, len(prompt))
        fingerprint = b"%d %b %b" % (self.version, image, bytes(prompt[:whole]))
        pages, scheduler = self.scheduler.pages, self.scheduler
        written = 0 if pages is None or scheduler.window else min(written, len(prompt) - 1)
        request = Request(tuple(prompt), new, min(n, scheduler.rows), priority, fingerprint, reuse, whole, written)
        if whole > min(scheduler.chunk, scheduler.budget) or (whole and scheduler.window):
            return
        need = 0 if pages is None else -(-(len(prompt) + new - 1) // pages.size)
        if pages is not None and scheduler.window is None and need > pages.count - 1:
            with pytest.raises(ValueError, match=r"raise pages="):
                scheduler.add(request)
            return
        try:
            self.engine.add(request)
        except ValueError:
            assert scheduler.window is not None
            return
        self.requests.append(request)

    def plan(self, ahead: bool = False) -> None:
        scheduler, pages, seen = self.scheduler, self.scheduler.pages, self.seen
        waited, ran = {s: s.computed for s in scheduler.waiting}, list(scheduler.running)
        if ahead:
            step = self.later = scheduler.ahead()
            seen["not ahead"] += step is None
            if step is None:
                return
            assert step.chunks
            assert not step.preempted
            assert not any(sequence.pending for sequence in scheduler.waiting)
            seen["ahead"] += 1
            seen["new ahead"] += len(step.started) > 0
            seen["with others that wait for their tokens"] += len(scheduler.running) > len(step.chunks)
        else:
            step = self.step = scheduler.plan()
            assert step.chunks or not (scheduler.running or scheduler.waiting), "while anything is left, something is computed"
        chunks = step.chunks
        assert len({c.sequence for c in chunks}) == len(chunks) <= scheduler.rows
        assert sum(c.count for c in chunks) <= scheduler.budget
        assert sum(s.rows for s in scheduler.running) <= scheduler.rows
        for sequence, start, count, draws in chunks:
            assert sequence.status == "running"
            assert start == sequence.computed
            assert draws == (start + count == len(sequence.tokens))
            assert 0 < count <= min(scheduler.chunk, len(sequence.tokens) - start)
            assert start >= sequence.request.whole or start + count >= sequence.request.whole
        assert all(c.sequence.remaining == 1 for c in step.decodes)
        survivors = [s for s in ran if s.status == "running"]
        assert not ran or ran[0] in survivors, "the first goes on"
        decoding = {c.sequence for c in step.decodes}
        for sequence in step.preempted:
            seen["swapped" if sequence.computed else "recomputed"] += 1
            assert all(s.order < sequence.order or s in decoding for s in survivors), "who comes last gives way"
        admitted = [s for s in waited if s.status == "running"]
        assert not (admitted and step.preempted)
        assert all(s.order < other.order for s in admitted for other in scheduler.waiting), "first come, first served"
        for sequence in step.started:
            assert sequence.request.reuse or sequence.computed == sequence.request.written
            seen["prefix hits"] += sequence.registered > 0
            seen["given"] += sequence.computed == sequence.request.written > 0
        seen["swapped in"] += sum(waited[s] > 0 for s in admitted)
        seen["copies"] += len(step.copies)
        seen["state copies"] += len(step.forks)
        seen["state swaps"] += len(step.slots_in)
        seen["several prompts"] += len(step.prefills) > 1
        seen["chunks"] += any(c.start for c in step.prefills)
        if pages is not None:
            seen["given up behind the window"] += any(0 in s.pages for s in scheduler.running)
        self.engine.run(step)

    def advance(self) -> None:
        step, self.step, self.later = self.step, self.later, None
        drawn = self.engine.draw(step)
        self.seen["in vain"] += self.step is not None and any(
            not new and c.sequence in self.step.draws for new, c in zip(drawn, [c for c in step.chunks if c.draws], strict=True)
        )
        self.engine.advance(step, drawn)

    def go(self, steps: int, ahead: bool = False) -> None:
        for _ in range(steps):
            if self.step is not None:
                self.advance()
            if self.step is None:
                self.plan()
            if ahead:
                self.plan(ahead=True)

    def cancel(self, i: int) -> None:
        request = self.requests.pop(i)
        ended = self.scheduler.cancel(request)
        assert all(s.status == "cancelled" and s.request is request for s in ended)
        self.seen["cancelled in a step"] += self.step is not None and any(c.sequence in ended for c in self.step.decodes)

    def update(self, forget: bool) -> None:
        """New weights, when what runs is done; or at once, and it is dropped."""
        if forget:
            self.scheduler.drop()
            self.step = self.later = None
        while self.step is not None:
            self.advance()
        self.version += 1
        self.scheduler.restart(lambda fingerprint: b"%d %b" % (self.version, fingerprint.partition(b" ")[2]))
        if forget and self.scheduler.pages is not None:
            self.scheduler.pages.clear()

    def books_agree(self) -> None:
        scheduler, pages = self.scheduler, self.scheduler.pages
        alive = scheduler.running + scheduler.waiting
        assert all(s.status == "running" for s in scheduler.running)
        assert all(s.status == "waiting" for s in scheduler.waiting)
        assert len({s.slot for s in scheduler.running}) == len(scheduler.running)
        assert [s.order for s in scheduler.running] == sorted(s.order for s in scheduler.running)
        assert [s.order for s in scheduler.waiting] == sorted(s.order for s in scheduler.waiting)
        if pages is not None:
            pages.check()
            readers = Counter(page for s in alive for page in s.pages if page)
            assert pages.readers == [readers[page] for page in range(pages.count)]
            assert pages.statistics().in_use <= pages.count - 1
            if self.step is None:
                assert not any(s.pending for s in alive)
                for s in scheduler.running:
                    assert len(s.pages) == -(-s.computed // pages.size)
            for page, key in enumerate(pages.keys):
                if key is not None:
                    fingerprint, text = self.engine.cells[page][-1]
                    assert key == chain(fingerprint, text, pages.size)[-1], "what is found is what it says"

    def finish(self) -> None:
        """All that is left comes to its end, and nothing stays behind."""
        while self.step is not None:
            self.advance()
        left = self.scheduler.running + self.scheduler.waiting
        while self.scheduler.running or self.scheduler.waiting:
            self.plan()
            self.advance()
            self.books_agree()
        assert all(s.status == "finished" for s in left)
        self.engine.nothing_is_held()
