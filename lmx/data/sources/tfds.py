"""Data sets of TensorFlow Datasets, read without TensorFlow: stored as ArrayRecord."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmx.data.documents import Document
from lmx.data.sources.paths import parts
from lmx.data.sources.records import CREATED, first_line, from_record, plain
from lmx.data.sources.source import UNIT, Omitted, Unit

# A TFDS split ("train", "train[:10%]", "train+test") starts with a letter, a version ("1.0.0") with a digit: so `ag_news_subset:1.0.0` is
# all name.
NAME = re.compile(r"(?P<name>.+?)(?::(?P<split>[A-Za-z_][\w+\[\]:%-]*))?")


@dataclass(frozen=True)
class Tfds:
    """A split of a prepared data set. A document without an id of its own is `data set/split:number`."""

    dataset: str
    """`NAME[:split]` (prepared in TFDS's own data directory, downloaded if it is not there yet) or `DIRECTORY[:split]`; else `train`."""
    text: str = "text"
    id: str = "id"
    created: tuple[str, ...] = CREATED
    """As for `Jsonl`."""
    name: str = "tfds"

    def units(self, size: int = UNIT) -> Sequence[Unit]:
        if size < 1:
            raise ValueError(f"size={size} bytes of a unit, expected at least 1")
        builder, split = built(self.dataset, self.name)
        data, _ = opened_split(builder, split, self.dataset, self.name)
        total = sum(file.stat().st_size for file in Path(builder.data_dir).glob("*.array_record*"))
        share = total * len(data) // max(1, sum(info.num_examples for info in builder.info.splits.values()))
        bounds = parts(len(data), min(len(data), -(-share // size)))
        return [Unit(f"{split}@{start}", (str(builder.data_dir),), start, stop) for start, stop in bounds]

    def read(self, unit: Unit) -> Iterator[Document | Omitted]:
        where = f"tfds:{self.dataset}"
        try:
            builder, split = built(self.dataset, self.name)
            data, prefix = opened_split(builder, split, self.dataset, self.name)
        except ValueError as error:
            yield Omitted(where, str(error), damaged=True)
            return
        for number in range(unit.start, len(data) if unit.stop is None else unit.stop):
            try:
                record = plain(data[number])
                made = from_record(record, f"{prefix}:{number}", where, text=self.text, key=self.id, created=self.created)
            except Exception as error:  # TFDS and ArrayRecord raise many types, each about this record
                made = Omitted(f"{where}, record {number}", first_line(error), damaged=True)
            yield made


def built(dataset: str, name: str) -> tuple[Any, str]:
    """A prepared TFDS builder and the split. Raises ValueError in one line whatever TFDS has to say."""
    given = f"{name}='tfds:{dataset}'"
    match = NAME.fullmatch(dataset)
    if not match:
        raise ValueError(f"{given} names no data set; expected tfds:NAME[:split] or tfds:DIRECTORY[:split]")
    dataset, split = (dataset, None) if Path(dataset).is_dir() else match.group("name", "split")
    import tensorflow_datasets as tfds

    try:
        if Path(dataset).is_dir():
            builder = tfds.builder_from_directory(dataset)
        else:
            builder = tfds.builder(dataset, file_format="array_record")
            builder.download_and_prepare()
    except Exception as error:  # TFDS raises many types, and each is about the name or the directory given
        raise ValueError(
            f"{given}: TFDS cannot open it ({first_line(error)}); give a name from the TFDS catalogue or a prepared directory"
        ) from error
    return builder, split or "train"


def opened_split(builder: Any, split: str, dataset: str, name: str) -> tuple[Any, str]:
    """Its records, by number, and what their ids begin with. Raises ValueError as `built`."""
    try:
        return builder.as_data_source(split=split), f"{builder.info.name}/{split}"
    except Exception as error:  # as above: an unknown split, or files that are no ArrayRecord
        known = ", ".join(builder.info.splits)
        raise ValueError(
            f"{name}='tfds:{dataset}': no split {split!r} to read ({first_line(error)}); it has {known}, and must be stored as array_record"
        ) from error
