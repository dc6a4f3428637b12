"""Which requests run next: under random arrivals, cancellations and updates, and case by case."""

import random
from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from toy_engine import Engine, World

from lmx.infer.pages import Pages, chain
from lmx.infer.scheduler import Scheduler
from lmx.infer.steps import Request, Sequence, Step

SIZES = {
    "kind": ["pages", "pages", "window", "states", "both"],
    "size": range(1, 5),
    "pages": range(3, 17),
    "rows": range(1, 8),
    "chunk": range(1, 9),
    "budget": range(9),
    "window": range(1, 10),
    "host_pages": [0, 5, 20],
    "forks": [False, True],
}
REQUESTS = {
    "new": range(1, 13),
    "n": range(1, 4),
    "priority": [0, 0, 1],
    "image": [b"", b"", b"image"],
    "reuse": [True, True, False],
    "whole": [0, 0, 3],
    "written": [0, 0, 5],
}


def one_of_each(choices: dict) -> dict:
    return {name: st.sampled_from(list(several)) for name, several in choices.items()}


class Machine(RuleBasedStateMachine):
    """Finds the shortest way to a mistake."""

    @initialize(**one_of_each(SIZES))
    def start(self, **sizes):
        self.world = World(**sizes)

    @rule(prompt=st.lists(st.integers(1, 2), min_size=1, max_size=14), **one_of_each(REQUESTS))
    def add(self, **request):
        self.world.add(**request)

    @rule(steps=st.integers(1, 6), ahead=st.booleans())
    def go(self, steps, ahead):
        self.world.go(steps, ahead)

    @precondition(lambda self: self.world.step is not None)
    @rule()
    def advance(self):
        self.world.advance()

    @precondition(lambda self: self.world.requests)
    @rule(which=st.integers(0, 1000))
    def cancel(self, which):
        self.world.cancel(which % len(self.world.requests))

    @rule(forget=st.booleans())
    def update(self, forget):
        self.world.update(forget)

    @invariant()
    def books_agree(self):
        if hasattr(self, "world"):
            self.world.books_agree()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.finish()


TestScheduler = Machine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=30, deadline=None, derandomize=True, report_multiple_bugs=False)


def test_under_load_every_text_is_computed_from_itself_and_ends():
    seen = Counter()
    for seed in range(200):
        rng = random.Random(seed)
        world = World(**{name: rng.choice(several) for name, several in SIZES.items()})
        beginning = rng.choices([1, 2], k=6)
        for _ in range(60):
            what = rng.random()
            if what < 0.4:
                prompt = beginning[: rng.randrange(7)] + rng.choices([1, 2], k=rng.randrange(1, 9))
                world.add(prompt, **{name: rng.choice(several) for name, several in REQUESTS.items()})
            elif what < 0.45 and world.requests:
                world.cancel(rng.randrange(len(world.requests)))
            elif what < 0.47:
                world.update(rng.random() < 0.5)
            else:
                world.go(rng.randrange(1, 4), rng.random() < 0.5)
            world.books_agree()
        world.finish()
        seen += world.seen
    assert len(seen) == 18, f"not everything happened: {seen}"
    assert min(seen.values()) >= 5, f"not everything happened often enough: {seen}"


def add(scheduler: Scheduler, length: int, new: int = 4, **others) -> Sequence:
    return scheduler.add(Request(tuple(range(1, length + 1)), new, **others))


def one_token_each(scheduler: Scheduler, step: Step):
    return scheduler.advance(step, [[7]] * len(step.draws))


def planned(step: Step) -> list[tuple[int, int, int]]:
    return [(c.sequence.order[1], c.start, c.count) for c in step.chunks]


def test_decodes_come_first_and_prompts_share_a_chunk_and_what_is_left_of_the_budget():
    scheduler = Scheduler(Pages(64, 4), rows=4, chunk=8, budget=9)
    for length in (3, 10, 9, 5):
        add(scheduler, length, reuse=False)
    expected = [
        [(0, 0, 3), (1, 0, 5)],
        [(0, 3, 1), (1, 5, 5), (2, 0, 3)],
        [(0, 4, 1), (1, 10, 1), (2, 3, 6), (3, 0, 1)],
        [(0, 5, 1), (1, 11, 1), (2, 9, 1), (3, 1, 4)],
    ]
    found = []
    for _ in expected:
        step = scheduler.plan()
        found.append(planned(step))
        one_token_each(scheduler, step)
    # Of the second prompt's last two tokens it was a prefill; of the third's last one, a decode: those lists are told apart by what lacks.
    assert [sorted(step) for step in found] == [sorted(step) for step in expected]


@pytest.mark.parametrize(("length", "admitted"), [(4, True), (5, False)])
def test_who_comes_in_leaves_a_page_for_each_who_runs(length, admitted):
    scheduler = Scheduler(Pages(6, 2), rows=2)
    add(scheduler, 3)
    one_token_each(scheduler, scheduler.plan())
    newcomer = add(scheduler, length, 1, reuse=False)
    scheduler.plan()
    assert (newcomer.status == "running") == admitted


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


@pytest.mark.parametrize(("window", "size"), [(2, 1), (2, 4), (5, 4), (6, 4), (9, 4), (10, 4), (7, 3)])
def test_a_window_needs_as_many_pages_as_it_ever_lies_in(window, size):
    need = max(last // size - (last - window + 1) // size + 1 for last in range(window, window + 40))
    with pytest.raises(ValueError, match=f"need {need} pages"):
        Scheduler(Pages(need, size), rows=1, window=window).add(Request((1,) * 30, 30))
    scheduler = Scheduler(Pages(need + 1, size), rows=1, window=window)
    engine = Engine(scheduler)
    sequence = engine.add(Request((1,) * 30, 30))
    while scheduler.running or scheduler.waiting:
        step = scheduler.plan()
        assert step.chunks
        assert not step.preempted
        engine.run(step)
        scheduler.advance(step, [[7]] * len(step.draws))
    assert len(sequence.tokens) == 60


def test_where_host_memory_does_not_suffice_tokens_are_computed_again():
    scheduler = Scheduler(Pages(9, 1), rows=2, states=True, host_pages=100)
    engine = Engine(scheduler)
    preempted = []
    for priority in range(9, 0, -1):  # each before all that are there
        engine.add(Request((priority,), 8, priority=priority))
        for _ in range(5):
            step = scheduler.plan()
            engine.run(step)
            preempted += [s.host_slot for s in step.preempted]
            engine.advance(step, [[7]] * len(step.draws))
    assert {1, 2} <= set(preempted)
    assert 0 in preempted
    while scheduler.running or scheduler.waiting:
        step = scheduler.plan()
        engine.run(step)
        engine.advance(step, [[7]] * len(step.draws))
    engine.nothing_is_held()


def test_a_text_that_two_computed_still_goes_from_its_end():
    scheduler = Scheduler(Pages(16, 2), rows=2)
    add(scheduler, 4, 1)
    longer = add(scheduler, 4, 4)
    while scheduler.running or scheduler.waiting:
        one_token_each(scheduler, scheduler.plan())
    keys = chain(b"", longer.tokens[:6], 2)
    pages = scheduler.pages
    held = pages.found(keys)
    assert len(held) == 3
    assert pages.allocate(15)[-3:] == held[::-1]


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
        (Request((1,) * 9, 9), r"9 tokens and max_new_tokens=9 need 5 pages of 4 tokens, and the pool has 4; raise pages=5"),
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
        (lambda: Request((1, 1), 1, written=2), "written=2 of the 2 tokens"),
        (lambda: Scheduler(Pages(4, 2), 1, window=2).add(Request((1, 1), 1, written=1)), r"\(written\), which a window=2 would give up"),
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


def test_so_many_prompts_share_a_step_at_most():
    scheduler = Scheduler(Pages(64, 4), rows=8, chunk=32, prompts=2)
    for length in (3, 4, 5):
        add(scheduler, length, reuse=False)
    assert planned(scheduler.plan()) == [(0, 0, 3), (1, 0, 4)]


def test_what_depends_on_something_new_is_computed_anew():
    scheduler = Scheduler(Pages(64, 4), rows=2, chunk=32)
    sequence = add(scheduler, 6, 9)
    one_token_each(scheduler, scheduler.plan())
    scheduler.renew(sequence, b"longer")
    assert (sequence.status, sequence.computed, sequence.pages) == ("waiting", 0, [])
    assert planned(scheduler.plan()) == [(0, 0, 7)]
    with pytest.raises(ValueError, match="while a step runs"):
        scheduler.renew(sequence, b"")
