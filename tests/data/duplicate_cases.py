"""Real text for tests of cleaning, and a corpus step run as a pipeline runs it."""

import json
import lzma
from functools import cache
from pathlib import Path

import numpy as np

from lmx.data.clean.step import Ragged
from lmx.data.documents import Document

PLAYS = Path(__file__).parents[2] / "experiments/data/shakespeare/test.jsonl.xz"


@cache
def passages(size: int = 800) -> list[str]:
    """Passages of plays, of at least that many characters."""
    found = []
    with lzma.open(PLAYS, "rt", encoding="utf-8") as file:
        for line in file:
            passage = ""
            for part in json.loads(line)["text"].split("\n\n"):
                passage += part + "\n\n"
                if len(passage) >= size:
                    found.append(passage)
                    passage = ""
    return found


def documents(texts) -> list[Document]:
    return [Document(str(number), text, "test") for number, text in enumerate(texts)]


def ragged(arrays, dtype=np.uint64) -> Ragged:
    arrays = [np.asarray(array, dtype) for array in arrays]
    return Ragged(np.concatenate([*arrays, np.zeros(0, dtype)]), np.cumsum([0, *map(len, arrays)]))


def verdicts(step, texts):
    """Of each text."""
    corpus = documents(texts)
    extracted = ragged([step.extract(document) for document in corpus])
    resolved = step.resolve(extracted)
    assert len(resolved) == len(corpus)
    return [step.apply(document, resolved[number]) for number, document in enumerate(corpus)]
