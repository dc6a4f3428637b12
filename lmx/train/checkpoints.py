"""Checkpoints with Orbax: asynchronous, atomic, sharded, restored on any mesh; the data position beside the state."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from lmx.core.tree import Tree, named_leaves
from lmx.parallel.offload import copied
from lmx.train.state import TrainState


@dataclass(frozen=True)
class Checkpoints:
    """When the state is saved and what is kept."""

    every: int = 200
    """Steps between checkpoints; the last step and an interruption are saved too. 0: only those."""
    keep: int = 2
    """How many of the newest stay."""
    best: bool = True
    """Whether the one with the lowest validation loss stays as well."""
    period: int = 0
    """Every checkpoint at a multiple of this many steps stays too. 0: none."""


class Manager:
    """The checkpoints of one run folder. A class, because writing goes on in the background.

    Use it as a context manager: leaving it waits for what is being written.
    """

    def __init__(self, folder: Path, policy: Checkpoints):
        keep = [managers.LatestN(max(policy.keep, 1))]
        if policy.best:
            # `reverse` keeps the smallest; a checkpoint without a validation loss is never the best.
            keep.append(managers.BestN(get_metric_fn=lambda m: m["loss"], reverse=True, n=1, keep_checkpoints_without_metrics=False))
        if policy.period:
            keep.append(managers.EveryNSteps(policy.period))
        options = ocp.CheckpointManagerOptions(preservation_policy=managers.AnyPreservationPolicy(keep))
        self.folder = folder
        handlers = {"state": ocp.StandardCheckpointHandler(), "position": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers)

    def __enter__(self) -> "Manager":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Steps of all complete checkpoints."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, position: dict[str, Any], loss: float | None = None) -> None:
        """Begins to write; returns once the state is copied, so it may be donated at once. A step already saved is left alone.

        Args:
          position: where the data stands, JSON-able.
          loss: validation loss of this very state, when it is known.
        """
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(copied(state)), position=ocp.args.JsonSave(position))
        self._manager.save(step, args=args, metrics=None if loss is None else {"loss": loss}, force=True)

    def wait(self) -> None:
        """Until everything is written."""
        self._manager.wait_until_finished()

    def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """The state of a step (the newest when None) in the shapes, types and shardings of `abstract`, and the data position.

        Raises:
          ValueError: one line: no such checkpoint, one that cannot be read, or one of another model.
        """
        step = self.latest if step is None else step
        if step not in self.steps:
            raise ValueError(
                f"{self.folder} has no checkpoint{'' if step is None else f' of step {step}'}; complete ones: {self.steps or 'none'}"
            )
        self._check(step, abstract)
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore())
            restored = self._manager.restore(step, args=args)
        except Exception as error:
            raise ValueError(_corrupt(self.folder, step, error)) from error
        return restored.state, restored.position

    def _check(self, step: int, abstract: TrainState) -> None:
        """Compares names and shapes with what is on disk, so that the error can speak of the model."""
        try:
            metadata = self._manager.item_metadata(step).state.tree
            on_disk = {name: tuple(leaf.shape) for name, leaf in named_leaves(metadata, is_leaf=lambda x: hasattr(x, "shape")).items()}
        except Exception as error:
            raise ValueError(_corrupt(self.folder, step, error)) from error
        wanted = {name: tuple(leaf.shape) for name, leaf in named_leaves(abstract).items()}
        del wanted["key"], on_disk["key"]  # a typed key is stored as its numbers
        for name in [*wanted, *on_disk]:
            if wanted.get(name) != on_disk.get(name):
                there, here = on_disk.get(name, "missing"), wanted.get(name, "missing")
                hint = "the tokenizer or model.vocab changed" if "embed" in name.split("/")[-1:] else "model.* or the optimizer changed"
                raise ValueError(f"checkpoint {self.folder}/{step} is of another run: {name} is {there} there and {here} here; {hint}")


def load_params(folder: Path, abstract: Tree, step: int | None = None) -> Tree:
    """The parameters alone, from a checkpoint folder, in the shapes and shardings of `abstract`."""
    with ocp.CheckpointManager(folder.absolute()) as manager:
        step = manager.latest_step() if step is None else step
        if step not in manager.all_steps():
            raise ValueError(f"{folder} has no checkpoint{'' if step is None else f' of step {step}'}")
        target = {"params": abstract}
        args = ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True)
        return manager.restore(step, args=ocp.args.Composite(state=args)).state["params"]


def _corrupt(folder: Path, step: int, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return f"checkpoint {folder}/{step} cannot be read ({reason}); delete that folder to resume from an older one"
