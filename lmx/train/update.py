"""Moving parameters by their gradients: all at once, or a layer at a time where state waits in host memory."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import PartitionSpec as P

from lmx.core.params import ParamSpec, abstract, is_spec
from lmx.core.tree import Tree, map_named, named_leaves
from lmx.parallel import manual
from lmx.parallel.offload import fetched, stored

Update = Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]
"""`(parameters, gradients, optimizer state) -> (parameters, optimizer state)`."""
Named = dict[str, Array]
"""Leaves by name."""


def at_once(transform: optax.GradientTransformation) -> Update:
    """All parameters together."""

    def update(params: Tree, gradients: Tree, optimizer: Tree) -> tuple[Tree, Tree]:
        updates, optimizer = transform.update(gradients, optimizer, params)
        return optax.apply_updates(params, updates), optimizer

    return update


def layer_by_layer(build: Callable[[Tree], optax.GradientTransformation], specs: Tree) -> Update:
    """Each layer's parameters and optimizer state fetched, moved and stored again in their place, the next one fetched meanwhile.

    Transformations treat layers apart, so the result is that of `at_once`; what is not a layer's comes first, together.

    Args:
      build: the transformation for a part of the parameter table.
    """

    def update(params: Tree, gradients: Tree, optimizer: Tree) -> tuple[Tree, Tree]:
        params_now, gradients_now, before = (named_leaves(tree) for tree in (params, gradients, optimizer))
        params_then, after = {}, {}
        for part in _parts(specs):
            names = named_leaves(part, is_leaf=is_spec)
            move, form = _move(build(part), part)
            run = _over_layers(move) if next(iter(names.values())).layers else _whole(move)
            state = {n: before[n] for n in named_leaves(form)}
            moved, state = run({n: params_now[n] for n in names}, {n: gradients_now[n] for n in names}, state)
            params_then, after = params_then | moved, after | state
        return map_named(lambda n, _: params_then[n], params), map_named(lambda n, _: after[n], optimizer)

    return update


def _move(transform: optax.GradientTransformation, part: Tree) -> tuple[Callable[[Named, Named, Named], tuple[Named, Named]], Tree]:
    """The transformation as a function of named leaves, and the form of its state."""
    form = jax.eval_shape(transform.init, abstract(part))

    def move(params: Named, gradients: Named, state: Named) -> tuple[Named, Named]:
        gradients, params = (map_named(lambda n, _, of=of: of[n], part, is_leaf=is_spec) for of in (gradients, params))
        updates, new = transform.update(gradients, map_named(lambda n, _: state[n], form), params)
        return named_leaves(optax.apply_updates(params, updates)), named_leaves(new)

    return move, form


def _parts(specs: Tree) -> Iterator[Tree]:
    """What is not a layer's, then each group of a stack (an encoder's too): trees in which names are those of the whole."""

    def group(name: str, spec: ParamSpec) -> tuple[str, ...]:
        words = name.split("/")
        return tuple(words[: words.index("layers") + 2]) if spec.layers else ()

    for one in sorted({group(name, spec) for name, spec in named_leaves(specs, is_leaf=is_spec).items()}):
        yield map_named(lambda name, spec, one=one: spec if group(name, spec) == one else None, specs, is_leaf=is_spec)


def _whole(move: Callable) -> Callable:
    def run(params: Named, gradients: Named, state: Named) -> tuple[Named, Named]:
        moved, new = move(fetched(params), gradients, fetched(state))
        return _stored(moved, params), _stored(new, state)

    return run


def _stored(values: Named, like: Named) -> Named:
    return {name: stored(value, like[name]) for name, value in values.items()}


def _over_layers(move: Callable) -> Callable:
    def run(params: Named, gradients: Named, state: Named) -> tuple[Named, Named]:
        repeats = next(iter(params.values())).shape[0]
        layered = {n: v for n, v in state.items() if "layers" in n.split("/") and v.ndim and v.shape[0] == repeats}
        shared = {n: v for n, v in state.items() if n not in layered}

        def local(params: Named, gradients: Named, layered: Named, shared: Named) -> tuple[Named, Named, Named]:
            count = next(iter(params.values())).shape[0]

            def of(values: Named, i: Array) -> Named:
                return {n: jax.lax.dynamic_slice_in_dim(v, i, 1) for n, v in values.items()}

            def into(values: Named, new: Named, i: Array) -> Named:
                return {n: jax.lax.dynamic_update_slice_in_dim(v, stored(new[n], v), i, 0) for n, v in values.items()}

            def layer(i: Array, carry: tuple) -> tuple:
                params, layered, _, (own_params, own_state) = carry
                following = jnp.minimum(i + 1, count - 1)
                ahead = fetched((of(params, following), of(layered, following)))
                moved, new = move(own_params, of(gradients, i), own_state | shared)
                return into(params, moved, i), into(layered, new, i), {n: new[n] for n in shared}, ahead

            start = params, layered, shared, fetched((of(params, 0), of(layered, 0)))
            return jax.lax.fori_loop(0, count, layer, start)[:3]

        if manual.axes().get("pipeline", 1) > 1:  # each device has the layers of its own stages
            mine = P("pipeline")
            local = jax.shard_map(
                local, in_specs=(mine, mine, mine, P()), out_specs=(mine, mine, P()), axis_names={"pipeline"}, check_vma=False
            )
        params, layered, shared = local(params, gradients, layered, shared)
        return params, layered | shared

    return run
