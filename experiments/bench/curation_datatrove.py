"""The side of `curation.py` that datatrove has: imported by an interpreter that has it, never by lmx's."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from experiments.bench.curation import answer, measured
from experiments.bench.turns import serve


def content(document: Any) -> str:
    """What is compared of a document: as lmx does, whatever its case, signs and spaces. (The annotation is read.)"""
    from datatrove.utils.text import simplify_text

    return simplify_text(document.text)


class Datatrove:
    """Stages as datatrove has them."""

    def __init__(self, corpus: str, tokenizer: str, language_model: str, *names: str):
        from datatrove.utils.logging import logger

        logger.remove()
        self.corpus, self.tokenizer, self.language_model, self.names = Path(corpus), tokenizer, language_model, names
        self.documents = list(self._reader().run())

    def run(self, stage: str, folder: Path) -> Any:
        """CPU seconds of a stage, and how many documents came out (tokens, of those that make tokens)."""
        from datatrove.data import Document

        if stage == "versions":
            return ", ".join(f"{name} {version(name)}" for name in ("datatrove", "spacy", "numpy", "tokenizers"))
        fresh = [Document(d.text, d.id, metadata=dict(d.metadata)) for d in self.documents]  # they are changed where they stand
        work = getattr(self, f"_{stage}", None)
        return list(measured((lambda: work(fresh, folder)) if work else (lambda: _count(self._filter(stage).run(iter(fresh))))))

    def _reader(self, path: Path | None = None) -> Any:
        from datatrove.pipeline.readers import JsonlReader

        path = path or self.corpus
        return JsonlReader(str(path.parent), glob_pattern=path.name, compression=None)

    def _filter(self, stage: str) -> Any:
        from datatrove.pipeline import filters
        from datatrove.pipeline.formatters import PIIFormatter

        if stage == "language":
            made = filters.LanguageFilter(["en"], 0.65)
            made.model = _model(self.language_model)
            return made
        return {
            "gopher_repetition": filters.GopherRepetitionFilter,
            "gopher_quality": filters.GopherQualityFilter,
            "c4": filters.C4QualityFilter,
            "fineweb": filters.FineWebQualityFilter,
            "pii": PIIFormatter,
        }[stage]()

    def _read(self, fresh: list, folder: Path) -> int:
        return _count(self._reader().run())

    def _write(self, fresh: list, folder: Path) -> int:
        from datatrove.pipeline.writers import JsonlWriter

        return _count(JsonlWriter(str(folder), compression=None).run(iter(fresh)))

    def _exact(self, fresh: list, folder: Path) -> int:
        from datatrove.pipeline import dedup

        config, (signatures, found) = dedup.ExactDedupConfig(content), _folders(folder, 2)
        dedup.ExactDedupSignature(signatures, config).run(iter(fresh))
        dedup.ExactFindDedups(signatures, found, config).run()
        return _count(dedup.ExactDedupFilter(found, config).run(iter(fresh)))

    def _minhash(self, fresh: list, folder: Path) -> int:
        first, buckets, cluster, last = self._minhash_steps(folder)
        first.run(iter(fresh))
        for rank in range(14):
            buckets.run(None, rank, 14)
        cluster.run(None)
        return _count(last.run(iter(fresh)))

    def _minhash_steps(self, folder: Path) -> tuple:
        from datatrove.pipeline import dedup

        signatures, pairs, gone = _folders(folder, 3)
        return (
            dedup.MinhashDedupSignature(signatures),
            dedup.MinhashDedupBuckets(signatures, pairs),
            dedup.MinhashDedupCluster(pairs, gone),
            dedup.MinhashDedupFilter(gone),
        )

    def _paragraphs(self, fresh: list, folder: Path) -> int:
        from datatrove.pipeline import dedup

        config = dedup.SentDedupConfig(split_sentences=False, min_doc_words=0, min_num_sentences=0)
        signatures, found = _folders(folder, 2)
        dedup.SentenceDedupSignature(signatures, config=config).run(iter(fresh))
        dedup.SentenceFindDedups(signatures, found, config=config).run()
        return _count(dedup.SentenceDedupFilter(found, config).run(iter(fresh)))

    def _tokenizer(self, folder: Path) -> Any:
        from datatrove.pipeline.tokens import DocumentTokenizer

        return DocumentTokenizer(str(folder / "tokens"), self.tokenizer, eos_token="<|endoftext|>", shuffle_documents=False)

    def _tokens(self, fresh: list, folder: Path) -> int:
        self._tokenizer(folder).run(iter(fresh))
        return sum(path.stat().st_size for path in (folder / "tokens").glob("*.ds")) // 2

    def _recipe(self, fresh: list, folder: Path) -> int:
        from datatrove.executor import LocalPipelineExecutor
        from datatrove.pipeline.writers import JsonlWriter

        first, buckets, cluster, last = self._minhash_steps(folder)
        steps = [self._filter(name) for name in self.names if name != "minhash" and (name != "language" or self.language_model)]
        parts = (
            ([self._reader(), *steps, JsonlWriter(str(folder / "kept"), compression=None), first], 1),
            ([buckets], 14),
            ([cluster], 1),
            ([self._reader(folder / "kept" / "00000.jsonl"), last, self._tokenizer(folder)], 1),
        )
        for number, (pipeline, tasks) in enumerate(parts):
            LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=str(folder / f"logs{number}")).run()
        (index,) = (folder / "tokens").glob("*.ds.index")
        return index.stat().st_size // 8


def _count(documents: Any) -> int:
    return sum(1 for _ in documents)


def _folders(folder: Path, count: int) -> list[str]:
    return [str(folder / f"part{number}") for number in range(count)]


def _model(path: str) -> Any:
    """datatrove's language model from a file, loaded when first asked: it would else be fetched."""
    from datatrove.utils.lid import FT176LID

    class Here(FT176LID):
        @property
        def model(self) -> Any:
            if self._model is None:
                from fasttext.FastText import _FastText

                self._model = _FastText(path)
            return self._model

    return Here(["en"])


if __name__ == "__main__":
    sys.argv.remove("--work")
    side = Datatrove(*sys.argv[1:])
    serve(lambda stage: answer(side, stage))
