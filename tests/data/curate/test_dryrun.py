"""What a sample says of the whole holds as often as it claims."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from corpora import WORDS, Lines, Long, Once, recipe, write_corpus
from lmx.data.clean.step import Drop, Verdict
from lmx.data.curate import Recipe, curate
from lmx.data.curate.dryrun import dry_run, wilson
from lmx.data.documents import Document
from lmx.data.sources import Parquet


@dataclass(frozen=True)
class Odd:
    """Drops documents whose number of letters is divisible by five."""

    name: str = "odd"

    def __call__(self, document: Document) -> Verdict:
        return Drop("letters") if len(document.text) % 5 == 0 else None


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("dry") / "raw", files=20, lines=60)


def truth(plan: Recipe, folder) -> tuple[float, dict]:
    curate(plan, folder)
    events = json.loads((folder / "tally.json").read_bytes())["events"]

    def total(*wanted):
        return sum(e[5] for e in events if tuple(e[: len(wanted)]) == wanted)

    read = total("source", "read")
    rules = {(e[0], e[2]) for e in events if e[1] == "dropped"}
    return total("corpus", "kept") / read, {rule: total(rule[0], "dropped", rule[1]) / read for rule in rules}


@pytest.mark.parametrize("units", [20, 8])
def test_the_interval_holds_the_truth_19_times_in_20(corpus, tmp_path, units):
    """Over 120 trials: 114 are claimed, and fewer than 106 would be bad luck once in a thousand times."""
    plan = Recipe("filters", (Lines(str(corpus)),), (Long(), Odd()))
    kept, rules = truth(plan, tmp_path / "corpus")
    inside = {"kept": 0, **dict.fromkeys(rules, 0)}
    for seed in range(120):
        forecast = dry_run(plan, documents=150, units=units, seed=seed)
        inside["kept"] += forecast.kept.low <= kept <= forecast.kept.high
        for rule, share in rules.items():
            inside[rule] += forecast.rules[rule].low <= share <= forecast.rules[rule].high
    assert min(inside.values()) >= 106, inside
    assert forecast.kept.high - forecast.kept.low < 0.25


def test_with_duplicates(corpus, tmp_path):
    plan = Recipe("all", (Lines(str(corpus)),), (Long(), Once(), Odd()))
    kept, rules = truth(plan, tmp_path / "corpus")
    inside = duplicates = 0
    for seed in range(40):
        forecast = dry_run(plan, documents=400, seed=seed)
        inside += forecast.kept.low <= kept <= forecast.kept.high
        share = forecast.rules["once", "duplicate"]
        duplicates += share.low <= rules["once", "duplicate"] <= share.high
    assert min(inside, duplicates) >= 35  # less would be bad luck once in three hundred times


def test_the_whole_is_known_exactly(corpus, tmp_path):
    plan = recipe(corpus)
    kept, rules = truth(plan, tmp_path / "corpus")
    forecast = dry_run(plan, documents=10**6, units=10**6)
    assert forecast.kept.value == pytest.approx(kept)
    assert forecast.kept.high - forecast.kept.low < 1e-6
    assert {rule: share.value for rule, share in forecast.rules.items()} == pytest.approx(rules)
    assert forecast.documents == forecast.sampled == sum(len(p.read_text().splitlines()) - 1 for p in corpus.glob("*.txt"))
    assert forecast.disk > 0 < forecast.memory
    assert set(forecast.seconds) == {"lines", "long", "once", "upper", "identity terms", "setup", "records", "tokens"}


COST = """
import json, resource, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from corpora import Lines, Long, Upper
from lmx.data.clean.exact import Exact
from lmx.data.clean.gopher import GopherRepetition
from lmx.data.clean.minhash import MinHash
from lmx.data.curate import Recipe, curate
from lmx.data.curate.dryrun import dry_run
import array_record.python.array_record_module, matplotlib.figure
steps = Long(), GopherRepetition(), Upper(), Exact(), MinHash()
plan = Recipe("cost", (Lines({corpus!r}),), steps, held_out=0.1)
clock = time.process_time()
if sys.argv[1] == "dry":
    forecast = dry_run(plan, documents=800, units=4)
    said = [sum(forecast.seconds.values()), forecast.disk, forecast.memory]
else:
    folder = Path({folder!r})
    curate(plan, folder)
    disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "report.html")
    said = [time.process_time() - clock, disk, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]
print(json.dumps(said))
"""


def test_what_it_costs_is_as_predicted(tmp_path):
    """A real run in a process of its own: disk within a quarter, memory within a third, CPU time within a factor of three (machines are busy)."""
    corpus = tmp_path / "raw"
    corpus.mkdir()
    for number in range(8):
        draw = np.random.default_rng(number)
        made = [f"w{draw.integers(4000)}" if draw.random() < 0.5 else word for word in draw.choice(WORDS, 40_000)]
        lines = [" ".join(part) for part in np.split(np.array(made), np.sort(draw.choice(40_000, 400, replace=False)))]
        (corpus / f"{number}.txt").write_text("\n".join(lines) + "\n")
    said = {}
    for what in ("dry", "real"):
        script = COST.format(tests=str(Path(__file__).parent), corpus=str(corpus), folder=str(tmp_path / "corpus"))
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
        out = subprocess.run([sys.executable, "-c", script, what], capture_output=True, text=True, env=environment)
        assert out.returncode == 0, out.stderr[-2000:]
        said[what] = json.loads(out.stdout)
    seconds, disk, memory = (a / b for a, b in zip(said["dry"], said["real"], strict=True))
    assert 1 / 1.25 < disk < 1.25, said
    assert 1 / 1.33 < memory < 1.33, said
    assert 1 / 3 < seconds < 3, said


def test_damage_is_counted(tmp_path):
    corpus = write_corpus(tmp_path / "raw", files=2, damaged=True)
    assert len(dry_run(recipe(corpus)).tally.damage) == 2


def test_wilson():
    # Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I, method 3: 81 of 263, 15 of 148, 0 of 20
    for part, whole, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert (wilson(part, whole).low, wilson(part, whole).high) == pytest.approx((low, high), abs=2e-4)
    assert wilson(3, 10, 10).low == wilson(3, 10, 10).high == 0.3


def test_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match="hold no files"):
        dry_run(replace(recipe(tmp_path), name="none"))
    (tmp_path / "0.txt").write_text("# only this\n")
    with pytest.raises(ValueError, match="hold no document"):
        dry_run(recipe(tmp_path))


@pytest.mark.parametrize("units", [2, 3])
def test_units_that_count_something_else_than_bytes(tmp_path, units):
    """Row groups, of which one has as many documents as another."""
    pyarrow = pytest.importorskip("pyarrow", reason="the data extra is not installed")
    pytest.importorskip("pyarrow.parquet")
    rows = [{"text": f"number {i} {hashlib.sha256(str(i).encode()).hexdigest()}"} for i in range(400)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=40)
    plan = Recipe("rows", (Parquet(str(tmp_path)),), unit=(tmp_path / "a.parquet").stat().st_size // 10)
    assert len(plan.sources[0].units(plan.unit)) > 5
    assert dry_run(plan, units=units).documents == pytest.approx(400, rel=0.25)


def test_no_sample(corpus):
    with pytest.raises(ValueError, match="documents=0 of units=32 are no sample"):
        dry_run(recipe(corpus), documents=0)
