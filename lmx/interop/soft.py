"""Inputs of a model with virtual tokens, as PEFT makes them."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from lmx.interop.checkpoint import Model
from lmx.interop.outputs import IGNORED

BEFORE = {"input_ids": 0, "attention_mask": 1, "token_type_ids": 0, "labels": IGNORED}
"""What stands in each input for a virtual token."""


def behind(inputs: Mapping[str, Any], count: int) -> Mapping[str, Any]:
    """Inputs with so many virtual tokens before each row."""
    if not count:
        return inputs
    arrays = {name: None if value is None else jnp.asarray(value) for name, value in inputs.items()}

    def longer(name: str, a: Array | None) -> Array | None:
        if a is None or name not in BEFORE or a.shape != arrays["input_ids"].shape:
            return a
        return jnp.pad(a, ((0, 0), (count, 0)), constant_values=BEFORE[name])

    return {name: longer(name, a) for name, a in arrays.items()}


def positions(model: Model, inputs: Mapping[str, Any], mask: Array | None, prompt: int, prefix: int) -> Array:
    """Positions behind `prefix` virtual tokens that are no tokens, and among `prompt` that are.

    Where none are given they are what the peer takes by itself: places in the row, padding counted, but for models that count the mask (OPT,
    and those with ALiBi) or that tell padding by its token (RoBERTa, which sees no tokens where it is given embeddings).

    Raises:
      ValueError: positions that are given with virtual tokens that are tokens: PEFT ignores them.
    """
    config, tokens, said = model.config, jnp.asarray(inputs["input_ids"]), inputs.get("position_ids")
    if said is not None and prompt:
        raise ValueError("a model with virtual tokens before each text takes no position_ids: PEFT ignores them")
    if said is not None:
        return prefix + jnp.asarray(said) - (config.first_position if model.table.pads_uncounted else 0)
    if model.table.pads_uncounted and not prompt:
        real = tokens != config.first_position - 1
        return prefix + jnp.where(real, jnp.cumsum(real, -1), 0) - 1
    if (config.positions == "alibi" or model.family == "opt") and mask is not None:
        return prefix + jnp.maximum(jnp.cumsum(mask, -1) - 1, 0)
    return jnp.broadcast_to(prefix + jnp.arange(tokens.shape[1]), tokens.shape)
