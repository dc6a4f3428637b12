"""What no recipe here trains on: benchmarks as they are released, in the folder `benchmarks/`. Add yours, or take out what you do not have."""

from lmx.data.benchmarks import Benchmark

BENCHMARKS = (
    Benchmark("gsm8k", "benchmarks/gsm8k/test.jsonl", ("question", "answer")),
    Benchmark("humaneval", "benchmarks/HumanEval.jsonl.gz", ("prompt", "canonical_solution"), id="task_id"),
    Benchmark("mmlu", "benchmarks/mmlu/test/*.csv", ("0",)),  # tables without a head: the question is the first column
    Benchmark("nq_open", "benchmarks/NQ-open.dev.jsonl", ("question",)),
)
