"""Which page of the cache holds what: reference counts, copy on write, and full pages found again by what they hold.

A page is `size` token slots in every layer's K and V (PagedAttention: Kwon et al., 2023). All of it is bookkeeping on the host; what it decides
(copy this page to that one) the engine does on the device. Page 0 is never given out: what is written for padding goes there.

A full page may be registered under a key: a hash of the whole text up to its end, and of a *fingerprint*, bytes from the caller that stand for
everything else that its K and V depend on: the weights' version, the adapter, image, encoder input or soft prompt, and the whole of a
prefix read in both directions. So equal keys mean equal K and V. A registered page that nobody reads any more is kept until its room is
needed: least recently used first, and of one text the end before the beginning, which more texts may share.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

DIGEST = 32  # bytes


def root(fingerprint: bytes) -> bytes:
    """The key before the first page: the parent of a text's first page, and how the key of each of its pages begins."""
    return blake2b(fingerprint, digest_size=DIGEST, person=b"lmx root").digest()


def child(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of the full page with `tokens` behind the page with key `parent` (or behind `root`)."""
    text = blake2b(parent, digest_size=DIGEST, person=b"lmx page")
    text.update(array("q", tokens).tobytes())
    return parent[:DIGEST] + text.digest()


def chain(fingerprint: bytes, tokens: Sequence[int], size: int) -> list[bytes]:
    """The keys of a text's full pages."""
    keys = [root(fingerprint)]
    for start in range(0, len(tokens) - size + 1, size):
        keys.append(child(keys[-1], tokens[start : start + size]))
    return keys[1:]


@dataclass(frozen=True)
class Statistics:
    """Where the pages are."""

    in_use: int
    """Pages with a reader."""
    cached: int
    """Pages without one, kept in case that their text comes again; as good as free."""
    free: int
    fragmentation: float
    """Share of the token slots of pages in use that hold no token."""
    hit_rate: float
    """Share of the full pages asked for by `take` that were found."""


class Pages:
    """Pages 1 … count - 1, of `size` tokens each."""

    def __init__(self, count: int, size: int):
        if count < 2:
            raise ValueError(f"pages={count} must be at least 2: page 0 is kept for padding")
        if size < 1:
            raise ValueError(f"page={size} must be at least 1, the tokens of a page; use 16, say")
        self.count, self.size = count, size
        self.readers = [0] * count
        self.filled = [0] * count
        """Tokens in each page."""
        self.keys: list[bytes | None] = [None] * count
        """The key under which each page is registered."""
        self._parents: list[bytes | None] = [None] * count
        self._free = list(range(count - 1, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # the next to be evicted first
        self._by_key: dict[bytes, int] = {}
        self._asked = self._found = 0

    @property
    def available(self) -> int:
        """How many pages `allocate` can give."""
        return len(self._free) + len(self._cached)

    def allocate(self, n: int) -> list[int]:
        """n pages with nothing in them and one reader each. Raises ValueError when there are not so many."""
        if n > self.available:
            raise ValueError(f"{n} pages asked for and {self.available} available; raise pages={self.count}, or release some first")
        return [self._take_one() for _ in range(n)]

    def _take_one(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            self._unregister(page)
        self.readers[page], self.filled[page] = 1, 0
        return page

    def share(self, pages: Iterable[int]) -> None:
        """One more reader for each: of pages that have some, or that `match` has just found. Page 0, which stands for no page, is passed over."""
        for page in pages:
            if not page:
                continue
            if not self.readers[page] and page not in self._cached:
                raise ValueError(f"page {page} is free: there is nothing in it to share")
            if not self.readers[page]:
                del self._cached[page]
            self.readers[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One reader less for each of a text's pages, given in the order of the text; page 0 is passed over. Without readers, registered
        pages stay to be found, others are free. Raises ValueError for a page that has no readers."""
        for page in reversed(pages):  # the end first, so that `_retire` has nothing to put behind it
            if not page:
                continue
            if self.readers[page] < 1:
                raise ValueError(f"page {page} is released and has no readers")
            self.readers[page] -= 1
            if not self.readers[page]:
                self._retire(page)

    def _retire(self, page: int) -> None:
        if self.keys[page] is None:
            self._free.append(page)
            return
        self._cached[page] = None
        # What comes before it in a text leaves the pool after it.
        parent = self._by_key.get(self._parents[page])
        while parent in self._cached:
            self._cached.move_to_end(parent)
            parent = self._by_key.get(self._parents[parent])

    def writable(self, page: int) -> tuple[int, int | None]:
        """The page in which one of `page`'s readers may write in its place, and the page that must be copied there first, or None.

        With more than one reader it is another page, which that reader now holds instead; a page of its own is no longer registered, since
        what it holds changes. Raises ValueError when a page is needed and none is available, or `page` has no readers.
        """
        if self.readers[page] < 1:
            raise ValueError(f"page {page} has no readers, so nobody may write in it")
        if self.readers[page] == 1:
            self._unregister(page)
            return page, None
        (copy,) = self.allocate(1)
        self.readers[page] -= 1
        return copy, page

    def fill(self, pages: Sequence[int], start: int, stop: int) -> None:
        """Notes that a text's tokens start … stop - 1 are in its pages (for `statistics`)."""
        size = self.size
        for index in range(start // size, -(-stop // size)):
            self.filled[pages[index]] = min(stop - index * size, size)

    def found(self, keys: Sequence[bytes]) -> list[int]:
        """The pages registered under the first of a text's keys, up to the first key that is not registered. They gain no reader."""
        pages = []
        for key in keys:
            page = self._by_key.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def match(self, fingerprint: bytes, tokens: Sequence[int]) -> list[int]:
        """The pages that hold the beginning of a prompt (to be shared before anything is allocated), never all of it: its last token must be
        computed, for what follows is drawn from there."""
        return self.found(chain(fingerprint, tokens[:-1], self.size))

    def take(self, keys: Sequence[bytes], behind: int = 0) -> list[int]:
        """What is `found`, shared, and counted in the hit rate; page 0 in place of the first `behind`, which nothing attends to any more."""
        found = self.found(keys)
        pages = [0] * min(behind, len(found)) + found[behind:]
        self.share(pages)
        self._asked, self._found = self._asked + len(keys), self._found + len(pages)
        return pages

    def register(self, page: int, parent: bytes, key: bytes) -> None:
        """Full page `page`, which is being read, can be found as `key`, behind `parent`. Does nothing where another page already is."""
        if self.readers[page] < 1:
            raise ValueError(f"page {page} has no readers; a page is registered by who reads it")
        if key not in self._by_key and self.keys[page] is None:
            self._by_key[key] = page
            self.keys[page], self._parents[page] = key, parent

    def _unregister(self, page: int) -> None:
        if self.keys[page] is not None:
            del self._by_key[self.keys[page]]
            self.keys[page] = self._parents[page] = None

    def forget(self, fingerprint: bytes) -> None:
        """Nothing is found under this fingerprint any more. Who reads a page goes on doing so."""
        beginning = root(fingerprint)
        self._forget([page for key, page in self._by_key.items() if key.startswith(beginning)])

    def clear(self) -> None:
        """Nothing is found any more."""
        self._forget(list(self._by_key.values()))

    def _forget(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._unregister(page)
            if page in self._cached:
                del self._cached[page]
                self._free.append(page)

    def statistics(self) -> Statistics:
        used = [page for page in range(1, self.count) if self.readers[page]]
        tokens = sum(self.filled[page] for page in used)
        return Statistics(
            in_use=len(used),
            cached=len(self._cached),
            free=len(self._free),
            fragmentation=1 - tokens / (len(used) * self.size) if used else 0.0,
            hit_rate=self._found / self._asked if self._asked else 0.0,
        )

    def check(self) -> None:
        """Raises AssertionError where the books do not agree with themselves. For tests: slow."""
        used = {page for page in range(1, self.count) if self.readers[page]}
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a page is free twice"
        assert sorted([*used, *free, *cached]) == list(range(1, self.count)), "every page is in use, cached or free, and only one of them"
        assert min(self.readers) >= 0, "no page has fewer than no readers"
        assert not self.readers[0], "page 0 is never given out"
        assert self._by_key == {key: page for page, key in enumerate(self.keys) if key is not None}, "a key and its page name each other"
        assert all(self.keys[page] is not None for page in cached), "what is cached can be found"
        assert not any(self.keys[page] is not None for page in free), "what is free cannot"
        order = {page: i for i, page in enumerate(self._cached)}
        for page in cached:
            parent = self._by_key.get(self._parents[page])
            assert parent not in order or order[page] < order[parent], "of one text, the end is evicted before the beginning"


class Slots:
    """Places 1 … count that one sequence holds at a time: of recurrent states, of encoder outputs, or of pages in host memory. 0 is no place."""

    def __init__(self, count: int):
        self.count = count
        self._free = list(range(count, 0, -1))
        self._taken: set[int] = set()

    @property
    def available(self) -> int:
        return len(self._free)

    def take(self) -> int:
        slot = self._free.pop()
        self._taken.add(slot)
        return slot

    def release(self, slot: int) -> None:
        """Raises ValueError for a slot that is not taken."""
        if slot not in self._taken:
            raise ValueError(f"slot {slot} is released and not taken")
        self._taken.remove(slot)
        self._free.append(slot)
