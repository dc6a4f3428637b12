"""A look into a recipe's folder: its stages, the documents of one, and what became of a document."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lmx.data.curate.records import read_records
from lmx.data.shards import is_shards, open_shards

SPLITS = ("train", "validation")


def stages(folder: Path) -> dict[str, int]:
    """The stages that a folder holds, with their documents: passes by number, what each dropped, the shards of each split.

    Raises FileNotFoundError where no recipe was run.
    """
    if not (folder / "recipe.json").is_file():
        raise FileNotFoundError(f"{folder} is not a recipe's folder: it has no recipe.json")
    found = {}
    for work in sorted((folder / "work").glob("[0-9]*"), key=lambda path: int(path.name)):
        for kind in ("kept", "dropped"):
            found[f"{kind}{work.name}"] = sum(path.read_bytes().count(b"\n") for path in work.glob(f"*.{kind}.jsonl"))
    return found | {split: len(open_shards(folder / split)) for split in SPLITS if is_shards(folder / split)}


def documents_at(folder: Path, stage: str) -> Iterator[Mapping[str, Any]]:
    """The documents of a stage, in order: `{id, source, ..}`, with `text` after a pass, and of dropped ones `step`, `reason` and `value`.

    Raises ValueError, with the stages that are there, for another name.
    """
    if stage not in (there := stages(folder)):
        raise ValueError(f"{folder} has no stage {stage!r}; it has {', '.join(there)}")
    if stage in SPLITS:
        yield from open_shards(folder / stage).about
        return
    kind, number = stage.rstrip("0123456789"), stage.lstrip("keptdro")
    for path in sorted((folder / "work" / number).glob(f"*.{kind}.jsonl")):
        if kind == "dropped":
            yield from map(json.loads, path.open("rb"))
        else:
            for record in read_records(path):
                d = record.document
                yield {"id": d.id, "source": d.source, "metadata": d.metadata, "decisions": record.decisions, "text": d.text}


def fate(folder: Path, id: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What became of the documents of an id: each stage that has one, with what it says of it. Raises as `stages` does."""
    for stage in stages(folder):
        for document in documents_at(folder, stage):
            if document["id"] == id:
                yield stage, document
