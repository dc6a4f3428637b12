"""Optimizers as recipes: a frozen config each, from which an optax transformation is built."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import jax
import optax

from lmx.core.params import is_spec
from lmx.core.tree import Tree
from lmx.train import factored, orthogonal, quantised


@dataclass(frozen=True)
class Schedule:
    """The learning rate over the steps of a run: up, perhaps along, and down."""

    kind: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """After the warm-up: down a cosine, flat and then down a line (warmup-stable-decay), down a line, or flat."""
    warmup: int = 100
    """Steps over which the rate rises from 0."""
    final: float = 0.1
    """The last rate, as a share of the peak (cosine, wsd, linear)."""
    decay: float = 0.2
    """Share of the run's steps in which wsd falls."""

    def rate(self, peak: float, steps: int) -> Callable:
        """The learning rate as a function of the step, for a run of `steps`."""
        rest = max(steps - self.warmup, 1)
        fall = max(round(self.decay * steps), 1)
        after = {
            "constant": optax.constant_schedule(peak),
            "linear": optax.linear_schedule(peak, self.final * peak, rest),
            "cosine": optax.cosine_decay_schedule(peak, rest, self.final),
            "wsd": optax.linear_schedule(peak, self.final * peak, fall, max(rest - fall, 0)),
        }[self.kind]
        return optax.join_schedules([optax.linear_schedule(0.0, peak, self.warmup), after], [self.warmup]) if self.warmup else after


@dataclass(frozen=True)
class Recipe:
    """What all optimizers share."""

    learning_rate: float = 1e-3
    """The peak learning rate."""
    schedule: Schedule = field(default_factory=Schedule)
    """How it changes over the run."""
    weight_decay: float = 0.1
    """Decoupled weight decay, of weights only: not of biases, norm scales or position tables."""
    clip: float = 1.0
    """Gradients are scaled down to this global norm. 0: never."""


@dataclass(frozen=True)
class AdamW(Recipe):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019)."""

    b1: float = 0.9
    """Decay of the mean of gradients."""
    b2: float = 0.95
    """Decay of the mean of squared gradients."""
    epsilon: float = 1e-8
    """Added to the root of the latter."""

    def update(self, rate: Callable, specs: Tree) -> optax.GradientTransformation:
        return optax.adamw(rate, self.b1, self.b2, self.epsilon, weight_decay=self.weight_decay, mask=decayed(specs))


@dataclass(frozen=True)
class Adam8bit(AdamW):
    """AdamW with moments in eight bits each (Dettmers et al., 2022), but for small parameters."""

    def update(self, rate: Callable, specs: Tree) -> optax.GradientTransformation:
        tiles = jax.tree.map(lambda spec: quantised.tile(spec) or optax.MaskedNode(), specs, is_leaf=is_spec)
        labels = jax.tree.map(lambda spec: "eight" if quantised.tile(spec) else "full", specs, is_leaf=is_spec)
        moments = (self.b1, self.b2, self.epsilon)
        return optax.chain(
            optax.partition({"eight": quantised.scale_by_adam(*moments, tiles), "full": optax.scale_by_adam(*moments)}, labels),
            optax.add_decayed_weights(self.weight_decay, decayed(specs)),
            optax.scale_by_learning_rate(rate),
        )


@dataclass(frozen=True)
class Adafactor(Recipe):
    """Adafactor (Shazeer and Stern, 2018): second moments as row and column means, no first moment."""

    def update(self, rate: Callable, specs: Tree) -> optax.GradientTransformation:
        return optax.chain(
            factored.scale_by_factored_rms(specs),
            factored.clip_by_matrix_rms(specs, 1.0),
            optax.add_decayed_weights(self.weight_decay, decayed(specs)),
            optax.scale_by_learning_rate(rate),
        )


@dataclass(frozen=True)
class Lion(Recipe):
    """Lion (Chen et al., 2023): the sign of a momentum; learning rates about a third to a tenth of Adam's."""

    learning_rate: float = 2e-4
    """The peak learning rate."""
    b1: float = 0.9
    """Weight of the momentum in the update."""
    b2: float = 0.99
    """Decay of the momentum."""

    def update(self, rate: Callable, specs: Tree) -> optax.GradientTransformation:
        return optax.lion(rate, self.b1, self.b2, weight_decay=self.weight_decay, mask=decayed(specs))


@dataclass(frozen=True)
class Muon(Recipe):
    """Muon (Jordan et al., 2024): orthogonalised momentum for the layers' weight matrices, scaled to AdamW's size of step (Liu et al.,
    2025) so that learning rates carry over; AdamW for everything else."""

    b1: float = 0.9
    """AdamW's decay of the mean of gradients."""
    b2: float = 0.95
    """AdamW's decay of the mean of squared gradients."""
    momentum: float = 0.95
    """Decay of Muon's momentum (Nesterov's form)."""

    def update(self, rate: Callable, specs: Tree) -> optax.GradientTransformation:
        labels = jax.tree.map(lambda spec: "muon" if orthogonal.is_matrix(spec) else "adam", specs, is_leaf=is_spec)
        matrices = jax.tree.map(lambda spec: spec if orthogonal.is_matrix(spec) else optax.MaskedNode(), specs, is_leaf=is_spec)
        muon = orthogonal.scale_by_muon(matrices, self.momentum)
        return optax.chain(
            optax.partition({"muon": muon, "adam": optax.scale_by_adam(self.b1, self.b2)}, labels),
            optax.add_decayed_weights(self.weight_decay, decayed(specs)),
            optax.scale_by_learning_rate(rate),
        )


@dataclass(frozen=True)
class SGD(Recipe):
    """Stochastic gradient descent with momentum."""

    learning_rate: float = 0.1
    """The peak learning rate."""
    weight_decay: float = 0.0
    """Weight decay, added to the gradient of weights."""
    momentum: float = 0.9
    """Decay of the momentum. 0: plain descent."""

    def update(self, rate: Callable, specs: Tree) -> optax.GradientTransformation:
        return optax.chain(optax.add_decayed_weights(self.weight_decay, decayed(specs)), optax.sgd(rate, self.momentum or None))


Optimizer = AdamW | Adam8bit | Adafactor | Lion | Muon | SGD


def build(recipe: Optimizer, steps: int, specs: Tree) -> tuple[optax.GradientTransformation, Callable]:
    """The transformation of gradients (clipping left to the step, which reports the norm anyway), and the learning rate by step."""
    rate = recipe.schedule.rate(recipe.learning_rate, steps)
    return recipe.update(rate, specs), rate


def check(recipe: Optimizer) -> None:
    """Refuses numbers that no optimizer has, with one line that names the knob. Raises ValueError."""
    schedule = recipe.schedule
    least = {"learning_rate": recipe.learning_rate, "weight_decay": recipe.weight_decay, "clip": recipe.clip}
    least |= {"schedule.warmup": schedule.warmup, "schedule.final": schedule.final, "epsilon": getattr(recipe, "epsilon", 0.0)}
    for knob, value in least.items():
        if not value >= 0:
            raise ValueError(f"optimizer.{knob}={value} must be at least 0")
    shares = {knob: getattr(recipe, knob, 0.0) for knob in ("b1", "b2", "momentum")}
    for knob, value in shares.items():
        if not 0 <= value < 1:
            raise ValueError(f"optimizer.{knob}={value} must be at least 0 and below 1")
    if not 0 <= schedule.decay <= 1:
        raise ValueError(f"optimizer.schedule.decay={schedule.decay} is a share of the run's steps: at least 0 and at most 1")


def decayed(specs: Tree) -> Tree:
    """Which parameters weight decay applies to: tables and matrices, told from vectors by their dimensions beside `layers`."""
    return jax.tree.map(lambda spec: spec.inputs > 0 or "vocab" in spec.axes, specs, is_leaf=is_spec)
