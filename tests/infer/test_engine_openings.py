"""What a text begins with besides tokens: prompts read in both directions, virtual tokens, images. Against the plain forward over whole texts."""

from dataclasses import replace
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.infer.engine import Engine
from lmx.infer.sampling import Sampling
from lmx.models import llava, virtual
from lmx.models.config import RWKV, EncoderDecoder, Transformer
from lmx.models.losses import logits
from lmx.models.transformer import Source, forward
from lmx.models.vision_config import LLaVA, VisionTransformer
from lmx.parallel.layout import Layout
from plain import Plain, arriving, prompts_of, tokens_of, weights

BASE = Transformer(vocab=24, layers=2, embed=16, heads=4, kv_heads=2, mlp=16, context=40)
NEW, START = 8, 1
ROOM = {"rows": 2, "page": 4, "chunk": 16, "pages": 7, "host_pages": 4, "longest": 32}
BEGINNING = [5, 3, 8, 1, 9, 2, 2, 7, 11]
PROMPTS = [[*BEGINNING, 4, 6], *prompts_of(3, seed=4, high=12), [*BEGINNING, 20], [*BEGINNING, 4, 6], [7]]
SCORED = Sampling(0, log_probs="raw")


class Whole(Plain):
    """The same with what prompts begin with; `images` of each prompt."""

    def __init__(self, model, params, *, both_ways=False, images=None, start=None):
        super().__init__(model, params, length=32, rows=len(PROMPTS), start=start)
        self.both_ways, self.images = both_ways, images
        self.prefix, self.soft = virtual.prefix(params), virtual.prompt(params)

    @cached_property
    def _run(self):
        @jax.jit
        def run(params, tokens, segments, first, pixels, *read):
            rows, length = tokens.shape
            soft, more = self.soft, {}
            prefix = (jnp.arange(length + soft) < first[:, None] + soft).astype(jnp.int32) if self.both_ways else None
            wide = [jnp.pad(a, ((0, 0), (soft, 0)), constant_values=i) for i, a in enumerate((tokens, segments))]
            places = jnp.broadcast_to(jnp.arange(length + soft), wide[0].shape)
            if read:
                seen = [jnp.pad(a, ((0, 0), (soft, 0)), constant_values=i) for i, a in enumerate(read)]
                more["source"] = Source(
                    seen[0], segments=seen[1], given=virtual.embedded(params, jnp.broadcast_to(jnp.arange(seen[0].shape[1]), seen[0].shape))
                )
                wide, places = [tokens, segments], places[:, soft:] - soft
            else:
                more["given"] = virtual.embedded(params, places)
            if self.prefix:
                more["cache"] = virtual.cache(params, self.model, rows, self.prefix + wide[0].shape[1], jnp.float32)
            call = llava.forward if pixels is not None else forward
            more |= {"pixels": pixels} if pixels is not None else {}
            hidden = call(params, self.model, wide[0], segments=wide[1], positions=places + self.prefix, prefix=prefix, **more).hidden
            return logits(params, self.model, hidden)[:, 0 if read else soft :]

        return run

    def logits(self, texts, sources=(), params=None):
        first = np.array([len(prompt) for prompt in PROMPTS])
        read = self._padded(sources) if sources else []
        pixels = None if self.images is None else np.concatenate(self.images)
        out = np.asarray(self._run(self.params if params is None else params, *self._padded(texts), first, pixels, *read))
        return [row[: len(text)] for row, text in zip(out, texts, strict=True)]


def agrees(model, params, plain, *, prompts=PROMPTS, each=None, other=None, room=None, **wishes):
    """Under random arrivals, preemption, prefix hits and other weights in between."""
    wanted = plain.greedy(prompts, NEW)
    told = plain.log_probs(prompts, wanted)
    engine = Engine(model, params, **ROOM | (room or {}), trace=True)
    each, rng = each or [{}] * len(prompts), np.random.default_rng(0)

    def check():
        jobs = []
        for prompt, own in zip(prompts, each, strict=True):
            jobs.append(engine.submit(prompt, max_new_tokens=NEW, sampling=SCORED, **wishes, **own))
            for _ in range(rng.integers(0, 4)):
                engine.step()
        engine.run()
        assert tokens_of(jobs) == wanted
        np.testing.assert_allclose([job.completions[0].log_probs for job in jobs], told, atol=1e-5)

    check()
    assert any(moment.preempted for moment in engine.timeline)
    if not isinstance(model, EncoderDecoder):
        (again,) = [arriving(engine, prompts[:1], max_new_tokens=NEW, **wishes, **each[0]) for _ in range(2)][1]
        assert again.completions[0].tokens == wanted[0]
        assert engine.statistics.hit_rate > 0
    if other is not None:
        engine.submit(prompts[0], max_new_tokens=NEW, **wishes, **each[0])
        engine.step()
        engine.update(other)
        engine.run()
        engine.update(params)
        check()
    engine.pages.check()
    assert engine.statistics.in_use == 0
    return engine


KINDS = {
    "rope": BASE,
    "alibi": replace(BASE, positions="alibi"),
    "relative": replace(BASE, positions="relative", relative_buckets=8, relative_distance=12),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_read_in_both_directions_is_the_plain_forwards(kind):
    model = KINDS[kind]
    params = weights(model, seed=1, scale=0.5)
    plain = Whole(model, params, both_ways=True)
    assert plain.greedy(PROMPTS, NEW) != Whole(model, params).greedy(PROMPTS, NEW)
    agrees(model, params, plain, bidirectional=True)


def test_a_bidirectional_prompt_is_found_again_only_as_a_whole():
    params = weights(BASE, seed=1, scale=0.5)
    engine = Engine(BASE, params, **ROOM | {"pages": 20})
    found = []
    for prompt, both in ((PROMPTS[0], True), (PROMPTS[0], False), (PROMPTS[4], True), (PROMPTS[0], True), (PROMPTS[4], False)):
        engine.generate([prompt], max_new_tokens=1, bidirectional=both)
        found.append(engine.pages._found)
    assert found == [0, 0, 0, 2, 4]


def test_what_has_no_room_in_one_step_is_refused_by_its_size():
    engine = Engine(BASE, weights(BASE), **ROOM)
    with pytest.raises(ValueError, match=r"first 17 tokens are computed in one step \(whole\), and chunk=16"):
        engine.submit([1] * 17, max_new_tokens=1, bidirectional=True)
    windowed = replace(BASE, window=4, pattern=("local",))
    with pytest.raises(ValueError, match=r"bidirectional=True and model.window=4"):
        Engine(windowed, weights(windowed), **ROOM).submit([1], max_new_tokens=1, bidirectional=True)
    assert not engine.busy


def soft(params, count, width=16, seed=0):
    rows = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return params | {"virtual": {"embeddings": jnp.asarray(rows)}}


def prefixed(params, count, model=BASE, seed=0):
    rng, shape = np.random.default_rng(seed), (model.layers, model.key_heads, count, model.head_size)
    return params | {"virtual": {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name in ("key", "value")}}


ADAPTERS = {"soft": lambda p, seed=0: soft(p, 5, seed=seed), "prefix": lambda p, seed=0: prefixed(p, 5, seed=seed)}
ADAPTERS["both"] = lambda p, seed=0: p | {"virtual": soft(p, 2, seed=seed)["virtual"] | prefixed(p, 3, seed=seed)["virtual"]}


@pytest.mark.parametrize(("kind", "both_ways"), [*((kind, False) for kind in ADAPTERS), ("soft", True)])
def test_virtual_tokens_are_the_plain_forwards(kind, both_ways):
    params = ADAPTERS[kind](weights(BASE, seed=1, scale=0.5))
    plain = Whole(BASE, params, both_ways=both_ways)
    agrees(BASE, params, plain, other=ADAPTERS[kind](params, seed=1), bidirectional=both_ways, room={"pages": 8})


def test_virtual_tokens_of_an_encoder_decoder_are_the_plain_forwards():
    side = Transformer(vocab=24, layers=1, embed=16, heads=4, mlp=16, context=40, causal=False)
    model = EncoderDecoder(vocab=24, layers=2, embed=16, heads=4, kv_heads=2, mlp=16, context=40, encoder=side)
    params = weights(model, seed=1, scale=0.5)
    params |= {"virtual": soft(params, 2)["virtual"] | prefixed(params, 3, model)["virtual"]}
    agrees(model, params, Whole(model, params, start=START), start_id=START, room={"pages": 5})


EYE = VisionTransformer(layers=1, embed=16, heads=2, mlp=16, image_size=(8, 8), patch_size=(4, 4))
SEES = LLaVA(vocab=24, layers=2, embed=16, heads=4, kv_heads=2, mlp=16, context=40, image=EYE, image_token=24)
"""Four tokens an image, and a token for it outside of the vocabulary."""


def pictures(count, seed):
    return np.random.default_rng(seed).normal(size=(count, 3, 8, 8)).astype(np.float32)


def test_images_are_the_plain_forwards():
    params, image = weights(SEES, seed=1, scale=0.5), [SEES.image_token] * SEES.image_tokens
    counts = [1, 0, 2, 1, 1, 1, 0]
    seen = [pictures(count, seed=min(i, 4)) for i, count in enumerate(counts)]
    seen[5] = seen[0]
    prompts = [[*image * count, *prompt[:5]] for count, prompt in zip(counts, PROMPTS, strict=True)]
    prompts[3] = [*prompts[3][4:], *image]  # ends in one
    plain = Whole(SEES, params, images=seen)
    each = [{"images": some} if len(some) else {} for some in seen]
    engine = agrees(SEES, params, plain, prompts=prompts, each=each, other=weights(SEES, seed=2), room={"chunk": 6})
    # The same tokens after another image are another text.
    (one,), (two,) = (arriving(engine, prompts[:1], max_new_tokens=NEW, images=pictures(1, seed)) for seed in (8, 9))
    assert one.completions[0].tokens != two.completions[0].tokens
    for images, said in (
        (None, "4 image tokens .24., and there are 0 images, each of 4"),
        (np.zeros((1, 3, 8, 9)), r"\[3, 8, 9\].* model's are \[3, 8, 8\]"),
    ):
        with pytest.raises(ValueError, match=said):
            engine.submit(prompts[0], max_new_tokens=1, images=images)
    with pytest.raises(ValueError, match="images for a Transformer, which reads none"):
        Engine(BASE, weights(BASE), **ROOM).submit([1], max_new_tokens=1, images=seen[0])


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(pipeline=2)], ids=["tensor", "pipeline"])
def test_on_several_devices_all_of_it_is_the_same(layout):
    params = weights(SEES, seed=1, scale=0.5)
    params |= {"virtual": soft(params, 2)["virtual"] | prefixed(params, 3)["virtual"]}
    prompts = [[*[SEES.image_token] * SEES.image_tokens, *prompt[:5]] for prompt in PROMPTS[:3]]
    wishes = {"max_new_tokens": NEW, "sampling": SCORED, "bidirectional": True, "images": pictures(1, 0)}
    alone, split = (Engine(SEES, params, **ROOM | {"pages": 20}, **how) for how in ({}, {"layout": layout}))
    for (one,), (two,) in zip(alone.generate(prompts, **wishes), split.generate(prompts, **wishes), strict=True):
        assert one.tokens == two.tokens
        np.testing.assert_allclose(one.log_probs, two.log_probs, atol=1e-5)


def test_what_has_no_virtual_tokens_refuses_them():
    model = RWKV(vocab=24, layers=1, embed=16, mlp=16, context=40)
    with pytest.raises(ValueError, match="params have 2 virtual tokens, and a recurrent model reads none"):
        Engine(model, soft(weights(model), 2))
    engine = Engine(BASE, soft(weights(BASE), 2), **ROOM)
    with pytest.raises(ValueError, match=r"the engine was made for .*prompt=2.*; make another"):
        engine.update(soft(weights(BASE), 3))
    with pytest.raises(ValueError, match="a prompt of 32 tokens, 2 of them virtual, and max_new_tokens=1"):
        engine.submit([1] * 30, max_new_tokens=1)


COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, _, **more: COMPILED.append(name) if name.endswith("backend_compile_duration") else None
)


def test_nothing_is_compiled_after_the_warm_up():
    params = weights(SEES)
    params |= {"virtual": soft(params, 2)["virtual"] | prefixed(params, 3)["virtual"]}
    engine = Engine(SEES, params, **ROOM | {"longest": 24})
    engine.warm_up()
    before, image = len(COMPILED), [SEES.image_token] * SEES.image_tokens
    for both_ways in (False, True):
        engine.submit([*image, 1, 2], max_new_tokens=4, images=pictures(1, 0), bidirectional=both_ways)
        engine.step()
        engine.submit([3, *image], max_new_tokens=4, images=pictures(1, 1))
        engine.submit([3], max_new_tokens=4, bidirectional=both_ways)
        engine.run()
    assert before > 0
    assert len(COMPILED) == before
