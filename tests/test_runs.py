"""The door `python -m lmx.runs`."""

import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from lmx import runs
from lmx.core.config import parse
from lmx.data.recipe import Data, prepare
from lmx.models.config import Transformer
from lmx.train import experiment as train
from lmx.train import logging


@dataclass(frozen=True)
class AdamW:
    learning_rate: float = 0.1


@dataclass(frozen=True)
class Lion:
    beta: float = 0.9


@dataclass(frozen=True)
class Experiment:
    steps: int = 10
    optimizer: AdamW | Lion = AdamW()


def record(folder: Path, experiment: Experiment, *argv: str, data: str = "ab12") -> None:
    experiment, sources = parse(experiment, argv)
    logging.write_record(folder, experiment, sources=sources, data={"plays": data})


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Two runs, `a` and `b`, under `runs/` of the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    record(Path("runs/a"), Experiment())
    record(Path("runs/b"), Experiment(optimizer=Lion()), "--steps", "2000", data="cd34")
    lines = [
        '{"step": 1000, "split": "train", "time": 86400.0, "loss": 3.0}',
        '{"step": 1000, "split": "validation", "time": 86401.0, "loss": 2.5}',
        '{"step": 1100, "split": "train", "time": 90000.0, "loss": 2.25}',
        '{"step": 1100, "split": "train", "time": 90000.0, "grad_norm": 2.25}',
        '{"step": 1200, "spl',
    ]
    Path("runs/b/metrics.jsonl").write_text("\n".join(lines))
    os.utime("runs/a/experiment.json", (0, 0))
    Path("runs/notes").mkdir()
    yield tmp_path
    monkeypatch.undo()
    time.tzset()


def printed(capsys, *argv: str) -> list[str]:
    runs.main(argv)
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def test_diff_prints_what_differs_and_nothing_else(folder, capsys):
    assert [line.split(maxsplit=2) for line in printed(capsys, "diff", "a", "runs/b")] == [
        ["config", "steps", "10 -> 2000"],
        ["config", "optimizer", "AdamW -> Lion"],
        ["config", "optimizer.learning_rate", "0.1 -> absent"],
        ["config", "optimizer.beta", "absent -> 0.9"],
        ["data", "plays", "ab12 -> cd34"],
    ]


def test_diff_sees_versions(folder, capsys, monkeypatch):
    monkeypatch.setattr(logging, "versions", lambda: {"jax": "0.1"})
    record(Path("runs/old"), Experiment())
    monkeypatch.setattr(logging, "versions", lambda: {"jax": "0.2"})
    record(Path("runs/new"), Experiment())
    assert [line.split() for line in printed(capsys, "diff", "old", "new")] == [["versions", "jax", "0.1", "->", "0.2"]]


def test_diff_of_equals_is_one_line(folder, capsys):
    record(Path("elsewhere/c"), Experiment(), "--steps", "10")
    assert printed(capsys, "diff", "a", "elsewhere/c") == ["a and elsewhere/c are the same in config, versions, data"]


def test_long_values_are_not_cut(folder, capsys):
    record(Path("runs/c"), Experiment(), data="e" * 300)
    assert printed(capsys, "diff", "a", "c")[-1].endswith("ab12 -> " + "e" * 300)


@pytest.mark.parametrize("argv", [["list"], ["list", "runs"]])
def test_list_is_a_table_of_runs(folder, capsys, argv):
    lines = printed(capsys, *argv)
    assert [line.split() for line in lines] == [
        ["run", "steps", "loss", "validation", "last", "logged"],
        ["a", "-", "-", "-", "1970-01-01", "00:00"],
        ["b", "1,100", "2.2500", "2.5000", "1970-01-02", "01:00"],
    ]
    assert len({line.index(word) for line, word in zip(lines[1:], ("1970", "1970"), strict=True)}) == 1


def test_show_says_who_set_each_field(folder, capsys):
    lines = [line.split() for line in printed(capsys, "show", "b")]
    assert ["command", "line", "steps", "2000"] in lines
    assert ["experiment", "optimizer", "Lion"] in lines
    assert ["default", "optimizer.beta", "0.9"] in lines
    assert ["data", "plays", "cd34"] in lines
    assert any(line[:2] == ["versions", "jax"] for line in lines)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["diff", "a", "c"], "c is not a run: there is no experiment.json in it"),
        (["show", "runs/notes"], "runs/notes is not a run: there is no experiment.json in it"),
        (["list", "nowhere"], "nowhere is not a folder; give the one that holds the runs"),
        (["list", "runs/notes"], "there is no run in runs/notes"),
        (
            ["dif", "a", "b"],
            "dif a b: not understood; usage: python -m lmx.runs diff A B | list [FOLDER] | show A | trace A STEP ROW | seen A TEXT",
        ),
        (
            ["diff", "a"],
            "diff a: not understood; usage: python -m lmx.runs diff A B | list [FOLDER] | show A | trace A STEP ROW | seen A TEXT",
        ),
        ([], "no command: not understood; usage: python -m lmx.runs diff A B | list [FOLDER] | show A | trace A STEP ROW | seen A TEXT"),
    ],
)
def test_what_cannot_be_read_is_one_line(folder, capsys, argv, line):
    with pytest.raises(SystemExit) as stop:
        runs.main(argv)
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err) == (2, "", line + "\n")


def test_a_damaged_record_is_one_line(folder, capsys):
    Path("runs/a/experiment.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        runs.main(["show", "a"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("runs/a/experiment.json is damaged: ")


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        runs.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("diff", "list", "show", "python -m lmx.runs"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of twelve steps as its record says it, over documents that tell themselves apart."""
    folder = tmp_path_factory.mktemp("trained")
    texts = [{"id": f"d{i}", "text": f"document number {i} says hello to number {i + 1}.\n"} for i in range(30)]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    experiment = train.Experiment(
        name="run",
        folder=str(folder),
        data=Data(train=str(folder / "texts.jsonl"), length=40, cache=str(folder / "cache")),
        model=Transformer(layers=1, embed=8, heads=2, mlp=16, context=40),
        batch=4,
        steps=12,
    )
    logging.write_record(folder / "run", experiment, sources={}, data={"train": prepare(experiment.data).train.fingerprint})
    (folder / "run/metrics.jsonl").write_text('{"step": 12, "split": "train", "time": 0.0, "loss": 3.0}\n')
    return folder / "run"


def test_trace_and_seen(trained, capsys):
    sights = printed(capsys, "seen", str(trained), "number 7 says hello to number 8")
    assert sights
    assert all("(d7)" in line for line in sights)
    step, row = re.match(r"step (\d+), row (\d+)", sights[0]).groups()
    text = "\n".join(printed(capsys, "trace", str(trained), step, row))
    assert "(d7), tokens" in text
    assert "7 says" in text
    assert printed(capsys, "seen", str(trained), "never written") == ["not in the 12 steps that were logged"]


def test_trace_of_a_row_that_is_not_there(trained, capsys):
    with pytest.raises(SystemExit):
        runs.main(["trace", str(trained), "1", "4"])
    assert "rows from 0 to 3" in capsys.readouterr().err


def test_trace_refuses_another_text(trained, capsys):
    text = (trained.parent / "texts.jsonl").read_text()
    (trained.parent / "texts.jsonl").write_text(text.replace("hello", "goodbye"))
    with pytest.raises(SystemExit):
        runs.main(["trace", str(trained), "1", "0"])
    (trained.parent / "texts.jsonl").write_text(text)
    assert "is not what" in capsys.readouterr().err
