"""A run's record, metrics, bar and curve."""

import io
import json
import math
import struct
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lmx.core.config import ConfigError, from_json, parse
from lmx.train import logging
from lmx.train.logging import Logger, draw_curve, read_metrics, read_record, truncate_metrics, write_record


@dataclass(frozen=True)
class Experiment:
    steps: int = 10
    learning_rate: float = 0.1


class Out(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self.console = Console(file=self, force_terminal=terminal, width=100)


def logger(folder, **options) -> Logger:
    return Logger(folder, **{"steps": 10, "interval": 0.0, "console": Out(False).console, **options})


def test_a_record_reads_back(tmp_path):
    experiment, sources = parse(Experiment(steps=5), ["--learning-rate", "0.3"])
    write_record(tmp_path / "run", experiment, sources=sources, data={"plays": "ab12"})
    record = read_record(tmp_path / "run")
    assert from_json(Experiment, record["config"]) == Experiment(5, 0.3)
    assert record["sources"] == {"steps": "experiment", "learning_rate": "command line"}
    assert record["data"] == {"plays": "ab12"}
    assert "jax" in record["versions"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["experiment.json"]


def test_a_failed_write_leaves_the_old_record(tmp_path, monkeypatch):
    write_record(tmp_path, Experiment(), sources={}, data={})

    def dies(value, file, **_):
        file.write('{"config": ')
        raise KeyboardInterrupt

    monkeypatch.setattr(logging.json, "dump", dies)
    with pytest.raises(KeyboardInterrupt):
        write_record(tmp_path, Experiment(7), sources={}, data={})
    assert read_record(tmp_path)["config"]["steps"] == 10
    assert [path.name for path in tmp_path.iterdir()] == ["experiment.json"]


def test_what_is_no_record_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a run: there is no experiment.json in it"):
        read_record(tmp_path / "nowhere")
    (tmp_path / "experiment.json").write_text('{"config": {')
    with pytest.raises(ValueError, match=r"experiment.json is damaged: "):
        read_record(tmp_path)
    (tmp_path / "experiment.json").write_text('{"config": {}, "data": {}, "written": ""}')
    with pytest.raises(ValueError, match=r"lacks sources, versions"):
        read_record(tmp_path)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_floats_are_exact(tmp_path_factory, losses):
    folder = tmp_path_factory.mktemp("run")
    with logger(folder) as log:
        for step, loss in enumerate(losses, start=1):
            log.log(step, {"loss": np.float32(loss)})
    back = [entry["loss"] for entry in read_metrics(folder)]
    assert [struct.pack("f", value) for value in back if value == value] == [struct.pack("f", value) for value in losses if value == value]
    assert [math.isnan(value) for value in back] == [math.isnan(value) for value in losses]


def test_lines_are_plain_json_and_flushed(tmp_path):
    with logger(tmp_path) as log:
        log.log(3, {"loss": np.float32(0.1), "bad": math.nan, "worse": -math.inf, "mfu": None, "skipped": np.int32(2)})
        log.log(3, {"loss": 1.0}, "validation")
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before it is closed
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    seconds = first.pop("time")
    assert first == {"step": 3, "split": "train", "loss": float(np.float32(0.1)), "bad": "nan", "worse": "-inf", "skipped": 2}
    assert second["split"] == "validation"
    assert second["time"] >= seconds > 1.7e9
    assert math.isnan(read_metrics(tmp_path)[0]["bad"])
    assert read_metrics(tmp_path)[0]["worse"] == -math.inf


def test_jax_scalars_are_metrics(tmp_path):
    import jax.numpy as jnp

    with logger(tmp_path) as log:
        log.log(1, {"loss": jnp.bfloat16(1.5), "count": jnp.int32(4)})
    assert read_metrics(tmp_path)[0]["loss"] == 1.5
    assert read_metrics(tmp_path)[0]["count"] == 4


@pytest.mark.parametrize(
    ("metrics", "words"),
    [({"step": 1.0}, "a metric cannot be called step"), ({"loss": np.zeros(2)}, r"the metric loss has shape \(2,\)")],
)
def test_what_is_no_metric_is_refused(tmp_path, metrics, words):
    with logger(tmp_path) as log, pytest.raises(ValueError, match=words):
        log.log(1, metrics)
    assert read_metrics(tmp_path) == []


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path / "nowhere") == []


def test_a_last_line_torn_anywhere_is_left_out(tmp_path):
    with logger(tmp_path) as log:
        for step in (1, 2, 3):
            log.log(step, {"loss": step / 3})
    path = tmp_path / "metrics.jsonl"
    whole, entries = path.read_bytes(), read_metrics(tmp_path)
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        expected = entries if cut == len(whole) - 1 else entries[:2]  # only the newline lost
        assert read_metrics(tmp_path) == expected
    path.write_bytes(whole.replace(b'"step": 2', b'"st', 1))
    with pytest.raises(ValueError, match=r"line 2 of .* is damaged"):
        read_metrics(tmp_path)


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    with logger(tmp_path) as log:
        for step in range(1, 8):
            log.log(step, {"loss": 1 / step})
        log.log(4, {"loss": 9.0}, "validation")
    kept = [entry for entry in read_metrics(tmp_path) if entry["step"] <= 4]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "spl')
    with logger(tmp_path, resumed_at=4) as log:
        log.log(5, {"loss": 0.2})
    entries = read_metrics(tmp_path)
    assert entries[:-1] == kept
    assert entries[-1]["step"] == 5
    assert len(entries) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_truncating_mends_a_lost_newline(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train", "time": 1.0}')
    truncate_metrics(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")
    truncate_metrics(tmp_path, 0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    truncate_metrics(tmp_path / "nowhere", 0)


def test_a_new_run_does_not_overwrite_another(tmp_path):
    with logger(tmp_path) as log:
        log.log(1, {"loss": 1.0})
    with pytest.raises(ValueError, match="already holds a run"):
        logger(tmp_path)
    assert len(read_metrics(tmp_path)) == 1


def events(folder):
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_tensorboard_gets_scalars_and_a_purge(tmp_path):
    with logger(tmp_path) as log:
        log.log(4, {"loss": 1.5})
        log.log(4, {"loss": 2.5}, "validation")
    scalars = [(event.step, value.tag, value.simple_value) for event in events(tmp_path) for value in event.summary.value]
    assert scalars == [(4, "train/loss", 1.5), (4, "validation/loss", 2.5)]
    with logger(tmp_path, resumed_at=3):
        pass
    assert any(event.session_log.status == event.session_log.START and event.step == 4 for event in events(tmp_path))


def test_plain_lines_without_a_terminal(tmp_path):
    out = Out(False)
    with logger(tmp_path, console=out.console, steps=2000, interval=1e9) as log:
        log.log(1, {"loss": 5.0, "mfu": None})
        for step in range(2, 1000):
            log.progress(step)
        log.message("To be [b]or[/b] not")
        log.log(1000, {"loss": 2.0, "tokens_per_second": 12345.6, "mfu": 0.314})
        log.log(1000, {"loss": 2.25}, "validation")
        log.progress(1001)
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["step 1/2,000  loss 5.000", "To be [b]or[/b] not"]
    assert lines[2].startswith("step 1,000/2,000  loss 2.000  val 2.250  12,346 tok/s  MFU 31%  ETA 0:0")
    assert lines[3].startswith("step 1,001/2,000")  # the last, when closed
    assert len(lines) == 4
    assert "\x1b" not in out.getvalue()


def test_time_left_is_of_the_steps_after_the_first(tmp_path, monkeypatch):
    clock = iter([100.0, 110.0])  # two steps done in ten seconds leave 40 for eight
    with logger(tmp_path) as log:
        monkeypatch.setattr(logging.time, "monotonic", lambda: next(clock))
        log._first, log._step = (0, logging.time.monotonic()), 2
        assert log._seconds_left() == pytest.approx(40.0)
        monkeypatch.undo()


def test_a_bar_in_a_terminal(tmp_path):
    out = Out(True)
    with logger(tmp_path, console=out.console, steps=2000, resumed_at=5) as log:
        log.log(6, {"loss": 5.0, "tokens_per_second": 1000})
        log.log(1200, {"loss": 2.0}, "validation")
        log.message("a sample")
    shown = out.getvalue()
    assert "━" in shown
    assert "a sample" in shown
    assert "MFU" not in shown
    last = shown[shown.rindex("a sample") :]
    assert "1,200/2,000" in last
    assert "loss 5.000  val 2.000  1,000 tok/s  ETA" in last
    assert shown.rstrip("\r\n").endswith("\x1b[?25h")  # the cursor is given back


def test_an_error_inside_closes_cleanly(tmp_path):
    log = logger(tmp_path)

    def interrupted():
        with log:
            log.log(1, {"loss": 1.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    log.close()
    assert len(read_metrics(tmp_path)) == 1


def logged(losses, split="train", every=1):
    return [{"step": every * step, "split": split, "time": 0.0, "loss": loss} for step, loss in enumerate(losses, start=1)]


def test_a_curve_is_drawn(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    original = Figure.add_subplot
    monkeypatch.setattr(Figure, "add_subplot", lambda self: figures.append(original(self)) or figures[-1])
    train = [5 * math.exp(-step / 50) for step in range(200)]
    metrics = [*logged([*train, math.nan]), *logged([3.0, 1.0, 2.0], "validation", 50), {"step": 3, "split": "train", "time": 0.0}]
    path = draw_curve(metrics, tmp_path / "new" / "c.png", unit="nats/byte")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000
    (axes,) = figures
    raw, smooth, validation = axes.lines
    assert axes.get_ylabel() == "loss (nats/byte)"
    assert axes.get_xlabel() == "step"
    np.testing.assert_allclose(raw.get_ydata(), train)  # nan is left out
    assert smooth.get_ydata()[0] == pytest.approx(train[0])
    assert len(smooth.get_ydata()) == 200
    assert list(validation.get_xdata()) == [50, 100, 150]
    assert list(validation.get_ydata()) == [3.0, 1.0, 2.0]
    assert validation.get_label() == "validation: 2.000 at the end, 1.000 at best"


def test_smoothing_is_a_centred_mean():
    noisy = 1.0 + np.tile([0.5, -0.5], 200)
    assert np.abs(logging._smoothed(noisy)[20:] - 1.0).max() < 0.1
    line = np.arange(400.0)
    np.testing.assert_allclose(logging._smoothed(line)[:395], line[:395])
    assert list(logging._smoothed(np.array([2.0]))) == [2.0]


def test_a_runs_curve_lies_in_its_folder(tmp_path):
    with logger(tmp_path) as log:
        log.log(1, {"loss": 1.0})
    assert draw_curve(tmp_path) == tmp_path / "curve.png"
    assert (tmp_path / "curve.png").is_file()


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no loss to draw in "):
        draw_curve(tmp_path)
    with pytest.raises(ValueError, match="no loss to draw"):
        draw_curve(logged([math.nan]), tmp_path / "c.png")
    with pytest.raises(ValueError, match="needs a path"):
        draw_curve(logged([1.0]))


def test_a_config_that_is_not_one_is_not_recorded(tmp_path):
    with pytest.raises(ConfigError):
        write_record(tmp_path, Experiment(steps={}), sources={}, data={})
    assert list(tmp_path.iterdir()) == []
