"""An experiment: the one value from which a run follows, saved beside its checkpoints."""

import dataclasses
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jax

from lmx.core.config import ConfigError, require_types
from lmx.core.precision import PrecisionName, policy
from lmx.data.denoising import BlankInfilling
from lmx.data.denoising import MaskedLM as MaskedText
from lmx.data.lengths import schedule
from lmx.data.recipe import Data, Prepared, decoder_columns, has_two_sides
from lmx.data.recipe import check as check_data
from lmx.kernels import cudnn, flash
from lmx.kernels.masks import Mask
from lmx.models import config as model_config
from lmx.models.config import RWKV, EncoderDecoder, Model, Transformer
from lmx.models.families import functions
from lmx.parallel import layout as layouts
from lmx.parallel.context import ring_refusal
from lmx.parallel.hosts import Hosts
from lmx.parallel.layout import Layout
from lmx.train.checkpoints import Checkpoints
from lmx.train.objectives import CausalLM, Objective, Seq2Seq
from lmx.train.optimizers import AdamW, Optimizer
from lmx.train.optimizers import check as check_optimizer

RESUMABLE = ("layout", "hosts", "microbatches", "steps", "log_every", "evaluation", "samples", "checkpoints", "folder", "start")
"""What may change when a run is resumed; anything else would make it another run."""


KERNELS = {"cudnn": cudnn.refusal, "flash": flash.refusal}
"""Implementations of attention that cannot do everything, and what says what."""


@dataclass(frozen=True)
class Evaluation:
    """The loss on held-out text."""

    every: int = 200
    """Steps between evaluations; the last step is evaluated too. 0: only that."""
    batches: int = 0
    """How many batches of the held-out text, from its beginning. 0: all of it."""


@dataclass(frozen=True)
class Samples:
    """Text written by the model as it trains, and at the end."""

    prompt: str = ""
    """What it continues. Empty: nothing is sampled."""
    every: int = 0
    """Steps between samples. 0: only at the end."""
    tokens: int = 200
    """Length of a sample, in tokens."""
    temperature: float = 0.8
    """Logits are divided by it; 0 takes the likeliest token."""


@dataclass(frozen=True)
class Experiment:
    """A training run, whole."""

    name: str
    """The run's name: it lives in folder/name."""
    data: Data
    """What is read."""
    model: Transformer | EncoderDecoder | RWKV = field(default_factory=Transformer)
    """What is trained."""
    objective: Objective = field(default_factory=CausalLM)
    """What is to be predicted."""
    optimizer: Optimizer = field(default_factory=AdamW)
    """How parameters move."""
    layout: Layout = field(default_factory=Layout)
    """Over which devices."""
    hosts: Hosts = field(default_factory=Hosts)
    """By which processes."""
    precision: PrecisionName = "fp32"
    """fp32; tf32 (as fp32, but GPUs multiply the numbers' first 11 bits); bf16 (fp32 master parameters, bf16 compute); bf16_pure; fp16
    (with dynamic loss scaling); fp8 (as bf16, products with layers' weights in float8: for chips that multiply it, Hopper and later;
    others compute the same, no faster); fp64 (with JAX_ENABLE_X64=1: slow, to tell rounding from bugs)."""
    steps: int = 1000
    """Optimizer steps of the whole run."""
    batch: int = 32
    """Packed examples of one optimizer step, over all devices and microbatches."""
    microbatches: int = 1
    """Into how many parts, computed one after another, a step's batch is cut. The result is the same; memory is not."""
    seed: int = 0
    """Of initial values, the order of the data, dropout and samples."""
    log_every: int = 10
    """Steps between lines of metrics."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    """When held-out text is scored."""
    samples: Samples = field(default_factory=Samples)
    """When text is sampled."""
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    """When the state is saved."""
    initial: str = ""
    """The folder of a run whose newest parameters this one begins with: an imported checkpoint's (`python -m lmx.interop import`), or any of
    the same model. Empty: initial values."""
    folder: str = "runs"
    """Where runs live."""
    start: Literal["new", "resume", "overwrite"] = "new"
    """new refuses a folder that holds a run; resume goes on from its newest checkpoint; overwrite deletes it first."""

    @property
    def path(self) -> Path:
        """The run's folder."""
        return Path(self.folder) / self.name


def named(argv: Sequence[str], usage: str) -> tuple[Experiment, list[str]]:
    """The experiment of the module that a command line begins with, and the rest of the line. Raises ConfigError."""
    if not argv or argv[0].startswith("-"):
        raise ConfigError(f"name an experiment's module first: {usage}")
    try:
        return importlib.import_module(argv[0]).experiment, list(argv[1:])
    except (ModuleNotFoundError, AttributeError) as error:
        raise ConfigError(f"{argv[0]} is no module with an `experiment` in it ({error})") from error


def check(experiment: Experiment, devices: int | None = None) -> None:
    """Refuses, before any text is read or anything compiled, what can be seen to be wrong. Raises ValueError in one line.

    Args:
      devices: how many are at hand; None: as many as are here.
    """
    require_types(experiment)
    if not experiment.name or Path(experiment.name).name != experiment.name:
        raise ConfigError(f"name={experiment.name!r} must be a plain folder name")
    for knob in ("steps", "batch", "microbatches", "log_every"):
        if getattr(experiment, knob) < 1:
            raise ConfigError(f"{knob}={getattr(experiment, knob)} must be at least 1")
    precision, model = policy(experiment.precision), experiment.model
    mixtures = ", ".join(f"{name}.experts={stack.experts}" for name, stack in stacks(model).items() if stack.experts)
    if precision.fp8 and mixtures:
        # Each device multiplies what it has of experts and of their rows. To scale by the largest of all, as numbers that do not depend on the
        # layout must be, is a reduction over the mesh before each product, forward and backward.
        raise ConfigError(f"precision={experiment.precision} is not there for mixtures ({mixtures}); use bf16")
    if experiment.layout.attention in KERNELS and experiment.precision not in ("bf16", "fp16", "fp8"):
        raise ConfigError(
            f"layout.attention={experiment.layout.attention} computes in bf16 or fp16, not in {experiment.precision}: set precision, or "
            "layout.attention to auto"
        )
    model_config.check(with_vocab(model, model.vocab or 8))
    check_optimizer(experiment.optimizer)
    _check_objective(experiment)
    _check_lengths(experiment)
    if experiment.batch % experiment.microbatches:
        raise ConfigError(f"batch={experiment.batch} is not divisible by microbatches={experiment.microbatches}")
    layout = experiment.layout
    sizes = model_config.divided(model, layout.tensor)
    if not layout.zero:
        sizes["fsdp"] = {}
    available = len(jax.devices()) if devices is None else devices
    layouts.check(layout, sizes, experiment.batch // experiment.microbatches, experiment.microbatches, available)
    _check_sequence(experiment)
    _check_attention(experiment)
    _check_collective_matmul(experiment)
    _check_pipeline(experiment)
    check_data(experiment.data)
    schedule(experiment.data.lengths, rows=experiment.batch, length=experiment.data.length, keep=experiment.data.keep)


def unread(experiment: Experiment) -> Experiment:
    """The experiment with a text that nobody looks for: to `check` the rest of one that does not read it."""
    data = dataclasses.replace(experiment.data, train="tfds:unread", validation="", tokenizer="bytes")
    return dataclasses.replace(experiment, data=data)


def columns(experiment: Experiment) -> tuple[int, int]:
    """Columns of a row: of the source that an encoder-decoder's encoder reads, 0 for other models; and of what is predicted. Without a
    denoising that makes pairs (a recipe that only `lmx.verify` and `lmx.plan` take) both sides are as long."""
    length = experiment.data.length
    if not isinstance(experiment.model, EncoderDecoder):
        return 0, length
    return length, decoder_columns(experiment.data) or length


def stacks(model: Model) -> dict[str, Model]:
    """A model's stacks of layers, by the names of their knobs."""
    return {"model": model} | ({"model.encoder": model.encoder} if isinstance(model, EncoderDecoder) else {})


def flops_per_token(model: Model, length: int, source: int) -> float:
    """FLOPs of training on a column of what is predicted, as MFU counts them, in rows of `columns`."""
    return functions(model).flops_per_token(model, length, **({"source": source} if source else {}))


def check_rows(experiment: Experiment) -> None:
    """Refuses an objective that cannot read the rows that the experiment's data makes. Raises ConfigError."""
    denoising, objective = experiment.data.denoising, experiment.objective
    named = f"objective={type(objective).__name__} with data.denoising={type(denoising).__name__}"
    if isinstance(denoising, MaskedText) == objective.causal:
        raise ConfigError(
            f"{named}: both are MaskedLM or neither; only text in which tokens are masked has something to predict in an encoder"
        )
    if has_two_sides(experiment.data) != isinstance(objective, Seq2Seq):
        raise ConfigError(
            f"{named}: Seq2Seq, and nothing else, reads rows of a source and a target; they are made by SpanCorruption, TextInfilling, PrefixLM "
            'or a Mixture of form="encoder_decoder"'
        )
    if denoising is None or has_two_sides(experiment.data) or isinstance(denoising, MaskedText):
        return
    model, named = experiment.model, f"data.denoising={type(denoising).__name__}"
    if isinstance(model, RWKV):
        raise ConfigError(f"{named} makes texts whose beginning is read in both directions, which an RWKV cannot; train a Transformer")
    if model.window is not None:
        raise ConfigError(f"model.window={model.window} hides what {named} shows: the beginning of a text, to all of it; leave it out")
    if isinstance(denoising, BlankInfilling) and not model.block_positions:
        raise ConfigError(f"{named} gives tokens a place in the blank that they fill, and the model has none; set model.block_positions")


def _check_lengths(experiment: Experiment) -> None:
    data, model = experiment.data, experiment.model
    source, length = columns(experiment)
    decoder = "data.decoder_length" if has_two_sides(data) else "data.length"
    longest = [("data.length", source, "model.encoder.context", model.encoder.context)] if source else []
    for knob, size, limit, context in [*longest, (decoder if source else "data.length", length, "model.context", model.context)]:
        if size > context:
            raise ConfigError(f"{knob}={size} is longer than {limit}={context}; lower the one or raise the other")


def _check_objective(experiment: Experiment) -> None:
    model, objective = experiment.model, experiment.objective
    if isinstance(model, EncoderDecoder) != isinstance(objective, Seq2Seq):
        raise ConfigError(f"objective={type(objective).__name__} is not for model={type(model).__name__}: Seq2Seq trains an EncoderDecoder")
    if model.causal != objective.causal:
        wanted = (
            "MaskedLM, for a model that sees the whole text" if objective.causal else "CausalLM, for a model that sees what came before"
        )
        raise ConfigError(f"objective={type(objective).__name__} with model.causal={model.causal}; use {wanted}, or change model.causal")
    if not model.vocabulary_head:
        raise ConfigError(
            f"model.head={model.head} gives no logits of the vocabulary, which {type(objective).__name__} trains; use lm or masked"
        )
    if experiment.samples.prompt and not model.causal:
        raise ConfigError("samples.prompt is continued token by token, which model.causal=False cannot do; leave it empty")


def _check_sequence(experiment: Experiment) -> None:
    for stage in experiment.data.lengths:
        shorter = dataclasses.replace(experiment.data, length=stage.length, lengths=())
        _check_sequence(dataclasses.replace(experiment, data=shorter))
    layout, model, length = experiment.layout, experiment.model, experiment.data.length
    between = layout.context * (layout.tensor if layout.sequence else 1)
    if has_two_sides(experiment.data) and (short := columns(experiment)[1]) % between:
        raise ConfigError(
            f"data.decoder_length={short} is not divisible by layout.context={layout.context} x layout.tensor={layout.tensor}, which split it; "
            f"set it to {-(-short // between) * between}, or layout.sequence to False"
        )
    if length % between:
        raise ConfigError(
            f"data.length={length} is not divisible by layout.context={layout.context} x layout.tensor={layout.tensor}, which split it"
            f"{'; change it, or set layout.sequence to False' if length % layout.context == 0 else '; change one of them'}"
        )
    if layout.context == 1:
        return
    if isinstance(model, EncoderDecoder) or getattr(model, "positions", None) in ("relative", "transformer_xl"):
        raise ConfigError(
            f"layout.context={layout.context} splits sequences, which is not there for an encoder-decoder or relative positions; set it to 1"
        )
    if isinstance(model, RWKV):
        raise ConfigError(
            f"layout.context={layout.context} splits sequences, along which an RWKV goes from token to token; set it to 1, and split the batch "
            "(layout.fsdp) or the channels (layout.tensor)"
        )
    if model.expert_capacity is not None:
        raise ConfigError(
            f"model.expert_capacity={model.expert_capacity} counts an expert's slots along a whole sequence, which layout.context splits; "
            "set it to None (dropless), or layout.context to 1"
        )
    if model.dropout:
        raise ConfigError(
            f"model.dropout={model.dropout} cannot drop attention weights of sequences that layout.context splits; set it to 0"
        )
    if layout.exchange == "ring" and length % (2 * layout.context):
        raise ConfigError(
            f"data.length={length} is not divisible by 2 x layout.context={layout.context}: a ring cuts it in that many pieces"
        )
    if layout.exchange == "ring" and (reason := ring_refusal(layout.attention)):
        raise ConfigError(f"layout.attention={layout.attention} {reason}")
    heads = model.heads // layout.tensor
    if layout.exchange == "alltoall" and heads % layout.context:
        raise ConfigError(
            f"layout.exchange=alltoall trades {heads} heads (model.heads / layout.tensor) among layout.context={layout.context} devices, "
            f"which does not divide them; use ring, or another degree"
        )


def is_packed(data: Data) -> bool:
    """Whether rows say which text each token belongs to."""
    return data.packing != "stream" or data.denoising is not None


def asked_of_attention(model: Transformer, queries: int, keys: int, dtype, packed: bool) -> tuple[tuple, dict]:
    """What the layers of a stack call attention with, beside values and scale: queries, keys and mask, abstract; and by name what only some
    implementations can do, None where it is not asked for."""
    q, k = (jax.ShapeDtypeStruct((1, length, 1, model.head_size), dtype) for length in (queries, keys))
    segments = [jax.ShapeDtypeStruct(a.shape[:2], "int32") if packed else None for a in (q, k)]
    learned = model.positions in ("relative", "transformer_xl") and queries == keys
    asked = {
        "softcap": model.attention_softcap,
        "slopes": model.positions if model.positions == "alibi" else None,
        "bias": model.positions if learned else None,
        "keep": model.dropout or None,
    }
    return (q, k, Mask(query_segments=segments[0], key_segments=segments[1])), asked


def _check_attention(experiment: Experiment) -> None:
    layout, model = experiment.layout, experiment.model
    if layout.attention not in KERNELS or isinstance(model, RWKV):
        return
    source, length = columns(experiment)
    calls = [(model, length, length)] + ([(model.encoder, source, source), (model, length, source)] if source else [])
    for stack, queries, keys in calls:
        (q, k, mask), asked = asked_of_attention(stack, queries, keys, policy(experiment.precision).compute, is_packed(experiment.data))
        values = (k,) if layout.attention == "flash" else ()
        if reason := KERNELS[layout.attention](q, k, *values, mask, **asked):
            raise ConfigError(f"layout.attention={layout.attention} {reason}; use auto")


def _check_collective_matmul(experiment: Experiment) -> None:
    layout, model = experiment.layout, experiment.model
    if not layout.collective_matmul:
        return
    if layout.tensor == 1 or not layout.sequence:
        raise ConfigError(
            f"layout.collective_matmul is of tensor devices that split sequences, not of layout.tensor={layout.tensor} with "
            f"layout.sequence={layout.sequence}; leave it out or change those"
        )
    if isinstance(model, RWKV):
        raise ConfigError("layout.collective_matmul is not there for an RWKV; leave it out")
    if policy(experiment.precision).fp8:
        raise ConfigError(f"layout.collective_matmul is not there for precision={experiment.precision}; use bf16, or leave it out")
    for name, stack in stacks(model).items():
        if stack.key_heads % layout.tensor:
            raise ConfigError(
                f"layout.collective_matmul needs a part of the keys for each device: {name}.kv_heads={stack.kv_heads} is not divisible by "
                f"layout.tensor={layout.tensor}"
            )


def _check_pipeline(experiment: Experiment) -> None:
    layout, model = experiment.layout, experiment.model
    stages = layout.pipeline * layout.rounds
    if stages > 1 and model.shared_layers:
        raise ConfigError(
            f"model.shared_layers has one set of parameters for all layers, which layout.pipeline={layout.pipeline} has none to divide of; "
            "set it to 1"
        )
    if stages > 1 and (isinstance(model, EncoderDecoder) or getattr(model, "positions", None) == "relative"):
        raise ConfigError(
            f"layout.pipeline={layout.pipeline} cuts one stack whose layers need nothing but each other's output; an encoder-decoder has two, "
            "and relative positions are one table for all layers; set it to 1"
        )
    if stages > 1 and getattr(model, "version", 4) > 6:
        raise ConfigError(
            f"layout.pipeline={layout.pipeline} cuts one stack whose layers need nothing but each other's output, and those of "
            f"model.version={model.version} take from the first one's values; set it to 1"
        )
    if stages > 1 and model.layers % (stages * len(model.pattern)):
        raise ConfigError(
            f"model.layers={model.layers} is not divisible by layout.pipeline={layout.pipeline} x layout.rounds={layout.rounds} x "
            f"{len(model.pattern)} (the length of model.pattern): every stage holds as many whole patterns"
        )


def resolve(experiment: Experiment, prepared: Prepared) -> Experiment:
    """The experiment with the vocabulary filled in from the tokenizer. Raises ConfigError when the model's is too small."""
    wanted, given = prepared.tokenizer.vocab, experiment.model.vocab
    if given and given < wanted:
        raise ConfigError(f"model.vocab={given} is smaller than the tokenizer's {wanted}; raise it, or leave it 0 to take the tokenizer's")
    vocab = given or -(-wanted // 8) * 8
    if vocab % experiment.layout.tensor:
        raise ConfigError(
            f"model.vocab={vocab} is not divisible by layout.tensor={experiment.layout.tensor}; set model.vocab to a multiple of it"
        )
    return dataclasses.replace(experiment, model=with_vocab(experiment.model, vocab))


def with_vocab(model: Model, vocab: int) -> Model:
    """The model with so many rows in its table of embeddings, which an encoder reads too."""
    if isinstance(model, EncoderDecoder) and model.encoder.vocab == model.vocab:
        model = dataclasses.replace(model, encoder=dataclasses.replace(model.encoder, vocab=vocab))
    return dataclasses.replace(model, vocab=vocab)
