"""A cluster's workers, through Apache Beam: Flink, Spark, Dataflow, or several processes of this machine. Extra `beam`.

The recipe is the same, and so are its bytes: a task is a unit, as with `Local`, and leaves its results in the run's folder, which every
worker must see under the same path (a shared file system). Corpus steps that only compare keys (`lmx.data.clean.groups`) are grouped by
Beam, so that no machine needs to hold them all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lmx.data.clean.step import CorpusStep, Ragged


@dataclass(frozen=True)
class Beam:
    """Workers of a Beam runner."""

    options: tuple[str, ...] = ("--runner=FnApiRunner", "--direct_running_mode=multi_processing", "--direct_num_workers=2")
    """Beam's own command line: `--runner=FlinkRunner`, `--flink_master=..`, .. The default: two processes of this machine."""

    def each(self, task: Callable[[int], None], items: Sequence[int], what: str) -> None:
        """Run a task for each item. Raises ValueError without the package, and what the runner makes of a task's error."""
        beam = _beam()
        with self._pipeline() as pipeline:
            pipeline | beam.Create(list(items)) | beam.Reshuffle() | beam.Map(task)

    def resolve(self, step: CorpusStep, extracted: Ragged) -> Ragged:
        return step.resolve(extracted)

    def _pipeline(self) -> Any:
        from apache_beam.options.pipeline_options import PipelineOptions

        return _beam().Pipeline(options=PipelineOptions(list(self.options)))


def _beam() -> Any:
    try:
        import apache_beam
    except ImportError as error:
        raise ValueError("running on Beam needs the apache-beam package, which is not installed; pip install 'lmx[beam]'") from error
    return apache_beam
