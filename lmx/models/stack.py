"""The stack of layers: a tuple of groups, each a pattern of layers repeated.

A group's parameters (and its cache) are held in one of two forms, which `unstack` and `stack` convert exactly:

- stacked: a dict from the place in the pattern, `{"0": tree, "1": tree}`, each leaf with a leading `layers` dimension over the
  repeats. It is run by `jax.lax.scan`, so that compile time does not grow with depth: the form of training and of disk.
- a tuple with one tree a layer, run one after another: the form of decoding, where a scan would copy each layer's weights.

Where all repeats share their parameters (ALBERT), either form holds those of one.

What a layer has inside comes back by its name where `Execution.taps` asks for it, and is changed by edits (`lmx.models.sites`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from lmx.core.execution import Execution
from lmx.core.params import stacked
from lmx.core.tree import Tree
from lmx.core.weights import PRODUCT
from lmx.models import block, sites
from lmx.models.config import Model
from lmx.models.experts import Aux
from lmx.models.sites import Asked, Edits
from lmx.parallel.offload import HOST, fetched

INPUT = "layer input"


@dataclass(frozen=True)
class Group:
    """`pattern` repeated `repeats` times, its first layer being layer `first` of the stack."""

    pattern: tuple[str, ...]
    repeats: int
    first: int

    def layer(self, repeat: Array | int, place: int) -> Array | int:
        """The absolute index of a layer."""
        return self.first + repeat * len(self.pattern) + place


def groups(config: Model) -> tuple[Group, ...]:
    """The config's pattern as often as it fits into the depth, and the rest of it: 26 layers of period 6 are 4 x 6 + 1 x 2."""
    period = len(config.pattern)
    whole, rest = divmod(config.layers, period)
    found = [Group(config.pattern, whole, 0)] if whole else []
    return tuple(found + ([Group(config.pattern[:rest], 1, whole * period)] if rest else []))


def specs(config: Model, layer: Callable[[Model, str], Tree] = block.specs) -> Tree:
    """Parameters of the whole stack, in stacked form; `layer`: those of one layer of a kind."""

    def of(group: Group) -> Tree:
        places = range(len(group.pattern))
        repeats = 1 if config.shared_layers else group.repeats
        layers = {p: tuple(group.layer(r, p) for r in range(repeats)) for p in places}
        return {str(p): stacked(layer(config, group.pattern[p]), layers[p]) for p in places}

    return tuple(of(group) for group in groups(config))


def unstack(tree: Tree) -> Tree:
    """Stacked groups as tuples of layers. Leaves may be of any kind that has a leading `layers` dimension."""

    def of(group: Tree) -> Tree:
        repeats = jax.tree.leaves(group)[0].shape[0]
        places = [group[str(p)] for p in range(len(group))]
        return tuple(jax.tree.map(lambda a, r=r: a[r], place) for r in range(repeats) for place in places)

    return tuple(of(group) for group in tree)


def stack(tree: Tree, config: Model) -> Tree:
    """The inverse of `unstack`. Layers of one place in the pattern must have the same shapes."""

    def of(layers: Tree, group: Group) -> Tree:
        period = len(group.pattern)
        return {str(p): jax.tree.map(lambda *a: jnp.stack(a), *layers[p::period]) for p in range(period)}

    return tuple(of(layers, group) for layers, group in zip(tree, groups(config), strict=True))


def run_layers(
    x: Float[Array, "batch length embed"],
    params: Tree,
    config: Model,
    context: Tree,
    execution: Execution,
    cache: Tree | None = None,
    layer: Callable = block.block,
    edits: Edits | None = None,
) -> tuple[Float[Array, "batch length embed"], Tree | None, Aux, dict[str, Array]]:
    """Runs every layer, whichever form each group is in; gives the output, the cache in the form it came in, auxiliary values summed
    over layers, and what is tapped, by its name. `context` is what layers share, with the `sites` of each; `layer` is one layer,
    `lmx.models.block.block` or a function of its form."""
    caches, aux, tapped = [], {}, {}
    for g, (group, layers) in enumerate(zip(groups(config), params, strict=True)):
        before = None if cache is None else cache[g]
        run = _scan if isinstance(layers, dict) else _unrolled
        x, after, more, inside = run(x, layers, before, group, config, context, execution, edits or {}, layer)
        caches.append(after)
        aux, tapped = added(aux, more), tapped | inside
    return x, None if cache is None else tuple(caches), aux, tapped


def added(aux: Aux, more: Aux) -> Aux:
    """Auxiliary values of two lots of layers, of which either may lack some."""
    return aux | {name: aux[name] + value if name in aux else value for name, value in more.items()}


def run_part(
    x: Array, layers: Tree, config: Model, context: Tree, execution: Execution, first: Array, layer: Callable = block.block
) -> tuple[Float[Array, "batch length embed"], Aux]:
    """Runs consecutive repeats of a stack that is one group, from the repeat `first` on: a stage of a pipeline. Its sites have no names."""
    period = len(config.pattern)
    group = Group(config.pattern, jax.tree.leaves(layers)[0].shape[0], first * period)
    x, _, aux, _ = _scan(x, layers, None, group, config, context, replace(execution, taps=()), {}, layer)
    return x, aux


def run_some(
    x: Array, layers: Tree, config: Model, context: Tree, execution: Execution, first: int, cache: Tree, layer: Callable = block.block
) -> tuple[Float[Array, "batch length embed"], Tree]:
    """Runs consecutive layers, a tuple of them, of any stack, from the layer `first` on, with a cache for each. Its sites have no names."""
    kinds = tuple(config.pattern[i % len(config.pattern)] for i in range(first, first + len(layers)))
    x, cache, _, _ = _unrolled(x, layers, cache, Group(kinds, 1, first), config, context, replace(execution, taps=()), {}, layer)
    return x, cache


def _unrolled(x, layers, cache, group, config, context, execution, edits, run):
    new, aux, tapped = [], {}, {}
    for i, params in enumerate(layers * group.repeats if config.shared_layers else layers):
        repeat, place = divmod(i, len(group.pattern))
        kept = None if cache is None else cache[i]
        kind, layer = group.pattern[place], group.layer(repeat, place)
        asked = sites.ask(sites.of_layer(config, kind), (layer,), execution.taps, edits)
        here = asked.sites(jax.tree.map(lambda a: a[0], asked.inputs))
        x = here("input", x)
        x, after, more = run(x, params, config, context.replace(sites=here), execution, kind=kind, layer=layer, cache=kept)
        x = here("output", x)
        tapped |= {asked.taps[site][0]: value for site, value in here.found.items()}
        new.append(after)
        aux = added(aux, more)
    return x, None if cache is None else tuple(new), aux, tapped


def _scan(x, layers, cache, group, config, context, execution, edits, run):
    def repeat(x, inputs):
        index, params, kept, changes = inputs
        params = shared if params is None else params
        x, params = checkpoint_name(x, INPUT), fetched(params)
        new, aux, inside = {}, {}, {}
        for p, kind in enumerate(group.pattern):
            here = asked[p].sites(changes[p])
            x = here("input", x)
            before = None if kept is None else kept[str(p)]
            at = group.layer(index, p)
            own = context.replace(sites=here)
            x, new[str(p)], more = run(x, params[str(p)], config, own, execution, kind=kind, layer=at, cache=before)
            x, inside[p] = here("output", x), here.found
            aux = added(aux, more)
        return x, (None if kept is None else new, aux, inside)

    def ask(p: int, kind: str) -> Asked:
        layers = [group.layer(r, p) for r in range(group.repeats)]
        return sites.ask(sites.of_layer(config, kind), layers, execution.taps, edits)

    asked = [ask(p, kind) for p, kind in enumerate(group.pattern)]
    shared = jax.tree.map(lambda a: a[0], layers) if config.shared_layers else None
    inputs = (jnp.arange(group.repeats), None if config.shared_layers else layers, cache, [of.inputs for of in asked])
    x, (new, aux, inside) = jax.lax.scan(_remat(repeat, execution), x, inputs, unroll=execution.unroll)
    found = {name: value[r] for p, of in inside.items() for site, value in of.items() for r, name in asked[p].taps[site].items()}
    return x, new, jax.tree.map(lambda a: a.sum(0), aux), found


def _remat(function, execution: Execution):
    if execution.remat == "none":
        return function
    kept = {"full": (), "dots": (PRODUCT,), "sites": execution.sites}[execution.remat]
    if execution.offload:
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=(), names_which_can_be_offloaded=(INPUT, *kept), offload_src="device", offload_dst=HOST
        )
    else:
        policy = jax.checkpoint_policies.save_only_these_names(*kept)
    return jax.checkpoint(function, policy=policy, prevent_cse=False)
