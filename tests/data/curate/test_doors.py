"""`python -m lmx.data` and the command line of a recipe."""

import pytest

from corpora import expected, recipe, write_corpus
from lmx.data.__main__ import main as data
from lmx.data.curate.door import main as run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doors")
    raw = write_corpus(folder / "raw")
    run(recipe(raw), ["--folder", str(folder)])
    return raw, folder / "small"


def test_run_says_what_it_made(made, capsys):
    raw, folder = made
    run(recipe(raw), ["--folder", str(folder.parent)])
    out = capsys.readouterr().out
    assert "train: " in out
    assert str(folder / "report.html") in out
    page = (folder / "report.html").read_text()
    for part in ("dropped: words", "changed: letters", "once: ", "Documents to read", "data:image/png"):
        assert part in page


def test_dry_run(made, capsys):
    raw, _ = made
    run(recipe(raw), ["--dry-run", "true", "--documents", "100"])
    out = capsys.readouterr().out
    assert "100 of about 282 documents judged" in out
    assert "dropped by long words (lines)" in out


def test_a_wrong_knob_is_one_line(made, capsys):
    raw, _ = made
    with pytest.raises(SystemExit):
        run(recipe(raw), ["--worker", "3"])
    assert "workers" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(recipe(raw), ["--workers", "0"])
    assert "workers=0 is not positive" in capsys.readouterr().err


def test_inspect(made, capsys):
    raw, folder = made
    data(["inspect", str(folder)])
    lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    kept = len(expected(raw))
    assert int(lines["train"].split()[0]) + int(lines["validation"].split()[0]) == kept == int(lines["kept1"].split()[0])
    data(["inspect", str(folder), "dropped0", "--count", "2"])
    out = capsys.readouterr().out
    assert out.count("id: ") == 2
    assert "reason: words" in out
    data(["inspect", str(folder), "kept0", "--count", "1"])
    assert "text: " in capsys.readouterr().out
    data(["check", str(folder)])
    assert capsys.readouterr().out.count("every byte as it was written") == 2


def test_fate(made, capsys):
    raw, folder = made
    lines = (raw / "3.txt").read_text().splitlines()
    short = next(i for i, line in enumerate(lines) if len(line.split()) < 3)
    data(["fate", str(folder), f"3.txt:{short}"])
    out = capsys.readouterr().out
    assert out.startswith("--- dropped0")
    assert "step: long" in out
    data(["fate", str(folder), "1.txt:40"])  # a line of every file, of which the first file's stays
    out = capsys.readouterr().out
    assert "--- kept0" in out
    assert "--- dropped1" in out
    assert "value: 0.txt:40" in out


def test_knobs_that_do_not_fit(made, capsys):
    raw, _ = made
    for argv, message in (
        (["--path", "elsewhere"], "source lines of small has no path"),
        (["--beam", "runner=FnApiRunner", "--workers", "2"], "workers=2 is of this machine"),
        (["--dry-run", "true", "--documents", "0"], "documents=0 of units=32 are no sample"),
    ):
        with pytest.raises(SystemExit):
            run(recipe(raw), argv)
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect", "nowhere"], "is not a recipe's folder"),
        (["inspect", "{}", "kept7"], "has no stage 'kept7'; it has kept0, dropped0, kept1, dropped1, train, validation"),
        (["fate", "{}", "nobody"], "has no document 'nobody'"),
        (["chek", "{}"], "not understood; usage: python -m lmx.data"),
    ],
)
def test_errors_are_one_line(made, capsys, argv, message):
    with pytest.raises(SystemExit):
        data([a.format(made[1]) for a in argv])
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
