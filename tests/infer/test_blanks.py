"""Blanks filled while decoding, against the plain forward over whole texts, with the positions that training gives them."""

from dataclasses import replace
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.execution import Execution
from lmx.data import corruption
from lmx.data.denoising import BlankInfilling
from lmx.infer import Engine, Sampling, generate
from lmx.infer.blanks import Blanks, Marks
from lmx.infer.texts import Lead, opening
from lmx.models import virtual
from lmx.models.config import RWKV, Transformer
from lmx.models.losses import logits
from lmx.models.transformer import Embedded, empty_cache, forward
from lmx.parallel.layout import Layout
from plain import weights as random_weights

MASK, BIG, START_OF_PIECE, END = 20, 21, 22, 23
MARKS = Marks((MASK, BIG), START_OF_PIECE, END)
GLM = Transformer(
    vocab=24, layers=2, embed=16, heads=4, mlp=16, context=64, positions="learned", block_positions=True, norm="layernorm", bias=True
)
KINDS = {"learned": GLM, "rope": replace(GLM, positions="rope", kv_heads=2)}
NEW, LENGTH = 5, 64
ROOM = {"rows": 2, "page": 4, "chunk": 16, "pages": 8, "host_pages": 4, "longest": 28}
BEGINNING = [5, 3, 8, 1, 9, 2, MASK, 7]
PROMPTS = [[*BEGINNING, 4, MASK, 6], [1, BIG], [*BEGINNING, 4, MASK, 6], [MASK, 2, MASK, 4, MASK], [*BEGINNING, 11, 12, BIG]]


def weights(model, seed=4, scale=0.5):
    """By which some pieces end."""
    params = random_weights(model, seed, scale)
    return params | {"embed": params["embed"].at[END].multiply(1.7)} if "embed" in params else params


class Whole:
    """What blanks are filled with, by a forward over all of a text for each token. Positions are written out as the paper draws them (figure 2c)."""

    def __init__(self, model, params):
        self.model, self.params = model, params
        self.soft, self.prefix = virtual.prompt(params), virtual.prefix(params)

    @cached_property
    def _run(self):
        @jax.jit
        def run(params, tokens, segments, positions, inside, prefix):
            model, kinds = self.model, {"positions": positions, "block_positions": inside}
            if self.soft:
                kinds["given"] = virtual.embedded(params, jnp.arange(LENGTH)[None])
            if self.prefix:  # a cache of slots takes what comes first by positions, so these are added beforehand
                vectors = params["embed"][tokens] + params["positions"][positions + self.prefix] + params["block_positions"][inside]
                kinds = {"given": Embedded(vectors, jnp.ones_like(tokens, bool)), "positions": self.prefix + jnp.arange(LENGTH)[None]}
                kinds["cache"] = virtual.cache(params, model, 1, self.prefix + LENGTH, jnp.float32)
                model = replace(model, positions="none", block_positions=False)
            return logits(params, model, forward(params, model, tokens, segments=segments, prefix=prefix, **kinds).hidden)[0]

        return run

    def logits(self, prompt, pieces):
        """`pieces`: (place of the blank, its tokens behind start), in order; of what follows the last token."""
        rows = [(token, i, 0, 1) for i, token in enumerate([0] * self.soft + prompt)]
        for place, piece in pieces:
            rows += [(token, self.soft + place, i, 0) for i, token in enumerate([START_OF_PIECE, *piece], 1)]
        table = np.zeros((5, 1, LENGTH), np.int32)
        table[1:, 0, : len(rows)] = np.array([(token, at, inside, first) for token, at, inside, first in rows]).T
        table[0, 0, : len(rows)] = 1
        segments, tokens, positions, inside, prefix = table
        return np.asarray(self._run(self.params, tokens, segments, positions, inside, prefix))[len(rows) - 1]

    def fill(self, prompt, most=NEW):
        """Greedily: each blank's piece, and the log-probabilities of its tokens."""
        done, told = [], []
        for place in [i for i, token in enumerate(prompt) if token in (MASK, BIG)]:
            piece, own = [], []
            while len(piece) < most:
                row = self.logits(prompt, [*done, (place, piece)]).astype(np.float64)
                own.append(row - np.log(np.exp(row - row.max()).sum()) - row.max())
                row[START_OF_PIECE] = -np.inf
                first, second = np.sort(row)[[-1, -2]]
                assert first - second > 1e-4, "a near tie, where rounding would decide: take other weights"
                if (token := int(row.argmax())) == END:
                    own.pop()
                    break
                own[-1] = float(own[-1][token])
                piece.append(token)
            done.append((place, piece))
            told.append(own)
        return [piece for _, piece in done], told


def filled_by(engine, prompt, **wishes):
    """Blank by blank; pieces and their log-probabilities."""
    blanks, told = MARKS.blanks(prompt), []
    while len(blanks.pieces) < len(blanks.places):
        job = engine.submit(prompt, blanks=blanks, max_new_tokens=NEW, stop_ids=[END], sampling=Sampling(0, log_probs="raw"), **wishes)
        yield job
        assert job.done
        blanks = replace(blanks, pieces=(*blanks.pieces, tuple(job.completions[0].tokens)))
        told.append(job.completions[0].log_probs)
    return [list(piece) for piece in blanks.pieces], told


def all_filled(engine, prompts=PROMPTS):
    """Side by side, each beginning some steps after the last."""
    runs, rng, found, going = [filled_by(engine, prompt) for prompt in prompts], np.random.default_rng(0), {}, {}
    for i, run in enumerate(runs):
        going[i] = next(run)
        for _ in range(rng.integers(0, 2)):
            engine.step()
    while going:
        engine.step()
        for i in [i for i, job in going.items() if job.done]:
            try:
                going[i] = runs[i].send(None)
            except StopIteration as end:
                found[i] = end.value
                del going[i]
    return [found[i] for i in range(len(prompts))]


def soft(params, count):
    rows = np.random.default_rng(3).normal(size=(count, 16)).astype(np.float32)
    return params | {"virtual": {"embeddings": jnp.asarray(rows)}}


def prefixed(params, count, model):
    rng, shape = np.random.default_rng(4), (model.layers, model.key_heads, count, model.head_size)
    return params | {"virtual": {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name in ("key", "value")}}


@pytest.mark.parametrize("kind", [*KINDS, "soft prompt", "key prefix"])
def test_blanks_are_filled_as_the_plain_forward_fills_them(kind):
    """Under random arrivals, preemption, chunks of prompts and prefix hits."""
    model = KINDS.get(kind, GLM)
    params = weights(model)
    if kind not in KINDS:
        params = soft(params, 3) if kind == "soft prompt" else prefixed(params, 3, model)
    plain = Whole(model, params)
    wanted = [plain.fill(prompt) for prompt in PROMPTS]
    engine = Engine(model, params, **ROOM | {"pages": 7 if kind in KINDS else 8}, trace=True)
    found = all_filled(engine)
    assert [pieces for pieces, _ in found] == [pieces for pieces, _ in wanted]
    for (_, told), (_, expected) in zip(found, wanted, strict=True):
        np.testing.assert_allclose(np.concatenate(told), np.concatenate(expected), atol=1e-5)
    assert any(moment.preempted for moment in engine.timeline)
    assert engine.statistics.hit_rate > 0
    engine.pages.check()
    assert engine.statistics.in_use == 0
    texts = generate(model, params, PROMPTS, max_new_tokens=NEW, blanks=MARKS)
    for text, prompt, (pieces, _) in zip(texts, PROMPTS, wanted, strict=True):
        left = iter(pieces)
        assert text == [token for one in prompt for token in (next(left) if one in MARKS.masks else [one])]


def test_some_pieces_end_and_others_are_cut():
    """Else the tests of them would show nothing."""
    plain = Whole(GLM, weights(GLM))
    lengths = {len(piece) for prompt in PROMPTS for piece in plain.fill(prompt)[0]}
    assert NEW in lengths
    assert len(lengths) > 1


def test_the_next_blank_finds_what_was_read_and_written_for_the_last():
    params = weights(GLM)
    engine = Engine(GLM, params, **ROOM)
    prompt, blanks = PROMPTS[0], MARKS.blanks(PROMPTS[0])
    engine.generate([prompt], max_new_tokens=1, bidirectional=True)
    before = engine.pages._found
    piece = engine.generate([prompt], blanks=blanks, max_new_tokens=4)[0][0].tokens
    assert engine.pages._found == before  # without pieces it is another reading
    engine.generate([prompt], blanks=replace(blanks, pieces=(tuple(piece),)), max_new_tokens=4)
    assert engine.pages._found - before == (len(prompt) + len(piece)) // ROOM["page"]
    engine.generate([prompt], blanks=replace(blanks, places=blanks.places[::-1], pieces=(tuple(piece),)), max_new_tokens=4)
    assert engine.pages._found - before == (len(prompt) + len(piece)) // ROOM["page"]  # in another order nothing


def test_a_piece_never_begins_inside_another():
    """Even where the model would have it so: pages could not tell them apart."""
    params = weights(GLM)
    bias = Sampling(0, logit_bias=((START_OF_PIECE, 1e9),))
    (job,) = Engine(GLM, params, **ROOM).generate([PROMPTS[1]], blanks=MARKS.blanks(PROMPTS[1]), max_new_tokens=4, sampling=bias)
    assert START_OF_PIECE not in job[0].tokens


def test_what_is_drawn_depends_on_seed_and_blank_alone():
    params = weights(GLM, scale=0.1)
    draw = partial(generate, GLM, params, max_new_tokens=NEW, temperature=1.0, blanks=MARKS)
    together = draw(PROMPTS, seed=1)
    assert draw(PROMPTS[:1], seed=1) == together[:1]
    assert draw(PROMPTS, seed=2) != together
    row = draw([[MASK, MASK, MASK, MASK]], seed=3)[0]
    assert len(row) > 4
    assert len({tuple(row[i : i + NEW]) for i in range(0, len(row), NEW)}) > 1


def test_a_row_of_training_is_laid_out_alike():
    objective = BlankInfilling(MASK, START_OF_PIECE, END, rate=0.4, mean_span=2.0)
    for seed in range(10):
        text = np.random.default_rng(seed).integers(0, 20, 14)
        row = corruption.corrupt(objective, text, corruption.Draws(seed, 0))
        known = int(row["prefix"].sum())
        tokens, starts = row["tokens"].tolist(), np.flatnonzero(row["tokens"] == START_OF_PIECE)
        pieces = [tuple(tokens[a + 1 : b]) for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)]
        blanks = Blanks(START_OF_PIECE, tuple(int(row["positions"][i]) for i in starts), tuple(pieces[:-1]))
        begun = opening(GLM, Lead(0, 0), tokens[:known], blanks=blanks)
        assert [*begun.tokens, *pieces[-1]] == tokens
        assert begun.whole == known
        found = begun.located(np.arange(len(tokens)))
        np.testing.assert_array_equal(found, [row["positions"], row["block_positions"]])


def test_stages_fill_the_same():
    params = weights(GLM)
    wanted = [Whole(GLM, params).fill(prompt) for prompt in PROMPTS[:2]]
    found = all_filled(Engine(GLM, params, **ROOM, layout=Layout(pipeline=2)), PROMPTS[:2])
    for (one, told), (two, its) in zip(found, wanted, strict=True):
        assert one == two
        np.testing.assert_allclose(np.concatenate(told), np.concatenate(its), atol=1e-5)


COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, _, **more: COMPILED.append(name) if name.endswith("backend_compile_duration") else None
)


def test_nothing_is_compiled_after_the_warm_up():
    engine = Engine(GLM, weights(GLM), **ROOM | {"longest": 24})
    engine.warm_up()
    before = len(COMPILED)
    engine.submit([1, 2, 3], max_new_tokens=4)
    all_filled(engine, PROMPTS[:2])
    assert before > 0
    assert len(COMPILED) == before


BLANKS = Blanks(START_OF_PIECE, (1,))
WRONG = {
    "another model": (replace(GLM, block_positions=False), [1, MASK], BLANKS, "this has none .model.block_positions"),
    "distances": (replace(GLM, positions="alibi"), [1, MASK], BLANKS, "model.positions=alibi .* counts from token to token"),
    "a recurrent model": (RWKV(vocab=24, layers=1, embed=16, mlp=16, context=40), [1, MASK], BLANKS, "bidirectional=True of model=RWKV"),
    "a place outside": (GLM, [1, MASK], Blanks(START_OF_PIECE, (2,)), r"blanks.places=\(2,\) are not different places of the prompt's 2"),
    "a place twice": (GLM, [1, MASK], Blanks(START_OF_PIECE, (1, 1)), r"blanks.places=\(1, 1\) are not different"),
    "nothing to fill": (GLM, [1, MASK], Blanks(START_OF_PIECE, (1,), ((3,),)), "1 pieces for 1 places: none is left"),
    "a start within": (GLM, [MASK, MASK], Blanks(START_OF_PIECE, (0, 1), ((START_OF_PIECE,),)), r"blanks.pieces\[0\] has token 22"),
    "a start outside": (GLM, [1, MASK], Blanks(24, (1,)), "blanks.start=24 is outside the model's vocabulary of 24"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_filled_is_refused_by_name(what):
    model, prompt, blanks, said = WRONG[what]
    with pytest.raises(ValueError, match=said):
        opening(model, Lead(0, 0), prompt, blanks=blanks)


def test_a_cache_of_slots_refuses_positions_by_which_it_would_take_a_piece_for_what_comes_at_once():
    with pytest.raises(ValueError, match="block_positions with a cache of slots"):
        forward(weights(GLM), GLM, jnp.ones((1, 2), int), block_positions=jnp.ones((1, 2), int), cache=empty_cache(GLM, 1, 8))


def test_generate_says_which_prompt_has_no_blank_and_what_has_no_room():
    params = weights(GLM)
    with pytest.raises(ValueError, match=r"prompt 1: the prompt has no blank to fill; put one of the mask tokens \(20, 21\)"):
        generate(GLM, params, [[MASK], [1]], max_new_tokens=2, blanks=MARKS)
    with pytest.raises(ValueError, match=r"prompt 0 begins with 44 tokens and max_new_tokens=30: longer than model\.context=64"):
        generate(GLM, params, [[MASK] * 2 + [1] * 10], max_new_tokens=30, blanks=MARKS)
    with pytest.raises(ValueError, match="leave out bidirectional, pixel_values and blanks"):
        generate(GLM, params, [[MASK]], max_new_tokens=2, blanks=MARKS, edits={}, execution=Execution())
