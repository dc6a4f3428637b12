"""An encoder of images: the layers of `lmx.models.stack` over patches (ViT, Dosovitskiy et al., 2021; CLIP's, Radford et al., 2021)."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from lmx.core.execution import Execution
from lmx.core.params import Normal, ParamSpec
from lmx.core.tree import Tree
from lmx.core.weights import linear, whole
from lmx.kernels.wide import widened
from lmx.models import dropout as drop
from lmx.models import norms, sites, stack
from lmx.models.dropout import Dropout
from lmx.models.feedforward import ACTIVATIONS
from lmx.models.linears import linear_specs
from lmx.models.sites import Edits
from lmx.models.transformer import Output, share
from lmx.models.vision_config import VisionTransformer
from lmx.parallel.rules import constrain, placed_outside


def specs(config: VisionTransformer) -> Tree:
    """The parameter table."""
    kernel, embed = (config.channels, *config.patch_size), config.embed
    tree = {
        "patches": linear_specs(kernel, (embed,), (None,) * 3, ("embed",), config, bias=config.patch_bias),
        "positions": ParamSpec((config.places, embed), (None, "embed"), init=Normal(config.init_std)),
        "layers": stack.specs(config),
    }
    if config.class_token:
        tree["class_token"] = ParamSpec((embed,), ("embed",), init=Normal(config.init_std))
    for name, there in (("embed_norm", config.embed_norm), ("norm", config.norm_placement != "post")):
        if there:
            tree[name] = norms.specs(config.norm, embed, "embed", bias=config.bias, offset=config.norm_offset)
    dense = partial(linear_specs, (embed,), input_axes=("embed",), output_axes=(None,), config=config)
    if config.head in ("pooler", "projection"):
        tree[config.head] = dense((config.summary_size,), bias=config.head == "pooler")
    elif config.head == "classifier":
        tree["classifier"] = dense((config.labels,))
    return tree


def forward(
    params: Tree,
    config: VisionTransformer,
    pixels: Float[Array, "batch channels height width"],
    *,
    depth: int | None = None,
    dropout: Dropout | None = None,
    edits: Edits | None = None,
    execution: Execution = Execution(),
) -> Output:
    """Hidden states of the class token and each patch, row by row.

    Args:
      params: as `specs` says, layers stacked or as a tuple (`lmx.models.stack`).
      depth: after how many layers to stop, before the final norm. None: after all, and the final norm where it is of all hidden states.
      edits: what is changed inside, by the names of `lmx.models.sites`.

    Raises:
      ValueError: images of another size than the model's; a name that is no site's.
    """
    edits = edits or {}
    if pixels.shape[1:] != (config.channels, *config.image_size):
        raise ValueError(
            f"images of {list(pixels.shape[1:])} (channels, height, width) are not those of the model, "
            f"{[config.channels, *config.image_size]}; lmx does not stretch its positions"
        )
    own = placed_outside(params, specs(config), execution)
    run = config if depth is None else replace(config, layers=depth)
    sites.check(run, execution, edits)
    outside = sites.outside(execution.taps, edits)
    x = outside("embeddings", _enter(own, config, pixels, dropout, execution))
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    context = share(config, positions, None, dropout, execution)
    layers = params["layers"] if depth is None else _first(params["layers"], depth)
    x, _, aux, tapped = stack.run_layers(x, layers, run, context, execution, edits=edits)
    if depth is None:
        x = outside("final", x if config.summary_norm else _normed(x, own, config))
    return Output(x, None, aux, tapped | outside.found)


def pooled(
    params: Tree, config: VisionTransformer, hidden: Float[Array, "batch length embed"], execution: Execution = Execution()
) -> Float[Array, "batch summary"]:
    """An image's summary: its class token, normalised; through the pooler's dense layer and activation where there is one."""
    params = placed_outside(params, specs(config), execution)
    rows = _normed(hidden[:, 0], params, config) if config.summary_norm else hidden[:, 0]
    if config.head != "pooler":
        return rows
    y = linear(rows, params["pooler"]["weight"], params["pooler"].get("bias"))
    return ACTIVATIONS[config.head_activation or config.activation](widened(y)).astype(y.dtype)


def classes(
    params: Tree, config: VisionTransformer, hidden: Float[Array, "batch length embed"], execution: Execution = Execution()
) -> Float[Array, "batch labels"]:
    """Logits of an image's classes, fp32 at least."""
    own = placed_outside(params, specs(config), execution)["classifier"]
    return widened(linear(pooled(params, config, hidden, execution), own["weight"], own.get("bias")))


def _enter(
    params: Tree, config: VisionTransformer, pixels: Array, dropout: Dropout | None, execution: Execution
) -> Float[Array, "batch length embed"]:
    dtype = jnp.dtype(execution.precision.compute)
    patches = cut(pixels.astype(dtype), config.patch_size)
    x = linear(patches, params["patches"]["weight"], params["patches"].get("bias"), inputs=3)
    if config.class_token:
        x = jnp.concatenate([jnp.broadcast_to(whole(params["class_token"]).astype(dtype), (x.shape[0], 1, x.shape[2])), x], 1)
    x = x + whole(params["positions"]).astype(dtype)
    if config.embed_norm:
        x = norms.norm(x, params["embed_norm"], config.norm, config.norm_epsilon, offset=config.norm_offset)
    return drop.apply(constrain(x, ("batch", "sequence", None), execution.rules), dropout, "embed", 0)


def side(execution: Execution, name: str) -> Execution:
    """That of an encoder inside a model: of what is tapped, what begins with its name (`image/layers/3/input`), without it."""
    lead = f"{name}/"
    return replace(execution, taps=tuple(tap.removeprefix(lead) for tap in execution.taps if tap.startswith(lead)))


def named(taps: dict[str, Array], name: str) -> dict[str, Array]:
    """What is tapped there, by its name in the model."""
    return {f"{name}/{tap}": value for tap, value in taps.items()}


def cut(pixels: Float[Array, "batch channels height width"], size: tuple[int, int]) -> Float[Array, "batch patches channels rows columns"]:
    """Patches of images, row by row; what is beyond whole patches is left out."""
    rows, columns = size
    down, across = pixels.shape[2] // rows, pixels.shape[3] // columns
    grid = pixels[:, :, : down * rows, : across * columns].reshape(*pixels.shape[:2], down, rows, across, columns)
    return jnp.einsum("bcdraw->bdacrw", grid).reshape(pixels.shape[0], down * across, pixels.shape[1], rows, columns)


def _normed(x: Array, params: Tree, config: VisionTransformer) -> Array:
    if "norm" not in params:
        return x
    return norms.norm(x, params["norm"], config.norm, config.norm_epsilon, offset=config.norm_offset)


def _first(layers: Tree, depth: int) -> Tree:
    """The first layers of a stack that is one group."""
    (group,) = layers
    if not depth:
        return ()
    return (jax.tree.map(lambda a: a[:depth], group) if isinstance(group, dict) else group[:depth],)
