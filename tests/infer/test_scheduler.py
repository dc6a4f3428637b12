"""The scheduler under an engine that computes nothing: it keeps, page by page, which text each token's K and V come from."""

from collections import Counter
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from lmx.infer.pages import Pages
from lmx.infer.scheduler import Scheduler
from lmx.infer.steps import Request, Sequence, Step


def drawn_after(tokens) -> int:
    """What the model that is none says next; 0 ends the text."""
    return hash(tuple(tokens)) % 9


class Engine:
    """Runs steps. The K and V of a token are (fingerprint, the text up to it), and so is a state."""

    def __init__(self, scheduler: Scheduler, forks: Callable[[int], int] = lambda rows: 1):
        self.scheduler, self.pages, self.forks = scheduler, scheduler.pages, forks
        self.cells, self.host, self.states, self.host_states = {}, {}, {}, {}
        self.texts: dict[Sequence, list[int]] = {}
        self.seen = Counter()

    def add(self, request: Request) -> Sequence:
        sequence = self.scheduler.add(request)
        self.texts[sequence] = list(request.prompt)
        return sequence

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
        for sequence in step.started:
            self.states[sequence.slot] = [(sequence.fingerprint, ())]
        written = set()
        for sequence, start, count, _ in step.chunks:
            texts = [(sequence.fingerprint, tuple(sequence.tokens[:i])) for i in range(start + count + 1)]
            if self.scheduler.states:
                assert self.states[sequence.slot] == [texts[start]]
                self.states[sequence.slot] = [texts[start + count]]
            if self.pages is None:
                continue
            size, window = self.pages.size, self.scheduler.window or len(texts)
            for i in range(start, start + count):
                place = (sequence.pages[i // size], i % size)
                assert place[0]
                assert self.pages.readers[place[0]] == 1, "who writes in a page is alone there"
                assert place not in written
                written.add(place)
                self.cells.setdefault(place[0], [None] * size)[i % size] = texts[i + 1]
            for i in range(max(0, start - window + 1), start):
                assert self.cells[sequence.pages[i // size]][i % size] == texts[i + 1], "each token attends to its own text"

    def draw(self, step: Step) -> list[list[int]]:
        free, drawn = self.scheduler.rows - sum(s.rows for s in self.scheduler.running), []
        for sequence in step.draws:
            first = drawn_after(sequence.tokens)
            several = sequence.request.n if not sequence.forked else 1 + self.forks(max(free, 0))
            if sequence.forked:
                free -= several - 1
            drawn.append([first + i for i in range(several)] if first else [])
        return drawn

    def advance(self, step: Step, drawn: list[list[int]]):
        before = {s: list(s.tokens) for s in step.draws}
        gone = {s for s in step.draws if s.status != "running"}
        outcome = self.scheduler.advance(step, drawn)
        for sequence, new in zip(step.draws, drawn, strict=True):
            members = [sequence, *(other for parent, other in outcome.forked if parent is sequence)]
            assert len(members) == (1 if sequence in gone else max(1, len(new)))
            if sequence not in gone:
                for member, token in zip(members, new, strict=False):
                    self.texts[member] = [*before[sequence], token]
        for sequence in outcome.finished:
            request = sequence.request
            assert sequence.tokens == self.texts[sequence]
            made = len(sequence.tokens) - len(request.prompt)
            assert made == request.max_new_tokens or (made < request.max_new_tokens and not drawn_after(sequence.tokens))
        return outcome

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


SEEN = Counter()


class Machine(RuleBasedStateMachine):
    """Requests come and go while steps are planned, run and advanced."""

    @initialize(
        kind=st.sampled_from(["pages", "pages", "window", "states", "both"]),
        size=st.integers(1, 4),
        pages=st.integers(3, 14),
        rows=st.integers(1, 5),
        chunk=st.integers(1, 8),
        budget=st.integers(0, 8),
        window=st.integers(1, 9),
        host_pages=st.sampled_from([0, 0, 5, 20]),
        forks=st.booleans(),
    )
    def start(self, kind, size, pages, rows, chunk, budget, window, host_pages, forks):
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
        self.engine = Engine(self.scheduler, (lambda free: min(free, 1)) if forks else (lambda free: 0))
        self.step, self.requests, self.version, self.finished = None, [], 0, []

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=14),
        new=st.integers(1, 12),
        n=st.integers(1, 3),
        priority=st.sampled_from([0, 0, 1]),
        image=st.sampled_from([b"", b"image"]),
        reuse=st.sampled_from([True, True, False]),
        whole=st.sampled_from([0, 0, 3]),
    )
    def add(self, prompt, new, n, priority, image, reuse, whole):
        whole = min(whole, len(prompt))
        fingerprint = b"%d %b %b" % (self.version, image, bytes(prompt[:whole]))
        request = Request(tuple(prompt), new, min(n, self.scheduler.rows), priority, fingerprint, reuse, whole)
        pages, scheduler = self.scheduler.pages, self.scheduler
        if whole > min(scheduler.chunk, scheduler.budget) or (whole and scheduler.window):
            return
        if pages is not None and scheduler.window is None and len(prompt) + new - 1 > (pages.count - 1) * pages.size:
            with pytest.raises(ValueError, match=r"pages\.count"):
                scheduler.add(request)
            return
        try:
            self.engine.add(request)
        except ValueError:
            assert scheduler.window is not None
            return
        self.requests.append(request)

    @precondition(lambda self: self.step is None)
    @rule()
    def plan(self):
        scheduler, pages, seen = self.scheduler, self.scheduler.pages, SEEN
        waited = {s: s.computed for s in scheduler.waiting}
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
        for sequence in step.preempted:
            assert all(sequence.order > c.sequence.order for c in chunks if c.sequence.status != "waiting") or step.decodes
            seen["swapped" if sequence.computed else "recomputed"] += 1
        first = min(scheduler.running + scheduler.waiting, key=lambda s: s.order, default=None)
        if first in waited and first.status == "waiting":
            seen["the first in the order waited"] += 1
        for sequence in step.started:
            assert sequence.request.reuse or not sequence.computed
            seen["prefix hits"] += sequence.computed > 0
        seen["swapped in"] += len([s for s in waited if s.status == "running" and waited[s]])
        seen["copies"] += len(step.copies)
        seen["state copies"] += len(step.forks)
        seen["state swaps"] += len(step.slots_in)
        seen["several prompts"] += len(step.prefills) > 1
        seen["chunks"] += any(c.start for c in step.prefills)
        if pages is not None:
            seen["given up behind the window"] += any(0 in s.pages for s in scheduler.running)
        self.engine.run(step)

    @precondition(lambda self: self.step is not None)
    @rule()
    def advance(self):
        step, self.step = self.step, None
        drawn = self.engine.draw(step)
        outcome = self.engine.advance(step, drawn)
        SEEN["forks"] += len(outcome.forked)
        self.finished += outcome.finished

    @rule(data=st.data())
    def some_steps(self, data):
        for _ in range(data.draw(st.integers(1, 6))):
            if self.step is not None:
                self.advance()
            self.plan()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data):
        request = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
        ended = self.scheduler.cancel(request)
        assert all(s.status == "cancelled" and s.request is request for s in ended)
        SEEN["cancelled in a step"] += self.step is not None and any(c.sequence in ended for c in self.step.decodes)

    @precondition(lambda self: self.step is None)
    @rule(forget=st.booleans())
    def update(self, forget):
        """Of the weights."""
        self.version += 1
        self.scheduler.restart(lambda fingerprint: b"%d %b" % (self.version, fingerprint.partition(b" ")[2]))
        if forget and self.scheduler.pages is not None:
            self.scheduler.pages.clear()

    @invariant()
    def books_agree(self):
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
                for s in scheduler.running:
                    assert len(s.pages) == -(-s.computed // pages.size)

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        if self.step is not None:
            self.advance()
        left = self.scheduler.running + self.scheduler.waiting
        self.engine.drain()
        assert all(s.status == "finished" for s in left)
        assert all(s.status == "finished" and s.tokens == self.engine.texts[s] for s in self.finished)
        self.engine.nothing_is_held()


def test_whatever_comes_and_goes_every_text_is_computed_from_itself():
    SEEN.clear()
    run_state_machine_as_test(Machine, settings=settings(max_examples=250, stateful_step_count=40, deadline=None, derandomize=True, report_multiple_bugs=False))
    print(SEEN)
