"""The parameters of a linear layer, as every layer declares them."""

import math

from lmx.core.params import ZEROS, Normal, ParamSpec
from lmx.core.tree import Tree
from lmx.models.config import Model


def linear_specs(
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    input_axes: tuple[str | None, ...],
    output_axes: tuple[str | None, ...],
    config: Model,
    *,
    residual: bool = False,
    bias: bool | None = None,
) -> Tree:
    """`{"weight": [*inputs, *outputs]}`, and `{"bias": [*outputs]}` where the config has biases, or where `bias` says so.

    A projection into the residual stream starts smaller, by the square root of how many there are (GPT-2, Radford et al., 2019).
    """
    stddev = config.init_std / math.sqrt(2 * config.layers) if residual else config.init_std
    weight = ParamSpec((*inputs, *outputs), (*input_axes, *output_axes), len(inputs), Normal(stddev))
    return {"weight": weight} | ({"bias": ParamSpec(outputs, output_axes, init=ZEROS)} if (config.bias if bias is None else bias) else {})
