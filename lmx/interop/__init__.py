"""Hugging Face checkpoints in and out.

from lmx import interop
model, params = interop.load("path")
tokenizer = interop.load_tokenizer("path")
outputs = interop.call(model, params, {"input_ids": ids})
interop.save(model, params, "elsewhere")
"""

from lmx.interop.call import call
from lmx.interop.checkpoint import Model, load, save, tensors
from lmx.interop.tokenizers import CheckpointTokenizer, load_tokenizer

__all__ = ["CheckpointTokenizer", "Model", "call", "load", "load_tokenizer", "save", "tensors"]
