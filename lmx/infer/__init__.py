"""Text from models."""

from lmx.infer.generate import decoding_params, generate
from lmx.infer.sampling import Sampling, sample

__all__ = ["Sampling", "decoding_params", "generate", "sample"]
