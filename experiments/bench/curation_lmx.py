"""The side of `curation.py` that lmx has."""

import json
import resource
import sys
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from experiments.bench.curation import answer, measured
from experiments.bench.turns import serve
from lmx.core.config import versions
from lmx.data.clean import c4, exact, fineweb, gopher, languages, minhash, paragraphs, privacy
from lmx.data.clean.step import Ragged
from lmx.data.curate import Recipe, curate
from lmx.data.curate.records import Record
from lmx.data.curate.tally import Tally
from lmx.data.curate.work import Resolved, through
from lmx.data.documents import Document
from lmx.data.shards import index_of, write_shard
from lmx.data.sources import Jsonl
from lmx.data.tokenizers import load_tokenizer

RECIPE = ("language", "gopher_repetition", "gopher_quality", "c4", "fineweb", "pii", "minhash")
OTHERS = ("phone", "credit_card", "iban", "national_id", "secret")  # what datatrove does not look for


class Lmx:
    """Stages as lmx has them. Without a language model datatrove has no stage for languages, so the recipe has none either."""

    def __init__(self, corpus: str, tokenizer: str, language_model: str):
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
        steps = tuple(self.steps[name] for name in RECIPE if name != "language" or language_model)
        self.recipe, self.tokenizer = Recipe("bench", (self.source,), steps, tokenizer=tokenizer), load_tokenizer(tokenizer)

    @cached_property
    def documents(self) -> list[Document]:
        return [document for unit in self.source.units() for document in self.source.read(unit)]

    def run(self, stage: str, folder: Path) -> Any:
        """CPU seconds of a stage, and how many documents came out (tokens, of those that make tokens)."""
        if stage == "versions":
            return json.dumps(versions())
        if stage == "memory":
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            return [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, int(status["RssAnon"].split()[0]) / 1024]
        if stage == "recipe":
            seconds, manifest = measured(lambda: curate(self.recipe, folder / "corpus"))
            return [seconds, manifest["splits"]["train"]["documents"]]
        documents = self.documents if stage != "read" else []
        work = getattr(self, f"_{stage}", None)
        return list(measured((lambda: work(documents, folder)) if work else (lambda: self._step(stage, documents, folder))))

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


def _ragged(arrays: list[np.ndarray]) -> Ragged:
    return Ragged(np.concatenate(arrays), np.append(0, np.cumsum([len(array) for array in arrays])))


if __name__ == "__main__":
    sys.argv.remove("--work")
    side = Lmx(*sys.argv[1:])
    serve(lambda stage: answer(side, stage))
