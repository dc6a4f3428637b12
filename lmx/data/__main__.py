"""Corpora made by recipes: `python -m lmx.data inspect FOLDER [STAGE]`, `fate FOLDER ID`, `check FOLDER`.

`inspect` lists a corpus's stages, or the documents of one; `fate` says what became of a document; `check` reads every byte of the shards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from lmx.core.config import ConfigError, exits_with_one_line, subcommand
from lmx.data.curate.look import SPLITS, documents_at, fate, stages
from lmx.data.shards import is_shards, open_shards

USAGE = "python -m lmx.data inspect FOLDER [STAGE] | fate FOLDER ID | check FOLDER"


@dataclass(frozen=True)
class Inspect:
    """Lists the stages of a corpus, or prints documents of one."""

    folder: Positional[Path]
    """The recipe's folder."""
    stage: Positional[str] = ""
    """A stage: kept0, dropped0, .., train, validation."""
    count: int = 5
    """How many documents."""


@dataclass(frozen=True)
class Fate:
    """Says what became of a document."""

    folder: Positional[Path]
    """The recipe's folder."""
    id: Positional[str]
    """The document's id."""


@dataclass(frozen=True)
class Check:
    """Reads every byte of a corpus's shards and compares hashes."""

    folder: Positional[Path]
    """The recipe's folder."""


def _print(document: Mapping[str, Any]) -> None:
    for name, value in document.items():
        if value not in ("", {}, [], ()):
            print(f"{name}: {value}")
    print()


def main(argv: Sequence[str] | None = None) -> None:
    """The door. A wrong command or folder is one line on stderr and exit code 2."""
    with exits_with_one_line():
        match subcommand(Inspect | Fate | Check, argv, prog="python -m lmx.data", description=__doc__, usage=USAGE):
            case Inspect(folder, "", _):
                for name, documents in stages(folder).items():
                    print(f"{name}: {documents:,} documents")
            case Inspect(folder, stage, count):
                for document in islice(documents_at(folder, stage), count):
                    _print(document)
            case Fate(folder, id):
                found = list(fate(folder, id))
                if not found:
                    raise ConfigError(f"{folder} has no document {id!r} in any stage")
                for stage, document in found:
                    print(f"--- {stage}")
                    _print(document)
            case Check(folder):
                splits = [split for split in SPLITS if is_shards(folder / split)]
                if not splits:
                    raise ConfigError(f"{folder} has no shards; run its recipe to the end")
                for split in splits:
                    store = open_shards(folder / split, hashes=True)
                    print(f"{folder / split}: {len(store):,} documents, {len(store.tokens):,} tokens, every byte as it was written")


if __name__ == "__main__":
    main()
