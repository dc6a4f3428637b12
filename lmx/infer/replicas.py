"""Several engines behind one door: replicas on their own devices, and batches that share the stages of a pipeline.

    engines = Replicas(model, params, layout=Layout(data=2, tensor=2))
    texts = engines.generate(prompts, max_new_tokens=50)

Every step, all engines that have something to do are told to, and then waited for: replicas compute side by side. A pipeline's stages are all
at work when as many `batches` are in flight as there are stages, each an engine's with its own rows and pages, over the same weights.
"""

from collections.abc import Sequence as Several
from dataclasses import replace

import jax
import numpy as np

from lmx.core.tree import Tree
from lmx.infer.engine import Engine
from lmx.infer.jobs import GREEDY, Door, Job, Piece
from lmx.infer.pages import Statistics
from lmx.infer.places import check
from lmx.infer.sampling import Sampling
from lmx.models.config import Model
from lmx.parallel.layout import Layout


class Replicas(Door):
    """As an `Engine`; each request goes to where it will be computed first: to who has least to do, and has its beginning in pages.

    Args:
      layout: `data` replicas, each over tensor and pipeline devices.
      devices: which; this process's first by default.
      batches: engines of a replica, that share its weights.
      seed: of requests that bring none: they draw what one engine of this seed draws.
      options: those of `Engine`, of each: rows and pages are one engine's.

    Raises:
      ValueError: as `Engine`.
    """

    def __init__(
        self,
        model: Model,
        params: Tree,
        *,
        layout: Layout = Layout(),
        devices: Several[jax.Device] | None = None,
        batches: int = 1,
        seed: int = 0,
        **options,
    ):
        model = getattr(model, "config", model)
        devices = jax.local_devices() if devices is None else devices
        check(model, layout, len(devices))
        if batches < 1:
            raise ValueError(f"batches={batches} must be at least 1")
        one = replace(layout, data=1)
        self.engines: list[Engine] = []
        for first in range(0, layout.devices, one.devices):
            own = list(devices[first : first + one.devices])
            for batch in range(batches):
                sharing = self.engines[-1] if batch else None
                self.engines.append(Engine(model, params, layout=one, devices=own, sharing=sharing, **options))
        self._seeds = np.random.default_rng(seed)

    def submit(self, prompt: Several[int] | str, *, sampling: Sampling = GREEDY, **wishes) -> Job:
        """As `Engine.submit`."""
        ids = self.engines[0].read(prompt)
        engine = min(self.engines, key=lambda engine: engine.cost(ids))
        if sampling.seed is None:
            sampling = replace(sampling, seed=int(self._seeds.integers(2**32)))
        return engine.submit(ids, sampling=sampling, **wishes)

    @property
    def busy(self) -> bool:
        """Whether anything runs or waits."""
        return any(engine.busy for engine in self.engines)

    @property
    def statistics(self) -> list[Statistics | None]:
        """Of each engine's pages."""
        return [engine.statistics for engine in self.engines]

    def step(self) -> list[Piece]:
        """One step of every engine that has something to do."""
        begun = [(engine, engine.begin()) for engine in self.engines if engine.busy]
        return [piece for engine, step in begun for piece in engine.finish(step)]

    def cancel(self, job: Job) -> None:
        """As `Engine.cancel`."""
        for engine in self.engines:
            if engine.holds(job):
                engine.cancel(job)

    def update(self, params: Tree) -> None:
        """As `Engine.update`."""
        for engine in self.engines:
            engine.update(params)

    def warm_up(self) -> None:
        """As `Engine.warm_up`."""
        for engine in self.engines:
            engine.warm_up()
