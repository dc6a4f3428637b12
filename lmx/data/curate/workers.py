"""Who does the work: this process, or several on this machine. (A cluster: `lmx.data.curate.beam`.)"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from lmx.data.clean.step import CorpusStep, Ragged
from lmx.data.curate.records import open_ragged

TRIES = 3


@dataclass(frozen=True)
class Local:
    """Workers of this machine."""

    workers: int = 1
    """Processes; 1 works in this one."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers={self.workers} is not positive; use the number of cores")

    def each(self, task: Callable[[int], None], items: Sequence[int], what: str) -> None:
        """Run a task for each item. Tasks leave their results in files, whole or not at all, so one can be done again.

        A worker that dies (killed, out of memory) is replaced and its item tried again, three times in all. Raises the first task's own error,
        RuntimeError where workers keep dying.
        """
        if self.workers == 1 or len(items) < 2:
            for item in items:
                task(item)
            return
        left = dict.fromkeys(items)
        for _ in range(TRIES):
            # Workers are started afresh, not forked: JAX, if it is loaded here, has threads, and a fork of those can hang.
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(min(self.workers, len(left)), context, initializer=_begin, initargs=(task,))
            try:
                futures = {pool.submit(_work, item): item for item in left}
                for future in as_completed(futures):
                    future.result()
                    del left[futures[future]]
                return
            except BrokenProcessPool:
                continue
            finally:
                pool.shutdown(cancel_futures=True)
        raise RuntimeError(
            f"workers died {TRIES} times at {what} of units {', '.join(map(str, [*left][:8]))} (killed, or out of memory?); "
            f"use fewer than workers={self.workers}, or a smaller unit"
        )

    def resolve(self, step: CorpusStep, folder: Path) -> Ragged:
        """What a corpus step finds in what was extracted, an array in a folder."""
        return step.resolve(open_ragged(folder))


def _begin(task: Callable[[int], None]) -> None:
    """A worker's first act. The task comes once, so that what its steps build (tables, models) is built once a process."""
    global _task
    _task = task
    threading.Thread(target=_follow, daemon=True).start()


def _work(item: int) -> None:
    _task(item)


def _follow() -> None:
    """End with the process that started this one: were that killed, its workers would wait for more work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)
