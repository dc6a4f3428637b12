"""What texts are without an engine: the plain forward over whole texts, no cache, nothing beside them."""

from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from lmx.core.params import is_spec
from lmx.core.tree import map_named
from lmx.models.config import EncoderDecoder, Transformer
from lmx.models.families import functions
from lmx.models.losses import logits
from lmx.models.transformer import Source

SMALL = Transformer(vocab=24, layers=2, embed=16, heads=4, kv_heads=2, mlp=16, context=64, window=5, pattern=("local", "global"))


def weights(model, seed: int = 0, scale: float = 0.6):
    """Large enough that texts differ and the likeliest token is so by far."""
    rng = np.random.default_rng(seed)
    table = functions(model).specs(model)
    return map_named(lambda _, spec: jnp.asarray(scale * rng.normal(size=spec.shape), jnp.float32), table, is_leaf=is_spec)


class Plain:
    """Args: length: of texts, at most; rows: so many are computed in one program; start: behind which an encoder-decoder's texts begin."""

    def __init__(self, model, params, *, length: int, rows: int = 8, start: int | None = None):
        self.model, self.params, self.length, self.rows, self.start = model, params, length, rows, start

    @cached_property
    def _run(self):
        @jax.jit
        def run(params, tokens, segments, *read):
            source = {"source": Source(read[0], segments=read[1])} if read else {}
            return logits(params, self.model, functions(self.model).forward(params, self.model, tokens, segments=segments, **source).hidden)

        return run

    def _padded(self, texts) -> list[np.ndarray]:
        tokens, segments = (np.zeros((self.rows, self.length), np.int32) for _ in range(2))
        for row, text in enumerate(texts):
            tokens[row, : len(text)], segments[row, : len(text)] = text, 1
        return [tokens, segments]

    def logits(self, texts, sources=(), params=None) -> list[np.ndarray]:
        """Of each text `[tokens, vocab]`: entry i is of what follows its token i."""
        found = []
        for i in range(0, len(texts), self.rows):
            here = texts[i : i + self.rows]
            read = self._padded(sources[i : i + self.rows]) if sources else []
            out = np.asarray(self._run(self.params if params is None else params, *self._padded(here), *read))
            found += [out[row, : len(text)] for row, text in enumerate(here)]
        return found

    def greedy(self, prompts, count: int, params=None) -> list[list[int]]:
        """Each prompt's likeliest next tokens, by a forward over all of the text for each."""
        reads = isinstance(self.model, EncoderDecoder)
        texts, sources = [[self.start] if reads else list(prompt) for prompt in prompts], prompts if reads else ()
        for _ in range(count):
            for text, rows in zip(texts, self.logits(texts, sources, params), strict=True):
                first, second = np.sort(rows[-1])[[-1, -2]]
                assert first - second > 1e-4, "a near tie, where rounding would decide: take other weights"
                text.append(int(rows[-1].argmax()))
        return [text[-count:] for text in texts]

    def log_probs(self, prompts, news, params=None) -> list[list[float]]:
        """Of each prompt's new tokens."""
        reads = isinstance(self.model, EncoderDecoder)
        before = [[self.start] if reads else list(prompt) for prompt in prompts]
        rows = self.logits([a + list(b) for a, b in zip(before, news, strict=True)], prompts if reads else (), params)
        found = []
        for start, new, own in zip(map(len, before), news, rows, strict=True):
            own = own.astype(np.float64)
            own -= np.log(np.exp(own - own.max(-1, keepdims=True)).sum(-1, keepdims=True)) + own.max(-1, keepdims=True)
            found.append([float(own[start - 1 + i, token]) for i, token in enumerate(new)])
        return found


def prompts_of(count: int, seed: int = 0, low: int = 1, high: int = 20, vocab: int = 24) -> list[list[int]]:
    """Random ones of mixed lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, rng.integers(low, high + 1)).tolist() for _ in range(count)]


def arriving(engine, prompts, *, seed: int = 0, **wishes) -> list:
    """Each prompt some steps after the last; their jobs, at the end."""
    rng, jobs = np.random.default_rng(seed), []
    for prompt in prompts:
        jobs.append(engine.submit(prompt, **wishes))
        for _ in range(rng.integers(0, 4)):
            engine.step()
    engine.run()
    return jobs


def tokens_of(jobs) -> list:
    return [job.completions[0].tokens for job in jobs]
