"""A corpus as a value: what is read, what is done to it, and with what it is tokenised."""

import dataclasses
import hashlib
import inspect
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lmx.data.clean.step import CorpusStep, Step
from lmx.data.sources.source import UNIT, Source, Unit


@dataclass(frozen=True)
class Recipe:
    """How a corpus is made. The same recipe over the same files gives the same bytes, whoever runs it and however often it was killed."""

    name: str
    """Names its folder."""

    sources: tuple[Source, ...]
    """What is read, in this order: of duplicates the first stays, so the best comes first."""

    steps: tuple[Step | CorpusStep, ...] = ()
    """What is done to the documents, one after the other."""

    tokenizer: str = "bytes"
    """As in `Data.tokenizer`: bytes, a path, or one to be trained on the text that is kept (`bpe:32000`)."""

    held_out: float = 0.0
    """Share of the kept documents, drawn by a hash of their source's name and their ids, that goes into `validation` instead of `train`: what
    a source has twice under one id is not in both."""

    damaged: Literal["refuse", "skip"] = "refuse"
    """What happens where a source is damaged: the run ends with the place, or the place is listed in the report and left out."""

    unit: int = UNIT
    """Bytes of files that one worker takes at a time. Decides where shards end, so it is part of the recipe."""

    examples: int = 10
    """Documents shown in the report, for each source and language, of those that a rule dropped, changed or kept."""

    identity_terms: bool = True
    """Whether the documents that name people and dialects are counted, before and after, for the report to say which lose most. Takes some 5%
    of the time of a chain of filters (8 MB/s); what is kept does not depend on it."""


def check(recipe: Recipe) -> None:
    """Raise ValueError, in one line, for a recipe that cannot be meant."""
    if not recipe.name or "/" in recipe.name or recipe.name.startswith("."):
        raise ValueError(f"name={recipe.name!r} is to name a folder; use letters and digits")
    if not recipe.sources:
        raise ValueError(f"recipe {recipe.name!r} reads nothing: give it sources")
    names = [part.name for part in (*recipe.sources, *recipe.steps)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two sources or steps are called {twice[0]!r}: give each its own name, reports tell them apart by it")
    if taken := sorted({"source", "corpus"} & {step.name for step in recipe.steps}):
        raise ValueError(f"a step is called {taken[0]!r}, which is what reports call the readers or the whole: give it another name")
    if not 0 <= recipe.held_out < 1:
        raise ValueError(f"held_out={recipe.held_out} is not a share of the documents; use 0.01, say, or 0")
    if recipe.unit < 1 or recipe.examples < 0:
        raise ValueError(f"unit={recipe.unit} and examples={recipe.examples} are to be positive")
    if recipe.damaged not in ("refuse", "skip"):
        raise ValueError(f"damaged={recipe.damaged!r} is not refuse or skip")


def files(units: Iterable[Unit]) -> list[Path]:
    """The files that units are made of, sorted; of a folder all below it."""
    paths = {path for unit in units for path in map(Path, unit.paths)}
    return sorted({file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if not file.is_dir()})


def files_read(recipe: Recipe, units: Iterable[Unit]) -> list[Path]:
    """The files that decide what a recipe makes: its units', and those that steps name as `reads`."""
    return sorted({*files(units), *(Path(path) for step in recipe.steps for path in getattr(step, "reads", ()))})


def is_corpus_step(step: Step | CorpusStep) -> bool:
    """Whether a step needs to see the whole corpus first."""
    return hasattr(step, "resolve")


def passes(recipe: Recipe) -> list[tuple[CorpusStep | None, tuple[Step, ...], CorpusStep | None]]:
    """The steps in passes over the corpus: what is applied first (resolved before), the steps of one document, what is extracted."""
    ends = [i for i, step in enumerate(recipe.steps) if is_corpus_step(step)]
    begins = [-1, *ends]
    return [
        (recipe.steps[a] if a >= 0 else None, recipe.steps[a + 1 : b], recipe.steps[b] if b < len(recipe.steps) else None)
        for a, b in zip(begins, [*ends, len(recipe.steps)], strict=True)
    ]


def described(value: Any) -> Any:
    """A recipe, or any value in it, as JSON: dataclasses by class and fields, functions by name. Raises ValueError for what has no such form."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: described(getattr(value, f.name)) if f.repr else _hidden(getattr(value, f.name)) for f in dataclasses.fields(value)
        }
        return {"class": _named(type(value)), **fields}
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, frozenset | set):
        return sorted(map(described, value), key=json.dumps)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [described(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, partial):
        return {"function": described(value.func), "args": described(value.args), "keywords": described(value.keywords)}
    if inspect.ismethod(value):
        return {"method": value.__name__, "of": described(value.__self__)}
    if callable(value) and "<" not in getattr(value, "__qualname__", "<"):
        return _named(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"a recipe holds {value!r}, which cannot be written down; use dataclasses, numbers, texts and functions of a module")


def _named(value: Any) -> str:
    """A class or function by its module and name; the same when the module is the program that is run."""
    module = value.__module__
    if module == "__main__" and (spec := getattr(sys.modules["__main__"], "__spec__", None)):
        module = spec.name
    return f"{module}.{value.__qualname__}"


def _hidden(secret: Any) -> str:
    """What is written of a field that is kept out of `repr`: enough to see that it has changed."""
    return f"sha256:{hashlib.sha256(json.dumps(described(secret), sort_keys=True).encode()).hexdigest()[:16]}"


def fingerprint(recipe: Recipe) -> str:
    """SHA-256 (hex) of a recipe as `described`."""
    return hashlib.sha256(json.dumps(described(recipe), sort_keys=True).encode()).hexdigest()


def code(recipe: Recipe) -> str:
    """SHA-256 (hex) of the code that makes a recipe's corpus: of `lmx.data`, and of the modules that its sources and steps come from."""
    paths = set(Path(__file__).parents[1].rglob("*.py"))
    for part in (*recipe.sources, *recipe.steps):
        with suppress(TypeError, OSError):  # of a class that was typed in, in a notebook, there is no file
            paths.add(Path(inspect.getfile(type(part))))
    return hashlib.sha256(b"".join(sorted(hashlib.sha256(path.read_bytes()).digest() for path in paths))).hexdigest()
