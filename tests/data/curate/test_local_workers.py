"""Workers of this machine: what they are given once, and when they end."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lmx.data.curate import Local

PROGRAM = """
import os, sys, time
from pathlib import Path
from lmx.data.curate import Local

def slow(item):
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(120)

if __name__ == "__main__":
    Local(2).each(slow, range(4), "a test")
"""


def test_they_end_with_their_program(tmp_path):
    """Else each killed run would leave some that hold memory, and wait for more work, for ever."""
    (tmp_path / "run.py").write_text(PROGRAM)
    (tmp_path / "here").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    run = subprocess.Popen([sys.executable, str(tmp_path / "run.py"), str(tmp_path / "here")], env=environment, stderr=subprocess.DEVNULL)
    try:
        wait(lambda: len(list((tmp_path / "here").iterdir())) == 2)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    workers = [path.name for path in (tmp_path / "here").iterdir()]
    wait(lambda: not any(alive(worker) for worker in workers))


def alive(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait(true) -> None:
    until = time.monotonic() + 60
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


@dataclass(frozen=True)
class Built:
    """A task that builds something first."""

    folder: Path

    @cached_property
    def _table(self) -> None:
        (self.folder / f"built-{time.monotonic_ns()}").touch()

    def __call__(self, item: int) -> None:
        assert self._table is None
        (self.folder / f"done-{item}").touch()


def test_what_a_task_builds_is_built_once_a_worker(tmp_path):
    Local(2).each(Built(tmp_path), range(12), "a test")
    assert len(list(tmp_path.glob("done-*"))) == 12
    assert len(list(tmp_path.glob("built-*"))) <= 2
