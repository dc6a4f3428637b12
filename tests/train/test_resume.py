"""A run that is cut off goes on as if nothing had happened."""

import dataclasses
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lmx.core.tree import disagreement
from lmx.data.pipeline import batch_hash
from lmx.parallel.layout import Layout
from lmx.train import loop
from lmx.train.checkpoints import Checkpoints, Manager
from lmx.train.logging import read_metrics
from lmx.train.optimizers import SGD, AdamW, Schedule

SMALL = "--model.layers 2 --model.embed 32 --model.heads 2 --model.mlp 64 --model.dropout 0.1 --data.length 32 --data.tokenizer bytes"
PACE = "--steps 240 --batch 8 --log-every 1 --checkpoints.every 4 --evaluation.every 80 --evaluation.batches 2 --samples.tokens 8"


def command(folder: Path, text: Path, *more: str) -> list[str]:
    """The main experiment on a tiny text and model, through its own door."""
    where = ["--folder", str(folder), "--data.train", str(text / "train"), "--data.validation", str(text / "held_out.txt")]
    return [
        sys.executable,
        "-m",
        "experiments.shakespeare",
        *SMALL.split(),
        *PACE.split(),
        *where,
        "--data.cache",
        str(text / "cache"),
        *more,
    ]


def environment() -> dict[str, str]:
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }


def losses(folder: Path) -> list[tuple[int, str, float]]:
    return [(line["step"], line["split"], line["loss"]) for line in read_metrics(folder)]


def file_hashes(folder: Path) -> str:
    """A hash of the last checkpoint's arrays, read back."""
    import orbax.checkpoint as ocp

    steps = sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    with ocp.StandardCheckpointer() as reader:
        state = reader.restore((folder / "checkpoints" / str(steps[-1]) / "state").absolute())
    digest = hashlib.sha256(str(steps[-1]).encode())
    for leaf in jax.tree.leaves(state):
        leaf = jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


@pytest.mark.slow
def test_killed_five_times_at_random_moments_and_still_bit_identical(root, text, tmp_path):
    subprocess.run(command(tmp_path / "whole", text), cwd=root, env=environment(), check=True, capture_output=True)
    folder, chance = tmp_path / "cut" / "shakespeare", random.Random(time.time_ns())
    kills = 0
    while kills < 5:
        process = subprocess.Popen(
            command(tmp_path / "cut", text, "--start", "resume" if (folder / "experiment.json").exists() else "new"),
            cwd=root, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        deadline, began = time.monotonic() + 120, len(read_metrics(folder)) if (folder / "metrics.jsonl").exists() else 0
        while time.monotonic() < deadline and process.poll() is None:  # a kill before training has begun would prove little
            if (folder / "metrics.jsonl").exists() and len(read_metrics(folder)) > began + 1:
                break
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.25))
        if process.poll() is None:
            process.kill()
            kills += 1
        error = process.communicate()[1].decode()
        assert process.returncode in (-signal.SIGKILL, 0), error
        if process.returncode == 0:
            break
    assert kills == 5, "the run was over before it was cut off five times; make it longer"
    finish = subprocess.run(
        command(tmp_path / "cut", text, "--start", "resume"), cwd=root, env=environment(), capture_output=True, text=True
    )
    assert finish.returncode == 0, finish.stderr
    assert losses(folder) == losses(tmp_path / "whole" / "shakespeare")
    assert file_hashes(folder) == file_hashes(tmp_path / "whole" / "shakespeare")


def test_sigterm_saves_leaves_with_its_code_and_the_run_goes_on(root, text, tmp_path):
    # Slowed down by a big batch, so that the signal comes before the end.
    slow = ("--batch", "64", "--checkpoints.every", "0", "--steps", "400", "--evaluation.every", "0")
    folder = tmp_path / "runs" / "shakespeare"
    process = subprocess.Popen(command(tmp_path / "runs", text, *slow), cwd=root, env=environment(), stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not ((folder / "metrics.jsonl").exists() and len(read_metrics(folder)) > 3):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM: saved step" in output
    last = losses(folder)[-1][0]
    assert f"saved step {last}" in output
    assert [p.name for p in (folder / "checkpoints").iterdir() if p.name.isdigit()] == [str(last)]
    assert (folder / "curve.png").exists()
    end = ("--steps", str(last + 2))
    subprocess.run(
        command(tmp_path / "runs", text, *slow, *end, "--start", "resume"), cwd=root, env=environment(), check=True, capture_output=True
    )
    assert [step for step, split, _ in losses(folder) if split == "train"] == list(range(1, last + 3))


@pytest.fixture
def hashed(monkeypatch):
    """The hash of every batch that the loop feeds."""
    found = []

    def watched(batch, *rest):
        if len(rest[1]) == 2:  # training, not evaluation
            order = np.argsort(batch["example_id"])
            found.append(batch_hash({name: a[order] for name, a in batch.items()}))
        return place(batch, *rest)

    place = loop.place
    monkeypatch.setattr(loop, "place", watched)
    return found


LAYOUTS = [
    Layout(data=4),
    Layout(fsdp=4, tensor=2),
    Layout(tensor=4, remat="full"),
    Layout(fsdp=2, remat="full", offload=("optimizer", "params")),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["data=4", "fsdp=4 tensor=2", "tensor=4", "fsdp=2 offload"])
def test_on_another_mesh_every_later_batch_is_equal_and_the_state_within_a_bound(layout, experiment, hashed):
    gentle = SGD(learning_rate=0.1, schedule=Schedule(kind="constant", warmup=0))
    whole = loop.run(loop.prepare_run(experiment(name="whole", optimizer=gentle)))
    expected = list(hashed)
    hashed.clear()
    loop.run(loop.prepare_run(experiment(name="cut", optimizer=gentle, steps=3)))
    resumed = loop.run(loop.prepare_run(experiment(name="cut", optimizer=gentle, layout=layout, start="resume")))
    assert hashed == expected
    assert len(set(hashed)) == len(hashed) == 6
    assert max(disagreement(resumed.state.params, whole.state.params).values()) < 1e-5
    assert jax.tree.leaves(resumed.state.params)[0].sharding.mesh.shape["tensor"] == layout.tensor


def test_with_ordered_reductions_parameters_are_hash_equal_for_any_number_of_data_shards(experiment):
    adam = AdamW(learning_rate=3e-3, schedule=Schedule(kind="constant", warmup=0))
    states = []
    for shards in (1, 2, 4, 8):
        result = loop.run(
            loop.prepare_run(experiment(name=f"over{shards}", optimizer=adam, layout=Layout(data=shards, ordered=8), steps=3))
        )
        states.append(
            (np.concatenate([np.asarray(a).ravel() for a in jax.tree.leaves(result.state.params)]).tobytes(), result.metrics["loss"])
        )
    assert len(set(states)) == 1


def test_what_is_kept_is_the_newest_the_best_and_each_period(experiment, tmp_path):
    start = loop.prepare_run(experiment())
    state = start.program.initial()
    policy = Checkpoints(keep=2, best=True, period=10)
    with Manager(tmp_path / "checkpoints", policy) as manager:
        for step, loss in [(1, 5.0), (2, 1.0), (3, 4.0), (10, 3.0), (11, None), (12, 2.0), (13, None)]:
            manager.save(step, state, {"example": step}, loss)
        manager.wait()
        assert manager.steps == [2, 10, 12, 13]
        restored, position = manager.restore(start.program.abstract, 10)
    assert position == {"example": 10}
    assert all(
        (np.asarray(a) == np.asarray(b)).all() for a, b in zip(jax.tree.leaves(restored.params), jax.tree.leaves(state.params), strict=True)
    )


def test_resuming_refuses_another_experiment_by_the_names_of_what_changed(experiment):
    loop.run(loop.prepare_run(experiment(steps=2)))
    model = dataclasses.replace(experiment().model, dropout=0.0)
    with pytest.raises(ValueError, match=r"model\.dropout was 0\.1 and is now 0\.0"):
        loop.prepare_run(experiment(steps=2, model=model, start="resume"))
    with pytest.raises(ValueError, match=r"seed was 0 and is now 1"):
        loop.prepare_run(experiment(seed=1, start="resume"))
    loop.prepare_run(experiment(steps=9, log_every=3, layout=Layout(data=2), start="resume"))


def test_resuming_refuses_text_whose_content_has_changed(experiment, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(experiment().data.train, copy)
    data = dataclasses.replace(experiment().data, train=str(copy))
    loop.run(loop.prepare_run(experiment(data=data, steps=1)))
    (copy / "00.txt").write_text("another text\n")
    with pytest.raises(ValueError, match="another train"):
        loop.prepare_run(experiment(data=data, start="resume"))
