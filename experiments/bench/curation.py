"""Cleaning a corpus against datatrove, stage by stage and as a whole: megabytes a second of one core; memory and time by size; lineage.

    python -m experiments.bench.curation --text FILE.jsonl [--field passage] [--join 4] [--language-model lid.176.ftz] [--peer-python PYTHON]
    python -m experiments.bench.curation --text FILE.jsonl --sizes 10 46 215 1000
    python -m experiments.bench.curation --text FILE.jsonl --lineage

Counted is CPU time, of children too, so that what else the machine does matters little. A stage gets documents that are in memory and is
driven as each library drives it, counts and all; deduplication is all its parts; `recipe` is everything from the file of documents to the
files of tokens, datatrove's by its LocalPipelineExecutor with one task, its files left uncompressed and its documents unshuffled, as lmx's are.
"""

import argparse
import itertools
import json
import math
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

from experiments.bench.turns import Contender, cpu_name

OURS, THEIRS = "experiments.bench.curation_lmx", "experiments.bench.curation_datatrove"
STAGES = {
    "read": "JSON lines to documents",
    "write": "documents to JSON lines",
    "language": "language (py3langid; fastText)",
    "gopher_repetition": "Gopher, repetition",
    "gopher_quality": "Gopher, quality",
    "c4": "C4",
    "fineweb": "FineWeb",
    "pii": "e-mail and IP addresses",
    "exact": "exact duplicates",
    "minhash": "MinHash, 14 bands of 8",
    "paragraphs": "runs of three lines",
    "tokens": "tokens, the same tokenizer.json",
    "recipe": "**the whole recipe**",
}
RECIPE = ("language", "gopher_repetition", "gopher_quality", "c4", "fineweb", "pii", "minhash")


def spent() -> float:
    """CPU seconds of this process and of those of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measured(work: Callable[[], Any]) -> tuple[float, Any]:
    start = spent()
    result = work()
    return spent() - start, result


def texts(path: str, field: str, join: int) -> Iterator[str]:
    """The texts of a file of JSON lines, each of `join` records with a line end between them."""
    parts: list[str] = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            parts.append(json.loads(line)[field])
            if len(parts) == join:
                yield "\n".join(parts)
                parts = []


def shuffled(found: list[str], size: int) -> Iterator[str]:
    """Texts of `size` bytes or a little more: those found, then again and again the words of each line of theirs in another order."""
    import numpy as np

    rng, made = np.random.default_rng(0), 0
    for turn in itertools.count():
        for text in found:
            if made >= size:
                return
            if turn:
                lines = [line.split(" ") for line in text.split("\n")]
                text = "\n".join(" ".join([words[i] for i in rng.permutation(len(words)).tolist()]) for words in lines)
            made += len(text.encode())
            yield text


def write_corpus(path: Path, found: Iterable[str]) -> int:
    """Writes documents as JSON lines; gives the bytes of their texts."""
    size = 0
    with path.open("w", encoding="utf-8") as file:
        for number, text in enumerate(found):
            file.write(json.dumps({"text": text, "id": f"text/{number}"}, ensure_ascii=False) + "\n")
            size += len(text.encode())
    return size


def answer(side: Any, stage: str) -> list[float]:
    """What a contender says to the name of a stage: `[CPU seconds, documents or tokens that came out]`."""
    with tempfile.TemporaryDirectory() as folder:
        return side.run(stage, Path(folder))


def compare(options: argparse.Namespace, folder: Path) -> None:
    """The table of stages."""
    size = write_corpus(folder / "text.jsonl", texts(options.text, options.field, options.join))
    arguments = (str(folder / "text.jsonl"), tokenizer(options, folder), options.language_model, *options.steps)
    contenders = [
        Contender("lmx", sys.executable, OURS, *arguments),
        Contender("datatrove", options.peer_python or sys.executable, THEIRS, *arguments),
    ]
    ours, theirs = contenders
    if ours.absent:
        raise SystemExit(f"lmx: {ours.absent}")
    print(
        f"{size / 1e6:.1f} MB of text; MB/s of one core, medians of {options.rounds}; datatrove {theirs.absent and 'absent: ' + theirs.absent}"
    )
    print("| stage | lmx | datatrove | lmx / it | out |\n| --- | --- | --- | --- | --- |")
    for stage in options.stages:
        if stage == "language" and not options.language_model:
            continue
        seconds: dict[str, list[float]] = {"lmx": [], "datatrove": []}
        out: dict[str, int] = {}
        for turn in range(options.rounds + 1):
            for contender in contenders if turn % 2 else contenders[::-1]:
                if not contender.absent:
                    taken, out[contender.name] = contender.ask(stage)
                    seconds[contender.name] += [taken] * (turn > 0)  # the first time is for warming up
        a, b = (statistics.median(s) if s else math.nan for s in seconds.values())
        print(
            f"| {STAGES[stage]} | {size / 1e6 / a:.2f} | {size / 1e6 / b:.2f} | {b / a:.2f} | {' and '.join(f'{n:,}' for n in out.values())} |",
            flush=True,
        )
    for contender in contenders:
        if not contender.absent:
            print(f"{contender.name}: {contender.ask('versions')}")
            contender.close()


def tokenizer(options: argparse.Namespace, folder: Path) -> str:
    """The tokenizer.json that both use: the one given, or one learned from the text."""
    if options.tokenizer:
        return options.tokenizer
    from lmx.data.learned import train_huggingface

    train_huggingface(texts(options.text, options.field, options.join), folder / "tokenizer.json", vocab=8192)
    return str(folder / "tokenizer.json")


def grow(options: argparse.Namespace, folder: Path) -> None:
    """Memory and time of the recipe by the size of the text."""
    found, made = list(texts(options.text, options.field, options.join)), tokenizer(options, folder)
    rows = []
    print("| MB | CPU seconds | MB/s | peak memory, MB | of it no file's | documents kept |\n| --- | --- | --- | --- | --- | --- |")
    for size in options.sizes:
        corpus = folder / f"{size}.jsonl"
        megabytes = write_corpus(corpus, shuffled(found, int(size * 1e6))) / 1e6
        contender = Contender("lmx", sys.executable, OURS, str(corpus), made, options.language_model, *options.steps)
        if contender.absent:
            raise SystemExit(f"lmx: {contender.absent}")
        seconds, kept = contender.ask("recipe")
        peak, own = contender.ask("memory")
        contender.close()
        corpus.unlink()
        rows.append((math.log(megabytes), math.log(seconds)))
        print(f"| {megabytes:.0f} | {seconds:.1f} | {megabytes / seconds:.2f} | {peak:.0f} | {own:.0f} | {kept:,} |", flush=True)
    if len(rows) > 1:
        print(f"seconds grow as size to the power of {statistics.linear_regression(*zip(*rows, strict=True)).slope:.3f}")


def lineage(options: argparse.Namespace, folder: Path) -> None:
    """What it costs to know where everything came from: when shards are made, and when batches are read."""
    write_corpus(folder / "text.jsonl", texts(options.text, options.field, options.join))
    ours = Contender(
        "lmx", sys.executable, OURS, str(folder / "text.jsonl"), tokenizer(options, folder), options.language_model, *options.steps
    )
    if ours.absent:
        raise SystemExit(f"lmx: {ours.absent}")
    found = ours.ask("lineage")
    ours.close()
    print(f"making a corpus: {found['recipe']:.2f} CPU seconds, of which writing what is known of its documents ({found['bytes']:,} bytes)")
    print(f"takes {found['written']:.4f}: {100 * found['written'] / found['recipe']:.2f}%")
    print("| batches of 8 rows of 1,024 tokens, from | a CPU second | time / that of shards without lineage |\n| --- | --- | --- |")
    for name, seconds in found["batch"].items():
        print(f"| {name} | {1 / seconds:,.0f} | {seconds / found['batch']['shards without lineage']:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="a file of JSON lines")
    parser.add_argument("--field", default="text", help="its field with the text")
    parser.add_argument("--join", type=int, default=1, help="records that make a document, a line each")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", default="", help="a tokenizer.json; without one 8,192 tokens are learned from the text")
    parser.add_argument("--language-model", default="", help="fastText's lid.176 for datatrove; without it no stage looks at languages")
    parser.add_argument("--peer-python", default="", help="an interpreter with datatrove[processing]")
    parser.add_argument(
        "--steps", nargs="+", choices=(*RECIPE, "exact", "paragraphs"), default=list(RECIPE), help="the steps of the recipe"
    )
    parser.add_argument("--sizes", nargs="+", type=float, help="megabytes: measure memory and time by size instead")
    parser.add_argument("--lineage", action="store_true", help="measure what lineage costs instead")
    parser.add_argument("--scratch", help="a folder for what is made meanwhile")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    print(f"{date.today()}, {cpu_name()}")
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        if options.sizes:
            grow(options, Path(name))
        elif options.lineage:
            lineage(options, Path(name))
        else:
            compare(options, Path(name))


if __name__ == "__main__":
    main()
