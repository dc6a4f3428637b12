"""Several processes, mostly one a host, that run one experiment: they find each other, take turns, agree, and notice a loss.

A run ends for all of its processes or for none. JAX notices a lost process late (after a minute and more) or by aborting with a page of
C++, so each process also holds a plain connection to process 0: it closes when either end dies, and the kernel's keepalive closes it when a
host goes down. Who sees that says so in a line and leaves at once, for a collective that waits for the lost one cannot be interrupted.
"""

import glob
import itertools
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # the client's key-value store and barriers have no public name
from jax._src.clusters import ClusterEnv  # nor has the detection of clusters by itself
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmx.core.config import ConfigError
from lmx.core.tree import Tree

CLUSTERS = {"SLURM_STEP_NODELIST": "Slurm", "OMPI_COMM_WORLD_SIZE": "Open MPI", "JOB_COMPLETION_INDEX": "a Kubernetes job"}
"""What a process that a cluster started finds in its environment. JAX's own detection then says the rest."""
ARRIVAL, HEARTBEAT, DEPARTURE = 300, 45, 30
"""Seconds: until all must have come; of silence after which JAX gives up a process that hangs; until all must have gone."""
GRACE = 3.0
"""Seconds that an error waits for the news of a loss, which may be its cause."""
FOREVER = 7 * 24 * 3600 * 1000  # milliseconds

_turns = itertools.count()  # names for the key-value store, which holds each once


@dataclass(frozen=True)
class Hosts:
    """The processes of a run. Left alone, the cluster says (Slurm, Open MPI, a Kubernetes job); without one there is one process."""

    coordinator: str = ""
    """HOST:PORT at which process 0 is reached, the port free there. Empty: as the cluster says."""
    processes: int = 0
    """How many there are. 0: as the cluster says. 1: this one alone, whatever the cluster says."""
    index: int = -1
    """Which one this is, from 0. -1: as the cluster says."""


@contextmanager
def together(hosts: Hosts, agreed: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Starts the processes of a run, and ends them together. To be entered before JAX starts its backend; nothing for one process.

    Where one fails, all leave; an exception in `agreed` is one that all of them meet at the same moment, and is raised.

    Raises:
      ConfigError: it is not clear who belongs to the run, or not all have come.
    """
    address, processes, index = settle(hosts)
    if processes == 1:
        yield
        return
    watch = _start(address, processes, index)
    failure = None
    try:
        yield
    except agreed as error:
        failure = error
    except BaseException as error:
        watch.fail(error)
    watch.close()
    if failure is not None:
        raise failure


def settle(hosts: Hosts) -> tuple[str, int, int]:
    """Where process 0 is reached, how many processes there are, and which one this is; raises ConfigError where that is not clear."""
    given = f"hosts.coordinator={hosts.coordinator!r}, hosts.processes={hosts.processes}, hosts.index={hosts.index}"
    address, count, index = hosts.coordinator or None, hosts.processes or None, None if hosts.index == -1 else hosts.index
    cluster = next((name for variable, name in CLUSTERS.items() if variable in os.environ), None)
    if count == 1 or (cluster is None and (address, count, index) == (None, None, None)):
        return "", 1, 0
    if None in (address, count, index):
        way = "give --hosts.coordinator HOST:PORT --hosts.processes N --hosts.index I, or --hosts.processes 1 for this one alone"
        if cluster is None:
            raise ConfigError(f"{given}: no cluster (Slurm, Open MPI, a Kubernetes job) is here to say the rest; {way}")
        try:
            address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(address, count, index, [0], None, ARRIVAL)
        except Exception as error:
            raise ConfigError(f"{cluster} started this process but does not say how to meet the others ({_line(error)}); {way}") from error
        if None in (address, count, index):
            raise ConfigError(f"{cluster} started this process but JAX cannot ask it (Kubernetes: pip install 'jax[k8s]'); {way}")
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and count >= 1 and 0 <= index < count):
        raise ConfigError(
            f"{given}: expected HOST:PORT, N >= 1 processes and an index from 0 to N - 1, and got {address}, {count}, {index}"
        )
    return address, count, index


def _start(address: str, processes: int, index: int) -> "_Watch":
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    host, _, port = address.rpartition(":")
    host = host.strip("[]")

    def late() -> None:
        print(
            f"process {index} of {processes} waited {ARRIVAL} s at {address} and not all others came; see what they say, and whether this "
            f"address is process 0's and its port can be reached",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(ARRIVAL, late)  # JAX would abort
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            address if index == 0 else f"127.0.0.1:{_forward(host, int(port))}",
            processes,
            index,
            cluster_detection_method="deactivate",
            initialization_timeout=2 * ARRIVAL,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=DEPARTURE,
        )
        client = distributed.global_state.client
        mine = socket.gethostname()
        client.key_value_set(f"lmx/host/{index}", f"{mine} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}")
        if index == 0:
            server = socket.create_server(("", 0), backlog=processes)
            server.settimeout(ARRIVAL)
            client.key_value_set("lmx/watch", str(server.getsockname()[1]))
        client.wait_at_barrier("lmx/met", ARRIVAL * 1000)
        found = {int(key.rpartition("/")[2]): value for key, value in client.key_value_dir_get("lmx/host/")}
        names = [found[i] for i in range(processes)]
        if (devices := share(names, index, _gpus(names[index].partition(" ")[2]))) is not None:
            jax.config.update("jax_cuda_visible_devices", ",".join(map(str, devices)))
        links = {}
        if index == 0:
            for _ in range(processes - 1):
                link = server.accept()[0]
                links[int(link.recv(8, socket.MSG_WAITALL))] = link
            server.close()
        else:
            links[0] = socket.create_connection((host, int(client.blocking_key_value_get("lmx/watch", ARRIVAL * 1000))), timeout=ARRIVAL)
            links[0].sendall(f"{index:8}".encode())
        return _Watch(index, [name.partition(" ")[0] for name in names], links)
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"process {index} did not meet the other {processes - 1} at {address} within {ARRIVAL} s: {_line(error)}"
        ) from error


def share(names: list[str], index: int, devices: int) -> list[int] | None:
    """Which of a host's accelerators a process takes: an even share, where several on one host see the same ones. None: all it sees.

    Args:
      names: of each process, its host and which devices it was told to see.
      devices: how many that are.
    """
    same = [i for i, name in enumerate(names) if name == names[index]]
    each = devices // len(same)
    return None if len(same) == 1 or each == 0 else list(range(same.index(index) * each, same.index(index) * each + each))


def _gpus(visible: str) -> int:
    return len(visible.split(",")) if visible else len(glob.glob("/dev/nvidia[0-9]*"))


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def _forward(host: str, port: int) -> int:
    """Opens a port of this process that leads to another's and stays open when that one dies.

    JAX's client aborts the process, from C++, as soon as its connection to process 0 closes, before anybody could say what happened. This
    one does not close: what happened is told by the watch.
    """
    server = socket.create_server(("127.0.0.1", 0))
    near_ends = []

    def copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)

    def link(near: socket.socket) -> None:
        deadline = time.monotonic() + ARRIVAL
        while True:
            try:
                far = socket.create_connection((host, port), timeout=10)
                break
            except OSError:
                if time.monotonic() > deadline:
                    return near.close()
                time.sleep(0.2)
        far.settimeout(None)
        threading.Thread(target=copy, args=(far, near), daemon=True).start()
        copy(near, far)
        far.close()

    def serve() -> None:
        while True:
            near_ends.append(server.accept()[0])
            threading.Thread(target=link, args=(near_ends[-1],), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return server.getsockname()[1]


class _Watch:
    """The connections between process 0 and each other one. A class, because it listens in the background.

    What goes over them are lines: `lost I`, `failed I CODE WHY`, `done`.
    """

    def __init__(self, index: int, names: list[str], links: dict[int, socket.socket]):
        self._index, self._names, self._links = index, names, links
        self._leaving = threading.Lock()
        for other, link in links.items():
            link.settimeout(None)
            link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 25_000}.items():
                if hasattr(socket, option):
                    link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
            threading.Thread(target=self._listen, args=(other, link), daemon=True).start()

    def _listen(self, other: int, link: socket.socket) -> None:
        word = ""
        with suppress(OSError), link.makefile(encoding="utf-8") as lines:
            for line in lines:
                word, _, rest = line.strip().partition(" ")
                if word == "lost":
                    self._lost(int(rest))
                elif word == "failed":
                    index, code, why = rest.split(" ", 2)
                    self._failed(int(index), int(code), why)
        if word != "done":
            self._lost(other)

    def _lost(self, other: int) -> None:
        line = (
            f"process {other} of {len(self._names)} (host {self._names[other]}) is gone: killed, out of memory, or its host went down. "
            f"Process {self._index} stops; --start resume goes on from the last checkpoint, with any number of processes"
        )
        self._leave(1, f"lost {other}", line)

    def _failed(self, other: int, code: int, why: str) -> None:
        # Process 0 has told its own error; of another's, which may be in a file far away, it tells again.
        line = f"process {other} of {len(self._names)} (host {self._names[other]}) stopped with an error: {why}" if self._index == 0 else ""
        self._leave(code, f"failed {other} {code} {why}", line)

    def fail(self, error: BaseException) -> None:
        """Tells an error, to people and to the other processes, and leaves."""
        if isinstance(error, SystemExit):  # its line has been printed
            code = error.code if isinstance(error.code, int) else 1
        else:
            time.sleep(GRACE)
            code = 1
            traceback.print_exception(error)
        why = _line(error.__cause__ or error)
        self._leave(code, f"failed {self._index} {code} {type(error.__cause__ or error).__name__}: {why}", "")

    def _leave(self, code: int, word: str, line: str) -> None:
        self._leaving.acquire()  # never released: who comes second waits for the end
        if line:
            print(line, file=sys.stderr, flush=True)
        self._tell(word if self._index == 0 or word.startswith("failed") else "")
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

    def _tell(self, word: str) -> None:
        for link in self._links.values() if word else ():
            with suppress(OSError):
                link.sendall(f"{word}\n".encode())

    def close(self) -> None:
        """Leaves in good order, once all have come here."""
        self._tell("done")
        distributed.global_state.client.wait_at_barrier("lmx/done", FOREVER)
        jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this is process 0, which speaks and writes for all."""
    return jax.process_index() == 0


def first[T](work: Callable[[], T]) -> T | None:
    """Process 0 works while the others wait: its value there, None elsewhere. If it fails, none goes on."""
    if jax.process_count() == 1:
        return work()
    value = work() if is_first() else None
    distributed.global_state.client.wait_at_barrier(f"lmx/turn/{next(_turns)}", FOREVER)
    return value


def largest(mesh: Mesh, value: int) -> jax.Array:
    """The largest of the values that the processes bring, as an array not waited for. Each is to ask at the same moment."""
    shards = NamedSharding(mesh, P(mesh.axis_names))
    return _maximum(mesh)(jax.make_array_from_callback((mesh.size,), shards, lambda index: np.full(1, value, np.int32)))


@cache
def _maximum(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))


def gathered(tree: Tree) -> Tree | None:
    """A tree of arrays on process 0, each whole; None elsewhere. The devices hold one whole leaf at a time, process 0's memory all."""
    if jax.process_count() == 1:
        return tree

    def whole(x: jax.Array) -> np.ndarray | None:
        x = jax.device_put(x, NamedSharding(x.sharding.mesh, P()))
        return np.asarray(x) if is_first() else None

    values = jax.tree.map(whole, tree)
    return values if is_first() else None
