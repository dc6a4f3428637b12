"""Text to batches: sources, tokenizers, the token store, packing and the pipeline.

Importing this room reads only NumPy; Grain, TFDS and the tokenizer libraries are imported by the functions that use them.
"""

from lmx.data.corruption import word_starts
from lmx.data.denoised import DenoisedBatches, denoise
from lmx.data.denoising import (
    OBJECTIVES,
    BlankInfilling,
    Denoiser,
    MaskedLM,
    Mixture,
    Objective,
    PrefixLM,
    SpanCorruption,
    TextInfilling,
    ul2,
)
from lmx.data.documents import Document
from lmx.data.expansion import expand_tokenizer
from lmx.data.explain import Explanation, explain
from lmx.data.fertility import Fertility, fertility
from lmx.data.learned import train_huggingface, train_sentencepiece
from lmx.data.lengths import ScheduledBatches, Shorter
from lmx.data.mixture import Blend, Component, MixedBatches, Stage, Stores
from lmx.data.packing import Fill, Packing, Plan, fill, permutation, plan
from lmx.data.pipeline import Batch, Batches, BatchIterator, batch_hash, iterate, require_supervised
from lmx.data.recipe import Data, Prepared, check, make_batches, prepare, prepare_tokenizer
from lmx.data.sources import documents, source_hash
from lmx.data.store import TokenStore, build_store, cached_store, open_store
from lmx.data.tokenizers import ByteTokenizer, HuggingFace, SentencePiece, Tokenizer, load_tokenizer

__all__ = [
    "OBJECTIVES",
    "Batch",
    "BatchIterator",
    "Batches",
    "BlankInfilling",
    "Blend",
    "ByteTokenizer",
    "Component",
    "Data",
    "DenoisedBatches",
    "Denoiser",
    "Document",
    "Explanation",
    "Fertility",
    "Fill",
    "HuggingFace",
    "MaskedLM",
    "MixedBatches",
    "Mixture",
    "Objective",
    "Packing",
    "Plan",
    "PrefixLM",
    "Prepared",
    "ScheduledBatches",
    "SentencePiece",
    "Shorter",
    "SpanCorruption",
    "Stage",
    "Stores",
    "TextInfilling",
    "TokenStore",
    "Tokenizer",
    "batch_hash",
    "build_store",
    "cached_store",
    "check",
    "denoise",
    "documents",
    "expand_tokenizer",
    "explain",
    "fertility",
    "fill",
    "iterate",
    "load_tokenizer",
    "make_batches",
    "open_store",
    "permutation",
    "plan",
    "prepare",
    "prepare_tokenizer",
    "require_supervised",
    "source_hash",
    "train_huggingface",
    "train_sentencepiece",
    "ul2",
    "word_starts",
]
