"""Text from models."""

from lmx.infer.generate import decoding_params, generate
from lmx.infer.sampling import Sampling, draw, knobs, log_probs
from lmx.infer.scoring import score
from lmx.infer.stopping import Stopper

__all__ = ["Sampling", "Stopper", "decoding_params", "draw", "generate", "knobs", "log_probs", "score"]
