"""The device's side of the engine: caches, and the programs that compute a step of the scheduler.

A program is compiled for a number of rows that decode and of tokens of prompts, of which there are few (`Sizes`); whatever a step has is
padded to the next. So nothing is compiled once each has been.
"""

from collections.abc import Sequence as Several
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from lmx.core.execution import Execution
from lmx.core.tree import Tree
from lmx.infer.steps import Chunk, Move, Sequence, Step
from lmx.kernels.paged import View
from lmx.models import rwkv, transformer
from lmx.models.attention import Pages
from lmx.models.config import RWKV, EncoderDecoder, Model, Transformer
from lmx.models.transformer import Paged, Source

MOVES = 16
"""Pages, or states, that one program moves."""


@dataclass(frozen=True)
class Sizes:
    """What programs are compiled for.

    Attributes:
      rows: sequences that run at a time.
      chunk: tokens of prompts in one step.
      prompts: prompts that share a step.
    """

    rows: int
    chunk: int
    prompts: int

    @property
    def decodes(self) -> tuple[int, ...]:
        """Rows of a step that only decodes: powers of two, and all."""
        return (*(2**i for i in range(self.rows.bit_length()) if 2**i < self.rows), self.rows)

    @property
    def prefills(self) -> tuple[int, ...]:
        """Tokens of prompts: few, or as many as there can be."""
        return (max(1, self.chunk // 8), self.chunk) if self.chunk > 16 else (self.chunk,)

    @property
    def all(self) -> tuple[tuple[int, int], ...]:
        """Pairs of rows that decode and tokens of prompts."""
        return (*((rows, 0) for rows in self.decodes), *((rows, tokens) for tokens in self.prefills for rows in (0, self.rows)))

    def least(self, rows: int, tokens: int) -> tuple[int, int]:
        """The smallest that holds so many."""
        return min((pair for pair in self.all if pair[0] >= rows and pair[1] >= tokens and bool(pair[1]) == bool(tokens)), key=sum)


class PagedRunner:
    """Of a transformer: its pages, and of an encoder-decoder what the encoder made of each sequence's source, in pages behind the pool's.

    Args:
      params: as `lmx.infer.weights.reading_params` gives them.
      pages, page: of the pool, and tokens of each.
      longest: tokens of a text, at most.
      dtype: of keys and values; int8 with a scale for each vector.
      host_pages: as of the scheduler.
    """

    def __init__(
        self,
        model: Transformer,
        params: Tree,
        execution: Execution,
        sizes: Sizes,
        *,
        pages: int,
        page: int,
        longest: int,
        dtype,
        host_pages: int = 0,
    ):
        self.model, self.params, self.sizes, self.page = model, params, sizes, page
        self._execution, self._static = execution, (model, execution)
        self._most = (sizes.rows + sizes.prompts) * -(-longest // page)
        self._source = -(-model.encoder.context // page) if isinstance(model, EncoderDecoder) else 0
        self._pool = pages
        self.layers = transformer.empty_pages(model, pages + sizes.rows * self._source, page, dtype)
        self._host = jax.tree.map(lambda a: np.zeros((host_pages + 1, *a.shape[1:]), a.dtype), self.layers) if host_pages else None
        self._sources: dict[int, int] = {}  # tokens of each slot's source
        self._spans = model.rope_scaling is not None and model.rope_scaling.kind in ("dynamic", "longrope")

    def move(self, step: Step) -> None:
        """What stands before the step."""
        forks = [Move(*pair) for m in step.forks for pair in zip(self._of_source(m.source), self._of_source(m.target), strict=True)]
        self._sources |= {m.target: self._sources[m.source] for m in step.forks}
        for moves in _some(forks):
            self.layers = _copied(self.layers, _ids(moves, 0), _ids(moves, 1))
        for moves in _some(step.pages_out):
            found = jax.device_get(_taken(self.layers, _ids(moves, 0)))
            jax.tree.map(lambda host, new, to=[m.target for m in moves]: host.__setitem__(to, new[: len(to)]), self._host, found)
        for moves in _some(step.copies):
            self.layers = _copied(self.layers, _ids(moves, 0), _ids(moves, 1))
        for moves in _some(step.pages_in):
            new = jax.tree.map(lambda host, ids=_ids(moves, 0): host[ids], self._host)
            self.layers = _put(self.layers, new, _ids(moves, 1))

    def start(self, sequence: Sequence, source: Several[int] | None) -> None:
        """Reads the source of a sequence that begins to run."""
        if not self._source:
            return
        self._sources[sequence.slot] = len(source)
        self._read(source, self._of_source(sequence.slot))

    def _read(self, source: Several[int], pages: np.ndarray) -> None:
        length = next(n for n in self._source_lengths() if n >= len(source))
        tokens, segments, at = (np.zeros((1, length), np.int32) for _ in range(3))
        here = np.arange(len(source))
        tokens[0, : len(source)], segments[0, : len(source)] = source, 1
        at[0, : len(source)] = pages[here // self.page] * self.page + here % self.page
        self.layers = _read(self._static, self.params, self.layers, Source(tokens, segments=segments), at[0])

    def _source_lengths(self) -> list[int]:
        """Of sources, in the programs that read them: twice the last each time."""
        most = -(-self.model.encoder.context // 16)
        return [16 * n for n in (*(2**i for i in range(most.bit_length()) if 2**i < most), most)]

    def compute(self, step: Step, take: Several[int], spans: Several[int] | None = None) -> Float[Array, "rows embed"]:
        """Hidden states of the last tokens of the chunks `take`, in that order; `spans`: of each chunk's text, its length at least, where the
        model asks for it."""
        size = self.sizes.least(len(step.decodes), sum(c.count for c in step.prefills))
        return self._run(step, size, take, spans)

    def warm_up(self) -> None:
        """Compiles every program."""
        self.move(Step(copies=[Move(0, 0)]))
        if self._host is not None:
            self.move(Step(pages_out=[Move(0, 0)], pages_in=[Move(0, 0)]))
        for length in self._source_lengths() if self._source else []:
            self._read([0] * min(length, self.model.encoder.context), np.zeros(self._source, np.int32))
        for size in self.sizes.all:
            self._run(Step(), size, [], [] if self._spans else None)

    def _run(self, step: Step, size: tuple[int, int], take: Several[int], spans: Several[int] | None) -> Float[Array, "rows embed"]:
        decodes, prefills, (singles, chunk) = step.decodes, step.prefills, size
        rows = singles + (self.sizes.prompts if chunk else 0)
        tokens, slots, lengths = np.zeros((1, singles + chunk), np.int32), np.zeros(singles + chunk, np.int32), np.zeros(rows, np.int32)
        queries, pages, first = np.arange(rows + 1, dtype=np.int32), np.zeros(self._most, np.int32), np.zeros(rows + 1, np.int32)
        source_pages, source_lengths = np.zeros((rows, self._source), np.int32), np.zeros(rows, np.int32)
        at_least = np.zeros(singles + chunk, np.int32)
        used, last, token = 0, [], singles
        for i, one in enumerate([*decodes, *[None] * (singles - len(decodes)), *prefills]):
            first[i] = used
            if i >= singles:
                queries[i] = token
            if one is None:
                continue
            sequence, begin = one.sequence, i if i < singles else token
            held = one.start + one.count
            own = np.asarray(sequence.pages[: -(-held // self.page)], np.int32)
            places, here = np.arange(one.start, held), slice(begin, begin + one.count)
            tokens[0, here] = sequence.tokens[one.start : held]
            slots[here] = own[places // self.page] * self.page + places % self.page
            pages[used : used + len(own)] = own
            at_least[here] = 0 if spans is None else spans[len(last)]
            lengths[i], used = held, used + len(own)
            if self._source:
                source_pages[i], source_lengths[i] = self._of_source(sequence.slot), self._sources[sequence.slot]
            last.append(begin + one.count - 1)
            token += 0 if i < singles else one.count
        end = singles + len(prefills)
        first[end:], queries[end:] = used, token if chunk else singles
        source = None
        if self._source:
            source = View(source_pages.reshape(-1), np.arange(rows + 1, dtype=np.int32) * self._source, source_lengths, queries, singles)
        view = View(pages, first, lengths, queries, singles)
        taken = np.zeros(self.sizes.rows, np.int32)
        taken[: len(take)] = [last[i] for i in take]
        there = Pages(view, slots, source, None if spans is None else at_least)
        self.layers, hidden = _compute(self._static, self.params, self.layers, tokens, there, taken)
        return hidden

    def _of_source(self, slot: int) -> np.ndarray:
        first = self._pool + (slot - 1) * self._source
        return np.arange(first, first + self._source, dtype=np.int32)


class StateRunner:
    """Of a recurrent model: a state for each slot, of which slot 0 is nobody's."""

    def __init__(self, model: RWKV, params: Tree, execution: Execution, sizes: Sizes, *, dtype):
        self.model, self.params, self.sizes, self._static = model, params, sizes, (model, execution)
        self._empty = rwkv.empty_cache(model, 1, 0, dtype)
        self.states = jax.tree.map(lambda a: jnp.repeat(a, sizes.rows + 1, 0), self._empty)

    def move(self, step: Step) -> None:
        """What stands before the step."""
        for moves in _some(step.forks):
            self.states = _copied(self.states, _ids(moves, 0), _ids(moves, 1))

    def start(self, sequence: Sequence, source: Several[int] | None) -> None:
        """An empty state for a sequence that begins to run."""
        self.states = _put(self.states, self._empty, np.array([sequence.slot], np.int32))

    def compute(self, step: Step, take: Several[int], spans: Several[int] | None = None) -> Float[Array, "rows embed"]:
        """As of `PagedRunner`; prompts one after another."""
        found: list[np.ndarray] = []
        if step.decodes:
            rows, _ = self.sizes.least(len(step.decodes), 0)
            found.append(jax.device_get(self._run(step.decodes, rows, 1))[: len(step.decodes)])
        for chunk in step.prefills:
            found.append(jax.device_get(self._run([chunk], 1, self.sizes.least(0, chunk.count)[1])))
        hidden = np.zeros((self.sizes.rows, self.model.embed), found[0].dtype)
        hidden[: len(take)] = np.concatenate(found)[np.asarray(take, np.int32)]
        return hidden

    def warm_up(self) -> None:
        """Compiles every program."""
        self.move(Step(forks=[Move(0, 0)]))
        self.states = _put(self.states, self._empty, np.array([0], np.int32))
        for rows, tokens in self.sizes.all:
            if not tokens or not rows:
                self._run([], rows or 1, tokens or 1)

    def _run(self, chunks: Several[Chunk], rows: int, length: int) -> Float[Array, "rows embed"]:
        tokens, segments, slots = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32), np.zeros(rows, np.int32)
        last = np.zeros(rows, np.int32)
        for i, chunk in enumerate(chunks):
            tokens[i, : chunk.count] = chunk.sequence.tokens[chunk.start : chunk.start + chunk.count]
            segments[i, : chunk.count], slots[i], last[i] = 1, chunk.sequence.slot, chunk.count - 1
        self.states, hidden = _recur(self._static, self.params, self.states, tokens, segments, slots, last)
        return hidden


def runner(model: Model, params: Tree, execution: Execution, sizes: Sizes, *, dtype, **pages) -> PagedRunner | StateRunner:
    """That of a model."""
    if isinstance(model, RWKV):
        return StateRunner(model, params, execution, sizes, dtype=execution.precision.compute)
    return PagedRunner(model, params, execution, sizes, dtype=dtype, **pages)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _compute(static, params: Tree, layers: Tree, tokens: Array, pages: Pages, take: Array) -> tuple[Tree, Array]:
    model, execution = static
    output = transformer.forward(params, model, tokens, cache=Paged(layers, pages), execution=execution)
    return output.cache.layers, output.hidden[0, take]


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _recur(static, params: Tree, states: Tree, tokens: Array, segments: Array, slots: Array, last: Array) -> tuple[Tree, Array]:
    model, execution = static
    own = jax.tree.map(lambda a: a[slots], states)
    output = rwkv.forward(params, model, tokens, segments=segments, cache=own, execution=execution)
    states = jax.tree.map(lambda a, new: a.at[slots].set(new), states, output.cache)
    return states, output.hidden[jnp.arange(len(slots)), last]


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(static, params: Tree, layers: Tree, source: Source, slots: Array) -> Tree:
    model, execution = static
    return transformer.read_source(params, model, source, layers, slots, execution)


@jax.jit
def _taken(tree: Tree, ids: Array) -> Tree:
    return jax.tree.map(lambda a: a[ids], tree)


@partial(jax.jit, donate_argnums=0)
def _copied(tree: Tree, source: Array, target: Array) -> Tree:
    return jax.tree.map(lambda a: a.at[target].set(a[source]), tree)


@partial(jax.jit, donate_argnums=0)
def _put(tree: Tree, new: Tree, ids: Array) -> Tree:
    return jax.tree.map(lambda a, b: a.at[ids].set(b), tree, new)


def _some(moves: Several[Move]) -> list[Several[Move]]:
    """So many at a time as a program moves. (What one list moves is read before any of it is written: no target is another's source.)"""
    return [moves[i : i + MOVES] for i in range(0, len(moves), MOVES)]


def _ids(moves: Several[Move], which: int) -> np.ndarray:
    """Sources (0) or targets (1), and the scrap page behind them."""
    return np.array([move[which] for move in moves] + [0] * (MOVES - len(moves)), np.int32)
