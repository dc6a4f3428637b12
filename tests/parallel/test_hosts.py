"""Several real processes on one machine: the same run as one process, and what happens when one is told to stop or killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lmx.core.config import ConfigError
from lmx.parallel.hosts import Hosts, settle, share
from lmx.train.logging import read_metrics

SENTENCES = ["To be, or not to be, that is the question:", "If music be the food of love, play on;", "Friends, Romans, countrymen,"]
SMALL = "--model.layers 1 --model.embed 32 --model.heads 4 --model.mlp 64 --model.dropout 0.1 --data.length 32 --data.tokenizer bytes"
PACE = "--optimizer SGD --optimizer.schedule.warmup 0 --batch 16 --log-every 1 --evaluation.batches 2 --samples.tokens 8"
LAYOUT = "--layout.fsdp 2 --layout.tensor 4"  # of four processes, two bring the same rows
STEPS = 20
BARE = ("--samples.prompt", "", "--evaluation.every", "0", "--data.validation", "")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "train").mkdir()
    for i in range(12):
        (folder / "train" / f"{i:02}.txt").write_text("\n".join(SENTENCES[(i * j + j) % 3] for j in range(3 + 2 * i)))
    (folder / "held_out.txt").write_text("\n".join(reversed(SENTENCES * 4)))
    return folder


@pytest.fixture(scope="module")
def launch(root, text, tmp_path_factory):
    """A function that starts one experiment by several processes, of eight devices in all; those still there at the end are killed."""
    started: list[subprocess.Popen] = []
    runs = tmp_path_factory.mktemp("runs")

    def start(
        name: str,
        processes: int,
        *more: str,
        environments: list[dict[str, str]] | None = None,
        last: tuple[str, ...] = (),  # what is only said to the last process
    ) -> list[subprocess.Popen]:
        port, found = free_port(), []
        for index in range(processes):
            where = ["--hosts.coordinator", f"127.0.0.1:{port}", "--hosts.processes", str(processes), "--hosts.index", str(index)]
            files = ["--folder", str(runs), "--name", name, "--data.cache", str(text / "cache")]
            files += ["--data.train", str(text / "train"), "--data.validation", str(text / "held_out.txt")]
            options = f"{SMALL} {PACE} {LAYOUT} --steps {STEPS}".split()
            command = [sys.executable, "-m", "experiments.shakespeare", *options, *files, *more]
            command += where if processes > 1 and environments is None else []
            command += last if index == processes - 1 else ()
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(8 // processes),
                "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
                "XLA_FLAGS": "--xla_backend_optimization_level=0",  # on a CPU only process 0 finds its programs in the cache
            }
            environment |= environments[index] if environments else {}
            output = (runs / f"{name}.{len(started)}.log").open("w+")
            found.append(subprocess.Popen(command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT))
            found[-1].log = output
            started.append(found[-1])
        return found

    start.runs = runs
    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.log.close()


@pytest.fixture(scope="module")
def whole(launch) -> Path:
    """The folder of a run by one process."""
    finish_well(launch("whole", 1))
    return launch.runs / "whole"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def output(process: subprocess.Popen) -> str:
    process.log.seek(0)
    return process.log.read()


def finish(processes: list[subprocess.Popen], within: float = 100) -> list[int]:
    """Exit codes, once all have left."""
    deadline = time.monotonic() + within
    return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in processes]


def finish_well(processes: list[subprocess.Popen]) -> None:
    assert finish(processes) == [0] * len(processes), "\n".join(map(output, processes))


def losses(folder: Path) -> dict[tuple[int, str], float]:
    return {(line["step"], line["split"]): line["loss"] for line in read_metrics(folder)}


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    np.testing.assert_allclose(list(a.values()), [b[key] for key in a], rtol=1e-5)


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def wait_for(step: int, folder: Path, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 100
    while not ((folder / "metrics.jsonl").exists() and any(line["step"] >= step for line in read_metrics(folder))):
        going = time.monotonic() < deadline and all(process.poll() is None for process in processes)
        assert going, "\n".join(map(output, processes))
        time.sleep(0.05)


def slurm(processes: int) -> list[dict[str, str]]:
    """What Slurm would tell the tasks of a job step on this machine."""
    job = {"JOB_ID": "1", "STEP_NODELIST": "localhost", "NTASKS": str(processes)}
    port = str(free_port())
    tasks = [job | {"PROCID": str(index), "LOCALID": str(index)} for index in range(processes)]
    return [{f"SLURM_{name}": value for name, value in task.items()} | {"JAX_COORDINATOR_PORT": port} for task in tasks]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_train_the_losses_of_one(launch, whole, processes):
    several = launch(f"by{processes}", processes, environments=slurm(processes) if processes == 2 else None)
    finish_well(several)
    folder = launch.runs / f"by{processes}"
    assert len(losses(folder)) == STEPS + 1  # and one of the held-out text
    same(losses(folder), losses(whole))
    assert (folder / "samples.txt").read_text() == (whole / "samples.txt").read_text()
    assert f"step {STEPS}" in output(several[0])
    assert all("step" not in output(other) and "ROMEO" not in output(other) for other in several[1:])


@pytest.mark.slow
def test_a_killed_process_is_named_and_the_run_goes_on_with_another_number(launch, whole):
    often = ("--checkpoints.every", "3", *BARE)
    cut, folder = launch("cut", 4, *often), launch.runs / "cut"
    wait_for(8, folder, cut)
    kill(cut, 2)
    assert 3 <= steps_saved(folder)[-1] < STEPS
    finish_well(launch("cut", 2, *often, "--start", "resume"))
    same(losses(folder), {(step, split): loss for (step, split), loss in losses(whole).items() if split == "train"})


@pytest.mark.slow
def test_the_loss_of_process_0_is_noticed_too(launch):
    cut = launch("beheaded", 2, "--steps", "2000", *BARE)
    wait_for(3, launch.runs / "beheaded", cut)
    kill(cut, 0)


def kill(processes: list[subprocess.Popen], victim: int) -> None:
    """Kills one, and checks that the others leave within a minute and say which one is gone."""
    processes[victim].kill()
    others = [process for process in processes if process is not processes[victim]]
    assert finish(others, within=60) == [1] * len(others), "\n".join(map(output, processes))
    for process in others:
        assert f"process {victim} of {len(processes)} (host {socket.gethostname()}) is gone" in output(process).splitlines()[-1]
        assert "Check failure" not in output(process)  # JAX's own way to go


@pytest.mark.slow
def test_sigterm_to_one_process_makes_all_save_the_same_step_and_leave(launch):
    processes, folder = (
        launch("stopped", 2, "--steps", "2000", "--checkpoints.every", "0", *BARE),
        launch.runs / "stopped",
    )
    wait_for(4, folder, processes)
    processes[1].send_signal(signal.SIGTERM)
    assert finish(processes) == [128 + signal.SIGTERM] * 2, "\n".join(map(output, processes))
    last = max(step for step, _ in losses(folder))
    assert last < 2000
    assert steps_saved(folder) == [last]
    assert f"SIGTERM: saved step {last}" in output(processes[0])


@pytest.mark.slow
def test_a_wrong_knob_stops_all_processes_with_one_line(launch):
    wrong = launch("wrong", 2, "--layout.fsdp", "3")
    assert finish(wrong) == [2, 2], "\n".join(map(output, wrong))
    assert "the layout needs 12 devices (fsdp 3 x tensor 4) but 8 are here" in output(wrong[0])
    assert "Traceback" not in output(wrong[0]) + output(wrong[1])


@pytest.mark.slow
def test_an_error_of_one_process_stops_all_and_process_0_says_whose_it_was(launch):
    wrong = launch("astray", 2, last=("--data.train", "/nowhere"))
    assert finish(wrong) == [2, 2], "\n".join(map(output, wrong))
    assert output(wrong[1]).startswith("data.train='/nowhere' does not exist")
    assert f"process 1 of 2 (host {socket.gethostname()}) stopped with an error: FileNotFoundError" in output(wrong[0])
    assert "Traceback" not in output(wrong[0]) + output(wrong[1])


@pytest.fixture
def no_cluster(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "JOB_COMPLETION"))]:
        monkeypatch.delenv(name)


def test_who_belongs_to_a_run_is_asked_of_the_cluster_or_given(no_cluster, monkeypatch):
    assert settle(Hosts()) == ("", 1, 0)
    assert settle(Hosts("node1:1234", 3, 2)) == ("node1:1234", 3, 2)
    slurm = {"JOB_ID": "5", "STEP_NODELIST": "node[07-09],other", "NTASKS": "3", "PROCID": "1", "LOCALID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert settle(Hosts()) == ("node07:61445", 3, 1)
    assert settle(Hosts(processes=1)) == ("", 1, 0)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert settle(Hosts())[1:] == (1, 0)


def test_open_mpi_is_asked_too(no_cluster, monkeypatch):
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911")
    for name, value in {"SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    monkeypatch.setenv("OMPI_VERSION", "4.1.5")
    address, processes, index = settle(Hosts())
    assert address.startswith("10.96.0.1:")
    assert (processes, index) == (4, 3)


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        (Hosts("node1:1234", 3), r"hosts\.index=-1.*no cluster.*--hosts\.index I"),
        (Hosts("node1", 3, 2), r"hosts\.coordinator='node1'.*expected HOST:PORT"),
        (Hosts("node1:1234", 3, 3), r"index from 0 to N - 1, and got node1:1234, 3, 3"),
    ],
)
def test_half_an_answer_is_refused(no_cluster, hosts, message):
    with pytest.raises(ConfigError, match=message):
        settle(hosts)


def test_a_cluster_that_cannot_be_asked_says_what_to_give_instead(no_cluster, monkeypatch):
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    with pytest.raises(ConfigError, match=r"a Kubernetes job started this process.*--hosts\.processes 1"):
        settle(Hosts())


def test_processes_of_one_host_share_its_accelerators_out():
    assert share(["a ", "b "], 0, 8) is None
    assert [share(["a ", "a ", "b ", "b "], i, 8) for i in range(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3], [4, 5, 6, 7]]
    assert share(["a 0", "a 1"], 1, 1) is None
    assert share(["a 0", "a 0"], 1, 1) is None
    assert share(["a ", "a "], 1, 0) is None
