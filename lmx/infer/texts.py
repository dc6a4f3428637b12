"""What can be continued, how far, and what a text begins with: tokens, and what is read beside or in place of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
from jax import Array

from lmx.core.tree import Tree
from lmx.infer.blanks import Blanks, check_blanks
from lmx.models import virtual
from lmx.models.config import RWKV, EncoderDecoder, Model
from lmx.models.vision_config import LLaVA

VIRTUAL = -1
"""Stands for a virtual token among tokens."""
NONE = -1
"""No vector."""


def context_of(model: Model) -> int:
    """The most tokens that a text may have."""
    scaling = getattr(model, "rope_scaling", None)
    return model.context if scaling is None or scaling.kind != "dynamic" else int(model.context * scaling.factor)


def check_continues(model: Model) -> None:
    """Raises ValueError for a model that predicts no next token: it neither continues texts nor scores them so."""
    if not model.causal or not model.vocabulary_head:
        raise ValueError(
            f"a model with causal={model.causal} and head={model.head} predicts no next token; that takes a causal one with logits"
        )


def ids_of(name: str, ids: Sequence[int]) -> tuple[int, ...]:
    """Token ids, of whatever kind of whole numbers. Raises ValueError, by the name, for anything else."""
    try:
        return tuple(map(index, ids))
    except TypeError:
        raise ValueError(f"{name}={ids!r} must be token ids, a list of whole numbers") from None


def check_text(text: str) -> None:
    """Raises ValueError for half of a surrogate pair, as bytes that are no UTF-8 become on a command line: tokenizers read none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt {text!r} is no text at place {error.start}: it cannot be written as UTF-8") from None


@dataclass(frozen=True)
class Lead:
    """The virtual tokens before every text, by how many there are: keys and values alone (`prefix`), then vectors (`prompt`), which of an
    encoder-decoder the encoder reads."""

    prefix: int
    prompt: int


def lead_of(model: Model, params: Tree) -> Lead:
    """Those of an adapter. Raises ValueError for a model that has no place for them."""
    lead = Lead(virtual.prefix(params), virtual.prompt(params))
    if isinstance(model, RWKV) and lead != Lead(0, 0):
        raise ValueError(
            f"params have {lead.prefix + lead.prompt} virtual tokens, and a recurrent model reads none; leave out their entry `virtual`"
        )
    return lead


@dataclass(frozen=True, eq=False)
class Opening:
    """What a text begins with.

    Attributes:
      tokens: what comes before anything that is drawn, as pages or a state hold it.
      source: what an encoder reads; None where there is none.
      prefix: so many of the first tokens are keys and values that are given.
      whole: so many of them see each other in both directions.
      vectors: of each token of what the model reads first (the source, or the text), which vector stands in its place, of a soft prompt's and
        behind them the images'; `NONE`: its own. None: so it is of all.
      images: `[images, channels, height, width]`, or None.
      pieces: `[2, pieces]`, of what fills blanks: which token is a piece's first, and the position of its blank. None where none does.
      written: so many of the last tokens are no prompt's, but were written behind one.
      key: stands for what keys and values depend on besides weights and tokens before (`lmx.infer.pages`).
    """

    tokens: tuple[int, ...]
    source: tuple[int, ...] | None = None
    prefix: int = 0
    whole: int = 0
    vectors: np.ndarray | None = None
    images: np.ndarray | None = None
    pieces: np.ndarray | None = None
    written: int = 0
    key: bytes = b""

    def located(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of tokens by their places, those to come too: their positions, and those in the blanks that they fill."""
        if self.pieces is None:
            return places, np.zeros_like(places)
        begins, blanks = self.pieces
        which = np.searchsorted(begins, places, side="right") - 1
        return np.where(which < 0, places, blanks[which]), np.where(which < 0, 0, places - begins[which] + 1)


def opening(
    model: Model,
    lead: Lead,
    prompt: Sequence[int],
    *,
    start_id: int | None = None,
    bidirectional: bool = False,
    images: Array | np.ndarray | None = None,
    blanks: Blanks | None = None,
    written: int = 0,
) -> Opening:
    """Of a prompt, of which so many of the last tokens were `written` behind it.

    Raises:
      ValueError: an empty prompt, a token outside the vocabulary, an encoder-decoder without `start_id` or another model with one, more than an
        encoder reads, images that are not as many as the prompt has places for, a model that reads none, or that reads no prompt in both
        directions; as `lmx.infer.blanks.check_blanks`.
    """
    reads = isinstance(model, EncoderDecoder)
    if not prompt:
        raise ValueError("the prompt is empty; begin it with at least one token")
    if reads != (start_id is not None):
        raise ValueError(
            f"start_id={start_id} of model={type(model).__name__}: an encoder-decoder begins its texts behind one, others have none"
        )
    begun = () if start_id is None else (start_id,)
    if strange := [token for token in (*prompt, *begun) if not 0 <= token < model.vocab and token != getattr(model, "image_token", None)]:
        raise ValueError(f"the prompt has token {strange[0]}, outside the model's vocabulary of {model.vocab}")
    read = (*(VIRTUAL,) * lead.prompt, *prompt)
    if reads and len(read) > model.encoder.context:
        raise ValueError(f"the prompt has {len(read)} tokens, and model.encoder.context={model.encoder.context}")
    tokens = (*(VIRTUAL,) * lead.prefix, *(begun if reads else read))
    if not 0 <= written < len(prompt) or (written and (reads or blanks is not None)):
        raise ValueError(
            f"written={written} of the prompt's {len(prompt)} tokens: its first at least was given, and a text goes on that a decoder reads from left"
            " to right"
        )
    if bidirectional or blanks is not None:
        _check_bidirectional(model)
    if blanks is not None:
        check_blanks(model, prompt, blanks)
    images = _images(model, prompt, images)
    vectors = _vectors(model, lead, read if reads else tokens)
    whole, key = len(tokens) - written if bidirectional or blanks is not None else 0, hashlib.blake2b(digest_size=16)
    if whole:
        key.update(np.array(tokens[:whole]).tobytes())
    pieces = None
    if blanks is not None:
        key.update(repr((blanks.start, blanks.places)).encode())
        tokens, pieces = blanks.behind(tokens, len(tokens) - len(prompt))
        vectors = None if vectors is None else np.append(vectors, np.full(len(tokens) - whole, NONE, np.int32))
    if images is not None:
        key.update(str(images.shape).encode() + images.tobytes())
    given = whole or images is not None
    return Opening(
        tokens,
        source=read if reads else None,
        prefix=lead.prefix,
        whole=whole,
        vectors=vectors,
        images=images,
        pieces=pieces,
        written=written,
        key=key.digest() if given else b"",
    )


def openings(
    model: Model,
    lead: Lead,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    images: Sequence[np.ndarray | None] | None = None,
    blanks: Sequence[Blanks] | None = None,
    **wishes: Any,
) -> list[Opening]:
    """Of several prompts, each with its images and blanks. Raises ValueError as `opening`, with the prompt's number; and for texts longer than the
    model's."""
    check_continues(model)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    found, most = [], context_of(model)
    for i, prompt in enumerate(prompts):
        try:
            own = {name: each[i] for name, each in (("images", images), ("blanks", blanks)) if each is not None}
            found.append(opening(model, lead, prompt, **own, **wishes))
        except ValueError as error:
            raise ValueError(f"prompt {i}: {error}") from None
        begun = found[-1].tokens
        if len(begun) + max_new_tokens > most + isinstance(model, EncoderDecoder):
            soft = f", {some} of them virtual," if (some := begun.count(VIRTUAL)) else ""
            raise ValueError(
                f"prompt {i} begins with {len(begun)} tokens{soft} and max_new_tokens={max_new_tokens}: longer than model.context={model.context}"
            )
    return found


def _vectors(model: Model, lead: Lead, read: Sequence[int]) -> np.ndarray | None:
    found, soft = np.full(len(read), NONE, np.int32), lead.prompt
    before = len(read) - len([token for token in read if token != VIRTUAL]) - soft  # those of the prefix
    found[before : before + soft] = np.arange(soft)
    if isinstance(model, LLaVA):
        there = np.array(read) == model.image_token
        found[there] = soft + np.arange(there.sum())
    return found if (found != NONE).any() else None


def _check_bidirectional(model: Model) -> None:
    if isinstance(model, RWKV | EncoderDecoder):
        raise ValueError(
            f"bidirectional=True of model={type(model).__name__}: a decoder's attention can read its prompt in both directions; leave it out"
        )
    if model.window is not None:
        raise ValueError(f"bidirectional=True and model.window={model.window}: a window hides what a prefix shows; leave it out")


def _images(model: Model, prompt: Sequence[int], images: Array | np.ndarray | None) -> np.ndarray | None:
    if not isinstance(model, LLaVA):
        if images is not None:
            raise ValueError(f"images for a {type(model).__name__}, which reads none; leave them out")
        return None
    places, count = sum(token == model.image_token for token in prompt), 0 if images is None else len(images)
    if places != count * model.image_tokens:
        raise ValueError(
            f"the prompt has {places} image tokens ({model.image_token}), and there are {count} images, each of {model.image_tokens}"
        )
    if count and images.shape[1:] != (size := (model.image.channels, *model.image.image_size)):
        raise ValueError(f"images are {list(images.shape[1:])} (channels, height, width), and the model's are {list(size)}")
    return np.asarray(images, np.float32) if count else None
