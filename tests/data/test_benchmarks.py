"""Benchmark items as their releases hold them, and what a recipe does with them."""

import gzip
import json
import pickle

import pytest

from lmx.data.benchmarks import Benchmark, Uncontaminated, items
from lmx.data.clean.decontaminate import Decontaminate
from lmx.data.clean.step import Drop
from lmx.data.curate.recipe import described
from lmx.data.documents import Document


def lines(*records) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


FILES = {
    "math/test.jsonl": lines({"question": "How many?", "answer": "Two.\n#### 2"}, {"question": "Why?", "answer": " "}),
    "code.jsonl.gz": gzip.compress(lines({"task_id": "H/0", "prompt": "def a():"}, {"task_id": "H/1", "prompt": "def b():"})),
    "seeds.jsonl": lines({"id": "s", "instruction": "Do.", "instances": [{"input": "", "output": "Done."}, {"input": "x", "output": "y"}]}),
    "exam/a_test.csv": b'"What, then,\nis a ball?",A food,A toy,B\nAnd why?,1,2,A\n',
    "crows.csv": b",sent_more,sent_less\n0,One is.,Two are.\n",
    "rte.tsv": b'index\tsentence1\tsentence2\n7\tA "ball.\tNo ball.\n',
    "choices.jsonl": lines({"q": {"stem": "Which?", "choices": [{"text": "this"}, {"text": "that"}]}, "n": 4, "ok": True}),
}
CASES = [
    (Benchmark("math", "math", ("question",)), [("test.jsonl:0", "How many?"), ("test.jsonl:1", "Why?")]),
    (
        Benchmark("math", "math/*.jsonl", ("question", "answer")),
        [("test.jsonl:0:question", "How many?"), ("test.jsonl:0:answer", "Two.\n#### 2"), ("test.jsonl:1:question", "Why?")],
    ),
    (Benchmark("code", "code.jsonl.gz", ("prompt",), id="task_id"), [("H/0", "def a():"), ("H/1", "def b():")]),
    (
        Benchmark("seeds", "seeds.jsonl", ("instruction", "instances.output"), id="id"),
        [("s:instruction", "Do."), ("s:instances.output", "Done."), ("s:instances.output", "y")],
    ),
    (Benchmark("exam", "exam", ("0",)), [("a_test.csv:0", "What, then,\nis a ball?"), ("a_test.csv:1", "And why?")]),
    (Benchmark("crows", "crows.csv", ("sent_more",)), [("crows.csv:0", "One is.")]),
    (Benchmark("rte", "rte.tsv", ("sentence1",), id="index"), [("7", 'A "ball.')]),
    (
        Benchmark("choices", "choices.jsonl", ("q.stem", "q.choices.text", "n")),
        [
            ("choices.jsonl:0:q.stem", "Which?"),
            *(("choices.jsonl:0:q.choices.text", t) for t in ("this", "that")),
            ("choices.jsonl:0:n", "4"),
        ],
    ),
]


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)


@pytest.mark.parametrize(("benchmark", "found"), CASES)
def test_items(benchmark, found):
    assert list(items([benchmark])) == [(benchmark.task, id, text) for id, text in found]


@pytest.mark.parametrize(
    ("benchmark", "message"),
    [
        (Benchmark("x", "math", ()), "benchmark x: fields=.. names nothing"),
        (Benchmark("x", "math", ("questions",)), "test.jsonl: no record has the field 'questions' .* they have question, answer"),
        (Benchmark("x", "math", ("question",), id="number"), "record 0: has no field id='number'; it has question, answer"),
        (Benchmark("x", "nowhere.jsonl", ("question",)), "benchmark x='nowhere.jsonl' does not exist"),
        (Benchmark("x", "bad.jsonl", ("question",)), "bad.jsonl, record 1: is damaged"),
        (Benchmark("x", "cut.jsonl.gz", ("prompt",)), "cut.jsonl.gz, record 1: is damaged"),
    ],
)
def test_what_is_wrong_is_named(benchmark, message, tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"question": "a"}\n{"question": \n')
    (tmp_path / "cut.jsonl.gz").write_bytes(FILES["code.jsonl.gz"][:-12])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        list(items([benchmark]))


def test_of_real_releases(shared):
    folder = shared / "data"
    if not folder.exists():
        pytest.skip("real releases (../shared/data) are not here")
    found = list(items((Benchmark("gsm8k", str(folder / "gsm8k/test.jsonl"), ("question",)),)))
    assert len(found) == 1319
    assert sum(1 for _ in items((Benchmark("crows", str(folder / "crows_pairs"), ("sent_more", "sent_less")),))) == 2 * 1508
    assert sum(1 for _ in items((Benchmark("seeds", str(folder / "self_instruct"), ("instruction",), id="id"),))) == 175
    assert sum(1 for _ in items((Benchmark("nq", str(folder / "nq_open"), ("question",)),))) == 3610


def test_a_step_reads_its_files_when_it_is_used(tmp_path):
    text = "The exact words of a question that nobody should ever have been trained on, all of them."
    path = tmp_path / "late.jsonl"
    step = Uncontaminated((Benchmark("late", str(path), ("q",)),), Decontaminate((), ngram=10))
    with pytest.raises(FileNotFoundError, match="late"):
        _ = step.reads
    path.write_bytes(lines({"q": text}))
    assert step.reads == [str(path)]
    step = pickle.loads(pickle.dumps(step))
    assert step(Document("1", f"Before. {text} After.", "s")) == Drop("contaminated", "late/late.jsonl:0")
    assert step(Document("2", "Something else.", "s")) is None
    assert json.dumps(described(step)).count("late.jsonl") == 1
