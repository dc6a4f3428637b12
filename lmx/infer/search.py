"""Searches for likely texts on the engine: the best of several that are drawn, and beam search."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from lmx.infer.engine import Engine
from lmx.infer.jobs import Completion, Job
from lmx.infer.replicas import Replicas
from lmx.infer.sampling import Sampling
from lmx.infer.texts import ids_of
from lmx.models.config import EncoderDecoder

Early = bool | Literal["never"]
LIKELIEST = Sampling(temperature=0, log_probs="raw")


def best_of(
    engine: Engine | Replicas, prompt: Sequence[int] | str, n: int, best_of: int, *, sampling: Sampling = Sampling(), **wishes
) -> list[Completion]:
    """The n likeliest of `best_of` texts that are drawn, likeliest first: by the sum of their tokens' log-probabilities, a stop token not
    among them, of the kind that `sampling` wishes (`raw` where it wishes none).

    Args:
      wishes: what else `Engine.submit` takes.

    Raises:
      ValueError: n or `best_of` that mean nothing, texts that would all be the same, and what `Engine.submit` refuses.
    """
    if not 1 <= n <= best_of:
        raise ValueError(f"n={n} must be at least 1 and at most best_of={best_of}")
    if sampling.temperature == 0 and best_of > 1:
        raise ValueError(f"best_of={best_of} texts at temperature=0 would all be the same; raise it")
    kind = sampling.log_probs or "raw"
    (texts,) = engine.generate([prompt], n=best_of, sampling=replace(sampling, log_probs=kind), **wishes)
    return sorted(texts, key=lambda text: sum(text.log_probs), reverse=True)[:n]


@dataclass(frozen=True)
class Beam:
    """A text that beam search has found.

    Attributes:
      tokens: new ones; a stop token is not among them.
      text: of them, with a tokenizer.
      score: the sum of their log-probabilities, and of the stop token's, over their number to the power of the length penalty.
      finish: why it ended.
    """

    tokens: tuple[int, ...]
    text: str
    score: float
    finish: Literal["length", "stop_id"]


@dataclass
class _Search:
    """One prompt's texts: those that go on, with the sums of their log-probabilities, and those that have ended, both likeliest first."""

    prompt: tuple[int, ...]
    running: list[tuple[tuple[int, ...], float]] = field(default_factory=lambda: [((), 0.0)])
    ended: list[Beam] = field(default_factory=list)


def beam_search(
    engine: Engine | Replicas,
    prompts: Sequence[Sequence[int] | str],
    *,
    beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    early_stopping: Early = False,
    stop_ids: Sequence[int] = (),
) -> list[list[Beam]]:
    """Each prompt's likeliest texts, as many as there are beams, best first: what transformers' `generate(num_beams=...)` finds.

    Each token of each beam is a request of its own, whose text so far is found among the engine's pages. So the engine may serve others
    meanwhile; a recurrent model, which has no pages, reads every text from its beginning each time.

    Args:
      length_penalty: above 0 favours long texts, below 0 short ones (scores are negative).
      early_stopping: when a prompt is done. True: as soon as as many texts have ended as there are beams. False: when besides no running text
        would be better if it ended now. "never": when none can become better, were it to go on for all of `max_new_tokens`.
      stop_ids: tokens that end a text.

    Raises:
      ValueError: an engine that tells too few alternatives or finds no texts again, beams that the vocabulary has not enough tokens for, a
        text longer than the engine's, an encoder-decoder, and what `Engine.submit` refuses.
    """
    one = engine.engines[0] if isinstance(engine, Replicas) else engine
    if isinstance(one.model, EncoderDecoder):
        raise ValueError("beam search goes on from any text, and the engine begins those of an encoder-decoder behind start_id alone")
    if beams < 1 or max_new_tokens < 1:
        raise ValueError(f"beams={beams} and max_new_tokens={max_new_tokens} must be at least 1")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping={early_stopping!r} must be True, False or 'never'")
    stops = frozenset(ids_of("stop_ids", stop_ids))
    # So many that as many as there are beams are left where each beam's likeliest end it.
    wanted = max(2, 1 + len(stops)) * beams
    if wanted > one.limit:
        raise ValueError(f"beams={beams} choose among {wanted} tokens, and the vocabulary has {one.limit}; use fewer beams")
    if one.top < wanted:
        raise ValueError(
            f"beams={beams} choose among {wanted} tokens, and the engine was made for top={one.top}; make it with top={wanted}"
        )
    if not one.reuse:
        raise ValueError("the engine was made with reuse=False, and beam search finds texts again; make it with reuse=True")
    searches = [_Search(one.read(prompt)) for prompt in prompts]
    for i, search in enumerate(searches):
        if len(search.prompt) + max_new_tokens > one.longest:
            raise ValueError(
                f"prompt {i} has {len(search.prompt)} tokens and max_new_tokens={max_new_tokens}: longer than engine.longest={one.longest}"
            )
    going = searches
    for length in range(1, max_new_tokens + 1):
        for search, found in zip(going, _following(engine, going, wanted), strict=True):
            known = [(total, tokens) for total, tokens in found if tokens[-1] < one.limit]
            _advance(search, known[:wanted], beams, length, max_new_tokens, length_penalty, stops, one)
        going = [search for search in going if not _done(search, beams, length, max_new_tokens, length_penalty, early_stopping)]
        if not going:
            break
    return [search.ended for search in searches]


def _following(engine: Engine | Replicas, searches: Sequence[_Search], top: int) -> list[list[tuple[float, tuple[int, ...]]]]:
    """For each prompt how its texts may go on by a token, with sums of log-probabilities, likeliest first."""
    jobs: list[list[Job]] = []
    try:
        for search in searches:
            jobs.append([])
            for tokens, _ in search.running:
                wishes = {"max_new_tokens": 1, "sampling": LIKELIEST, "top": top, "written": len(tokens)}
                jobs[-1].append(engine.submit((*search.prompt, *tokens), **wishes))
        while not all(job.done for group in jobs for job in group):
            engine.step()
    finally:
        for job in (job for group in jobs for job in group if not job.done):
            engine.cancel(job)
    found = []
    for search, group in zip(searches, jobs, strict=True):
        pairs = zip(search.running, group, strict=True)
        each = [(total + more, (*tokens, new)) for (tokens, total), job in pairs for new, more in job.completions[0].top[0]]
        found.append(sorted(each, key=lambda one: one[0], reverse=True))
    return found


def _advance(search: _Search, found, beams: int, length: int, most: int, penalty: float, stops: frozenset[int], engine: Engine) -> None:
    """The texts with one token more. Of those that end, only such as are among the likeliest are kept: the others stand in for them."""
    ended, running = list(search.ended), []
    for place, (total, tokens) in enumerate(found):
        stopped = tokens[-1] in stops
        if not stopped and length < most:
            running.append((tokens, total))
        elif place < beams:
            new = tokens[:-1] if stopped else tokens
            text = engine.tokenizer.decode(new) if engine.tokenizer else ""
            ended.append(Beam(new, text, total / length**penalty, "stop_id" if stopped else "length"))
    search.running = running[:beams]
    search.ended = sorted(ended, key=lambda beam: beam.score, reverse=True)[:beams]


def _done(search: _Search, beams: int, length: int, most: int, penalty: float, early: Early) -> bool:
    if not search.running:
        return True
    if len(search.ended) < beams:
        return False
    possible = search.running[0][1] / (most if early == "never" and penalty > 0 else length) ** penalty
    return early is True or possible <= search.ended[-1].score
