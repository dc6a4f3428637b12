"""Every test runs on eight simulated CPU devices, with compiled programs kept between runs."""

import fcntl
import gc
import hashlib
import itertools
import os
import pickle
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(os.environ["JAX_PLATFORMS"] == "cpu")))
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # operations without their source lines: less to compile
os.environ.setdefault("NPROC", "32")  # XLA's threads: with one a device, collectives of a pipeline may wait for each other for ever

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

ROOT = Path(__file__).parent.parent
QUICK = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
"""Whether machine code is left as it comes, also in processes that tests start: their programs compile for longer than they run."""


def pytest_collection_finish():
    """What modules hold lives for ever. Without looking through it, and looked for less often, garbage no longer costs a fifth of tracing."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


MAPS, ROOM, TESTS = Path("/proc/self/maps"), 20_000, itertools.count(1)


@pytest.fixture(autouse=True)
def room_for_programs():
    """A compiled program takes a dozen or more memory maps, of which Linux gives a process 65,530; without them XLA crashes."""
    yield
    if next(TESTS) % 8 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > ROOM:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable:
    """`once(make, *arguments)`: what a function gives for arguments that their `repr` tells apart, made by the first of the workers that asks
    and read by the others."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    made: dict[str, object] = {}

    def of(make: Callable, *arguments: object) -> object:
        key = hashlib.sha256(repr((make.__module__, make.__qualname__, *arguments)).encode()).hexdigest()
        if key not in made:
            with open(folder / f"{key}.pickle", "ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not file.seek(0, os.SEEK_END):
                    file.write(pickle.dumps(make(*arguments)))
                    file.flush()
                file.seek(0)
                made[key] = pickle.load(file)
        return made[key]

    return of


@pytest.fixture(scope="module")
def optimised():
    """For tests that run for longer than they compile, and for those that hold whole models against others' numbers: as users' programs are."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", QUICK)


@pytest.fixture
def scanned(monkeypatch):
    """Layers as a scan, as on other hardware, also where a CPU would unroll them: programs of tests are compiled for longer than they run."""
    from lmx.train import program

    monkeypatch.setattr(program, "SHALLOW", 0)


@pytest.fixture(scope="module")
def compiled_here():
    """For tests that run programs of their own on several devices: `lmx.parallel.host.compiled_here` says why."""
    from lmx.parallel import host

    with host.compiled_here(jax.make_mesh((8,), ("data",))):
        yield


@pytest.fixture(scope="session")
def shared(root: Path) -> Path:
    """Reference cases beside the repository; tests that need them skip where they are absent."""
    folder = root.parent / "shared"
    if not folder.exists():
        pytest.skip("reference cases (../shared) are not here")
    return folder


@pytest.fixture(scope="session")
def h100() -> str:
    """The chip that tests marked `aot` compile for in its absence; they skip where that cannot be."""
    from lmx.parallel import absent

    if not absent.installed():
        pytest.skip("the extra cuda is not installed")
    absent.prepare()
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        absent.devices(1)
    except RuntimeError:
        pytest.skip("JAX has started without the CUDA plugin; run these alone: pytest -m aot -n 0")
    return "h100"
