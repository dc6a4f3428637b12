"""Hugging Face checkpoints in and out.

from lmx import interop
model, params = interop.load("path")
outputs = interop.call(model, params, {"input_ids": ids})
interop.save(model, params, "elsewhere")
"""

from lmx.interop.call import call
from lmx.interop.checkpoint import Model, load, save, tensors

__all__ = ["Model", "call", "load", "save", "tensors"]
