"""Text from models."""

from lmx.infer.generate import generate
from lmx.infer.sampling import Sampling, sample
from lmx.infer.weights import decoding_params

__all__ = ["Sampling", "decoding_params", "generate", "sample"]
