"""Hugging Face checkpoints in and out.

from lmx import interop
model, params = interop.load("path")
tokenizer = interop.load_tokenizer("path")
outputs = interop.call(model, params, {"input_ids": ids})
interop.save(model, params, "elsewhere")
adapter = interop.load_adapter("adapter of PEFT's", model)
adapted = interop.adapt(params, adapter)  # as params, for call, generate, and every forward
"""

from lmx.interop.call import call
from lmx.interop.checkpoint import Model, load, save, tensors
from lmx.interop.new_adapter import new_adapter
from lmx.interop.peft import Adapter, adapt, adapter_tensors, load_adapter, save_adapter, unmerge
from lmx.interop.runs import export_run, import_run, load_run
from lmx.interop.tokenizers import CheckpointTokenizer, load_tokenizer
from lmx.interop.vocabulary import expand_vocabulary, resize_vocabulary, untie
from lmx.models.adapters import merge

__all__ = [
    "Adapter",
    "CheckpointTokenizer",
    "Model",
    "adapt",
    "adapter_tensors",
    "call",
    "expand_vocabulary",
    "export_run",
    "import_run",
    "load",
    "load_adapter",
    "load_run",
    "load_tokenizer",
    "merge",
    "new_adapter",
    "resize_vocabulary",
    "save",
    "save_adapter",
    "tensors",
    "unmerge",
    "untie",
]
