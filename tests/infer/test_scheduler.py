"""The scheduler under an engine that computes nothing: it keeps, page by page, which text each token's K and V come from."""

from collections import Counter
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from lmx.infer.pages import Pages
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
        self.seen = Counter() if seen is None else seen

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

    def decide(self) -> None:
        """Of a request whose sequences are chosen together, once each has its draw: some end, others fork into their places."""
        alive = self.scheduler.running + self.scheduler.waiting
        for request in {s.request: None for s in alive if s.request.together and s.forked}:
            beams = [s for s in alive if s.request is request]
            if any(s.remaining for s in beams):
                self.seen["waits for its siblings"] += any(not s.remaining for s in beams)
                continue
            draws = [drawn_after(s.tokens) for s in beams]
            if len(beams) > 1 and draws[0] % 2:
                several = [(beams[0], []), (beams[1], [1, 2]), *((s, [1]) for s in beams[2:])]
            else:
                several = [(s, [d + 1] if d else []) for s, d in zip(beams, draws, strict=True)]
            before = {s: list(s.tokens) for s in beams}
            self.note(before, several, self.scheduler.decide(several))

    def draw(self, step: Step) -> list[list[int] | None]:
        free, drawn = self.scheduler.rows - sum(s.rows for s in self.scheduler.running), []
        for sequence in step.draws:
            if sequence.request.together and sequence.forked:
                drawn.append(None)
                continue
            first = drawn_after(sequence.tokens)
            several = sequence.request.n if not sequence.forked else 1 + self.forks(max(free, 0))
            if sequence.forked:
                free -= several - 1
            drawn.append([first + i for i in range(several)] if first else [])
        return drawn

    def advance(self, step: Step, drawn: list[list[int] | None]) -> None:
        before = {s: list(s.tokens) for s in step.draws}
        live = [(s, new) for s, new in zip(step.draws, drawn, strict=True) if s.status == "running" and new is not None]
        self.note(before, live, self.scheduler.advance(step, drawn))
        self.decide()

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
        host_pages=st.sampled_from([0, 5, 20]),
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
        self.engine = Engine(self.scheduler, (lambda free: min(free, 1)) if forks else (lambda free: 0), SEEN)
        self.step, self.requests, self.version = None, [], 0

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=14),
        new=st.integers(1, 12),
        n=st.integers(1, 3),
        priority=st.sampled_from([0, 0, 1]),
        image=st.sampled_from([b"", b"image"]),
        reuse=st.sampled_from([True, True, False]),
        whole=st.sampled_from([0, 0, 3]),
        together=st.sampled_from([False, False, True]),
    )
    def add(self, prompt, new, n, priority, image, reuse, whole, together):
        whole = min(whole, len(prompt))
        fingerprint = b"%d %b %b" % (self.version, image, bytes(prompt[:whole]))
        request = Request(tuple(prompt), new, min(n, self.scheduler.rows), priority, fingerprint, reuse, whole, together)
        pages, scheduler = self.scheduler.pages, self.scheduler
        if whole > min(scheduler.chunk, scheduler.budget) or (whole and scheduler.window):
            return
        need = 0 if pages is None else -(-(len(prompt) + new - 1) // pages.size) * (request.n if together else 1)
        if pages is not None and scheduler.window is None and need > pages.count - 1:
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
        waited, ran = {s: s.computed for s in scheduler.waiting}, list(scheduler.running)
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
        beams = any(s.request.together for s in ran)
        assert not ran or ran[0] in survivors or beams, "the first goes on"
        decoding = {c.sequence for c in step.decodes}
        for sequence in step.preempted:
            seen["swapped" if sequence.computed else "recomputed"] += 1
            assert all(s.order < sequence.order or s in decoding for s in survivors), "who comes last gives way"
        admitted = [s for s in waited if s.status == "running"]
        assert not (admitted and step.preempted) or {s.status for s in ran} == {"waiting"} or beams
        assert all(s.order < other.order for s in admitted for other in scheduler.waiting), "first come, first served"
        for sequence in step.started:
            assert sequence.request.reuse or not sequence.computed
            seen["prefix hits"] += sequence.computed > 0
        seen["swapped in"] += sum(waited[s] > 0 for s in admitted)
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
        self.engine.advance(step, drawn)

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
        self.engine.nothing_is_held()


def test_whatever_comes_and_goes_every_text_is_computed_from_itself():
    SEEN.clear()
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=400, stateful_step_count=40, deadline=None, derandomize=True, report_multiple_bugs=False)
    )
    assert min(SEEN.values()) >= 5, f"not everything happened: {SEEN}"


def add(scheduler: Scheduler, length: int, new: int = 4, **others) -> Sequence:
    return scheduler.add(Request(tuple(range(1, length + 1)), new, **others))


def one_token_each(scheduler: Scheduler, step: Step):
    return scheduler.advance(step, [[7]] * len(step.draws))


def planned(step: Step) -> list[tuple[int, int, int]]:
    return [(c.sequence.order[1], c.start, c.count) for c in step.chunks]


def test_decodes_come_first_and_prompts_share_what_is_left_of_the_budget():
    scheduler = Scheduler(Pages(64, 4), rows=4, chunk=8, budget=12)
    for length in (3, 10, 9, 5):
        add(scheduler, length, reuse=False)
    expected = [
        [(0, 0, 3), (1, 0, 8), (2, 0, 1)],
        [(0, 3, 1), (1, 8, 2), (2, 1, 8), (3, 0, 1)],
        [(0, 4, 1), (1, 10, 1), (2, 9, 1), (3, 1, 4)],
        [(0, 5, 1), (1, 11, 1), (2, 10, 1), (3, 5, 1)],
    ]
    found = []
    for _ in expected:
        step = scheduler.plan()
        found.append(planned(step))
        one_token_each(scheduler, step)
    # Of the second prompt's last two tokens it was a prefill; of the third's last one, a decode: those lists are told apart by what lacks.
    assert [sorted(step) for step in found] == [sorted(step) for step in expected]


def test_lower_priority_numbers_run_first_and_equals_as_they_came():
    scheduler = Scheduler(Pages(64, 4), rows=1)
    for priority in (1, 0, 1, 0):
        add(scheduler, 2, 1, priority=priority)
    order = []
    while scheduler.waiting:
        step = scheduler.plan()
        order += [c.sequence.order[1] for c in step.chunks]
        one_token_each(scheduler, step)
    assert order == [1, 3, 0, 2]


def test_continuations_share_the_prompt_and_copy_only_the_page_that_they_write_in():
    scheduler = Scheduler(Pages(64, 4), rows=4)
    add(scheduler, 10, 6, n=3)
    add(scheduler, 2, reuse=False)
    add(scheduler, 2, reuse=False)
    step = scheduler.plan()
    assert planned(step) == [(0, 0, 10), (1, 0, 2)]  # a row is kept for each continuation
    outcome = scheduler.advance(step, [[7, 8, 9], [7]])
    (first, second), (_, third) = outcome.forked
    assert [s.tokens[-1] for s in (first, second, third)] == [7, 8, 9]
    assert [s.sample for s in (first, second, third)] == [0, 1, 2]
    assert first.pages == second.pages == third.pages
    assert scheduler.pages.statistics().in_use == 4
    shared = first.pages[2]
    step = scheduler.plan()
    assert [move.source for move in step.copies] == [shared, shared]
    assert {first.pages[2], second.pages[2]} == {move.target for move in step.copies}
    assert third.pages[2] == shared  # nobody else is left there
    assert first.pages[:2] == second.pages[:2] == third.pages[:2]
    assert scheduler.pages.statistics().in_use == 6


def test_states_are_copied_for_forks_and_never_found_again():
    scheduler = Scheduler(Pages(64, 2), rows=3, states=True)
    add(scheduler, 6, 3, n=2)
    step = scheduler.plan()
    assert [s.slot for s in step.started] == [1]
    scheduler.advance(step, [[7, 8]])
    assert scheduler.plan().forks == [(1, 2)]
    assert not scheduler.pages.found([key for key in scheduler.pages.keys if key])


def test_a_prompt_that_came_before_is_computed_from_where_it_differs():
    scheduler = Scheduler(Pages(64, 4), rows=2)
    add(scheduler, 12, 1)
    one_token_each(scheduler, scheduler.plan())
    again, other, asked = add(scheduler, 12), add(scheduler, 12, fingerprint=b"other"), add(scheduler, 12, reuse=False)
    step = scheduler.plan()
    assert planned(step) == [(1, 8, 4), (2, 0, 12)]
    assert again.pages[:2] != other.pages[:2]
    scheduler.advance(step, [[], []])
    assert planned(scheduler.plan()) == [(asked.order[1], 0, 12)]
    assert scheduler.pages.statistics().hit_rate == 2 / 6


@pytest.mark.parametrize("host_pages", [0, 8])
def test_who_came_last_gives_way_and_comes_back(host_pages):
    scheduler = Scheduler(Pages(6, 2), rows=2, host_pages=host_pages)
    engine = Engine(scheduler)
    first, last = (engine.add(Request((token,) * 4, 5, reuse=False)) for token in (1, 2))
    steps = []
    while scheduler.running or scheduler.waiting:
        step = scheduler.plan()
        engine.run(step)
        engine.advance(step, [[7]] * len(step.draws))
        steps.append(step)
    preempted = next(step for step in steps if step.preempted)
    assert preempted.preempted == [last]
    assert [c.sequence for c in preempted.chunks] == [first]
    back = next(step for step in steps[steps.index(preempted) :] if last in [c.sequence for c in step.chunks])
    (chunk,) = [c for c in back.chunks if c.sequence is last]
    if host_pages:
        assert [m.target for m in preempted.pages_out] == [m.source for m in back.pages_in] == [1, 2]
        assert (chunk.start, chunk.count) == (4, 1)
    else:
        assert not preempted.pages_out
        assert (chunk.start, chunk.count) == (0, 5)
    assert first.status == last.status == "finished"
    assert len(first.tokens) == len(last.tokens) == 9
    engine.nothing_is_held()


def test_pages_behind_the_window_of_every_layer_are_given_up():
    scheduler = Scheduler(Pages(5, 2), rows=1, chunk=3, window=4)
    engine = Engine(scheduler)
    sequence = engine.add(Request(tuple(range(1, 10)), 30))  # 38 tokens in a pool for 8
    most = 0
    while scheduler.running or scheduler.waiting:
        step = scheduler.plan()
        most = max(most, scheduler.pages.statistics().in_use)
        engine.run(step)
        if sequence.computed >= 20:
            assert sequence.pages[: (sequence.computed - 3) // 2] == [0] * ((sequence.computed - 3) // 2)
        scheduler.advance(step, [[7]] * len(step.draws))
    assert len(sequence.tokens) == 39
    assert most <= 4


def test_new_weights_find_nothing_of_the_old_and_texts_go_on():
    scheduler = Scheduler(Pages(64, 4), rows=2)
    engine = Engine(scheduler)
    old = engine.add(Request(tuple(range(1, 10)), 4, fingerprint=b"1"))
    step = engine.scheduler.plan()
    with pytest.raises(ValueError, match="advance"):
        scheduler.restart(lambda fingerprint: b"2")
    engine.run(step)
    engine.advance(step, [[7]])
    scheduler.restart(lambda fingerprint: b"2")
    engine.add(Request(tuple(range(1, 10)), 4, fingerprint=b"2"))
    step = scheduler.plan()
    assert planned(step) == [(0, 0, 10), (1, 0, 9)]
    assert old.tokens == [*range(1, 10), 7]
    engine.run(step)
    engine.advance(step, [[7], [7]])
    assert engine.drain() == 3


def test_the_same_requests_give_the_same_steps():
    def steps() -> list:
        scheduler, found = Scheduler(Pages(12, 2), rows=4, chunk=5, host_pages=6), []
        engine = Engine(scheduler)
        for i in range(12):
            engine.add(Request((1, 2, 1 + i % 3, 1, 2)[: 2 + i % 4], 6 + i % 3, n=1 + i % 2))
        while scheduler.running or scheduler.waiting:
            step = scheduler.plan()
            engine.run(step)
            found.append((planned(step), [list(c.sequence.pages) for c in step.chunks], step.copies, step.pages_out, step.pages_in))
            engine.advance(step, engine.draw(step))
        assert any(step[3] for step in found)
        return found

    assert steps() == steps()


def test_what_no_step_can_hold_is_refused_and_the_rest_goes_on():
    scheduler = Scheduler(Pages(5, 4), rows=2, chunk=8)
    engine = Engine(scheduler)
    engine.add(Request((1,) * 9, 8))  # 16 tokens: all four pages
    for request, message in (
        (Request((1,) * 9, 9), r"9 tokens and max_new_tokens=9 need 5 pages of 4 tokens, and the pool has 4; raise pages\.count=5"),
        (Request((1,), 1, n=3), r"n=3 .* rows=2"),
        (Request((1,) * 9, 1, whole=9), "first 9 tokens .* chunk=8"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler.add(request)
    engine.drain()
    engine.nothing_is_held()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Request((), 1), "prompt is empty"),
        (lambda: Request((1,), 0), "max_new_tokens=0"),
        (lambda: Request((1,), 1, n=0), "n=0"),
        (lambda: Request((1,), 1, whole=2), "whole=2"),
        (lambda: Scheduler(Pages(4, 2), 0), "rows=0"),
        (lambda: Scheduler(Pages(4, 2), 1, chunk=0), "chunk=0"),
        (lambda: Scheduler(Pages(4, 2), 1, window=0), "window=0"),
        (lambda: Scheduler(Pages(4, 2), 4, budget=3), "budget=3 .* rows=4"),
        (lambda: Scheduler(None, 4), "pages=None and states=False"),
        (lambda: Scheduler(None, 4, states=True, host_pages=3), "host_pages=3"),
    ],
)
def test_misuse_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_steps_are_advanced_once_and_with_a_draw_for_each():
    scheduler = Scheduler(Pages(16, 4), rows=2)
    add(scheduler, 3)
    step = scheduler.plan()
    with pytest.raises(ValueError, match="before the last step was advanced"):
        scheduler.plan()
    with pytest.raises(ValueError, match="0 entries for the 1 sequences"):
        scheduler.advance(step, [])
    with pytest.raises(ValueError, match="3 sequences, and rows=2"):
        scheduler.advance(step, [[1, 2, 3]])
    assert scheduler.running[0].computed == 0
    one_token_each(scheduler, step)
    with pytest.raises(ValueError, match="not the one that plan"):
        one_token_each(scheduler, step)
