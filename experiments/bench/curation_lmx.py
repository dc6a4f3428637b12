"""The side of `curation.py` that lmx has."""

import json
import resource
import statistics
import sys
import threading
from collections.abc import Iterable
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.curation import answer, measured
from experiments.bench.turns import serve
from lmx.core.config import versions
from lmx.data.clean import c4, exact, fineweb, gopher, languages, minhash, paragraphs, privacy
from lmx.data.clean.step import Ragged
from lmx.data.curate import Recipe, curate
from lmx.data.curate.records import Record, read_records
from lmx.data.curate.tally import Tally
from lmx.data.curate.work import Resolved, through
from lmx.data.documents import Document
from lmx.data.pipeline import Batches
from lmx.data.shards import OPTIONS, index_of, open_shards, write_shard
from lmx.data.sources import Jsonl
from lmx.data.store import TokenStore, build_store
from lmx.data.tokenizers import load_tokenizer

OTHERS = ("phone", "credit_card", "iban", "national_id", "secret")  # what datatrove does not look for


class Lmx:
    """Stages as lmx has them. Without a language model datatrove has no stage for languages, so the recipe has none either."""

    def __init__(self, corpus: str, tokenizer: str, language_model: str, *names: str):
        self.most = 0
        self.source = Jsonl(corpus, name="text")
        self.steps = {
            "language": languages.Language(("en",)),
            "gopher_repetition": gopher.GopherRepetition(),
            "gopher_quality": gopher.GopherQuality(),
            "c4": c4.C4Quality(),
            "fineweb": fineweb.FineWebQuality(),
            "pii": privacy.Private(**dict.fromkeys(OTHERS, "keep")),
            "all_pii": privacy.Private(),
            "exact": exact.Exact(),
            "minhash": minhash.MinHash(),
            "paragraphs": paragraphs.Paragraphs(span=3),
        }
        steps = tuple(self.steps[name] for name in names if name != "language" or language_model)
        self.recipe, self.tokenizer = Recipe("bench", (self.source,), steps, tokenizer=tokenizer), load_tokenizer(tokenizer)

    @cached_property
    def documents(self) -> list[Document]:
        return [document for unit in self.source.units() for document in self.source.read(unit)]

    def run(self, stage: str, folder: Path) -> Any:
        """CPU seconds of a stage, and how many documents came out (tokens, of those that make tokens)."""
        if stage == "versions":
            return json.dumps(versions())
        if stage == "memory":
            return [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, self.most / 1024]
        if stage == "lineage":
            return lineage(self, folder)
        if stage == "recipe":
            done = threading.Event()
            watch = threading.Thread(target=self._watch, args=(done,))
            watch.start()
            seconds, manifest = measured(lambda: curate(self.recipe, folder / "corpus"))
            done.set()
            watch.join()
            return [seconds, manifest["splits"]["train"]["documents"]]
        documents = self.documents if stage != "read" else []
        work = getattr(self, f"_{stage}", None)
        return list(measured((lambda: work(documents, folder)) if work else (lambda: self._step(stage, documents, folder))))

    def _watch(self, done: threading.Event) -> None:
        """Keeps the most memory that is no file's, in kilobytes."""
        while not done.wait(0.25):
            status = Path("/proc/self/status").read_text()
            self.most = max(self.most, next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")))

    def _read(self, documents: list[Document], folder: Path) -> int:
        return sum(1 for unit in self.source.units() for _ in self.source.read(unit))

    def _write(self, documents: list[Document], folder: Path) -> int:
        with (folder / "kept.jsonl").open("wb") as file:
            file.writelines(Record(document).to_line() for document in documents)
        return len(documents)

    def _tokens(self, documents: list[Document], folder: Path) -> int:
        write_shard(map(Record, documents), self.tokenizer, folder, 0, corpus="text")
        return json.loads(index_of(folder, 0).read_bytes())["tokens"]

    def _step(self, stage: str, documents: list[Document], folder: Path) -> int:
        step, tally = self.steps[stage], Tally(10)
        steps: Iterable[Any] = (step for _ in documents)
        if hasattr(step, "resolve"):
            found = _ragged([step.extract(document) for document in documents])
            names = _ragged([np.frombuffer(document.id.encode(), np.uint8) for document in documents])
            resolved = step.resolve(found)
            steps = (Resolved(step, resolved[number], names) for number in range(len(documents)))
        with (folder / "dropped.jsonl").open("wb") as dropped:
            return sum(through(Record(d), (one,), "text", tally, dropped) is not None for d, one in zip(documents, steps, strict=True))


def lineage(side: Lmx, folder: Path) -> dict[str, Any]:
    """CPU seconds of the recipe and of writing what its shards say of each document; of a batch from the shards, from the same shards without
    that, and from a memory-mapped store: medians of turns, the batches being the same."""
    from array_record.python.array_record_module import ArrayRecordWriter

    seconds, _ = measured(lambda: curate(side.recipe, folder / "corpus"))
    shards = open_shards(folder / "corpus" / "train")
    about = [shards.about[number] for number in range(len(shards))]

    def write() -> None:
        writer = ArrayRecordWriter(str(folder / "again"), OPTIONS)
        for record in about:
            writer.write(json.dumps(record, ensure_ascii=False).encode())
        writer.close()

    written = statistics.median(measured(write)[0] for _ in range(5))
    kept = max((folder / "corpus" / "work").iterdir(), key=lambda path: path.name)
    texts = (record.document for path in sorted(kept.glob("*.kept.jsonl")) for record in read_records(path))
    stores = {
        "shards": shards,
        "shards without lineage": TokenStore(folder, shards.index, shards.tokens, shards.offsets, shards.document_bytes, *[shards.ids] * 2),
        "memory-mapped store": build_store(texts, side.tokenizer, folder / "store"),
    }
    batches = {name: Batches(store, rows=8, length=1024, seed=0) for name, store in stores.items()}
    taken: dict[str, list[float]] = {name: [] for name in stores}
    for turn in range(9):
        made = []
        for name, kind in batches.items():
            lap, found = measured(lambda kind=kind, turn=turn: [kind[turn * 32 + k] for k in range(32)])
            taken[name] += [lap / 32] * (turn > 0)
            made.append(found)
        for one, other in pairwise(made):
            assert all(np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(one, other, strict=True))
    size = sum(path.stat().st_size for path in (folder / "corpus" / "train").glob("documents-*"))
    return {"recipe": seconds, "written": written, "bytes": size, "batch": {name: statistics.median(laps) for name, laps in taken.items()}}


def _ragged(arrays: list[np.ndarray]) -> Ragged:
    return Ragged(np.concatenate(arrays), np.append(0, np.cumsum([len(array) for array in arrays])))


if __name__ == "__main__":
    sys.argv.remove("--work")
    side = Lmx(*sys.argv[1:])
    serve(lambda stage: answer(side, stage))
