"""The devices' side of the engine: caches, and the programs that compute a step of the scheduler.

Whatever a step has is padded to the next of a few sizes (`lmx.infer.sizes`), so nothing is compiled once each has been.
"""

from collections.abc import Sequence as Several
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from lmx.core.tree import Tree, map_named
from lmx.infer.given import Given
from lmx.infer.places import Place, where
from lmx.infer.sizes import Sizes
from lmx.infer.steps import Chunk, Move, Sequence, Step
from lmx.infer.texts import NONE, Opening, lead_of
from lmx.infer.weights import reading_params
from lmx.kernels.paged import View
from lmx.models import llava, rwkv, transformer
from lmx.models.attention import Pages
from lmx.models.config import RWKV, EncoderDecoder, Model, Transformer
from lmx.models.families import functions
from lmx.models.rope import by_length
from lmx.models.transformer import Embedded, Paged, Source
from lmx.models.vision_config import LLaVA
from lmx.parallel.attention import page_heads, write_pages
from lmx.parallel.rules import constrain

MOVES = 16
"""Pages, or states, that one program moves."""


class Stage:
    """Consecutive layers on their devices, mostly all there are: parameters, pages, and the programs that compute them.

    Args:
      pages, page: how many, and tokens of each.
      dtype: of keys and values; int8 with a scale for each vector.
      host_pages: pages in the host's memory.
    """

    def __init__(self, model: Transformer, place: Place, *, pages: int, page: int, dtype, host_pages: int):
        self.place, self.params, self._static = place, {}, (model, place)
        self.layers = self._empty(model, pages, page, dtype)
        self._host = jax.tree.map(lambda a: np.zeros((host_pages + 1, *a.shape[1:]), a.dtype), self.layers) if host_pages else None

    def _empty(self, model: Transformer, pages: int, page: int, dtype) -> Tree:
        place, shards = self.place, 1 if self.place.execution.rules is None else self.place.mesh.shape["tensor"]

        def empty() -> Tree:
            layers = transformer.empty_pages(model, pages, page, dtype, heads=page_heads(model.heads, model.key_heads, shards))
            return layers if place.whole else tuple(layer for group in layers for layer in group)[slice(*place.layers)]

        if place.mesh is None:
            return empty()
        at = jax.tree.map(lambda a: place.sharding((None, "kv_heads", *[None] * (a.ndim - 2)), a.shape), jax.eval_shape(empty))
        with place.entered():
            return jax.jit(empty, out_shardings=at)()

    def move(self, step: Step) -> None:
        """Pages, as the step says."""
        with self.place.entered():
            for moves in _some(step.pages_out):
                found = jax.device_get(_taken(self.layers, _ids(moves, 0)))
                jax.tree.map(lambda host, new, to=[m.target for m in moves]: host.__setitem__(to, new[: len(to)]), self._host, found)
            self.copy(step.copies)
            for moves in _some(step.pages_in):
                new = jax.tree.map(lambda host, ids=_ids(moves, 0): host[ids], self._host)
                self.layers = _put(self.layers, new, _ids(moves, 1))

    def copy(self, several: Several[Move]) -> None:
        """Pages to pages."""
        with self.place.entered():
            for moves in _some(several):
                self.layers = _copied(self.layers, _ids(moves, 0), _ids(moves, 1))

    def read(self, source: Source, slots: np.ndarray) -> None:
        """What an encoder makes of a source goes to pages."""
        with self.place.entered():
            self.layers = _read(self._static, self.params, self.layers, source, slots)

    def write(self, slots: np.ndarray) -> None:
        """The keys and values of an adapter's prefix go to pages."""
        with self.place.entered():
            self.layers = _written(self._static, self.params["virtual"], self.layers, slots)

    def look(self, image: np.ndarray) -> Array:
        """What stands in an image's places."""
        with self.place.entered():
            return _seen(self._static, self.params, image)

    def compute(self, x: Array, pages: Pages, take: np.ndarray, given: Embedded | None = None, latest: Array | None = None) -> Array:
        """What the layers make of tokens, some with vectors in their place and some yet to be read from `latest`, or of what the stage before
        gave; of the last stage the rows `take`."""
        with self.place.entered():
            self.layers, x = _compute(self._static, self.params, self.layers, x, pages, take, given, latest)
        return x


class PagedRunner:
    """Of a transformer: its pages, and of an encoder-decoder what the encoder made of each sequence's source, in pages behind the pool's.

    Where the stack is cut into stages, a step goes through one after the other: each is at work for its share of the time, and all together are as
    fast as one device that could hold everything, but for handing on `[tokens, embed]` numbers. No call waits for devices, so that what is
    computed for other requests meanwhile (`lmx.infer.replicas`) finds the stages that are free.

    Args:
      places: the stages.
      pages, page: of the pool, and tokens of each.
      longest: tokens of a text, at most.
      dtype: of keys and values; int8 with a scale for each vector.
      host_pages: as of the scheduler.
    """

    def __init__(
        self,
        model: Transformer,
        places: Several[Place],
        sizes: Sizes,
        *,
        pages: int,
        page: int,
        longest: int,
        dtype,
        host_pages: int = 0,
    ):
        self.model, self.sizes, self.page = model, sizes, page
        self._most = (sizes.rows + sizes.prompts) * -(-longest // page)
        self._source = -(-model.encoder.context // page) if isinstance(model, EncoderDecoder) else 0
        self._pool, self._swaps = pages, host_pages > 0
        kept = {"pages": pages + sizes.rows * self._source, "page": page, "dtype": dtype, "host_pages": host_pages}
        self.stages = tuple(Stage(model, place, **kept) for place in places)
        self._sources: dict[int, int] = {}  # tokens of each slot's source
        self._given = Given(model.table_size, sizes.rows, self.stages[0].look)
        self._spans, self._blanks = by_length(model.rope_scaling) is not None, model.block_positions

    @property
    def place(self) -> Place:
        """Where hidden states come out."""
        return self.stages[-1].place

    @property
    def params(self) -> Tree:
        """Those there, of which some make logits."""
        return self.stages[-1].params

    def load(self, params: Tree) -> None:
        """Takes parameters, in whatever form and wherever they are. The form to read them in is made there, so that for a moment there are two
        copies; what a device is to have of it then goes there."""
        read = _read_params(self.model, params, self.place)
        for stage in self.stages:
            stage.params = stage.place.weights(self.model, read)
        self._given.load(self.stages[0].params)

    def share(self, other: "PagedRunner") -> None:
        """Takes the parameters that another, over the same places, has."""
        for stage, there in zip(self.stages, other.stages, strict=True):
            stage.params = there.params
        self._given.load(self.stages[0].params)

    def move(self, step: Step) -> None:
        """What stands before the step."""
        forks = [Move(*pair) for m in step.forks for pair in zip(self._of_source(m.source), self._of_source(m.target), strict=True)]
        self._sources |= {m.target: self._sources[m.source] for m in step.forks}
        for stage in self.stages:
            stage.copy(forks)
            stage.move(step)

    def start(self, sequence: Sequence) -> None:
        """What its pages are to have before a sequence begins to run: an adapter's prefix, but for pages that were found; its source."""
        opening: Opening = sequence.request.beside
        if count := opening.prefix:
            places = np.arange(count)
            pages = np.array(sequence.pages, np.int32)
            pages[: sequence.registered] = 0
            for stage in self.stages:
                stage.write(pages[places // self.page] * self.page + places % self.page)
        if self._source:
            self._sources[sequence.slot] = len(opening.source)
            self._read(opening, self._of_source(sequence.slot))

    def _read(self, opening: Opening, pages: np.ndarray) -> None:
        source = np.array(opening.source, np.int32)
        length = next(n for n in self._source_lengths() if n >= len(source))
        tokens, segments, at = (np.zeros((1, length), np.int32) for _ in range(3))
        here = np.arange(len(source))
        tokens[0, : len(source)], segments[0, : len(source)] = np.maximum(source, 0), 1
        at[0, : len(source)] = pages[here // self.page] * self.page + here % self.page
        given = None
        if opening.vectors is not None:
            given = self._given.blank(length)
            self._given.put(given, here, opening, here)
        (stage,) = self.stages
        stage.read(Source(tokens, segments=segments, given=given), at[0])

    def _source_lengths(self) -> list[int]:
        """Of sources, in the programs that read them: twice the last each time."""
        most = -(-self.model.encoder.context // 16)
        return [16 * n for n in (*(2**i for i in range(most.bit_length()) if 2**i < most), most)]

    def compute(
        self, step: Step, take: Several[int], latest: Int[Array, "slots"], spans: Several[int] | None = None
    ) -> Float[Array, "rows embed"]:
        """Hidden states of the last tokens of the chunks `take`, in that order.

        Args:
          latest: what each slot drew last, which is read for tokens that are pending.
          spans: of each chunk's text, its length at least, where the model asks for it.
        """
        size = self.sizes.least(len(step.decodes), sum(c.count for c in step.prefills))
        return self._run(step, size, take, latest, spans)

    def warm_up(self) -> None:
        """Compiles every program."""
        lead = lead_of(self.model, self.stages[0].params)
        self.move(Step(copies=[Move(0, 0)]))
        if self._swaps:
            self.move(Step(pages_out=[Move(0, 0)], pages_in=[Move(0, 0)]))
        for length in self._source_lengths() if self._source else []:
            source = (0,) * min(length, self.model.encoder.context)
            vectors = np.full(len(source), NONE) if lead.prompt else None
            self._read(Opening((), source, vectors=vectors), np.zeros(self._source, np.int32))
        if lead.prefix:
            for stage in self.stages:
                stage.write(np.zeros(lead.prefix, np.int32))
        sees = isinstance(self.model, LLaVA)
        if sees:
            image = self.model.image
            self.stages[0].look(np.zeros((1, image.channels, *image.image_size), np.float32))
        latest = np.zeros(self.sizes.rows + 1, np.int32)
        for size in self.sizes.all:
            for given in (False, True) if sees or (lead.prompt and not self._source) else (False,):
                self._run(Step(), size, [], latest, [] if self._spans else None, given=given)

    def _run(
        self, step: Step, size: tuple[int, int], take: Several[int], latest: Array, spans: Several[int] | None, *, given: bool = False
    ) -> Float[Array, "rows embed"]:
        decodes, prefills, (singles, chunk) = step.decodes, step.prefills, size
        vectors = self._given.blank(singles + chunk) if given else None
        rows = singles + (self.sizes.prompts if chunk else 0)
        tokens, slots, lengths = np.zeros((1, singles + chunk), np.int32), np.zeros(singles + chunk, np.int32), np.zeros(rows, np.int32)
        queries, pages, first = np.arange(rows + 1, dtype=np.int32), np.zeros(self._most, np.int32), np.zeros(rows + 1, np.int32)
        source_pages, source_lengths = np.zeros((rows, self._source), np.int32), np.zeros(rows, np.int32)
        at_least, prefix = np.zeros(singles + chunk, np.int32), np.zeros(rows, np.int32)
        located = np.zeros((2, singles + chunk), np.int32)
        used, read, last, token = 0, [], [], singles
        for i, one in enumerate([*decodes, *[None] * (singles - len(decodes)), *prefills]):
            first[i] = used
            if i >= singles:
                queries[i] = token
            if one is None:
                continue
            (sequence, start, count, _), begin = one, i if i < singles else token
            held, own = start + count, sequence.pages[: -(-(start + count) // self.page)]
            opening, fresh = sequence.request.beside, start < len(sequence.request.prompt)
            if count == 1 and not fresh and not self._blanks:  # most, and so many at a time that arrays for each would take longest of all
                tokens[0, begin] = _read_from(sequence.slot) if sequence.pending else sequence.tokens[start]
                slots[begin] = own[-1] * self.page + start % self.page
            else:
                places, here = np.arange(start, held), slice(begin, begin + count)
                tokens[0, here] = _read_from(sequence.slot) if sequence.pending else np.maximum(sequence.tokens[start:held], 0)
                begun = places[places < len(sequence.request.prompt)]
                if opening.vectors is not None and not self._source and (opening.vectors[begun] != NONE).any():
                    vectors = vectors or self._given.blank(singles + chunk)
                    self._given.put(vectors, begin + np.arange(len(begun)), opening, begun)
                if self._blanks:
                    located[:, here] = opening.located(places)
                slots[here] = np.asarray(own)[places // self.page] * self.page + places % self.page
            if spans is not None:
                at_least[begin : begin + count] = spans[len(last)]
            read += own
            prefix[i], lengths[i], used = opening.whole, held, used + len(own)
            if self._source:
                source_pages[i], source_lengths[i] = self._of_source(sequence.slot), self._sources[sequence.slot]
            last.append(begin + count - 1)
            token += 0 if i < singles else count
        pages[:used] = read
        end = singles + len(prefills)
        first[end:], queries[end:] = used, token if chunk else singles
        source = None
        if self._source:
            source = View(source_pages.reshape(-1), np.arange(rows + 1, dtype=np.int32) * self._source, source_lengths, queries, singles)
        view = View(pages, first, lengths, queries, singles, prefix)
        taken = np.zeros(self.sizes.rows, np.int32)
        taken[: len(take)] = [last[i] for i in take]
        there = Pages(view, slots, source, None if spans is None else at_least, *(located if self._blanks else ()))
        front, *others = self.stages
        hidden = front.compute(tokens, there, taken, vectors, front.place.put(latest))
        for stage in others:
            hidden = stage.compute(stage.place.put(hidden), there, taken)
        return hidden

    def _of_source(self, slot: int) -> np.ndarray:
        first = self._pool + (slot - 1) * self._source
        return np.arange(first, first + self._source, dtype=np.int32)


class StateRunner:
    """Of a recurrent model: a state for each slot, of which slot 0 is nobody's."""

    def __init__(self, model: RWKV, place: Place, sizes: Sizes, *, dtype):
        self.model, self.place, self.params, self.sizes, self._static = model, place, {}, sizes, (model, place)
        self._empty = jax.device_get(rwkv.empty_cache(model, 1, 0, dtype))
        self._nothing = place.put(jnp.zeros((sizes.rows, model.embed), place.execution.precision.compute))
        with place.entered():
            self.states = jax.tree.map(lambda a: jnp.repeat(a, sizes.rows + 1, 0), self._empty)
            self.states = place.put(self.states) if place.execution.rules is None else _kept(self.states, place)

    def load(self, params: Tree) -> None:
        """As of `PagedRunner`."""
        self.params = self.place.weights(self.model, _read_params(self.model, params, self.place))

    def share(self, other: "StateRunner") -> None:
        """As of `PagedRunner`."""
        self.params = other.params

    def move(self, step: Step) -> None:
        """What stands before the step."""
        with self.place.entered():
            for moves in _some(step.forks):
                self.states = _copied(self.states, _ids(moves, 0), _ids(moves, 1))

    def start(self, sequence: Sequence) -> None:
        """An empty state for a sequence that begins to run."""
        self._clear(sequence.slot)

    def _clear(self, slot: int) -> None:
        with self.place.entered():
            self.states = _put(self.states, self._empty, np.array([slot], np.int32))

    def compute(
        self, step: Step, take: Several[int], latest: Int[Array, "slots"], spans: Several[int] | None = None
    ) -> Float[Array, "rows embed"]:
        """As of `PagedRunner`; prompts one after another."""
        nowhere = self.sizes.rows
        to, hidden = {i: place for place, i in enumerate(take)}, self._nothing
        if step.decodes:
            rows, _ = self.sizes.least(len(step.decodes), 0)
            hidden = self._run(step.decodes, rows, 1, [to[i] for i in range(len(step.decodes))], hidden, latest)
        for i, chunk in enumerate(step.prefills, len(step.decodes)):
            hidden = self._run([chunk], 1, self.sizes.least(0, chunk.count)[1], [to.get(i, nowhere)], hidden, latest)
        return hidden

    def warm_up(self) -> None:
        """Compiles every program."""
        self.move(Step(forks=[Move(0, 0)]))
        self._clear(0)
        latest = self.place.put(np.zeros(self.sizes.rows + 1, np.int32))
        for rows, tokens in self.sizes.all:
            if not tokens or not rows:
                self._run([], rows or 1, tokens or 1, [], self._nothing, latest)

    def _run(self, chunks: Several[Chunk], rows: int, length: int, to: Several[int], hidden: Array, latest: Array) -> Array:
        """Hidden states with those of the last tokens of chunks, each where it is to go."""
        tokens, segments, slots = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32), np.zeros(rows, np.int32)
        last, places = np.zeros(rows, np.int32), np.full(rows, self.sizes.rows, np.int32)
        places[: len(to)] = to
        for i, (sequence, start, count, _) in enumerate(chunks):
            tokens[i, :count] = _read_from(sequence.slot) if sequence.pending else sequence.tokens[start : start + count]
            segments[i, :count], slots[i], last[i] = 1, sequence.slot, count - 1
        with self.place.entered():
            given = tokens, segments, slots, last, places
            self.states, hidden = _recur(self._static, self.params, self.states, hidden, latest, *given)
        return self.place.put(hidden)


def _read_from(slot: int) -> int:
    """Stands among tokens for what a slot drew last."""
    return -slot


def _known(tokens: Array, latest: Array) -> Array:
    """Tokens, with what stands for others (`_read_from`) read."""
    return jnp.where(tokens < 0, latest[jnp.maximum(-tokens, 0)], tokens)


def runner(model: Model, places: Several[Place], sizes: Sizes, *, dtype, **pages) -> PagedRunner | StateRunner:
    """That of a model, which is to be given parameters (`load`)."""
    if isinstance(model, RWKV):
        return StateRunner(model, places[0], sizes, dtype=places[0].execution.precision.compute)
    return PagedRunner(model, places, sizes, dtype=dtype, **pages)


def _read_params(model: Model, params: Tree, place: Place) -> Tree:
    with where(params):
        return reading_params(model, params, place.execution)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _compute(
    static, params: Tree, layers: Tree, x: Array, pages: Pages, take: Array, given: Embedded | None, latest: Array | None
) -> tuple[Tree, Array]:
    model, place = static
    x = x if latest is None else _known(x, latest)
    cache, execution = Paged(layers, pages), place.execution
    if place.whole:
        output = functions(model).forward(params, model, x, given=given, cache=cache, execution=execution)
        return output.cache.layers, output.hidden[0, take]
    x, cache = transformer.over_pages(params, model, x, cache, execution, first=place.layers[0], given=given)
    return cache.layers, x[0, take] if place.layers[1] == model.layers else x


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _recur(
    static,
    params: Tree,
    states: Tree,
    hidden: Array,
    latest: Array,
    tokens: Array,
    segments: Array,
    slots: Array,
    last: Array,
    places: Array,
) -> tuple[Tree, Array]:
    model, place = static
    own = jax.tree.map(lambda a: a[slots], states)
    output = rwkv.forward(params, model, _known(tokens, latest), segments=segments, cache=own, execution=place.execution)
    states = jax.tree.map(lambda a, new: a.at[slots].set(new), states, output.cache)
    return _held(states, place), hidden.at[places].set(output.hidden[jnp.arange(len(slots)), last], mode="drop")


def _held(states: Tree, place: Place) -> Tree:
    """Sums over tokens are where their heads (or channels) are."""

    def hold(name: str, a: Array) -> Array:
        names = (None, "heads") if "sums" in name.split("/") else (None, None)
        return constrain(a, (*names, *[None] * (a.ndim - 2))[: a.ndim], place.execution.rules)

    return map_named(hold, states)


@partial(jax.jit, static_argnums=1)
def _kept(states: Tree, place: Place) -> Tree:
    return _held(states, place)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(static, params: Tree, layers: Tree, source: Source, slots: Array) -> Tree:
    model, place = static
    return transformer.read_source(params, model, source, layers, slots, place.execution)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _written(static, virtual: Tree, layers: Tree, slots: Array) -> Tree:
    _, place = static
    several, which = jax.tree.flatten(layers, is_leaf=lambda part: isinstance(part, dict))
    own = [
        write_pages(kept, *(virtual[name][layer].swapaxes(0, 1) for name in ("key", "value")), slots, place.execution)
        for layer, kept in enumerate(several, place.layers[0])
    ]
    return jax.tree.unflatten(which, own)


@partial(jax.jit, static_argnums=0)
def _seen(static, params: Tree, image: Array) -> Array:
    model, place = static
    return llava.features(params, model, image, place.execution)


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
