"""Named sites: what a forward has inside, by the same names in every architecture, to read (`Execution.taps`) and to edit.

| name | value | where |
| --- | --- | --- |
| `embeddings` | `[batch, length, embed]` | what the first layer reads |
| `layers/3/input`, `layers/3/output` | `[batch, length, embed]` | the residual stream before and after layer 3 |
| `layers/3/attention/query`, `key`, `value` | `[batch, length, heads or kv_heads, head_dim]` | normalised and turned, as attention takes them |
| `layers/3/attention/scores`, `weights` | `[batch, heads, queries, keys]`, fp32 at least | before mask and softmax; what values are mixed by |
| `layers/3/attention/mixed` | `[batch, length, heads, head_dim]` | of each head, before the output projection |
| `layers/3/attention/output` | `[batch, length, embed]` | what is added to the residual stream, so after a norm that follows the sublayer |
| `layers/3/cross/input` | `[batch, length, embed]` | the residual stream between attention and cross-attention |
| `layers/3/cross/query` ... `output` | as attention's | of attention to an encoder's output |
| `layers/3/residual` | `[batch, length, embed]` | the residual stream between attention and feed-forward; a parallel block has none |
| `layers/3/router/logits` | `[batch, length, experts]`, fp32 at least | of a mixture of experts |
| `layers/3/feedforward/hidden` | `[batch, length, mlp]` | activated, before the projection down; not of a mixture |
| `layers/3/feedforward/output` | `[batch, length, embed]` | what is added to the residual stream |
| `final` | `[batch, length, embed]` | after the final norm |

An encoder-decoder's own names are the decoder's; its encoder's begin with `encoder/`. An RWKV has queries (its receptance), keys, values and
what is mixed of them by channel, `[batch, length, channels]` (from version 5 on by head), and no scores or weights. In a name `*` stands for
any part between slashes but the first, or for some of its letters: `layers/*/attention/*`.

Where a ring splits sequences, tokens and values are in the order of `lmx.parallel.context.arrange`, and `as_read` undoes it.

With a cache, queries, keys and values are those of the new tokens (keys and values as they are then kept), and `keys` of weights are the
cache's slots. A call that reads no source, as its cache has read one, has neither the encoder's sites nor `cross/key` and `cross/value`.

Where scores or weights are named, attention is computed by the reference implementation, which alone forms them: more memory, and other
rounding. An edit is made before a value is read, so what comes back is what the model went on with.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from lmx.core.execution import Execution
from lmx.models.config import RWKV, EncoderDecoder, Model, is_mixture

HEADS = ("query", "key", "value", "scores", "weights", "mixed", "output")
FORMED = ("scores", "weights")
"""What only the reference implementation forms."""


@flax.struct.dataclass
class Edit:
    """What is done to the value of a site. All of it is arrays, so that other values are the same compiled program.

    Attributes:
      value: what stands there instead, or is added; broadcasts to the site's value.
      at: where it is; broadcasts to the site's value too. Everywhere when None.
      layer: of the layers that the name matches, the one that is meant; or several, `[n]`, where `value` and `at`, unless they are single
        numbers, have a leading dimension of n. All when None.
      added: whether `value` is added. Static.
    """

    value: Float[Array, "..."]
    at: Bool[Array, "..."] | None = None
    layer: Int[Array, "..."] | None = None
    added: bool = flax.struct.field(pytree_node=False, default=False)

    def made(self, name: str, value: Array, on: Array | None) -> Array:
        """The site's value with the edit, where `on` (None: yes) says so."""
        for part, shape in (("value", jnp.shape(self.value)), ("at", () if self.at is None else jnp.shape(self.at))):
            if len(shape) > value.ndim or any(n not in (1, m) for n, m in zip(shape[::-1], value.shape[::-1], strict=False)):
                raise ValueError(f"edits[{name!r}].{part} has shape {shape}, and the site {value.shape}, to which it does not broadcast")
        new = jnp.asarray(self.value).astype(value.dtype)
        new = value + new if self.added else jnp.broadcast_to(new, value.shape)
        where = [jnp.asarray(mask, bool) for mask in (self.at, on) if mask is not None]
        return jnp.where(where[0] if len(where) == 1 else where[0] & where[1], new, value) if where else new

    def spread(self, layers: Sequence[int], named: Sequence[bool]) -> tuple[Array | None, "Edit | None"]:
        """For each of some layers, of which the name matches some: whether the edit is of it (None: of all); and, where it is of several by
        their indices, its own part (None: the edit itself is)."""
        if self.layer is None:
            return (None if all(named) else jnp.array(named)), None
        hits = jnp.array(layers)[:, None] == jnp.atleast_1d(self.layer)
        on = jnp.array(named) & hits.any(1)
        if jnp.ndim(self.layer) == 0:
            return on, None
        which = hits.argmax(1)

        def own(a: Array) -> Array:
            if jnp.ndim(a) == 0:
                return jnp.broadcast_to(a, which.shape)
            if jnp.shape(a)[0] != len(self.layer):
                raise ValueError(
                    f"an edit of {len(self.layer)} layers at once has an array of shape {jnp.shape(a)}, not of one part a layer"
                )
            return jnp.asarray(a)[which]

        return on, self.replace(layer=None, value=own(self.value), at=None if self.at is None else own(self.at))


Edits = Mapping[str, Edit]
"""Edits by the names of their sites, made in the names' alphabetical order where several are of one site."""


def patch(value: Any, *, at: Any = None, layer: Any = None) -> Edit:
    """Puts given values in the place of a site's: another run's, say (activation patching; Vig et al., 2020)."""
    return Edit(value, at, layer)


def ablate(mean: Any = 0.0, *, at: Any = None, layer: Any = None) -> Edit:
    """Puts zero in the place of a site's values, or a mean over some texts."""
    return Edit(mean, at, layer)


def steer(vector: Any, *, at: Any = None, layer: Any = None) -> Edit:
    """Adds a vector to a site's values (Turner et al., 2023)."""
    return Edit(vector, at, layer, added=True)


class Sites:
    """The sites of one layer, or of what is outside of layers, while it is traced: `value = sites(name, value)` makes a site. It costs
    nothing where nobody asks for it."""

    def __init__(self, taps: Iterable[str] = (), edits: Mapping[str, Sequence[tuple[Edit, Array | None]]] | None = None):
        self.taps, self.edits = frozenset(taps), edits or {}
        self.found: dict[str, Array] = {}

    def __call__(self, name: str, value: Array) -> Array:
        for edit, on in self.edits.get(name, ()):
            value = edit.made(name, value, on)
        if name in self.taps:
            self.found[name] = value
        return value

    def asked(self, name: str) -> bool:
        return name in self.taps or name in self.edits

    def formed(self, where: str) -> Callable[[str, Array], Array] | None:
        """What the reference implementation of attention calls with scores and weights; None where nobody asks for them."""
        if not any(self.asked(f"{where}/{name}") for name in FORMED):
            return None
        return lambda name, value: self(f"{where}/{name}", value)


NONE = Sites()


@dataclass(frozen=True)
class Asked:
    """What is asked of layers that run as one: of a place in a pattern, in each of its repeats.

    Attributes:
      taps: for each site of the layer, the full names of those that are read, by the repeat.
      edits: for each site of the layer, its edits.
      inputs: for each edit, what differs from repeat to repeat (`Edit.spread`), with a leading dimension of repeats.
    """

    taps: dict[str, dict[int, str]] = field(default_factory=dict)
    edits: dict[str, tuple[Edit, ...]] = field(default_factory=dict)
    inputs: dict[str, tuple[tuple[Array | None, Edit | None], ...]] = field(default_factory=dict)

    def sites(self, inputs: dict[str, tuple[tuple[Array | None, Edit | None], ...]]) -> Sites:
        """Those of one repeat."""
        edits = {site: [(own or edit, on) for edit, (on, own) in zip(of, inputs[site], strict=True)] for site, of in self.edits.items()}
        return Sites(self.taps, edits)


def ask(known: Sequence[str], layers: Sequence[int], taps: Sequence[str], edits: Edits) -> Asked:
    """What taps and edits ask of the layers with some indices, which have the `known` sites."""
    if not taps and not edits:
        return Asked()
    full = {site: [f"layers/{layer}/{site}" for layer in layers] for site in known}
    read = {site: {r: name for r, name in enumerate(of) if any(matches(name, tap) for tap in taps)} for site, of in full.items()}
    made, inputs = {}, {}
    for site, of in full.items():
        named = {name: [matches(one, name) for one in of] for name in sorted(edits)}
        here = [name for name, hits in named.items() if any(hits)]
        if here:
            made[site] = tuple(edits[name] for name in here)
            inputs[site] = tuple(edits[name].spread(layers, named[name]) for name in here)
    return Asked({site: of for site, of in read.items() if of}, made, inputs)


def outside(taps: Sequence[str], edits: Edits) -> Sites:
    """The sites outside of layers."""
    known = ("embeddings", "final")
    made = {site: [(edits[name], None) for name in sorted(edits) if matches(site, name)] for site in known}
    return Sites([site for site in known if any(matches(site, tap) for tap in taps)], {site: of for site, of in made.items() if of})


def of_layer(config: Model, kind: str) -> tuple[str, ...]:
    """Names of a layer's sites, in the order in which it comes to them."""
    if isinstance(config, RWKV):
        mixing = tuple(f"attention/{name}" for name in HEADS if name not in FORMED)
        return ("input", *mixing, "residual", "feedforward/hidden", "feedforward/output", "output")
    found = ["input", *(f"attention/{name}" for name in HEADS)]
    if isinstance(config, EncoderDecoder):
        found += ["cross/input", *(f"cross/{name}" for name in HEADS)]
    found += [] if config.parallel else ["residual"]
    found += ["router/logits"] if is_mixture(config, kind) else ["feedforward/hidden"]
    return (*found, "feedforward/output", "output")


def names(config: Model) -> tuple[str, ...]:
    """Names of all sites of a model."""
    kinds = [config.pattern[i % len(config.pattern)] for i in range(config.layers)]
    layers = [f"layers/{i}/{name}" for i, kind in enumerate(kinds) for name in of_layer(config, kind)]
    own = ("embeddings", *layers, "final")
    return (*(f"encoder/{name}" for name in names(config.encoder)), *own) if isinstance(config, EncoderDecoder) else own


def matches(name: str, pattern: str) -> bool:
    """Whether a name is meant by a pattern, part by part."""
    parts, meant = name.split("/"), pattern.split("/")
    return len(parts) == len(meant) and parts[0] == meant[0] and all(map(fnmatchcase, parts, meant))


def check(config: Model, execution: Execution, edits: Edits) -> None:
    """Raises ValueError for names that are no site's, an implementation of attention that does not form what is named, a layer of what is
    in none."""
    if not execution.taps and not edits:
        return
    known = names(config)
    for knob, wanted in (("execution.taps", execution.taps), ("edits", edits)):
        for pattern in wanted:
            here = [name for name in known if matches(name, pattern)]
            if not here:
                near = get_close_matches(pattern, [*dict.fromkeys(_general(name) for name in known), *known], n=3, cutoff=0.3)
                raise ValueError(f"{knob} names {pattern!r}, which is no site of this model; the nearest are {', '.join(near)}")
            formed = [name for name in here if name.rsplit("/", 1)[-1] in FORMED]
            if formed and execution.attention not in ("auto", "xla", "reference"):
                raise ValueError(
                    f"{knob} names {formed[0]!r}, which attention={execution.attention!r} never forms; use reference, or auto, which then "
                    "is that"
                )
    for name, edit in edits.items():
        if edit.layer is None:
            continue
        if "layers/" not in name:
            raise ValueError(f"edits[{name!r}].layer is of the sites of layers; leave it out")
        meant = sorted({int(one.split("layers/")[1].split("/")[0]) for one in known if matches(one, name)})
        if not isinstance(edit.layer, jax.core.Tracer) and not np.isin(edit.layer, meant).all():
            raise ValueError(
                f"edits[{name!r}].layer={np.asarray(edit.layer).tolist()}, and the name is of layers {', '.join(map(str, meant))}"
            )


def inner(edits: Edits, prefix: str) -> dict[str, Edit]:
    """The edits whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): edit for name, edit in edits.items() if name.startswith(prefix)}


def _general(name: str) -> str:
    return "/".join("*" if part.isdigit() else part for part in name.split("/"))
