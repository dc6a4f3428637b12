"""Several texts in one run: by weight, by temperature, with a cap of epochs for each, along a curriculum.

A batch is a pure function of (seed, k) as everywhere: `lmx.data.interleaving` says, without counting up to it, of which component global
example j is and which one of that component's own (shuffled, endless) examples. So a run goes on anywhere at once.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from lmx.data.interleaving import BLOCK, interleave
from lmx.data.pipeline import EXAMPLES, Batch, Batches, Numbered
from lmx.data.store import TokenStore

RAMP = 256  # a share that changes along a line does so in at most so many steps


@dataclass(frozen=True)
class Component:
    """A text among those that are mixed."""

    source: str
    """The text, given like data.train."""
    weight: float | None = None
    """Its part of the examples, relative to the others' weights. None: its number of tokens; all components have a weight or none has."""
    epochs: float | None = None
    """How often its text may be read, 1.5 say: after so many of its examples it is used up. None: without end."""
    name: str = ""
    """What it is called in messages and reports. Empty: its source."""


@dataclass(frozen=True)
class Stage:
    """A curriculum's weights from a step on."""

    step: int
    """The first step that they are for."""
    weights: tuple[float, ...]
    """Of the components, in their order."""


@dataclass(frozen=True)
class Blend:
    """Several texts to train on, mixed example by example (an example is a packed row)."""

    components: tuple[Component, ...]
    """What is mixed."""
    temperature: float = 1.0
    """Weights are raised to 1 / temperature: 1 leaves them, larger ones even them out, so that small texts come more often (Devlin et al.
    2019, for languages)."""
    curriculum: tuple[Stage, ...] = ()
    """Weights that change as the run goes on, in place of the components' own; the first stage is for step 0. Empty: they stay."""
    between: Literal["constant", "linear"] = "constant"
    """How shares go from a stage of the curriculum to the next: they stay until it begins, or change along a line."""
    exhausted: Literal["redistribute", "error"] = "redistribute"
    """When a component is used up (epochs): redistribute: the others have its share, in proportion; error: the run is refused if it would
    come to that."""


def check_blend(blend: Blend) -> None:
    """Raise ValueError, in one line, for what is wrong with a blend whatever its texts are."""
    count = len(blend.components)
    if not count:
        raise ValueError("data.train.components is empty; name at least one text")
    if not blend.temperature > 0:
        raise ValueError(f"data.train.temperature={blend.temperature} is not positive; 1 leaves the weights as they are")
    for knob, values in (("between", ("constant", "linear")), ("exhausted", ("redistribute", "error"))):
        if getattr(blend, knob) not in values:
            raise ValueError(f"data.train.{knob}={getattr(blend, knob)!r} is not one of {', '.join(values)}")
    for i, component in enumerate(blend.components):
        if component.epochs is not None and not 0 < component.epochs < math.inf:
            raise ValueError(f"data.train.components.{i}.epochs={component.epochs} must be positive; None sets no end")
    given = [component.weight is not None for component in blend.components]
    if any(given) and blend.curriculum:
        raise ValueError("data.train has both components with weights and a curriculum of them; leave one out")
    if any(given) and not all(given):
        raise ValueError(f"data.train.components.{given.index(False)}.weight is not given, but others are; give all of them or none")
    weights = [("data.train.components.*.weight", [component.weight for component in blend.components])] if all(given) else []
    for i, stage in enumerate(blend.curriculum):
        if len(stage.weights) != count:
            raise ValueError(f"data.train.curriculum.{i}.weights has {len(stage.weights)} weights; there are {count} components")
        before = blend.curriculum[i - 1].step if i else -1
        if stage.step <= before or (i == 0 and stage.step):
            raise ValueError(
                f"data.train.curriculum.{i}.step={stage.step}: stages are in the order of their steps, the first is for step 0"
            )
        weights.append((f"data.train.curriculum.{i}.weights", list(stage.weights)))
    for knob, values in weights:
        if not all(0 <= value < math.inf for value in values) or not any(values):
            raise ValueError(f"{knob}={tuple(values)}: weights are 0 or more, and at least one of them is")


def shares(weights: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Weights raised to 1 / temperature, as parts of one. A weight of 0 stays 0."""
    largest = max(weights)
    raised = [(weight / largest) ** (1 / temperature) if weight else 0.0 for weight in weights]
    return [value / math.fsum(raised) for value in raised]


def pieces(blend: Blend, sizes: Sequence[int]) -> list[tuple[int, list[float]]]:
    """A blend's shares from steps on: `(step, shares)`, the first for step 0. A line becomes steps, at most 256, each with the share of its
    middle. `sizes` are the components' tokens."""
    stages = blend.curriculum or (
        Stage(0, tuple(size if c.weight is None else c.weight for c, size in zip(blend.components, sizes, strict=True))),
    )
    found = [(stage.step, shares(stage.weights, blend.temperature)) for stage in stages]
    if blend.between == "constant":
        return found
    line = []
    for (a, before), (b, after) in pairwise(found):
        count = min(RAMP, b - a)
        edges = [a + (b - a) * i // count for i in range(count + 1)]
        for low, high in pairwise(edges):
            part = ((low + high) / 2 - a) / (b - a)
            line.append((low, [x + (y - x) * part for x, y in zip(before, after, strict=True)]))
    return [*line, found[-1]]


@dataclass(frozen=True, eq=False)
class Stores:
    """The token stores of a blend's components."""

    components: tuple[TokenStore, ...]

    @property
    def vocab(self) -> int:
        return self.components[0].vocab

    @property
    def fingerprint(self) -> str:
        """Hash (hex) of all the components', in their order."""
        return hashlib.sha256("".join(store.fingerprint for store in self.components).encode()).hexdigest()

    @property
    def targets(self) -> int:
        """Tokens that are predicted in one epoch of each."""
        return sum(store.targets for store in self.components)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per predicted token, all components' text together."""
        return sum(store.index["bytes"] for store in self.components) / self.targets

    def __len__(self) -> int:
        """Documents."""
        return sum(map(len, self.components))


class MixedBatches(Numbered):
    """The batches of a blend. Global example j is example n of component c, `origin` says which, `find` goes back.

    - `batches`: those of each component, without end.
    - `steps`: the global example that a step begins with, where batches have not all the same rows (`lmx.data.lengths`).
    """

    def __init__(
        self,
        batches: Sequence[Batches],
        blend: Blend,
        *,
        seed: int,
        shuffle: bool = True,
        steps: Callable[[int], int] | None = None,
    ):
        check_blend(blend)
        self.batches, self.blend = tuple(batches), blend
        self.rows_per_batch, self.length = batches[0].rows_per_batch, batches[0].length
        step = steps or (lambda k: k * self.rows_per_batch)
        caps = [
            None if c.epochs is None else math.floor(c.epochs * b.examples_per_epoch + 1e-6)
            for c, b in zip(blend.components, batches, strict=True)
        ]
        if 0 in caps:
            i = caps.index(0)
            raise ValueError(
                f"data.train.components.{i}.epochs={blend.components[i].epochs} of {batches[i].examples_per_epoch} examples is less than one; "
                "use more, or leave the component out"
            )
        found = [(step(k), each) for k, each in pieces(blend, [b.store.targets for b in batches])]
        found = [(begin, each) for begin, each in found if begin < EXAMPLES]
        endless = blend.exhausted == "redistribute"
        self.order = interleave(found, caps, end=EXAMPLES, seed=seed if shuffle else None, redistribute=endless)
        self.total = self.order.total

    def origin(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The component of each global example, and its number among that one's; int64 `[ids]` both. Raises IndexError past the end."""
        return self.order.locate(ids)

    def find(self, component: int, nth: np.ndarray) -> np.ndarray:
        """The global examples that a component's examples are; the inverse of `origin`. Raises IndexError for one that never comes."""
        return self.order.find(component, nth)

    @property
    def stores(self) -> list[TokenStore]:
        return [batches.store for batches in self.batches]

    def spans(self, example: int) -> list[tuple[TokenStore, int, int]]:
        component, nth = self.origin(np.array([example]))
        return self.batches[component[0]].spans(int(nth[0]))

    def holding(self, store: TokenStore, start: int, stop: int, until: int) -> list[int]:
        found: list[int] = []
        for component, batches in enumerate(self.batches):
            # As many of its examples as can be below `until`: those of the last block may be permuted.
            reach = min(int(self.order.used(until)[component]) + BLOCK, int(self.order.counts[-1, component]))
            found += self.find(component, np.array(batches.holding(store, start, stop, reach), np.int64)).tolist()
        return sorted(example for example in found if example < until)

    def examples(self, ids: np.ndarray) -> Batch:
        ids = np.asarray(ids, np.int64)
        real = np.flatnonzero(ids < self.total)
        component, nth = self.order.locate(ids[real])
        parts = [(real[component == c], self.batches[c].examples(nth[component == c])) for c in np.unique(component)]
        like = parts[0][1] if parts else self.batches[0].examples(np.zeros(1, np.int64))
        batch = {name: np.zeros((len(ids), *array.shape[1:]), array.dtype) for name, array in like.items()}
        for where, part in parts:
            for name, rows in part.items():
                batch[name][where] = rows
        return batch | {"example_id": ids.astype(np.uint32)}


def component_seed(seed: int, component: int) -> int:
    """The seed of a component's own order, apart from all the others'."""
    return int.from_bytes(hashlib.sha256(f"lmx component {component} of {seed}".encode()).digest()[:8], "little")
