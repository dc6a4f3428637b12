"""Benchmarks for GPUs run from end to end where there is none."""

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
