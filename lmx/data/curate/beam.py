"""A cluster's workers, through Apache Beam: Flink, Spark, Dataflow, or several processes of this machine. Extra `beam`.

The recipe is the same, and so are its bytes: a task is a unit, as with `Local`, and leaves its results in the run's folder, which every
worker must see under the same path (a shared file system). The keys of exact and MinHash deduplication are grouped by Beam, so that no
machine needs to hold them all.
"""

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmx.data.clean.exact import Exact
from lmx.data.clean.groups import components, duplicates, edges
from lmx.data.clean.minhash import MinHash
from lmx.data.clean.step import CorpusStep, Ragged
from lmx.data.curate.records import open_ragged

TOLD = re.compile(
    r"ValueError: ((?:(?!\\n).)*?) \[while running "
)  # a task's error, in a runner's words or in the traceback that it quotes
DOCUMENTS = 4096  # whose keys one element of Beam's reads


@dataclass(frozen=True)
class Beam:
    """Workers of a Beam runner."""

    options: tuple[str, ...] = ("--runner=FnApiRunner", "--direct_running_mode=multi_processing", "--direct_num_workers=2")
    """Beam's own command line: `--runner=FlinkRunner`, `--flink_master=..`, .. The default: two processes of this machine."""

    def each(self, task: Callable[[int], None], items: Sequence[int], what: str) -> None:
        """Run a task for each item. Raises ValueError without the package and for a task's; what the runner makes of other errors."""
        beam = _beam()
        try:
            with self._pipeline() as pipeline:
                pipeline | beam.Create(list(items)) | beam.Reshuffle() | what >> beam.Map(task)
        except Exception as error:
            if said := TOLD.search(f"{type(error).__name__}: {error}"):
                raise ValueError(said[1].replace("\\'", "'")) from error
            raise

    def resolve(self, step: CorpusStep, folder: Path) -> Ragged:
        """What a corpus step finds. Documents that share a key are brought together by Beam; only the edges between them come back."""
        if not isinstance(step, Exact | MinHash):
            return step.resolve(open_ragged(folder))
        beam, extracted = _beam(), open_ragged(folder)
        ranges = [(at, min(at + DOCUMENTS, len(extracted))) for at in range(0, len(extracted), DOCUMENTS)]
        found = folder / "edges"
        shutil.rmtree(found, ignore_errors=True)  # a killed run's
        found.mkdir()
        with self._pipeline() as pipeline:
            (
                pipeline
                | beam.Create(ranges)
                | beam.Reshuffle()
                | beam.FlatMap(_keys, str(folder))
                | beam.GroupByKey()
                | beam.FlatMap(_edges)
                | beam.io.WriteToText(str(found / "part"))
            )
        parents = np.arange(len(extracted))
        for path in sorted(found.glob("part*")):
            if path.stat().st_size:
                pairs = np.loadtxt(path, np.int64, ndmin=2)
                parents = components(len(parents), pairs[:, 0], pairs[:, 1], parents)
        shutil.rmtree(found)
        return duplicates(parents)

    def _pipeline(self) -> Any:
        from apache_beam.options.pipeline_options import PipelineOptions

        return _beam().Pipeline(options=PipelineOptions(list(self.options)))


def _keys(part: tuple[int, int], folder: str) -> Iterator[tuple[tuple[int, int], int]]:
    """The keys of some documents, each with its place among a document's and the document."""
    extracted = open_ragged(Path(folder))
    for document in range(*part):
        for place, key in enumerate(extracted[document].view(np.int64).tolist()):  # Beam counts with a sign
            yield (place, key), document


def _edges(group: tuple[tuple[int, int], Iterable[int]]) -> Iterator[str]:
    return (f"{first} {other}" for first, other in edges(group[1]))


def _beam() -> Any:
    try:
        import apache_beam
    except ImportError as error:
        raise ValueError("running on Beam needs the apache-beam package, which is not installed; pip install 'lmx[beam]'") from error
    return apache_beam
