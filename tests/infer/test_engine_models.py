"""The engine over each kind of decoder: under random arrivals, preemption, prefix hits and chunked prefill, the greedy text of the plain loop."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lmx import interop
from lmx.infer import score
from lmx.infer.dense import continued
from lmx.infer.engine import Engine
from lmx.infer.sampling import Sampling
from lmx.infer.search import beam_search
from lmx.interop.families import FAMILIES
from lmx.interop.files import mapped
from lmx.models.config import RWKV, EncoderDecoder, Transformer
from lmx.models.rope import RopeScaling
from plain import Plain, arriving, prompts_of, tokens_of, weights

SIZES = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 40}
PAIR = {"vocab_size": 24, "d_model": 16}
CONFIGS = {
    "gpt2": {"vocab_size": 24, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 40},
    "llama": LLAMA,
    "gemma2": LLAMA | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "mixtral": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "glm": LLAMA | {"head_dim": 8, "pad_token_id": 0},
    "bloom": {"vocab_size": 24, "hidden_size": 16, "n_layer": 2, "n_head": 4, "seq_length": 40},
    "t5": PAIR | {"d_kv": 8, "d_ff": 16, "num_heads": 4, "num_layers": 1, "n_positions": 40},
    "bart": PAIR
    | {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 40}
    | {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
    "rwkv": {"vocab_size": 24, "hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2, "context_length": 40},
    "rwkv7": {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "head_dim": 8, "intermediate_size": 16}
    | {"decay_low_rank_dim": 5, "a_low_rank_dim": 3, "v_low_rank_dim": 2, "gate_low_rank_dim": 4, "max_position_embeddings": 40},
}
"""As their `config.json` says it."""
NEW, START = 8, 1
PROMPTS = [
    [5, 3, 8, 1, 9, 2, 2, 7, 11, 4, 6],
    *prompts_of(3, seed=4),
    [5, 3, 8, 1, 9, 2, 2, 7, 20],
    [5, 3, 8, 1, 9, 2, 2, 7, 11, 4, 6, 12, 13],
]
ROOM = {"rows": 2, "page": 4, "chunk": 6, "pages": 8, "host_pages": 4, "longest": 24}


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_text_is_that_of_the_plain_loop(family):
    model = FAMILIES[family].read({"model_type": family} | CONFIGS[family])
    reads, recurrent = isinstance(model, EncoderDecoder), isinstance(model, RWKV)
    params = weights(model, seed=1, scale=0.5)
    plain = Plain(model, params, length=24, rows=len(PROMPTS), start=START if reads else None)
    wanted = plain.greedy(PROMPTS, NEW)
    log_probs = plain.log_probs(PROMPTS, wanted)
    room = ROOM | ({"host_pages": 0} if recurrent else {"pages": 4} if reads else {})
    engine = Engine(model, params, **room, trace=True)
    wishes = {"max_new_tokens": NEW, "sampling": Sampling(0, log_probs="raw")} | ({"start_id": START} if reads else {})
    jobs = arriving(engine, PROMPTS, **wishes)
    jobs += [job for _ in range(2) for job in arriving(engine, PROMPTS[:1], **wishes)]
    assert tokens_of(jobs) == wanted + 2 * wanted[:1]
    np.testing.assert_allclose([job.completions[0].log_probs for job in jobs], log_probs + 2 * log_probs[:1], atol=2e-5)
    assert recurrent or any(moment.preempted for moment in engine.timeline)
    assert recurrent or reads or engine.statistics.hit_rate > 0
    # Other weights, and these again; several texts of each.
    engine.update(weights(model, seed=2, scale=0.5))
    engine.generate(PROMPTS[:2], **wishes | {"max_new_tokens": 2})
    engine.update(params)
    both = [one for some in engine.generate(PROMPTS[3:], n=2, **wishes) for one in some]
    assert [one.tokens for one in both] == [new for new in wanted[3:] for _ in range(2)]
    np.testing.assert_allclose([one.log_probs for one in both], np.repeat(log_probs[3:], 2, axis=0), atol=2e-5)


STRETCHED = Transformer(vocab=24, layers=2, embed=16, heads=2, mlp=16, context=12)
DYNAMIC = replace(STRETCHED, rope_scaling=RopeScaling("dynamic", 2.0, 12))
LONG = replace(
    STRETCHED,
    context=24,
    rope_scaling=RopeScaling("longrope", 2.0, 12, short_factors=(1.0, 1.1, 1.2, 1.3), long_factors=(1.5, 2.0, 3.0, 4.0)),
)
CROSSING = [PROMPTS[0][:9], PROMPTS[5], [7, *PROMPTS[0][:8]], [*PROMPTS[5][:11], 3, 3]]
"""Up to the context of training, which they outgrow, and over it."""


@pytest.mark.parametrize("model", [DYNAMIC, LONG], ids=["dynamic", "longrope"])
def test_where_wavelengths_depend_on_a_texts_length_each_text_is_as_alone(model):
    params = weights(model, seed=1, scale=0.5)
    wanted = [continued(model, params, [prompt], max_new_tokens=NEW)[0] for prompt in CROSSING]
    some = [Engine(model, params, **ROOM | {"pages": 7}, trace=True) for _ in range(2)]
    for seed, engine in enumerate(some):
        assert tokens_of(arriving(engine, CROSSING, max_new_tokens=NEW, seed=seed)) == wanted
    assert any(moment.preempted for engine in some for moment in engine.timeline)
    # Among pages of texts that begin alike and are turned otherwise.
    assert tokens_of(arriving(engine, CROSSING[::-1], max_new_tokens=NEW)) == wanted[::-1]


def test_each_of_n_texts_is_turned_as_a_long_one_when_it_becomes_one():
    params = weights(LONG, seed=1, scale=0.5)
    prompt = [3] * LONG.rope_scaling.original_context
    engine = Engine(LONG, params, **ROOM | {"pages": 7})
    (some,) = engine.generate([prompt], max_new_tokens=4, n=2, sampling=Sampling(1.5, seed=0, log_probs="raw"))
    whole = score(LONG, params, [prompt + one.tokens for one in some])
    for one, scored in zip(some, whole, strict=True):
        np.testing.assert_allclose(one.log_probs[1:], scored.log_probs[-3:], atol=1e-5)


@pytest.mark.parametrize("prompt", CROSSING[:2], ids=["outgrows", "long"])
def test_a_beam_is_turned_as_a_text_that_is_written_at_one_go(prompt):
    """Each of its tokens is a request, and yet wavelengths are by the length of the prompt that there was."""
    params = weights(DYNAMIC, seed=1, scale=0.5)
    engine = Engine(DYNAMIC, params, **ROOM, top=24)
    ((whole,),) = engine.generate([prompt], max_new_tokens=NEW, sampling=Sampling(0, log_probs="raw"))
    ((beam,),) = beam_search(engine, [prompt], beams=1, max_new_tokens=NEW, length_penalty=0)
    assert list(beam.tokens) == whole.tokens
    assert beam.score == pytest.approx(sum(whole.log_probs), abs=1e-5)
    with pytest.raises(ValueError, match="written=9 of the prompt's 9 tokens"):
        engine.submit(CROSSING[0], max_new_tokens=1, written=9)


OWN = Path(__file__).parent.parent / "data_files" / "interop"
OFTEN = ("llama", "gemma2", "glm", "t5", "bart")
RARELY = ("gpt2", "llama3", "mistral", "mixtral", "gemma", "opt", "bloom", "bloom_pow2", "rwkv", "t5_unscaled", "t5_untied")
HERE = ("llama_dynamic", "phi3_longrope", "rwkv7")
SELDOM = ("cohere", "falcon_7b", "gemma3", "glm4", "gptj", "gpt_neox", "olmo2", "qwen2_moe", "qwen2_window", "qwen3", "rwkv6", "stablelm")
CASES = [*OFTEN, *(f"own/{name}" for name in HERE)]
CASES += [pytest.param(name, marks=pytest.mark.slow) for name in (*RARELY, *(f"own/{name}" for name in SELDOM))]


@pytest.mark.parametrize("case", CASES)
def test_greedy_text_is_what_transformers_finds(case, request):
    folder = OWN / case.removeprefix("own/") if "own/" in case else request.getfixturevalue("shared") / "goldens" / case
    golden, (model, params) = mapped(folder / "golden.safetensors"), interop.load(folder)
    reads = isinstance(model.config, EncoderDecoder)
    prompts, found = np.asarray(golden["input.prompt"]).tolist(), np.asarray(golden["greedy"])
    start, wanted = int(found[0, 0]), found[:, 1 if reads else len(prompts[0]) :].tolist()
    never = Sampling(0, logit_bias=((2 if not reads else 1, -np.inf),))
    engine = Engine(model, params, rows=1, page=5, chunk=16)
    begun = {"start_id": start} if reads else {}
    jobs = [engine.submit(prompt, max_new_tokens=len(wanted[0]), sampling=never, **begun) for prompt in prompts]
    engine.run()
    assert tokens_of(jobs) == wanted
