"""Adapters that are yet to be trained, by the settings that PEFT has for them."""

import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from lmx.core.params import ParamSpec, initial_values
from lmx.core.tree import Tree, named_leaves
from lmx.interop.adapter_settings import Settings, read
from lmx.interop.checkpoint import Model
from lmx.interop.peft import EMBEDDINGS, Adapter, Base, plan
from lmx.models.adapters import LowRank, Part, Replaced

WHOLE = {"LORA": "base_model.model.", "IA3": "base_model.model."}
"""What stands before names of the base's own tensors; of virtual tokens `base_model.`."""


def new_adapter(model: Model, params: Tree, settings: Mapping[str, Any], key: Array) -> Adapter:
    """An adapter that changes nothing yet (virtual tokens: random ones), in fp32.

    Args:
      params: of the model: what DoRA's lengths, biases and modules_to_save begin with.
      settings: as adapter_config.json has them: `{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}`.

    Raises:
      ValueError: settings that lmx does not have, by name, or that target nothing.
    """
    said = read(settings)
    base = Base(model)
    names = _names(said, base)
    parts, _ = plan(said, base, names)
    adapter = Adapter({}, tuple(sorted(parts.items())), model, json.dumps(dict(settings)), tuple(names.items()))
    values = initial_values(key, adapter.specs)
    leaves = named_leaves(params)
    return adapter.replace(values={name: values[name] | _from_base(part, leaves, base) for name, part in parts.items()})


def _names(settings: Settings, base: Base) -> dict[str, tuple[int, ...]]:
    """PEFT's tensors, and their shapes."""
    found: dict[str, tuple[int, ...]] = {}
    adapted: list[str] = []
    if settings.kind in ("LORA", "IA3"):
        linear = [name for name, module in base.modules.items() if base.linear(module)]
        adapted = settings.targeted(base.modules, linear=linear, head=base.head) or []
        if not adapted:
            target = settings.get("target_modules")
            raise ValueError(
                f"target_modules={target!r} names nothing of a {base.model.family}, which has {', '.join(list(base.modules)[:12])}, ..."
            )
        for name in adapted:
            found |= {f"base_model.model.{name}.{end}": shape for end, shape in _of(settings, base, name).items()}
    elif settings.kind == "PREFIX_TUNING":
        width = 2 * settings.said["num_layers"] * settings.said["token_dim"]
        found[EMBEDDINGS] = (settings.said["num_virtual_tokens"], width)
    else:
        rows = settings.said["num_virtual_tokens"] * settings.get("num_transformer_submodules", 1)
        found[EMBEDDINGS] = (rows, settings.said["token_dim"])
    start, bias = WHOLE.get(settings.kind, "base_model."), settings.get("bias", "none")
    for tensor, module in base.tensors.items():
        owner, _, end = tensor.rpartition(".")
        above = [owner.rsplit(".", up)[0] for up in range(owner.count(".") + 1)]
        if any(one.endswith(saved) for one in above for saved in settings.saved):
            found[start + tensor] = base.shape(module)
        elif end == "bias" and (bias == "all" or (bias == "lora_only" and owner in adapted)):
            found[start + (f"{owner}.base_layer.bias" if owner in adapted else tensor)] = base.shape(module)
    return found


def _of(settings: Settings, base: Base, name: str) -> dict[str, tuple[int, ...]]:
    """One module's tensors."""
    module = base.modules[name]
    inputs, outputs = base.sides(module)
    if settings.kind == "IA3":
        return {"ia3_l": (1, inputs) if settings.feeds(name) else (outputs, 1)}
    rank = settings.rank(name)
    if base.linear(module):
        found = {"lora_A.weight": (rank, inputs), "lora_B.weight": (outputs, rank)}
    else:
        found = {"lora_embedding_A": (rank, inputs), "lora_embedding_B": (outputs, rank)}
    return found | ({"lora_magnitude_vector": (outputs,)} if settings.get("use_dora") else {})


def _from_base(part: Part, leaves: Mapping[str, Array], base: Base) -> Tree:
    """Values that begin as the base's."""
    if isinstance(part, Replaced):
        return {
            "value": tuple(jnp.asarray(leaves[n][jnp.array(part.layers)] if part.layers else leaves[n], jnp.float32) for n in part.names)
        }
    if isinstance(part, LowRank) and part.magnitude:
        return {"magnitude": tuple(_lengths(leaves[name], base.names.specs[name], part.use == "head") for name in part.weights)}
    return {}


def _lengths(weight: Array, spec: ParamSpec, turned: bool) -> Array:
    """Of a weight's columns."""
    weight = weight.T if turned else weight
    lead = len(spec.layers) > 0
    over = tuple(range(lead, lead + (spec.inputs or 1)))
    return jnp.sqrt(jnp.sum(jnp.square(weight.astype(jnp.float32)), over))
