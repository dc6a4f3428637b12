"""What a run reads, as a config, and how that becomes a tokenizer and token stores."""

import hashlib
import importlib
import importlib.metadata
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmx.data.corruption import word_starts
from lmx.data.denoised import DenoisedBatches, denoise
from lmx.data.denoising import Objective, fit, has_decoder
from lmx.data.learned import TRAINED, train_tokenizer, trained
from lmx.data.lengths import Keep, ScheduledBatches, Shorter, check_lengths, schedule
from lmx.data.mixture import Blend, Component, MixedBatches, Stores, check_blend, component_seed
from lmx.data.packing import PACKINGS, Packing
from lmx.data.pipeline import Batches, Numbered
from lmx.data.shards import corpus_tokenizer, is_shards, open_shards
from lmx.data.sources import documents, source_files, source_hash
from lmx.data.store import TokenStore, cached_store
from lmx.data.tokenizers import Tokenizer, load_tokenizer

RECIPE = "recipe:"


@dataclass(frozen=True)
class Data:
    """What a run reads and how it is packed."""

    train: str | Blend
    """Text to train on: a file (.txt, .md, .jsonl, .json, also .gz/.xz/.bz2/.zst, .array_record), a folder or glob of them,
    tfds:NAME[:split] or tfds:DIRECTORY[:split]; a folder of shards (corpora/web/train); recipe:MODULE, the corpus of a recipe, made first.
    In an experiment's module also a Blend of several."""

    validation: str = ""
    """Held-out text, given like train. Empty: nothing is held out and nothing evaluated."""

    field: str = "text"
    """The field of JSON and TFDS records that holds the text."""

    tokenizer: str = "bytes"
    """bytes; bpe:VOCAB or unigram:VOCAB (a SentencePiece model trained on the training text and cached), byte_bpe:VOCAB or
    byte_unigram:VOCAB (the same of bytes, a tokenizer.json); corpus: the one that the shards of data.train were made with; or a path: a
    SentencePiece .model, a tokenizer.json or a folder with one."""

    length: int = 256
    """Tokens that a packed example predicts: the context a model is trained at."""

    lengths: tuple[Shorter, ...] = ()
    """Shorter rows in the first steps of training: examples are cut into rows of such a length until such a step."""

    keep: Keep = "tokens"
    """What a batch of shorter rows keeps: tokens: it has more rows; rows: it has as many, and so fewer tokens."""

    packing: Packing = "concatenate"
    """concatenate: all text in a row, cut into full examples. first_fit: documents stay whole, examples end with padding.
    stream: all text as one, so that attention, and what is to be predicted, reach over the ends of documents (as in GPT-2's training); on
    GPUs attention is then fastest."""

    denoising: Objective | None = None
    """What is done to the text first (`lmx.data.denoising`): it is corrupted, to be restored. None: each token is predicted from those
    before it. Packing is then first_fit or stream."""

    decoder_length: int | None = None
    """Columns of the decoder's side, where denoising makes rows of two sides. None: as many as the longest text needs that length has room
    for."""

    cache: str = ".cache/lmx"
    """Folder for tokenised text and trained tokenizers, found again by the hash of what made them. It may be deleted at any time."""


def decoder_columns(data: Data) -> int:
    """Columns of the decoder's side of a row, 0 where rows have one side. Raises ValueError as `lmx.data.denoising.fit` does."""
    return 0 if data.denoising is None else fit(data.denoising, data.length, data.decoder_length)[1]


def has_two_sides(data: Data) -> bool:
    """Whether rows have a source, which an encoder reads, and a target."""
    return data.denoising is not None and has_decoder(data.denoising)


def padding(data: Data) -> dict[str, np.ndarray]:
    """A row without texts: the fields of a batch, their types and, but for the rows, their shapes. Raises as `denoise` does."""
    if data.denoising is not None:
        words = np.zeros(1, bool)  # any will do where no text is
        return denoise(data.denoising, 0, [], length=data.length, decoder_length=data.decoder_length, seed=0, words=words)
    names = ("tokens", "targets", "positions", *(() if data.packing == "stream" else ("segments",)))
    row = {name: np.zeros(data.length, np.int32) for name in names}
    return row | {"weights": np.zeros(data.length, np.float32), "example_id": np.uint32(0)}


def make_batches(
    data: Data,
    store: TokenStore | Stores,
    tokenizer: Tokenizer,
    *,
    vocab: int,
    rows: int,
    seed: int,
    shuffle: bool = True,
    epochs: int | None = None,
) -> Numbered:
    """The batches of a store as a config says; `vocab` is the number of ids that the model knows.

    Where `epochs` is None, as in training, data.lengths is followed. Raises as the batches do, and ValueError for epochs of a blend, whose
    components have their own.
    """
    words = word_starts(tokenizer) if getattr(data.denoising, "whole_word", False) else None

    def plain(store: TokenStore, seed: int) -> Batches:
        same: dict[str, Any] = {"rows": rows, "length": data.length, "packing": data.packing}
        same |= {"seed": seed, "shuffle": shuffle, "epochs": epochs}
        if data.denoising is None:
            return Batches(store, **same)
        return DenoisedBatches(store, data.denoising, decoder_length=data.decoder_length, vocab=vocab, words=words, **same)

    stages = schedule(data.lengths, rows=rows, length=data.length, keep=data.keep) if data.lengths and epochs is None else None
    if isinstance(store, TokenStore):
        batches: Numbered = plain(store, seed)
    elif epochs is not None or not isinstance(data.train, Blend):
        raise ValueError(f"epochs={epochs} of {len(store.components)} components: a blend has epochs for each of them; use None")
    else:
        parts = [plain(part, component_seed(seed, i)) for i, part in enumerate(store.components)]
        steps = None if stages is None else stages.examples
        batches = MixedBatches(parts, data.train, seed=seed, shuffle=shuffle, steps=steps)
    return batches if stages is None else ScheduledBatches(batches, stages)


def components(data: Data) -> dict[str, Component]:
    """What data.train names, by the knob that does."""
    if isinstance(data.train, Blend):
        return {f"data.train.components.{i}.source": component for i, component in enumerate(data.train.components)}
    return {"data.train": Component(data.train)}


@dataclass(frozen=True)
class Prepared:
    """A run's text, ready to be batched."""

    tokenizer: Tokenizer
    train: TokenStore | Stores
    validation: TokenStore | None


def check(data: Data) -> None:
    """Raise ValueError or FileNotFoundError, in one line, for what can be seen to be wrong without reading the text."""
    if data.length < 1:
        raise ValueError(f"data.length={data.length} is not positive; use the number of tokens in a packed example, 256 say")
    if data.packing not in PACKINGS:
        raise ValueError(f"data.packing={data.packing!r} is not one of {', '.join(PACKINGS)}")
    if data.decoder_length is not None and data.denoising is None:
        raise ValueError(f"data.decoder_length={data.decoder_length} is of rows with two sides; set data.denoising, or leave it out")
    if data.lengths and data.denoising is not None:
        raise ValueError("data.lengths cuts rows, which those of data.denoising cannot be; leave one of them out")
    check_lengths(data.lengths, length=data.length, keep=data.keep)
    if isinstance(data.train, Blend):
        check_blend(data.train)
    sources = {name: component.source for name, component in components(data).items()}
    for name, source in [*sources.items(), *([("data.validation", data.validation)] if data.validation else [])]:
        if source.startswith(RECIPE):
            _recipe(source, name)
        elif not source.startswith("tfds:") and not is_shards(source):
            source_files(source, name=name)
    made = [source for source in sources.values() if source.startswith(RECIPE) or is_shards(source)]
    if data.tokenizer == "corpus" and not made:
        raise ValueError("data.tokenizer='corpus' is that of a corpus's shards, and data.train names none; give a recipe or its folder")
    if made and trained(data.tokenizer, name="data.tokenizer"):
        raise ValueError(f"data.tokenizer={data.tokenizer!r} cannot be trained on {made[0]}, which is tokens already; use 'corpus'")
    if data.tokenizer != "corpus" and not trained(data.tokenizer, name="data.tokenizer"):
        loaded = load_tokenizer(data.tokenizer, name="data.tokenizer")
        for name, source in sources.items():
            if source.startswith(RECIPE):  # said before the corpus is made
                of = _recipe(source, name)[0].tokenizer
                _same_tokenizer(None if trained(of) else load_tokenizer(of).fingerprint, loaded, source, name, data)


def _same_tokenizer(fingerprint: str | None, tokenizer: Tokenizer, source: str, name: str, data: Data) -> None:
    if fingerprint != tokenizer.fingerprint:
        raise ValueError(f"{name}={source!r} was not made with data.tokenizer={data.tokenizer!r}; use data.tokenizer='corpus'")


def prepare(data: Data) -> Prepared:
    """Load or train the tokenizer and tokenise the text, each from the cache if it has been done before.

    Raises what `check`, `documents`, `train_sentencepiece` and `cached_store` raise, the first before any work.
    """
    check(data)
    tokenizer = prepare_tokenizer(data)

    def store(source: str, name: str) -> TokenStore:
        if folder := corpus(source, data.cache, name):
            shards = open_shards(folder)
            _same_tokenizer(shards.index["tokenizer"], tokenizer, source, name, data)
            return shards
        return cached_store(source, tokenizer, cache=data.cache, field=data.field, name=name)

    parts = tuple(store(component.source, name) for name, component in components(data).items())
    train = Stores(parts) if isinstance(data.train, Blend) else parts[0]
    return Prepared(tokenizer, train, store(data.validation, "data.validation") if data.validation else None)


def prepare_tokenizer(data: Data) -> Tokenizer:
    """The tokenizer that a config names, trained on its training text (or found in its cache) if it says so. Raises as `prepare` does."""
    sources = {name: component.source for name, component in components(data).items()}
    if data.tokenizer == "corpus":
        folders = [folder for name, source in sources.items() if (folder := corpus(source, data.cache, name))]
        return corpus_tokenizer(folders[0])
    kind = trained(data.tokenizer, name="data.tokenizer")
    if not kind:
        return load_tokenizer(data.tokenizer, name="data.tokenizer")
    algorithm, vocab = kind
    contents = [source_hash(source, name=name) for name, source in sources.items()]
    parts = [*contents, data.field, algorithm, vocab, importlib.metadata.version(TRAINED[algorithm])]
    path = Path(data.cache) / "tokenizers" / f"{algorithm}-{vocab}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"
    texts = (document.text for name, source in sources.items() for document in documents(source, field=data.field, name=name))
    return load_tokenizer(train_tokenizer(texts, path, data.tokenizer))


def _recipe(source: str, name: str) -> tuple[Any, str]:
    """`recipe:MODULE` or `recipe:MODULE:validation`: the recipe that a module holds, and the split. Raises ValueError where it holds none."""
    module, _, split = source.removeprefix(RECIPE).partition(":")
    try:
        recipe = importlib.import_module(module).recipe
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name}={source!r}: no recipe there ({error}); name a module that has one, recipe:experiments.data.plays"
        ) from error
    from lmx.data.curate.recipe import Recipe

    if not isinstance(recipe, Recipe):
        raise ValueError(f"{name}={source!r}: {module}.recipe is {recipe!r}, not a Recipe")
    split = split or "train"
    if split != "train" and not (split == "validation" and recipe.held_out):
        raise ValueError(f"{name}={source!r}: the recipe makes no {split}; it makes train, and validation where held_out is above 0")
    return recipe, split


def corpus(source: str, cache: str | Path, name: str) -> Path | None:
    """The folder of shards that a source names, made first where it is a recipe's; None for other sources."""
    if not source.startswith(RECIPE):
        return Path(source) if is_shards(source) else None
    from lmx.data.curate import Local, curate
    from lmx.data.curate.recipe import fingerprint

    recipe, split = _recipe(source, name)
    folder = Path(cache) / "corpora" / f"{recipe.name}-{fingerprint(recipe)[:16]}"
    curate(recipe, folder, workers=Local(os.cpu_count() or 1))
    return folder / split
