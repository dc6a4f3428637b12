"""Adapters: a few parameters of their own, applied over a model's, which stay as they are.

`over` gives a tree of the model's parameters in which some weights are `lmx.core.weights.Adapted`; every forward takes it as it is, and is
differentiable in the adapter's own values. Virtual tokens (`lmx.models.virtual`) are an entry of it beside the model's.

Adapters are here low-rank sums (LoRA, Hu et al., 2021; DoRA, Liu et al., 2024), vectors that scale (IA3, Liu et al., 2022), whole
parameters trained beside them, soft prompts (Lester et al., 2021; Liu et al., 2021) and prefixes (Li and Liang, 2021).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmx.core.params import ONES, Normal, ParamSpec, adapted_specs
from lmx.core.tree import Tree, map_named, named_leaves
from lmx.core.weights import STAND_INS, Adapted, Twofold, Weight, whole

Use = Literal["both", "table", "head"]
"""Of a tied table: what is changed, rows that are looked up, the head's matrix, or both."""


@dataclass(frozen=True)
class LowRank:
    """What LoRA adds to one module of the layers that are stacked together.

    Attributes:
      weights: names of the weights that it is over: several with one `down` where peers have them as one module.
      ranks: of each layer (one, of what is no layer's); 0 where it is not adapted.
      scales: by what each layer's product is multiplied.
      magnitude: whether columns have lengths of their own (DoRA).
      use: of a tied table.
    """

    weights: tuple[str, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    magnitude: bool = False
    use: Use = "both"

    def specs(self, table: Mapping[str, ParamSpec]) -> Tree:
        specs = [_turned(table[name]) if self.use == "head" else table[name] for name in self.weights]
        downs, ups = zip(*(adapted_specs(spec, max(self.ranks)) for spec in specs), strict=True)
        tree = {"down": downs[0], "up": tuple(ups)}
        return tree | ({"magnitude": tuple(_side(spec, 1) for spec in specs)} if self.magnitude else {})

    def over(self, weights: dict[str, Weight], values: Tree) -> dict[str, Weight]:
        down = values["down"]
        scale = np.zeros((len(self.ranks), down.shape[-1]))
        for row, rank, factor in zip(scale, self.ranks, self.scales, strict=True):
            row[:rank] = factor
        scale = jnp.asarray(scale if _of_layers(self.weights[0]) else scale[0], down.dtype)
        lengths = values.get("magnitude", (None,) * len(self.weights))
        found = {}
        for name, up, length in zip(self.weights, values["up"], lengths, strict=True):
            ends = (up.T, down.T) if self.use == "head" else (down, up)
            found[name] = _used(weights[name], lambda base, e=ends, m=length: Adapted(base, *e, scale, m), self.use)
        return found


@dataclass(frozen=True)
class Scaled:
    """A vector by which IA3 multiplies what one module reads (`inputs`), or what it gives, its bias included.

    Attributes:
      weights: as of `LowRank`.
      layers: which layers have one.
    """

    weights: tuple[str, ...]
    layers: tuple[bool, ...]
    inputs: bool

    def specs(self, table: Mapping[str, ParamSpec]) -> Tree:
        names = self.weights[:1] if self.inputs else self.weights
        return {"scale": tuple(replace(_side(table[name], 0 if self.inputs else 1), init=ONES) for name in names)}

    def over(self, weights: dict[str, Weight], values: Tree) -> dict[str, Weight]:
        found = {}
        for i, name in enumerate(self.weights):
            scale, base = values["scale"][0 if self.inputs else i], _array(name, weights[name])
            lead = int(_of_layers(name))
            there = np.array(self.layers).reshape(-1, *(1,) * (scale.ndim - 1)) if lead else self.layers[0]
            scale = jnp.where(there, scale, 1).astype(base.dtype)
            ones = (1,) * (base.ndim - scale.ndim)
            middle = (*scale.shape, *ones) if self.inputs else (*scale.shape[:lead], *ones, *scale.shape[lead:])
            found[name] = base * scale.reshape(middle)
            bias = name.removesuffix("weight") + "bias"
            if not self.inputs and bias in weights:
                found[bias] = weights[bias] * scale
        return found


@dataclass(frozen=True)
class Replaced:
    """Parameters that were trained whole, in some of their layers (none named: they are no layer's)."""

    names: tuple[str, ...]
    layers: tuple[int, ...] = ()
    use: Use = "both"

    def specs(self, table: Mapping[str, ParamSpec]) -> Tree:
        def some(spec: ParamSpec) -> ParamSpec:
            layers = tuple(spec.layers[i] for i in self.layers)
            return replace(spec, shape=(len(layers), *spec.shape[1:]), layers=layers) if layers else spec

        return {"value": tuple(some(table[name]) for name in self.names)}

    def over(self, weights: dict[str, Weight], values: Tree) -> dict[str, Weight]:
        def put(name: str, base: Weight, value: Array) -> Array:
            return _array(name, base).at[jnp.array(self.layers)].set(value.astype(base.dtype)) if self.layers else value.astype(base.dtype)

        named = zip(self.names, values["value"], strict=True)
        return {n: _used(weights[n], lambda base, n=n, value=value: put(n, base, value), self.use) for n, value in named}


@dataclass(frozen=True)
class Prompt:
    """Embeddings of virtual tokens before a text: the first `tokens` of `rows`."""

    tokens: int
    rows: int
    width: int

    def specs(self, table: Mapping[str, ParamSpec]) -> Tree:
        return {"embeddings": ParamSpec((self.rows, self.width), (None, "embed"), init=Normal(0.02))}

    def over(self, weights: dict[str, Weight], values: Tree) -> dict[str, Weight]:
        return {"virtual/embeddings": values["embeddings"][: self.tokens]}


@dataclass(frozen=True)
class Prefix:
    """Keys and values of virtual tokens in every layer, as attention takes them: keys turned and normed already.

    Attributes:
      tokens: how many.
      layers, heads, size: of the model; heads are key heads.
      stride: a layer's keys are `stride` after the one before's among the `2 x layers` parts of a row, and begin again past its end: 2; 4 of
        an encoder-decoder, in which PEFT lays four out for each layer.
    """

    tokens: int
    layers: int
    heads: int
    size: int
    stride: int = 2

    def specs(self, table: Mapping[str, ParamSpec]) -> Tree:
        return {"embeddings": ParamSpec((self.tokens, 2 * self.layers * self.heads * self.size), (None, None), init=Normal(1.0))}

    def over(self, weights: dict[str, Weight], values: Tree) -> dict[str, Weight]:
        parts = values["embeddings"].reshape(self.tokens, 2 * self.layers, self.heads, self.size).transpose(1, 2, 0, 3)
        first = self.stride * np.arange(self.layers) % (2 * self.layers)
        return {"virtual/key": parts[first], "virtual/value": parts[(first + 1) % (2 * self.layers)]}


Part = LowRank | Scaled | Replaced | Prompt | Prefix
Parts = Mapping[str, Part]


def specs(parts: Parts, table: Tree) -> Tree:
    """The parameter table of an adapter with these parts, over a model with a table: what `values` has, under the parts' names."""
    leaves = named_leaves(table, is_leaf=lambda x: isinstance(x, ParamSpec))
    return {name: part.specs(leaves) for name, part in parts.items()}


def over(params: Tree, parts: Parts, values: Tree) -> Tree:
    """A model's parameters (layers stacked) under an adapter. Again over what it gives, another adapter adds to it.

    Raises:
      ValueError: parameters without a weight that the adapter is over.
    """
    weights = named_leaves(params, is_leaf=_is_weight)
    for name, part in sorted(parts.items(), key=lambda pair: not isinstance(pair[1], Replaced)):
        try:
            weights |= part.over(weights, values[name])
        except KeyError as missing:
            raise ValueError(f"the adapter is over {missing}, which the parameters have not; give them with layers stacked") from None
    adapted = map_named(lambda name, _: weights[name], params, is_leaf=_is_weight)
    virtual = {name.removeprefix("virtual/"): value for name, value in weights.items() if name.startswith("virtual/")}
    return adapted | {"virtual": virtual} if virtual else adapted


def merge(params: Tree) -> Tree:
    """What `over` gives as plain parameters again, adapters added into the weights.

    Raises:
      ValueError: what plain parameters cannot be: virtual tokens, or a tied table of which one use alone is adapted.
    """
    if "virtual" in params:
        raise ValueError("virtual tokens are no sum with a weight; they cannot be merged")

    def plain(name: str, weight: Weight) -> Weight:
        if isinstance(weight, Twofold):
            raise ValueError(
                f"the adapter changes {name} as the table of embeddings or as the head alone, and the model ties the two: merged, it would "
                "change both. Untie them first (`lmx.interop.untie`)"
            )
        return _array(name, weight) if isinstance(weight, Adapted) else weight

    return map_named(plain, params, is_leaf=_is_weight)


def unmerge(params: Tree, parts: Parts, values: Tree) -> Tree:
    """The parameters before `merge`, but for rounding. Raises ValueError for what merging has forgotten: all but LoRA."""
    for name, part in parts.items():
        if not isinstance(part, LowRank) or part.magnitude:
            kind = "DoRA's lengths" if isinstance(part, LowRank) else type(part).__name__
            raise ValueError(f"{name}: what was before is not known from a sum with {kind}; keep the parameters from before merging")
    negative = {name: replace(part, scales=tuple(-scale for scale in part.scales)) for name, part in parts.items()}
    return merge(over(params, negative, values))


def _is_weight(x) -> bool:
    return isinstance(x, STAND_INS)


def _array(name: str, weight: Weight) -> Array:
    """A weight's numbers, of all layers."""
    return jax.vmap(whole)(weight) if _of_layers(name) and isinstance(weight, Adapted) else whole(weight)


def _of_layers(name: str) -> bool:
    return "layers" in name.split("/")


def _used(weight: Weight, change, use: Use) -> Weight:
    """A tied table with one use of it changed, or any weight changed."""
    if use == "both" and not isinstance(weight, Twofold):
        return change(weight)
    table, head = (weight.table, weight.head) if isinstance(weight, Twofold) else (weight, weight)
    return Twofold(table if use == "head" else change(table), head if use == "table" else change(head))


def _turned(spec: ParamSpec) -> ParamSpec:
    """A table's spec as that of a head's matrix."""
    return replace(spec, shape=spec.shape[::-1], axes=spec.axes[::-1], inputs=1)


def _side(spec: ParamSpec, side: int) -> ParamSpec:
    """Of the dimensions that a product contracts (0), or of the others (1), after that of layers."""
    lead = len(spec.layers) > 0
    split = lead + (spec.inputs or 1)
    kept = [*range(lead), *(range(lead, split) if side == 0 else range(split, len(spec.shape)))]
    return replace(spec, shape=tuple(spec.shape[i] for i in kept), axes=tuple(spec.axes[i] for i in kept), inputs=0)
