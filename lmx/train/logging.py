"""What a run leaves behind and shows while it goes: its record, metrics, TensorBoard, progress bar and loss curve.

A run is a folder: `experiment.json` (config, who set each field, versions, data hashes), `metrics.jsonl` (one object a line),
`tensorboard/`, and `curve.png` at the end.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from lmx.core.config import to_json, versions

RECORD, METRICS, TENSORBOARD, CURVE = "experiment.json", "metrics.jsonl", "tensorboard", "curve.png"
Split = Literal["train", "validation"]


@contextmanager
def _atomic(path: Path) -> Iterator[Any]:
    """A text file that takes its place whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_record(folder: str | Path, experiment: Any, *, sources: Mapping[str, str], data: Mapping[str, str]) -> None:
    """Writes a run's `experiment.json`, atomically.

    Args:
      experiment: the run's whole config, a frozen dataclass.
      sources: who set each field, as `lmx.core.config.command_line` says.
      data: content hash of each data set, by name.
    """
    written = datetime.now().astimezone().isoformat(timespec="seconds")
    record = {"config": to_json(experiment), "sources": dict(sources), "versions": versions(), "data": dict(data), "written": written}
    with _atomic(Path(folder) / RECORD) as file:
        json.dump(record, file, indent=2, allow_nan=False)
        file.write("\n")


def read_record(folder: str | Path) -> dict[str, Any]:
    """The record of a run: `config` (JSON; `lmx.core.config.from_json` makes it a value again), `sources`, `versions`, `data`, `written`.

    Raises:
      FileNotFoundError: the folder is not a run's.
      ValueError: its record is damaged.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run: there is no {RECORD} in it")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in ("config", "sources", "versions", "data", "written") if key not in record]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if missing:
        raise ValueError(f"{path} is not a run's record: it lacks {', '.join(missing)}")
    return record


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines of a metrics file with what they say. The last may be torn (a process killed while it wrote) and is then left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        torn = None
        for number, line in enumerate(file, start=1):
            if torn is not None:
                raise ValueError(f"line {torn} of {path} is damaged; delete it to read the rest")
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if isinstance(entry, dict) and "step" in entry:
                yield line, entry
            else:
                torn = number


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Every line logged by a run, in order: `step`, `split`, `time` (seconds since 1970) and the metrics; none if nothing was logged.

    Floats are exactly those logged, nan and infinities included. A last line torn by a kill is left out.

    Raises:
      ValueError: another line is damaged.
    """
    special = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
    entries = (entry for _, entry in _lines(Path(folder) / METRICS))
    return [{name: special.get(value, value) for name, value in entry.items()} for entry in entries]


def truncate_metrics(folder: str | Path, step: int) -> None:
    """Drops, atomically, what was logged after `step`, so that a run resumed there has no step twice."""
    path = Path(folder) / METRICS
    if path.is_file():
        with _atomic(path) as file:
            file.writelines(line.rstrip("\n") + "\n" for line, entry in _lines(path) if entry["step"] <= step)


def _plain(name: str, value: Any) -> int | float:
    """A metric as a Python number. Scalars of NumPy and JAX become the float64 of the same value."""
    if getattr(value, "size", 1) != 1:
        raise ValueError(f"the metric {name} has shape {value.shape}; log one number, such as its mean")
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int) else float(value)


class Logger:
    """Shows and writes metrics of a run as it goes. Use it as a context manager.

    The metrics `loss`, `tokens_per_second` and `mfu` (share of the chip's peak, 0 to 1) are those in the progress bar; any may be
    missing or None. Where output is no terminal, a plain line is printed every `interval` seconds and at every validation instead.
    """

    def __init__(self, folder: str | Path, *, steps: int, resumed_at: int | None = None, interval: float = 10.0, console: Any = None):
        """Opens the files.

        Args:
          steps: optimizer steps of the whole run.
          resumed_at: the step of the checkpoint that is gone on from; what was logged after it is dropped. None: a new run.
          interval: seconds between plain lines.
          console: a `rich.console.Console`; standard output when None.

        Raises:
          ValueError: a new run in a folder with metrics in it.
        """
        from rich.console import Console
        from tensorboardX import SummaryWriter

        self.folder, self.steps, self.interval = Path(folder), steps, interval
        path = self.folder / METRICS
        if resumed_at is not None:
            truncate_metrics(folder, resumed_at)
        elif path.is_file() and path.stat().st_size > 0:
            raise ValueError(f"{folder} already holds a run: resume it, or give the new run another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self.folder / TENSORBOARD), purge_step=None if resumed_at is None else resumed_at + 1)
        self._console = console or Console(file=sys.stdout, force_jupyter=False)
        self._live = self._console.is_terminal and not self._console.is_jupyter
        self._shown: dict[str, float] = {}
        self._first: tuple[int, float] | None = None
        self._said: tuple[int | None, float] = None, -math.inf
        self._step = resumed_at or 0
        self._bar, self._task = self._make_bar() if self._live else (None, None)

    def _make_bar(self) -> tuple[Any, Any]:
        from rich.progress import BarColumn, Progress, TextColumn

        width = min(max(self._console.width - 72, 8), 40)  # the text fits in 80 columns
        columns = BarColumn(bar_width=width), TextColumn("{task.completed:,}/{task.total:,}"), TextColumn("{task.fields[text]}")
        bar = Progress(*columns, console=self._console, refresh_per_second=4)
        return bar, bar.add_task("", total=self.steps, completed=self._step, text="")

    def __enter__(self) -> "Logger":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar and closes the files; a second call does nothing."""
        if self._file.closed:
            return
        if self._bar is not None:
            self._bar.stop()
        elif self._first is not None and self._said[0] != self._step:
            self._say()
        self._file.close()
        self._board.close()

    def log(self, step: int, metrics: Mapping[str, Any], split: Split = "train") -> None:
        """Writes scalars of a step (the number of optimizer steps done) and shows them. A metric that is None is left out.

        Raises:
          ValueError: a metric is called `step`, `split` or `time`, or is not a scalar.
        """
        numbers = {name: _plain(name, value) for name, value in metrics.items() if value is not None}
        if clash := {"step", "split", "time"} & numbers.keys():
            raise ValueError(f"a metric cannot be called {', '.join(sorted(clash))}: every line has its own; rename it")
        written = {name: value if math.isfinite(value) else repr(value) for name, value in numbers.items()}
        entry = {"step": int(step), "split": split, "time": round(time.time(), 3), **written}
        self._file.write(json.dumps(entry, allow_nan=False) + "\n")  # one write: a kill leaves whole lines, or a torn last one
        self._file.flush()
        for name, value in numbers.items():
            self._board.add_scalar(f"{split}/{name}", value, entry["step"])
        self._shown.update(numbers if split == "train" else {f"{split} {name}": value for name, value in numbers.items()})
        self.progress(step)
        if split == "validation" and not self._live:
            self._say()

    def progress(self, step: int) -> None:
        """Moves the bar to a step about which there is nothing to log."""
        self._step = int(step)
        if self._first is None:  # the time of compiling is not extrapolated
            self._first = self._step, time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._step, text=self._text())
        elif self._shown and time.monotonic() - self._said[1] >= self.interval:
            self._say()

    def message(self, text: str) -> None:
        """Prints text, a sample for example, above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _say(self) -> None:
        self.message(f"step {self._step:,}/{self.steps:,}  {self._text()}".rstrip())
        self._said = self._step, time.monotonic()

    def _text(self) -> str:
        forms = {"loss": "loss {:.3f}", "validation loss": "val {:.3f}", "tokens_per_second": "{:,.0f} tok/s", "mfu": "MFU {:.0%}"}
        parts = [form.format(self._shown[name]) for name, form in forms.items() if name in self._shown]
        if (left := self._seconds_left()) is not None:
            parts.append(f"ETA {timedelta(seconds=int(left))}")
        return "  ".join(parts)

    def _seconds_left(self) -> float | None:
        if self._first is None or self._step <= self._first[0] or self._step >= self.steps:
            return None
        step, began = self._first
        return (time.monotonic() - began) / (self._step - step) * (self.steps - self._step)


class Silence:
    """What all processes but the first have for a `Logger`: it shows and writes nothing."""

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def log(self, step: int, metrics: Mapping[str, Any], split: Split = "train") -> None:
        pass

    def progress(self, step: int) -> None:
        pass

    def message(self, text: str) -> None:
        pass


def draw_curve(run: str | Path | list[dict[str, Any]], path: str | Path | None = None, *, unit: str = "nats/token") -> Path:
    """Draws the losses of a run as a PNG: training, raw and smoothed, and validation.

    Args:
      run: the run's folder, or its metrics as `read_metrics` gives them (then `path` is needed).
      path: where to; `curve.png` in the run's folder when None.
      unit: of the losses.

    Raises:
      ValueError: there is no finite loss to draw, or no place to draw to.
    """
    metrics = run if isinstance(run, list) else read_metrics(run)
    if path is None and isinstance(run, list):
        raise ValueError("draw_curve needs a path when it is given metrics instead of a run's folder")
    path = Path(path) if path is not None else Path(run) / CURVE
    points = {
        split: [
            (entry["step"], entry["loss"]) for entry in metrics if entry["split"] == split and math.isfinite(entry.get("loss", math.nan))
        ]
        for split in ("train", "validation")
    }
    if not any(points.values()):
        raise ValueError(f"no loss to draw in {'these metrics' if isinstance(run, list) else run}")
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if points["train"]:
        steps, losses = np.asarray(points["train"]).T
        smooth = _smoothed(losses)
        axes.plot(steps, losses, color="#9db7d5", linewidth=0.8)
        axes.plot(
            steps,
            smooth,
            color="#1f4e8c",
            linewidth=1.8,
            marker="o" if len(steps) == 1 else None,
            label=f"training, smoothed: {smooth[-1]:.3f} at the end",
        )
    if points["validation"]:
        steps, losses = np.asarray(points["validation"]).T
        label = f"validation: {losses[-1]:.3f} at the end, {losses.min():.3f} at best"
        axes.plot(steps, losses, "o-", color="#d1495b", linewidth=1.0, markersize=4.5, markeredgecolor="white", label=label)
    axes.set(xlabel="step", ylabel=f"loss ({unit})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.01)
    axes.legend(frameon=False, loc="upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))
    return path


def _smoothed(values: Any) -> Any:
    """Mean over a centred window of about a fortieth of the run.

    It grows at the start, where a wide one would flatten the steep descent; at the end it looks back only.
    """
    import numpy as np

    half = max(1, len(values) // 80)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    back = np.minimum(half, index)
    ahead = np.minimum(back, len(values) - 1 - index)
    return (sums[index + ahead + 1] - sums[index - back]) / (back + ahead + 1)
