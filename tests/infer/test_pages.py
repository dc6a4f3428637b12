"""The page allocator against a plain model of who holds what, under random operations."""

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from lmx.infer.pages import Pages, Slots, chain, child, root

PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=12)
VERSIONS = st.sampled_from([b"weights 1", b"weights 2"])


class Text:
    """Somebody who reads pages: what it takes each of them to hold."""

    def __init__(self, version: bytes, tokens: list[int], pages: list[int]):
        self.version, self.tokens, self.pages = version, tokens, pages


class Machine(RuleBasedStateMachine):
    texts = Bundle("texts")

    @initialize(count=st.integers(2, 16), size=st.integers(1, 3))
    def start(self, count, size):
        self.pages, self.alive = Pages(count, size), []
        self.store = {}  # page -> [version, the whole text up to the end of the page], as the engine's arrays would have it

    def write(self, text: Text, token: int) -> bool:
        """The next token of a text, or False where no page is left for it."""
        size, (index, offset) = self.pages.size, divmod(len(text.tokens), self.pages.size)
        shared = offset and self.pages.readers[text.pages[index]] > 1
        if (not offset or shared) and not self.pages.available:
            with pytest.raises(ValueError, match=r"raise pages="):
                self.pages.allocate(1)
            return False
        if not offset:
            text.pages += self.pages.allocate(1)
        else:
            page, source = self.pages.writable(text.pages[index])
            assert (source is not None) == shared
            if source is not None:
                self.store[page] = self.store[source]
            text.pages[index] = page
        assert sum(other.pages.count(text.pages[index]) for other in self.alive) <= 1
        text.tokens.append(token)
        self.store[text.pages[index]] = (text.version, tuple(text.tokens))
        self.pages.fill(text.pages, len(text.tokens) - 1, len(text.tokens))
        if offset == size - 1:
            keys = [root(text.version), *chain(text.version, text.tokens, size)]
            self.pages.register(text.pages[index], keys[-2], keys[-1])
        return True

    @rule(target=texts, version=VERSIONS, prompt=PROMPTS)
    def arrive(self, version, prompt):
        size = self.pages.size
        found = self.pages.match(version, prompt)
        assert len(found) * size < len(prompt)
        for i, page in enumerate(found):
            assert self.store[page] == (version, tuple(prompt[: (i + 1) * size]))
        assert self.pages.take(chain(version, prompt[:-1], size)) == found
        text = Text(version, prompt[: len(found) * size], found)
        self.alive.append(text)
        for token in prompt[len(found) * size :]:
            if not self.write(text, token):
                break
        return text

    @rule(text=texts, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def go_on(self, text, tokens):
        for token in tokens:
            self.write(text, token)

    @rule(target=texts, text=texts)
    def fork(self, text):
        self.pages.share(text.pages)
        self.alive.append(Text(text.version, list(text.tokens), list(text.pages)))
        return self.alive[-1]

    @rule(text=consumes(texts))
    def leave(self, text):
        self.alive.remove(text)
        self.pages.release(text.pages)

    @rule(text=consumes(texts))
    def a_free_page_is_not_released(self, text):
        self.alive.remove(text)
        self.pages.release(text.pages)
        for page in text.pages:
            if not self.pages.readers[page]:
                with pytest.raises(ValueError, match="no readers"):
                    self.pages.release([page])

    @rule(version=VERSIONS)
    def forget(self, version):
        self.pages.forget(version)
        for text in self.alive:
            if text.version == version:
                assert not self.pages.match(version, [*text.tokens, 0])

    @rule()
    def clear(self):
        self.pages.clear()
        assert self.pages.statistics().cached == 0

    @invariant()
    def books_agree(self):
        self.pages.check()
        readers = Counter(page for text in self.alive for page in text.pages)
        assert self.pages.readers == [readers[page] for page in range(self.pages.count)]
        found = self.pages.statistics()
        assert found.in_use == len(readers) <= self.pages.count - 1
        assert found.in_use + self.pages.available == self.pages.count - 1
        held = {page: tokens for text in self.alive for page, tokens in zip(text.pages, self.slots_held(text), strict=True)}
        assert found.fragmentation == pytest.approx(1 - sum(held.values()) / (len(held) * self.pages.size) if held else 0)
        for key, page in self.pages._by_key.items():
            version, tokens = self.store[page]
            assert chain(version, tokens, self.pages.size)[-1] == key, "what a key finds is what it says"
        for text in self.alive:
            for i, page in enumerate(text.pages):
                # A reader of a page that others have gone on writing in would find another text there.
                assert self.store[page] == (text.version, tuple(text.tokens[: (i + 1) * self.pages.size]))

    def slots_held(self, text: Text) -> list[int]:
        return [min(self.pages.size, len(text.tokens) - i * self.pages.size) for i in range(len(text.pages))]

    def teardown(self):
        if hasattr(self, "pages"):
            for text in self.alive:
                self.pages.release(text.pages)
            self.pages.clear()
            assert not any(self.pages.readers)
            assert self.pages.statistics().free == self.pages.count - 1


# 10,000 operations in all.
TestPages = Machine.TestCase
TestPages.settings = settings(max_examples=200, stateful_step_count=50, deadline=None, derandomize=True)


def registered(pages: Pages, fingerprint: bytes, tokens: list[int]) -> list[int]:
    held, parent = pages.allocate(len(tokens) // pages.size), root(fingerprint)
    for page, key in zip(held, chain(fingerprint, tokens, pages.size), strict=True):
        pages.register(page, parent, key)
        parent = key
    return held


def test_the_least_recently_used_text_goes_first_and_from_its_end():
    pages = Pages(7, 2)
    old, new = registered(pages, b"", [1, 2, 3, 4, 5, 6]), registered(pages, b"", [7, 8, 9, 10, 11, 12])
    pages.release(old)
    pages.release(new)
    pages.release(pages.take(chain(b"", [1, 2], 2)))  # only the old text's beginning is used again
    assert [pages.allocate(1)[0] for _ in range(6)] == [old[2], old[1], new[2], new[1], new[0], old[0]]


def test_a_beginning_that_its_readers_leave_first_still_outlives_the_end():
    pages = Pages(3, 1)
    first, second = registered(pages, b"", [1, 2])
    pages.release([first])
    pages.release([second])
    assert pages.allocate(1) == [second]
    assert pages.match(b"", [1, 2]) == [first]


@pytest.mark.parametrize(
    ("fingerprint", "tokens", "found"),
    [
        (b"a", [1, 2, 3, 4, 5], 2),
        (b"a", [1, 2, 3, 4], 1),  # its last token is computed
        (b"a", [1, 2, 9, 4, 5], 1),
        (b"a", [9, 2, 3, 4, 5], 0),
        (b"b", [1, 2, 3, 4, 5], 0),
        (b"a", [3, 4, 5], 0),  # the same tokens behind others
        (b"a", [], 0),
    ],
)
def test_a_page_is_found_by_everything_before_it(fingerprint, tokens, found):
    pages = Pages(5, 2)
    held = registered(pages, b"a", [1, 2, 3, 4])
    assert pages.match(fingerprint, tokens) == held[:found]


def test_keys_tell_apart_what_runs_together_when_written_down():
    keys = [child(root(f), t) for f, t in [(b"", [1, 2]), (b"\x01", [2]), (b"", [12]), (b"", [1]), (b"", [258]), (b"", [1, 2, 0])]]
    assert len({*keys, child(child(root(b""), [1]), [2])}) == 7


def test_statistics_say_what_is_where():
    pages = Pages(9, 4)
    held = pages.allocate(2)
    pages.fill(held, 0, 5)
    pages.release(registered(pages, b"", [0] * 8))
    pages.release(pages.take(chain(b"", [0] * 12, 4)))
    found = pages.statistics()
    assert (found.in_use, found.cached, found.free) == (2, 2, 4)
    assert found.fragmentation == 3 / 8
    assert found.hit_rate == 2 / 3


def test_written_in_place_a_page_is_no_longer_found():
    pages = Pages(5, 2)
    (page,) = registered(pages, b"", [1, 2])
    assert pages.writable(page) == (page, None)
    assert not pages.match(b"", [1, 2, 3])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Pages(1, 16), r"pages=1"),
        (lambda: Pages(8, 0), r"page=0"),
        (lambda: Pages(8, 2).allocate(8), "8 pages asked for and 7 available"),
        (lambda: Pages(8, 2).share([3]), "page 3 is free"),
        (lambda: Pages(8, 2).writable(3), "page 3 has no readers"),
        (lambda: Pages(8, 2).register(3, b"", b""), "page 3 has no readers"),
        (lambda: Slots(2).release(1), "slot 1 is released and not taken"),
    ],
)
def test_misuse_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
