"""What was run: lists runs, shows one, and says what differs between two.

`python -m lmx.runs diff A B`, `python -m lmx.runs list [FOLDER]`, `python -m lmx.runs show A`; and what it was trained on:
`python -m lmx.runs trace A STEP ROW`, `python -m lmx.runs seen A TEXT`. A run is given by its folder, or by its name under `runs/`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from lmx.core.config import ConfigError, diff, exits_with_one_line, flatten, from_json, subcommand
from lmx.data.lineage import seen, trace
from lmx.data.pipeline import Numbered
from lmx.data.recipe import make_batches, prepare
from lmx.data.tokenizers import Tokenizer
from lmx.train.experiment import Experiment, resolve
from lmx.train.logging import RECORD, read_metrics, read_record

RUNS = Path("runs")
PARTS = ("config", "versions", "data")
USAGE = "python -m lmx.runs diff A B | list [FOLDER] | show A | trace A STEP ROW | seen A TEXT"


@dataclass(frozen=True)
class Diff:
    """Prints what differs between two runs: config, versions, data."""

    a: Positional[str]
    """A run."""
    b: Positional[str]
    """Another."""


@dataclass(frozen=True)
class List:
    """Prints a table of runs."""

    folder: Positional[Path] = RUNS
    """The folder that holds them."""


@dataclass(frozen=True)
class Show:
    """Prints the record of a run, with who set each field."""

    run: Positional[str]
    """The run."""


@dataclass(frozen=True)
class Trace:
    """Prints what a row of a training batch was made of: texts, where they came from, what cleaning did to them."""

    run: Positional[str]
    """The run."""
    step: Positional[int]
    """The training step, from 1."""
    row: Positional[int]
    """The row of its batch, from 0."""


@dataclass(frozen=True)
class Seen:
    """Prints when a text was trained on: each step and row."""

    run: Positional[str]
    """The run."""
    text: Positional[str]
    """The text, as it stands in the cleaned documents."""


@dataclass(frozen=True)
class Row:
    """A run in the list: steps logged, last training and validation losses, and when it last logged."""

    name: str
    steps: int | None
    loss: float | None
    validation: float | None
    when: datetime


def folder_of(run: str) -> Path:
    """The folder of a run given as a path or as a name under `runs/`."""
    return RUNS / run if not (Path(run) / RECORD).is_file() and (RUNS / run / RECORD).is_file() else Path(run)


def differences(a: str, b: str) -> dict[str, dict[str, tuple[Any, Any]]]:
    """What differs between two runs: for each of config, versions and data, the two values by name. Empty when nothing does.

    Raises:
      FileNotFoundError, ValueError: one is no run, or its record is damaged.
    """
    old, new = (read_record(folder_of(run)) for run in (a, b))
    found = {part: diff(old[part], new[part]) for part in PARTS}
    return {part: changed for part, changed in found.items() if changed}


def rows(folder: Path) -> list[Row]:
    """Every run in a folder, by name.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: a run's metrics are damaged.
    """
    found = []
    for run in sorted(path for path in folder.iterdir() if (path / RECORD).is_file()):
        metrics = read_metrics(run)
        losses: dict[str, float] = {entry["split"]: entry["loss"] for entry in metrics if "loss" in entry}
        seconds = metrics[-1]["time"] if metrics else (run / RECORD).stat().st_mtime
        steps = max((entry["step"] for entry in metrics), default=None)
        found.append(Row(run.name, steps, losses.get("train"), losses.get("validation"), datetime.fromtimestamp(seconds)))
    return found


def _print(lines: Sequence[Sequence[tuple[str, str]]]) -> None:
    """Prints cells (text, style) in aligned columns, never cut or wrapped, so that the output can be searched."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    widths = [max(len(line[column][0]) for line in lines) for column in range(len(lines[0]))] if lines else []
    for line in lines:
        cells = [(text.ljust(width), style) for (text, style), width in zip(line[:-1], widths, strict=False)]
        console.print(Text("  ").join(Text(text, style) for text, style in [*cells, line[-1]]), soft_wrap=True)


def show_diff(a: str, b: str) -> None:
    """Prints what differs between two runs, one field a line."""
    found = differences(a, b)
    if not found:
        print(f"{a} and {b} are the same in {', '.join(PARTS)}")
    changes = ((part, name, *pair) for part, changed in found.items() for name, pair in changed.items())
    _print([[(part, "dim"), (name, "bold"), (f"{old} -> {new}", "")] for part, name, old, new in changes])


def show_list(folder: Path) -> None:
    """Prints a table of the runs in a folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the one that holds the runs")
    found = rows(folder)
    if not found:
        raise ConfigError(f"there is no run in {folder}")

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    header = [(title, "bold") for title in ("run", "steps", "loss", "validation", "last logged")]
    cells = [
        [row.name, number(row.steps, ","), number(row.loss, ".4f"), number(row.validation, ".4f"), f"{row.when:%Y-%m-%d %H:%M}"]
        for row in found
    ]
    _print([header, *([(cell, "") for cell in line] for line in cells)])


def show_run(run: str) -> None:
    """Prints a run's record: every field with who set it, then versions and data."""
    record = read_record(folder_of(run))
    style = {"default": "dim", "experiment": "", "command line": "bold"}
    lines = []
    for name, value in flatten(record["config"]).items():
        source = record["sources"].get(name, "unknown")
        lines.append([(source, "dim"), (name, style.get(source, "")), (str(value), style.get(source, ""))])
    for part in PARTS[1:]:
        lines += [[(part, "dim"), (name, ""), (str(value), "")] for name, value in record[part].items()]
    _print([*lines, [("written", "dim"), ("", ""), (record["written"], "")]])


def batches_of(run: str) -> tuple[Numbered, Tokenizer, int]:
    """The batches that a run trained on, their tokenizer, and the steps that it has logged.

    Raises:
      FileNotFoundError, ValueError: it is no run, its text is gone, or is no longer the text that it was trained on.
    """
    record, metrics = read_record(folder_of(run)), read_metrics(folder_of(run))
    experiment = from_json(Experiment, record["config"])
    prepared = prepare(experiment.data)
    if (was := record["data"].get("train")) not in (None, prepared.train.fingerprint):
        raise ValueError(f"{experiment.data.train} is not what {run} was trained on (hash {was}); put that text back")
    vocab = resolve(experiment, prepared).model.vocab
    batches = make_batches(experiment.data, prepared.train, prepared.tokenizer, vocab=vocab, rows=experiment.batch, seed=experiment.seed)
    return batches, prepared.tokenizer, max((entry["step"] for entry in metrics), default=0)


def show_trace(run: str, step: int, row: int) -> None:
    """Prints the pieces of a row."""
    batches, tokenizer, _ = batches_of(run)
    try:
        pieces = trace(batches, tokenizer, step, row)
    except IndexError as error:
        raise ConfigError(str(error)) from error
    for piece in pieces:
        about = dict(piece.about)
        decisions = about.pop("decisions", [])
        print(f"--- document {piece.document} ({about.pop('id')}), tokens {piece.start} to {piece.stop}, characters {piece.characters}")
        print("\n".join(f"{name}: {value}" for name, value in about.items() if value not in ("", {})))
        for decision in decisions:
            print(f"changed by {decision['step']}: {decision['counts'] or decision['metadata']}")
        print(piece.text)


def show_seen(run: str, text: str) -> None:
    """Prints each sight of a text."""
    batches, tokenizer, steps = batches_of(run)
    sights = seen(batches, tokenizer, text, steps=steps)
    if not sights:
        print(f"not in the {steps} steps that were logged")
    for sight in sights:
        print(f"step {sight.step}, row {sight.row}: document {sight.document} ({sight.id}){'' if sight.whole else ', in part'}")


def main(argv: Sequence[str] | None = None) -> None:
    """The door. A wrong command or an unreadable run is one line on stderr and exit code 2."""
    with exits_with_one_line():
        match subcommand(Diff | List | Show | Trace | Seen, argv, prog="python -m lmx.runs", description=__doc__, usage=USAGE):
            case Diff(a, b):
                show_diff(a, b)
            case List(folder):
                show_list(folder)
            case Show(run):
                show_run(run)
            case Trace(run, step, row):
                show_trace(run, step, row)
            case Seen(run, text):
                show_seen(run, text)


if __name__ == "__main__":
    main()
