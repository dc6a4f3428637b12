"""Text from models."""

from lmx.infer.engine import Engine
from lmx.infer.generate import generate
from lmx.infer.replicas import Replicas
from lmx.infer.sampling import Sampling, draw, knobs, log_probs
from lmx.infer.scoring import score
from lmx.infer.stopping import Stopper
from lmx.infer.weights import decoding_params

__all__ = ["Engine", "Replicas", "Sampling", "Stopper", "decoding_params", "draw", "generate", "knobs", "log_probs", "score"]
