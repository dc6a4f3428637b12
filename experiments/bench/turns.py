"""What the benchmarks share: contenders that are processes of their own and take turns, so that a machine whose speed drifts slows all alike.

A contender's process is the benchmark's module run with `--work`: it warms up, then answers each line of its input with a line of JSON
(`serve`). This file needs nothing but Python, since the peers' interpreters import it too.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def serve(answer: Callable[[str], Any]) -> None:
    """A contender's side, once it is warm: one answer for each request until there are no more."""
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(line.strip())), flush=True)


def timed(function: Callable[[], Any], times: int = 1) -> list[float]:
    """Seconds of each of a number of calls."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return seconds


class Contender:
    """A running process of a benchmark. `absent` says why there is none; an absent one is not to be asked."""

    def __init__(self, name: str, python: str, module: str, *arguments: str):
        """Starts `python -m module --work ...arguments` and waits until it is warm."""
        self.name, self.seconds, self.absent = name, [], ""
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`); a pipe would fill and stop it
        self._process = subprocess.Popen(
            [python, "-m", module, "--work", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        )
        line = self._process.stdout.readline()
        while line and line.strip() != "ready":  # libraries say things of their own
            line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self.absent = self._last_words()

    def ask(self, request: str) -> Any:
        """Its answer to a request. Raises RuntimeError, with its last words, if it died of it."""
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise RuntimeError(f"{self.name} ended: {self._last_words()}")
        return json.loads(line)

    def run(self, request: str) -> None:
        """Asks for something timed: the answer is seconds, kept in `seconds`."""
        self.seconds += self.ask(request)

    def close(self) -> None:
        """Lets the process end."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _last_words(self) -> str:
        self._errors.seek(0)
        return (self._errors.read().strip().splitlines() or ["it ended without a word"])[-1]


def gpu_name() -> tuple[str, str]:
    """The first GPU, and its driver. Raises OSError, or subprocess.CalledProcessError, where nvidia-smi finds none."""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    name, driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
    return name, driver


def cpu_name() -> str:
    """The processor, with the instruction sets that matter here."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    name = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), platform.machine())
    extra = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag} " in text or f" {flag}\n" in text]
    return f"{name}, {os.cpu_count()} cores ({', '.join(extra)})"
