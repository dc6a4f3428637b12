"""The vocabulary of a model: more rows, fewer, or a head of its own."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lmx.core.params import is_spec
from lmx.core.tree import Tree, map_named, named_leaves
from lmx.core.weights import Adapted, Twofold, Weight, whole
from lmx.interop.checkpoint import Model
from lmx.interop.tokenizers import CheckpointTokenizer
from lmx.kernels.wide import wide
from lmx.models.families import functions
from lmx.train.experiment import with_vocab


def resize_vocabulary(
    model: Model,
    params: Tree,
    size: int,
    *,
    pad_to_multiple_of: int = 1,
    mean: bool = True,
    discard: bool = False,
    parts: Mapping[int, Sequence[int]] | None = None,
) -> tuple[Model, Tree]:
    """The model with `size` rows of embeddings, and as many outputs of its head with their biases, as transformers'
    `resize_token_embeddings` makes it.

    Args:
      pad_to_multiple_of: the size is rounded up to a multiple of this.
      mean: whether new rows are the mean of the old ones (Hewitt, 2021: then they hardly take from the old ones' probabilities), which is
        what transformers does but for noise of 1e-9 of their variance; else zeros, which a tied head's new biases are in any case.
      discard: whether rows may be dropped.
      parts: of some rows, new ones or such as no token had, the rows whose mean they are instead.

    Raises:
      ValueError: fewer rows than there are without `discard`, or than a special token of config.json needs; parameters under an adapter.
    """
    if size < 1 or pad_to_multiple_of < 1:
        raise ValueError(f"size={size} and pad_to_multiple_of={pad_to_multiple_of} must be at least 1")
    size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
    old = model.config.vocab
    if size < old and not discard:
        raise ValueError(
            f"size={size} drops {old - size} of the vocabulary's {old} rows, which nothing brings back; set discard=True if they may go"
        )
    special = {name: token for name, token in json.loads(model.about).items() if name.endswith("_token_id") and isinstance(token, int)}
    if lost := {name: token for name, token in special.items() if size <= token < old}:
        raise ValueError(f"size={size} drops {', '.join(f'{name}={token}' for name, token in lost.items())} of config.json")
    specs = named_leaves(functions(model.config).specs(model.config), is_leaf=is_spec)
    if named_leaves(params).keys() != specs.keys():
        raise ValueError("the parameters are not the model's own with layers stacked; merge an adapter first (lmx.interop.merge)")

    if wrong := [id for id, ids in (parts or {}).items() if not (0 <= id < size and ids and min(ids) >= 0 and max(ids) < min(size, old))]:
        raise ValueError(f"parts of row {wrong[0]}, {tuple(parts[wrong[0]])}, are not rows of the {old} there are, or it is none of {size}")

    def composed(leaf: Array, axis: int) -> Array:
        """With the mean of their parts in the rows that have some."""
        counts = np.array([len(ids) for ids in parts.values()])
        taken = jnp.take(leaf, np.concatenate([np.asarray(ids) for ids in parts.values()]), axis).astype(wide(leaf.dtype))
        sums = jax.ops.segment_sum(jnp.moveaxis(taken, axis, 0), np.repeat(np.arange(len(counts)), counts), len(counts))
        means = (sums / counts.reshape(-1, *(1,) * (leaf.ndim - 1))).astype(leaf.dtype)
        rows = jnp.moveaxis(leaf, axis, 0).at[np.array(list(parts))].set(means)
        return jnp.moveaxis(rows, 0, axis)

    def resized(name: str, leaf: Array) -> Array:
        if "vocab" not in specs[name].axes:
            return leaf
        axis = specs[name].axes.index("vocab")
        leaf = lengthened(name, leaf, axis)
        return composed(leaf, axis) if parts else leaf

    def lengthened(name: str, leaf: Array, axis: int) -> Array:
        if size <= old:
            return jnp.take(leaf, jnp.arange(size), axis)
        shape = tuple(size - old if i == axis else length for i, length in enumerate(leaf.shape))
        zeros = not mean or (name == "head_bias" and model.config.tied)
        rows = jnp.zeros((), leaf.dtype) if zeros else leaf.mean(axis, keepdims=True, dtype=wide(leaf.dtype))
        return jnp.concatenate([leaf, jnp.broadcast_to(rows, shape).astype(leaf.dtype)], axis)

    return replace(model, config=with_vocab(model.config, size)), map_named(resized, params)


def expand_vocabulary(
    model: Model, params: Tree, tokenizer: CheckpointTokenizer, texts: Iterable[str], *, pieces: int, pad_to_multiple_of: int = 1
) -> tuple[Model, Tree, CheckpointTokenizer]:
    """A model and its tokenizer with so many pieces more, learned from texts (`lmx.data.expansion`).

    A new piece begins as the mean of the tokens that it is made of, in the embeddings and in the head (Sachidananda et al. 2021; Gee et al.
    2022). Special tokens keep their ids.

    Raises:
      ValueError: as `CheckpointTokenizer.with_pieces` and `resize_vocabulary` do.
    """
    grown, parts = tokenizer.with_pieces(texts, pieces)
    size = max(model.config.vocab, grown.vocab)
    model, params = resize_vocabulary(model, params, size, pad_to_multiple_of=pad_to_multiple_of, parts=parts)
    return model, params, grown


def untie(model: Model, params: Tree) -> tuple[Model, Tree]:
    """A model whose head has its own matrix, where one table was both: what it computes is the same. An adapter of one use of the table
    (`lmx.interop.adapt`) is then of that use's own weight, and can be merged.

    Raises:
      ValueError: a model that ties nothing, or whose family has no untied form.
    """
    config = model.config
    if not (config.tied and config.vocabulary_head):
        raise ValueError(f"the {model.family} has no head that is tied to its embeddings")
    untied = replace(model, config=replace(config, tied=False))
    untied.table.write(untied.config)
    table, head = (params["embed"].table, params["embed"].head) if isinstance(params["embed"], Twofold) else (params["embed"],) * 2
    return untied, params | {"embed": _plain(table), "head": _plain(head).T}


def _plain(weight: Weight) -> Array:
    return whole(weight) if isinstance(weight, Adapted) else weight
