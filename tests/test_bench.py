"""Benchmarks run from end to end: those for GPUs where there is none, those against peers without them."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_train_gpu_compares_what_computes_the_same_and_names_who_is_absent(root):
    """Losses are compared inside, so a table is a statement that they agree; the interpreter given has no torch."""
    command = [sys.executable, "-m", "experiments.bench.train_gpu", "--device", "cpu", "--sizes", "tiny", "--rounds", "1", "--steps", "1"]
    done = subprocess.run([*command, "--peer-python", "/usr/bin/false"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| tiny")]
    assert [row[2].strip() for row in rows] == ["lmx", "jax", "torch math"]
    assert float(rows[1][6]) > 0
    assert "absent: it ended without a word" in rows[2][3]
    assert "torch absent" in done.stdout


@pytest.mark.slow
def test_serving_gpu_compares_and_names_who_is_absent(root):
    """The interpreter given has no transformers."""
    command = [sys.executable, "-m", "experiments.bench.serving_gpu", "--device", "cpu", "--rounds", "1", "--models", "tiny"]
    done = subprocess.run([*command, "--peer-python", "/usr/bin/false"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| tiny")]
    assert [row[2].strip() for row in rows] == ["lmx", "transformers", "transformers, continuous"]
    assert float(rows[0][3].replace(",", "")) > 0
    assert all("absent: it ended without a word" in row[3] for row in rows[1:])


@pytest.mark.slow
def test_serving_gpu_decodes_rows_whose_prompts_are_in_pages(root):
    command = [sys.executable, "-m", "experiments.bench.serving_gpu", "--device", "cpu", "--floor", "--shape", "tiny"]
    done = subprocess.run([*command, "--batches", "1", "4", "--steps", "5"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith(("| 1 ", "| 4 "))]
    assert [int(row[1]) for row in rows] == [1, 4]
    assert all(float(row[3]) > float(row[5]) > 0 for row in rows)  # no step is faster than memory


def curation(root, tmp_path, *arguments):
    """The lines of the table that the benchmark of cleaning prints, for a text of its own; the interpreter given has no datatrove."""
    sentence = "The {} of number {} is to be read with care, and that of the others too."
    nouns = ("harbour", "garden", "letter", "machine", "winter", "teacher")
    texts = [" ".join(sentence.format(noun, 7 * i + j) for j, noun in enumerate(nouns)) for i in range(60)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"passage": text}) + "\n" for text in [*texts, texts[0]]))
    command = [sys.executable, "-m", "experiments.bench.curation", "--text", str(path), "--field", "passage", "--tokenizer", "bytes"]
    done = subprocess.run(
        [*command, "--peer-python", "/usr/bin/false", "--rounds", "1", *arguments],
        cwd=root,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line.startswith("|")][2:], done.stdout


def test_cleaning_is_measured_stage_by_stage(root, tmp_path):
    rows, said = curation(root, tmp_path, "--stages", "read", "write", "c4", "exact", "tokens", "recipe", "--steps", "c4", "exact")
    assert "datatrove absent: it ended without a word" in said
    assert [row[4] for row in rows[:4]] == ["61", "61", "61", "60"]
    assert rows[5][4] == "60"  # the recipe drops the one that is there twice
    assert all(float(row[1]) > 0 and row[2] == "nan" for row in rows)


def test_memory_and_time_are_measured_by_size(root, tmp_path):
    rows, said = curation(root, tmp_path, "--sizes", "0.1", "0.3", "--steps", "exact")
    assert [row[0] for row in rows] == ["0", "0"]
    assert all(float(row[3]) > float(row[4]) > 10 for row in rows)
    assert "as size to the power of" in said
    kept = [int(row[5].replace(",", "")) for row in rows]
    assert kept[1] > 2 * kept[0]  # words in another order make another document


def test_lineage_is_measured(root, tmp_path):
    rows, said = curation(root, tmp_path, "--lineage", "--steps", "c4")
    assert [row[0] for row in rows] == ["shards", "shards without lineage", "memory-mapped store"]
    assert "writing what is known of its documents" in said
