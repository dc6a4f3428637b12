"""What is to be predicted: losses as sums with weights.

An objective has two parts, so that a pipeline can run its stages between them: `inputs(microbatch)`, what the forward reads, and
`loss(params, hidden, microbatch)`, a sum. Sums of microbatches add up to exactly the batch's, whatever the grouping.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from lmx.core.execution import Execution
from lmx.core.tree import Tree
from lmx.models.config import Model
from lmx.models.experts import Aux
from lmx.models.losses import cross_entropy
from lmx.models.transformer import Source

Batch = dict[str, Array]


@dataclass(frozen=True)
class CausalLM:
    """Predict each next token."""

    causal: ClassVar[bool] = True
    """Whether it is for models whose tokens see only what came before them."""

    z_loss: float = 0.0
    """Weight of log(Z)^2, which keeps logits from drifting (PaLM uses 1e-4)."""
    balance_loss: float = 0.01
    """Weight of each mixture's balance loss, which spreads the tokens of a sequence over the experts (Switch uses 0.01)."""
    router_z_loss: float = 0.0
    """Weight of each mixture's log(Z)^2 of the router (ST-MoE uses 1e-3)."""

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """The weight sum of a batch, known from the data before anything is computed."""
        return batch["weights"].sum()

    def inputs(self, microbatch: Batch) -> dict[str, Array]:
        """Arguments of the model's forward: what of them the batch has."""
        names = ("tokens", "positions", "segments", "prefix", "block_positions", "token_types")
        return {name: microbatch[name] for name in names if name in microbatch}

    def loss(
        self, params: Tree, config: Model, hidden: Float[Array, "batch length embed"], microbatch: Batch, execution: Execution
    ) -> tuple[Float[Array, ""], Tree]:
        """The loss summed over supervised tokens (nats), and metrics as sums."""
        return cross_entropy(params, config, hidden, microbatch["targets"], microbatch["weights"], z_loss=self.z_loss, execution=execution)

    def auxiliary(self, config: Model, aux: Aux, microbatch: Batch) -> tuple[Float[Array, ""], Tree]:
        """What layers add to the loss, and metrics (means over mixtures), as sums.

        A row's auxiliary value counts as often as the row has supervised tokens: these too are sums over rows, whatever the grouping, and
        divided by the weight sum of the batch they are weighted means over its rows.
        """
        rows = microbatch["weights"].sum(-1)
        sums = {name: jnp.sum(rows * value) for name, value in aux.items()}
        if not sums:
            return jnp.zeros((), rows.dtype), {}
        loss = self.balance_loss * sums["balance"] + self.router_z_loss * sums["router_z"]
        return loss, {name: jax.lax.stop_gradient(value) / config.mixtures for name, value in sums.items()}


@dataclass(frozen=True)
class MaskedLM(CausalLM):
    """Predict what stood in the place of each token that was masked or replaced (BERT, Devlin et al., 2019): `tokens` are what the model
    sees, `targets` the text, and `weights` are above 0 where a token is to be predicted."""

    causal: ClassVar[bool] = False


class Seq2Seq(CausalLM):
    """Predict each next token of a target, given a source that an encoder reads.

    A batch has `tokens`, `positions` and `segments` of sources, and `decoder_tokens`, `decoder_positions`, `decoder_segments`, `targets` and
    `weights` of targets. A target sees the source whose segment in the same row has its number, so pairs may be packed.
    """

    def inputs(self, microbatch: Batch) -> dict[str, Array | Source]:
        """Arguments of `transformer.forward`."""
        names = ("tokens", "positions", "segments")
        target = {name: microbatch.get(f"decoder_{name}") for name in names}
        return target | {"source": Source(**{name: microbatch.get(name) for name in names})}


Objective = CausalLM | MaskedLM | Seq2Seq
