"""Runs an experiment, top to bottom."""

import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path

import jax
import numpy as np

from lmx.core.config import ConfigError, command_line, diff, exits_with_one_line, from_json, refuse_changes, to_json
from lmx.core.tree import Tree
from lmx.data.pipeline import Numbered, iterate, require_supervised
from lmx.data.recipe import Prepared, has_two_sides, make_batches, prepare
from lmx.parallel import hosts
from lmx.parallel.chips import peak_flops
from lmx.parallel.feed import batch_sharding, local_rows, place
from lmx.parallel.host import keep_pages
from lmx.parallel.offload import fetched
from lmx.train.advice import shortage
from lmx.train.checkpoints import Manager, load_params
from lmx.train.experiment import RESUMABLE, Experiment, check, check_rows, columns, flops_per_token, resolve
from lmx.train.logging import RECORD, Logger, Silence, draw_curve, read_record, write_record
from lmx.train.program import Program, build, mean_over
from lmx.train.samples import corrupted, written
from lmx.train.state import TrainState


@dataclass(frozen=True)
class Start:
    """A run about to start: all that could be wrong with it beforehand has been looked at.

    Attributes:
      batches: what it trains on.
      state: what is gone on from, or None for a new run.
      example: the global example that the next batch begins with.
      sources: who set each field of the experiment.
    """

    experiment: Experiment
    prepared: Prepared
    program: Program
    batches: Numbered
    state: TrainState | None = None
    example: int = 0
    sources: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """How a run ended: its last state, the last metrics of each kind, the last sample, and the signal that cut it short if one did."""

    state: TrainState
    metrics: dict[str, float]
    validation: dict[str, float]
    sample: str
    stopped: int | None = None


class NotFiniteError(ArithmeticError):
    """Training met a loss or gradient that is no number."""


class DeviceMemoryError(MemoryError):
    """A device has not memory enough for the state or a step."""


def main(experiment: Experiment, argv: list[str] | None = None) -> Result:
    """The door of every experiment module: command line, checks, run.

    Leaves with code 2 and one line when something is wrong before the run; with code 1 and one line when loss or gradients are no numbers
    any more or another process of the run is lost; with code 1 and the plan's largest rows when memory was not enough; and with 128 + the
    signal's number, everything saved, when Ctrl-C or SIGTERM ended it. Of several processes all leave with the same code, whichever got
    the signal.
    """
    keep_pages()
    description = sys.modules["__main__"].__doc__ or "Trains a language model."
    experiment, sources = command_line(experiment, argv, description=description)
    if jax.config.jax_compilation_cache_dir is None:
        _keep_compiled(Path(experiment.data.cache) / "compiled")
    speaks = True
    try:
        with ExitStack() as stack:
            with exits_with_one_line():
                stack.enter_context(hosts.together(experiment.hosts, agreed=(NotFiniteError,)))
                start = prepare_run(experiment, sources)
            speaks = hosts.is_first()
            result = run(start)
    except (NotFiniteError, DeviceMemoryError) as error:
        sys.exit(str(error) if speaks else 1)
    if result.stopped is not None:
        sys.exit(128 + result.stopped)
    return result


def _keep_compiled(folder: Path) -> None:
    """Compiled programs are kept, so that a second start of the same experiment compiles nothing."""
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def prepare_run(experiment: Experiment, sources: dict[str, str] | None = None) -> Start:
    """Checks an experiment, reads its text, settles its folder, restores what is resumed. Compiles nothing.

    Raises:
      ValueError, FileNotFoundError: one line that says what is wrong and what to do.
    """
    prepared = hosts.first(lambda: _settle(experiment)) or prepare(experiment.data)  # which the others find in the cache
    experiment = resolve(experiment, prepared)
    _check_initial(experiment)
    if experiment.samples.prompt and has_two_sides(experiment.data):
        corrupted(experiment, prepared.tokenizer)
    program = build(experiment)
    batches = make_batches(
        experiment.data, prepared.train, prepared.tokenizer, vocab=experiment.model.vocab, rows=experiment.batch, seed=experiment.seed
    )
    if len(batches) < experiment.steps:
        raise ConfigError(
            f"steps={experiment.steps}: data.train is used up at step {len(batches)} (its components' epochs, or 2**32 examples); lower steps or "
            "raise epochs"
        )
    folder, start = experiment.path, Start(experiment, prepared, program, batches, sources=sources or {})
    if experiment.start != "resume":
        if experiment.start == "overwrite":
            hosts.first(lambda: shutil.rmtree(folder, ignore_errors=True))
        return start
    record = read_record(folder)
    refuse_changes(from_json(Experiment, record["config"]), experiment, allowed=RESUMABLE)
    changed = [name for name, value in hashes(prepared).items() if record["data"].get(name) != value]
    if changed:
        raise ValueError(f"{folder} was trained with another {' and '.join(changed)}: what data.* names has changed its content since")
    with Manager(folder / "checkpoints", experiment.checkpoints) as manager:
        if manager.latest is None:
            return start
        state, position = manager.restore(program.abstract)
    state = program.arranged(state)
    return replace(start, state=state, example=position["example"])


UNSHAPED = ("dropout", "init_std", "context")
"""Settings of a model in which a run may differ from the one whose parameters it begins with."""


def _check_initial(experiment: Experiment) -> None:
    """Refuses another run's parameters that are not of this one's model."""
    if not experiment.initial:
        return
    model = from_json(Experiment, read_record(experiment.initial)["config"]).model
    changed = {n: pair for n, pair in diff(to_json(model), to_json(experiment.model)).items() if n.rsplit(".", 1)[-1] not in UNSHAPED}
    if changed:
        said = ", ".join(f"model.{name} is {old} there and {new} here" for name, (old, new) in changed.items())
        raise ConfigError(f"initial={experiment.initial} is a run of another model: {said}")


def _settle(experiment: Experiment) -> Prepared:
    """Refuses what is wrong with an experiment or its folder, and reads its text."""
    check(experiment)
    check_rows(experiment)
    processes, devices = jax.process_count(), len(jax.devices())
    if processes > 1 and experiment.layout.devices != devices:
        raise ConfigError(
            f"the layout uses {experiment.layout.devices} of the {devices} devices that {processes} processes have; they must use all: "
            f"raise layout.*, or start fewer"
        )
    folder, held = experiment.path, (experiment.path / RECORD).exists()
    if held and experiment.start == "new":
        raise ValueError(f"{folder} holds a run; --start resume goes on with it, --start overwrite deletes it, --name NAME keeps both")
    if experiment.start == "resume" and not held:
        raise ValueError(f"{folder} holds no run to resume; drop --start resume, or set --name and --folder to a run's")
    return prepare(experiment.data)


def hashes(prepared: Prepared) -> dict[str, str]:
    """Content hashes of what a run reads."""
    held_out = {} if prepared.validation is None else {"validation": prepared.validation.fingerprint}
    return {"train": prepared.train.fingerprint, **held_out, "tokenizer": prepared.tokenizer.fingerprint}


def run(start: Start) -> Result:
    """Trains. Writes the run's folder: record, metrics, TensorBoard, curve, samples, checkpoints.

    Raises:
      NotFiniteError: a step's loss or gradient is no number; the checkpoints before it stay.
      DeviceMemoryError: memory was not enough; they stay too.
    """
    with _explaining_shortage(start):
        return _run(start)


@contextmanager
def _explaining_shortage(start: Start) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        on_cpu = start.program.mesh.devices.flat[0].platform == "cpu"
        raise DeviceMemoryError(shortage(start.experiment, cpu=on_cpu)) from error


def _run(start: Start) -> Result:
    experiment, program, folder = start.experiment, start.program, start.experiment.path
    state = program.initial() if start.state is None else start.state
    if experiment.initial and start.state is None:
        params = load_params(Path(experiment.initial) / "checkpoints", program.abstract.params)
        state = state.replace(params=program.arranged(params))
    resumed_at = int(state.step) if experiment.start == "resume" else None
    first = hosts.is_first()
    if first:
        recorded = replace(experiment, start="new", hosts=hosts.Hosts())
        write_record(folder, recorded, sources=start.sources, data=hashes(start.prepared))
    with (
        Manager(folder / "checkpoints", experiment.checkpoints) as manager,
        Logger(folder, steps=experiment.steps, resumed_at=resumed_at) if first else Silence() as logger,
        _signals() as caught,
    ):
        result = _train(start, state, manager, logger, caught)
    if first:
        draw_curve(folder)
    return result


def _train(start: Start, state: TrainState, manager: Manager, logger: Logger | Silence, caught: list[int]) -> Result:
    experiment, program = start.experiment, start.program
    sharding = batch_sharding(program.mesh, microbatches=True)

    def shape(size: int) -> tuple[int, int]:
        return experiment.microbatches, size // experiment.microbatches

    @cache
    def rows(size: int) -> np.ndarray:
        return local_rows(sharding, shape(size))

    step, metrics, validation, sample = int(state.step), {}, {}, ""
    meter = _Meter(experiment, program)
    pending, several, stopped = None, jax.process_count() > 1, 0

    def settle() -> None:
        """Looks at the metrics of the last step: after the next one was issued where possible, so that the device does not wait."""
        nonlocal metrics, pending, stopped
        if pending is not None:
            (at, arrays, called, length), pending = pending, None
            stopped = stopped or int(called)
            metrics = {name: float(value) for name, value in jax.device_get(arrays).items()}
            _require_finite(at, metrics)
            meter.count(metrics["tokens"], length)
            if at % experiment.log_every == 0 or at == experiment.steps:
                metrics |= meter.speeds()
                logger.log(at, metrics)
            else:
                logger.progress(at)

    with iterate(start.batches, start_example=start.example, rows=rows) as batches:
        while step < experiment.steps and not stopped:
            batch = next(batches)
            require_supervised(batch, f"the batch of step {step + 1}")
            size, length = batches.size, batch["weights"].shape[1]
            state, arrays = program.step(state, place(batch, rows(size), shape(size), sharding))
            # A signal may reach only some processes: like the metrics, that they are called is known to all one step later.
            called = hosts.largest(program.mesh, caught[0] if caught else 0) if several else 0
            settle()
            step, pending = step + 1, (step + 1, arrays, called, length)
            last, loss = step == experiment.steps, None
            if start.prepared.validation is not None and _due(step, experiment.evaluation.every, last):
                settle()
                validation = evaluate(start, state.params)
                logger.log(step, validation, split="validation")
                loss = validation["loss"]
                meter.restart()
            if _due(step, experiment.checkpoints.every, last):
                settle()
                manager.save(step, program.natural(state), batches.get_state(), loss)
            if experiment.samples.prompt and _due(step, experiment.samples.every, last):
                settle()
                sample = _sample(start, program.natural(state.params))
                if hosts.is_first():
                    logger.message(f"--- sample at step {step} ---\n{sample}\n---")
                    _append(experiment, step, sample)
                meter.restart()
            if caught and not several:
                stopped = caught[0]
        settle()
        if stopped:
            manager.save(step, program.natural(state), batches.get_state())
            logger.message(f"{signal.Signals(stopped).name}: saved step {step}; --start resume goes on from it")
    return Result(program.natural(state), metrics, validation, sample, stopped or None)


def evaluate(start: Start, params: Tree) -> dict[str, float]:
    """Means over the held-out text: the objective's metrics in nats per token, and, where each is predicted from those before it,
    `nats_per_byte`, which compares across tokenizers."""
    experiment, store = start.experiment, start.prepared.validation
    rows = experiment.batch // experiment.microbatches
    sharding = batch_sharding(start.program.mesh, microbatches=False)
    mine = local_rows(sharding, (rows,))
    tokenizer, vocab = start.prepared.tokenizer, experiment.model.vocab
    held_out = make_batches(experiment.data, store, tokenizer, vocab=vocab, rows=rows, seed=0, shuffle=False, epochs=1)
    with iterate(held_out, rows=mine) as local:
        placed = (place(batch, mine, (rows,), sharding) for batch in islice(local, experiment.evaluation.batches or None))
        means = mean_over(start.program.evaluate, params, placed)
    if experiment.data.denoising is not None:  # whose loss is of some tokens, given the others
        return means
    return means | {"nats_per_byte": means["loss"] / store.bytes_per_token}


def _sample(start: Start, params: Tree) -> str:
    """Text that process 0 alone writes, on its first device if there are several processes; empty elsewhere."""
    params = hosts.gathered(fetched(params))
    return "" if params is None else written(start.experiment, start.prepared.tokenizer, params)


def _append(experiment: Experiment, step: int, sample: str) -> None:
    with (experiment.path / "samples.txt").open("a") as file:
        file.write(f"--- step {step} ---\n{sample}\n")


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)


def _require_finite(step: int, metrics: dict[str, float]) -> None:
    """Under fp16 a step that overflows is skipped and the scale halved; it is an error only once the scale cannot fall further."""
    if all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm")) or metrics.get("loss_scale", 1.0) > 1.0:
        return
    raise NotFiniteError(
        f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; lower optimizer.learning_rate, raise "
        f"optimizer.schedule.warmup, or set precision to bf16 or fp32; the checkpoints before this step are kept"
    )


class _Meter:
    """Speed of training, evaluation and sampling left out. A class, because time passes."""

    def __init__(self, experiment: Experiment, program: Program):
        devices = program.mesh.devices.flat
        source, _ = columns(experiment)
        peak = peak_flops(devices[0].device_kind, program.precision.multiplies)
        self._peak = None if peak is None else peak * len(list(devices))
        self._cost = cache(lambda length: flops_per_token(experiment.model, length, source))
        self._length: int | None = None
        self.restart()

    def restart(self) -> None:
        self._since: float | None = None
        self._tokens = self._flops = 0.0

    def count(self, tokens: float, length: int) -> None:
        """A step with rows of a length ended. The first after a restart, or of a length, only starts the clock: it may have compiled."""
        if length != self._length:
            self.restart()
            self._length = length
        if self._since is None:
            self._since = time.perf_counter()
        else:
            self._tokens += tokens
            self._flops += tokens * self._cost(length)

    def speeds(self) -> dict[str, float]:
        """Supervised tokens per second since the last call, and the share of the chips' peak that is where it is known."""
        if not self._tokens:
            return {}
        now = time.perf_counter()
        seconds, tokens, flops = now - self._since, self._tokens, self._flops
        self._since, self._tokens, self._flops = now, 0.0, 0.0
        return {"tokens_per_second": tokens / seconds} | ({} if self._peak is None else {"mfu": flops / seconds / self._peak})


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and Ctrl-C, so that the run can save and leave; a second Ctrl-C interrupts at once."""
    caught: list[int] = []

    def catch(number: int, _frame) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
