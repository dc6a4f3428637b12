"""What a step of an experiment costs each device, before anything runs: `plan`. `python -m lmx.plan` is its door."""

import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding

from lmx.core.config import ConfigError
from lmx.core.precision import POLICIES
from lmx.core.tree import Tree, named_leaves
from lmx.data.recipe import padding
from lmx.kernels.attention import LONG, why
from lmx.models import experts, stack
from lmx.models.config import RWKV, EncoderDecoder, Model, Transformer, is_local
from lmx.models.families import functions
from lmx.models.rwkv_heads import MIXED
from lmx.parallel import absent, chips, cost, hlo, roofline
from lmx.parallel.chips import Chip
from lmx.parallel.feed import batch_sharding
from lmx.parallel.host import compiled_here
from lmx.parallel.layout import AXES, Layout, make_mesh
from lmx.parallel.roofline import Time
from lmx.parallel.traffic import Traffic, traffic
from lmx.parallel.work import Work
from lmx.train import optimizers, orthogonal
from lmx.train.experiment import (
    Experiment,
    asked_of_attention,
    check,
    check_rows,
    columns,
    flops_per_token,
    is_packed,
    stacks,
    unread,
    with_vocab,
)
from lmx.train.program import build
from lmx.train.state import initial_state, state_shardings


@dataclass(frozen=True)
class Plan:
    """A step's cost on one device.

    Attributes:
      memory: bytes by row, at the step's fullest moment.
      host: bytes by row in the host's memory, for each device.
      traffic: collectives of a step, larger ones first.
      flops: of a step on one device as MFU counts them, and with what is recomputed.
      time: the roofline.
      compiled: the compiler's own figures, where asked for.
    """

    experiment: Experiment
    chip: Chip
    memory: dict[str, int]
    host: dict[str, int]
    traffic: tuple[Traffic, ...]
    flops: tuple[float, float]
    time: Time
    compiled: hlo.Compiled | None = None

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total <= chips.USABLE * self.chip.memory

    @property
    def mfu(self) -> float:
        """The share of the chips' peak that the predicted step reaches (PaLM, appendix B)."""
        return self.flops[0] / self.time.step / self.chip.flops[POLICIES[self.experiment.precision].multiplies]


def plan(experiment: Experiment, *, chip: str = "h100", compiled: bool = False, cpu: bool = False) -> Plan:
    """Plans an experiment on its layout, whatever devices are here.

    Args:
      chip: a short name of `lmx.parallel.chips.CHIPS`.
      compiled: whether to compile it too: for the chip after `lmx.parallel.absent.prepare`, else for simulated CPU devices.
      cpu: whether bytes and collectives are to be those of XLA:CPU, to be held against the latter.

    Raises:
      ValueError: one line that says what is wrong with the experiment, or what cannot be planned yet.
    """
    experiment = settled(experiment)
    kind = chips.chip(chip)
    found = work(experiment, "cpu" if cpu else kind.kind)
    specs = _specs(experiment.model)
    whole = state_bytes(experiment.model, experiment.optimizer, experiment.steps, experiment.precision, _of_state(experiment.layout))
    rest = whole["rest"] + _batch_bytes(experiment)
    state = {"parameters": whole["parameters"], "optimizer": whole["optimizer"]}
    moving = _moving(experiment, cpu=cpu)
    memory = cost.memory(found, specs, **state, rest=rest, fetched=(whole["layer"], whole["update"]), moving=moving, cpu=cpu)
    waiting = sum(cost.activations(found, cpu=cpu).values()) if "activations" in experiment.layout.offload else 0
    host = {"parameters": whole["parameters, host"], "optimizer": whole["optimizer, host"], "activations": waiting}
    sent = sorted([*traffic(found, specs, cpu=cpu), *_of_update(experiment, specs, found.master)], key=lambda t: -t.volume)
    source, length = columns(experiment)
    tokens = experiment.batch * length
    model = _flops_per_token(experiment.model, length, source) * tokens / experiment.layout.devices
    flops = (model, model + _besides(experiment, found) / experiment.layout.devices)
    moved = roofline.moved(found, memory["parameters"] + host["parameters"], memory["optimizer"] + host["optimizer"])
    timed = roofline.seconds(found, sent, flops[1], kind, moved, roofline.fetched(found, host))
    made = compile_step(experiment, chip if absent.prepared() else None) if compiled else None
    return Plan(experiment, kind, memory, {name: size for name, size in host.items() if size}, tuple(sent), flops, timed, made)


PLANNED: dict[str, tuple] = {
    "positions": ("rope", "alibi", "learned", "sinusoidal", "relative", "none"),
}
"""Settings of a model, where it has them, of which `lmx.parallel.cost` counts these values alone: others change what a step keeps or sends."""


MOVING: dict[type, dict[bool, tuple[float, float]]] = {
    optimizers.Adam8bit: {True: (2.0, 3.9), False: (0.0, 2.1)},
    optimizers.Adafactor: {True: (0.0, 1.0)},
    optimizers.Lion: {True: (1.0, 1.0)},
    optimizers.Muon: {True: (0.0, 2.1), False: (0.0, 2.1)},
}
"""Numbers for each gradient that an update has beside gradients and state, on XLA:CPU (True) and on XLA:GPU: what it forms of its state before
there are gradients, and all of it. Measured."""


def _moving(experiment: Experiment, *, cpu: bool) -> tuple[float, float]:
    """Of `MOVING`, what there is at once: nothing to speak of where layers are moved one at a time."""
    return (0.0, 0.0) if experiment.layout.streamed else MOVING.get(type(experiment.optimizer), {}).get(cpu, (0.0, 0.0))


def _of_update(experiment: Experiment, specs: Tree, width: int) -> list[Traffic]:
    """What an optimizer sends by itself, of numbers of a width in bytes."""
    if not isinstance(experiment.optimizer, optimizers.Muon):
        return []
    return orthogonal.traffic(specs, experiment.layout, width=width, streamed=experiment.layout.streamed)


def settled(experiment: Experiment) -> Experiment:
    """The experiment with a vocabulary, checked in all but its text and the devices at hand.

    Raises:
      ValueError: something does not fit together, or cannot be planned.
    """
    layout, model = experiment.layout, experiment.model
    if layout.ordered:
        raise ConfigError(f"layout.ordered={layout.ordered} is for debugging and cannot be planned; plan with it at 0")
    if experiment.precision == "fp64":
        raise ConfigError("precision=fp64 cannot be planned: no chip trains in it; plan with fp32")
    if not model.vocab:
        kind, _, size = experiment.data.tokenizer.partition(":")
        if kind not in ("bpe", "unigram") or not size.isdigit():
            raise ConfigError("model.vocab=0 takes the tokenizer's vocabulary, which a plan does not read; set model.vocab")
        model = with_vocab(model, -(-int(size) // 8) * 8)
    for (knob, values), (name, one) in itertools.product(PLANNED.items(), stacks(model).items()):
        if getattr(one, knob, values[0]) not in values:
            raise ConfigError(f"{name}.{knob}={getattr(one, knob)} cannot be planned yet: what it costs has not been measured")
    experiment = replace(experiment, model=model)
    check(unread(experiment), layout.devices)
    if isinstance(model, EncoderDecoder):
        check_rows(experiment)
    return experiment


def work(experiment: Experiment, kind: str = "cpu") -> Work:
    """What the cost of an experiment's step depends on; `kind`: JAX's name of the devices, on which it depends what computes attention."""
    model, (source, length) = experiment.model, columns(experiment)
    if isinstance(model, RWKV):
        return _recurrent(experiment, model)
    found = _work(experiment, model, length, kind)
    if not source:
        return found
    encoder = _work(experiment, model.encoder, source, kind)
    norms = found.norms * 3 // 2
    return replace(found, source=source, dense_across=source <= LONG and not model.attention_softcap, encoder=encoder, norms=norms, reads=3)


def _work(experiment: Experiment, model: Transformer, length: int, kind: str) -> Work:
    """The same of one stack, on rows of `length`."""
    layout, precision = experiment.layout, POLICIES[experiment.precision]
    ring = layout.context > 1 and layout.exchange == "ring"
    packed = is_packed(experiment.data)
    if ring:
        kernel = "flash" if layout.attention == "flash" else "chunked"
    else:
        kernel = _attention(model, length, precision.compute, packed, "cpu" if layout.offload else kind, layout.attention)
    fused = kernel in ("cudnn", "flash")
    return Work(
        layout=layout,
        rows=experiment.batch // experiment.microbatches,
        microbatches=experiment.microbatches,
        length=length,
        layers=model.layers,
        embed=model.embed,
        heads=model.heads,
        kv_heads=model.key_heads,
        head_dim=model.head_size,
        mlp=model.hidden,
        vocab=model.vocab,
        table=model.table_size,
        read_out=model.table_size if model.head == "masked" else model.embed,
        one_layer=model.shared_layers,
        gated=model.gated,
        norms=(1 if model.parallel and not model.parallel_norms else 2) + 2 * (model.norm_placement == "sandwich"),
        reads=1 if model.parallel and not model.parallel_norms else 2,
        parallel=model.parallel,
        qk_norm=model.qk_norm,
        tied=model.tied,
        positions=model.context if model.positions == "learned" else 0,
        period=min(len(model.pattern), model.layers),
        masks=0 if kernel == "flash" or (fused and not packed) else len({is_local(kind) for kind in model.pattern}),
        fused=fused,
        dense=not fused and not ring and length <= LONG and model.attention_softcap is None,
        embed_norm=model.embed_norm,
        after=model.norm_placement != "pre",
        head_bias=model.head_bias,
        mixtures=model.mixtures - (model.encoder.mixtures if isinstance(model, EncoderDecoder) else 0),
        experts=model.experts,
        choices=model.experts_per_token if model.experts else 0,
        expert_mlp=model.expert_hidden if model.experts else 0,
        shared=model.shared_hidden,
        shared_gate=model.shared_gate,
        capacity=experts.capacity_of(model, length),
        relative=model.positions == "relative",
        dropout=model.dropout > 0,
        compute=jnp.dtype(precision.compute).itemsize,
        master=jnp.dtype(precision.params).itemsize,
        multiplies=precision.multiplies,
    )


def _attention(model: Transformer, length: int, dtype, packed: bool, kind: str, implementation: str) -> str:
    """What `lmx.kernels.attention` takes on devices of a kind."""
    operands, asked = asked_of_attention(model, length, length, dtype, packed)
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=None)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("chip",), abstract_device=device)):
        return why(*operands, **asked, implementation=implementation)[0]


def _recurrent(experiment: Experiment, model: RWKV) -> Work:
    """The same of an RWKV."""
    precision = POLICIES[experiment.precision]
    return Work(
        layout=experiment.layout,
        rows=experiment.batch // experiment.microbatches,
        microbatches=experiment.microbatches,
        length=experiment.data.length,
        layers=model.layers,
        embed=model.embed,
        heads=model.width,
        kv_heads=model.width,
        head_dim=1,
        mlp=model.hidden,
        vocab=model.vocab,
        table=model.embed,
        read_out=model.embed,
        gated=False,
        tied=model.tied,
        masks=0,
        dense=False,
        recurrent=model.version,
        state=model.head_dim,
        ranks=_ranks(model),
        embed_norm=True,
        dropout=model.dropout > 0,
        compute=jnp.dtype(precision.compute).itemsize,
        master=jnp.dtype(precision.params).itemsize,
        multiplies=precision.multiplies,
    )


def _ranks(model: RWKV) -> tuple[int, ...]:
    """Of its networks of low rank."""
    of = {6: (len(MIXED) * model.mix_rank, model.decay_rank), 7: (model.decay_rank, model.rate_rank, model.value_rank, model.gate_rank)}
    return of.get(model.version, ())


def _of_state(layout: Layout) -> Layout:
    """The part of a layout that says where the state is."""
    degrees = {axis: getattr(layout, axis) for axis in ("fsdp", "tensor", "pipeline", "expert")}
    return Layout(**degrees, zero=layout.zero, offload=tuple(part for part in layout.offload if part != "activations"))


@lru_cache(4096)
def state_bytes(model: Model, recipe: optimizers.Optimizer, steps: int, precision: str, layout: Layout) -> MappingProxyType:
    """Bytes on one device of parameters, optimizer state and the rest of the state, which lie there all along, and in its host's memory:
    exact; and of what is fetched from there at once, `layer` by a pass and `update` by the update, each a layer ahead."""
    mesh = AbstractMesh(tuple(getattr(layout, a) for a in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    shapes = _shapes(model, recipe, steps, precision)
    where = state_shardings(_specs(model), shapes, mesh, layout)
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, where)
    params, optimizer = (sum(_waiting(tree, model), start=Counter()) for tree in (state.params, state.optimizer))
    whole = {
        "parameters": cost.held(state.params),
        "optimizer": cost.held(state.optimizer),
        "rest": cost.held((state.step, state.key, state.loss_scale)),
        "parameters, host": cost.held(state.params, in_host=True),
        "optimizer, host": cost.held(state.optimizer, in_host=True),
    }
    layers = 2 * max((params[g] + optimizer[g] for g in params | optimizer if g >= 0), default=0)
    return MappingProxyType(whole | {"layer": 2 * max(params.values(), default=0), "update": layers + optimizer[-1]})


def _waiting(tree: Tree, model: Model) -> Iterator[Counter]:
    """Bytes in the host's memory of one repeat of each group's pattern, and (-1) of what is no layer's."""
    own = stack.groups(model)
    both = (model, model.encoder) if isinstance(model, EncoderDecoder) else (model,)
    depths = [1 if one.shared_layers else group.repeats for one in both for group in stack.groups(one)]
    for name, leaf in named_leaves(tree).items():
        words = name.split("/")
        group = int(words[words.index("layers") + 1]) if "layers" in words else -1
        if group >= 0 and "encoder" in words:  # whose groups are counted after the decoder's
            group += len(own)
        yield Counter({group: cost.held(leaf, in_host=True) // (depths[group] if group >= 0 else 1)})


@lru_cache(64)
def _specs(model: Model) -> Tree:
    return functions(model).specs(model)


@lru_cache(64)
def _flops_per_token(model: Model, length: int, source: int) -> float:
    return flops_per_token(model, length, source)


@lru_cache(64)
def _shapes(model: Model, recipe: optimizers.Optimizer, steps: int, precision: str) -> Tree:
    specs = _specs(model)
    transform, _ = optimizers.build(recipe, steps, specs)
    return jax.eval_shape(partial(initial_state, 0, specs, transform, POLICIES[precision]))


def batch_structs(experiment: Experiment, sharding: NamedSharding) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch's shapes, as a step takes it."""
    shape = (experiment.microbatches, experiment.batch // experiment.microbatches)
    row = padding(experiment.data)
    return {name: jax.ShapeDtypeStruct((*shape, *field.shape), field.dtype, sharding=sharding) for name, field in row.items()}


def _batch_bytes(experiment: Experiment) -> int:
    """Of a batch on one device, as far as the step reads it: not unused positions, and the example ids for dropout alone."""
    model, row = experiment.model, padding(experiment.data)
    unread = set() if model.dropout else {"example_id"}
    sides = {"decoder_": model, "": model.encoder} if isinstance(model, EncoderDecoder) else {"": model}
    unread |= {f"{side}positions" for side, one in sides.items() if getattr(one, "positions", "none") == "none"}
    return experiment.batch // experiment.layout.shards * sum(field.nbytes for name, field in row.items() if name not in unread)


def _besides(experiment: Experiment, work: Work) -> float:
    """FLOPs of a step over all devices that MFU does not count: forward passes of layers done again, by rematerialisation and by a pipeline
    with its backward pass; products of empty slots of experts; and, dropless, each row with every expert of its device, as XLA:GPU has
    it."""
    model, layout, (source, length) = experiment.model, experiment.layout, columns(experiment)
    tokens = experiment.batch * length
    scores = 0.0
    if not isinstance(model, RWKV):
        scores = 4.0 * model.layers * model.heads * model.head_size * (length + source) * tokens
    if source:
        scores += 4.0 * model.encoder.layers * model.encoder.heads * model.encoder.head_size * source**2 * experiment.batch
    forward = _flops_per_token(model, length, source) / 3 * tokens - 2.0 * model.vocab * work.read_out * tokens
    again = {"none": 0.0, "dots": scores, "sites": forward, "full": forward}[layout.remat] + (forward if layout.pipeline > 1 else 0.0)
    routed = work.routed * work.microbatches * layout.devices // (layout.tensor * layout.pipeline)
    rows = routed * (1 if work.capacity is not None else work.here.experts) - tokens * work.choices
    passes = 3 + layout.formed_again + (layout.pipeline > 1)
    return again + passes * 2.0 * max(rows, 0) * work.mixtures * work.embed * work.expert_mlp * (3 if work.gated else 2)


def compile_step(experiment: Experiment, chip: str | None = None) -> hlo.Compiled:
    """Compiles the step for absent GPUs of a kind, or for the simulated CPU devices that are here.

    Args:
      chip: a short name of `lmx.parallel.absent.TARGETS`, after `lmx.parallel.absent.prepare`; None for CPU devices.

    Raises:
      ValueError: there are too few simulated devices, or nothing is known of the chip.
    """
    devices = jax.devices("cpu") if chip is None else absent.devices(experiment.layout.devices, chip)
    if len(devices) < experiment.layout.devices:
        raise ConfigError(
            f"the layout has {experiment.layout.devices} devices and {len(devices)} are simulated; raise JAX_NUM_CPU_DEVICES, or {absent.HINT}"
        )
    start = time.perf_counter()
    mesh = make_mesh(experiment.layout, devices)
    program = build(experiment, mesh.abstract_mesh if chip and experiment.layout.offload else mesh)
    batch = batch_structs(experiment, batch_sharding(program.mesh, microbatches=True))
    if program.mesh is mesh:
        with jax.set_mesh(mesh), compiled_here(mesh):
            made = program.step.jitted.lower(program.abstract, batch).compile()
    else:
        made = absent.compiled(program.step.jitted, mesh, program.abstract, batch)
    target = "simulated CPU devices" if chip is None else chips.chip(chip).kind
    return hlo.read(made, mesh, target, time.perf_counter() - start)


def compared(found: Plan, made: hlo.Compiled) -> dict[tuple[str, tuple[str, ...]], tuple[int, int]]:
    """Bytes of a step's collectives by kind and axes: planned, and found in the compiled text."""
    volumes: dict[tuple, list[int]] = defaultdict(lambda: [0, 0])
    for place, several in ((0, found.traffic), (1, made.collectives)):
        for one in several:
            volumes[one.kind, one.axes or ("?",)][place] += one.volume
    return {key: (a, b) for key, (a, b) in sorted(volumes.items(), key=lambda item: -max(item[1]))}
