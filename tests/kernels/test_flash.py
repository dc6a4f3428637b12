"""Our own flash attention where there is no GPU: in Pallas' interpreter, which looks for races, lowered for CUDA, and compiled for an absent H100."""

import re
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh

from lmx.core.execution import Execution
from lmx.kernels import chunked, cudnn, devices, flash, flash_blocks, flash_pipeline
from lmx.kernels import flash_sight as sights
from lmx.kernels.attention import attention, why
from lmx.kernels.masks import Mask
from lmx.parallel import absent
from lmx.parallel import attention as parallel
from lmx.parallel.layout import Layout
from lmx.parallel.rules import rules

QUERIES, KEYS, HEADS, KV_HEADS, DIM = 130, 150, 2, 1, 64
SLOPES = np.array([0.25, 0.0625], np.float32)
H100 = "NVIDIA H100 80GB HBM3"


@dataclass(frozen=True)
class Case:
    """What of a call is fixed; lengths are no multiples of any block, and all blocks are entered and left more than once."""

    causal: bool = True
    window: int | None = None
    order: str = "index"
    segments: bool = False
    prefix: bool = False
    index: bool = False
    softcap: float | None = None
    alibi: bool = False
    dtype: str = "bfloat16"
    queries: int = QUERIES
    keys: int = QUERIES

    @property
    def scale(self) -> float:
        return DIM**-0.5

    def mask(self, rng: np.random.Generator) -> Mask:
        mask = Mask(self.causal, self.window, self.order)
        if self.segments:  # texts in order, then padding, whose queries see nothing
            cuts = np.sort(rng.integers(1, self.queries, 3))
            segments = np.searchsorted(cuts, np.arange(self.queries), side="right")
            segments = np.where(segments == 3, 0, segments + 1).astype(np.int32)[None]
            positions = np.stack([np.arange(self.queries) - np.r_[0, cuts][np.searchsorted(cuts, np.arange(self.queries), side="right")]])
            positions = positions.astype(np.int32)
            mask = mask.replace(query_segments=segments, key_segments=segments, query_positions=positions, key_positions=positions)
        if self.prefix:
            mask = mask.replace(key_prefix=(rng.random((1, self.keys)) < 0.3).astype(np.int32))
        if self.index:
            mask = mask.replace(query_index=rng.permutation(self.queries).astype(np.int32), key_index=np.arange(self.keys, dtype=np.int32))
        return mask

    def arrays(self, rng: np.random.Generator) -> list[jax.Array]:
        shapes = [(self.queries, HEADS), (self.keys, KV_HEADS), (self.keys, KV_HEADS), (self.queries, HEADS)]
        return [jnp.asarray(rng.normal(size=(1, length, heads, DIM)), self.dtype) for length, heads in shapes]


CASES = {
    "causal": Case(),
    "both ways, more keys than queries, fp16": Case(causal=False, keys=KEYS, queries=70, dtype="float16"),
    "packed window, capped": Case(window=40, segments=True, softcap=3.0),
    "packed by positions, ALiBi": Case(order="positions", segments=True, alibi=True),
    "packed prefixes": Case(prefix=True, segments=True),
    "out of order, ALiBi": Case(index=True, alibi=True),
}


@cache
def kernels(case: Case):
    """Output, log-sum-exp (of packed cases) and gradients from the kernels, compiled once a case."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    knobs = {"scale": case.scale, "softcap": case.softcap, "interpret": plgpu.InterpretGPUParams(detect_races=True)}
    slopes = SLOPES if case.alibi else None

    def run(q, k, v, g, mask):
        if not case.segments:
            out, pullback = jax.vjp(lambda *a: flash.attention(*a, mask, slopes=slopes, **knobs), q, k, v)
            return out, None, *pullback(g)
        out, lse = flash.with_lse(q, k, v, mask, slopes=slopes, **knobs)
        return out, lse, *flash.gradients(q, k, v, mask, lse, chunked.weigh(g, out), g, slopes=slopes, **knobs)

    return jax.jit(run)


def interpreter():
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    return interpret_pallas_call


def races_found() -> bool:
    return interpreter().get_races().races_found


def exact(case: Case, q, k, v, g, mask: Mask) -> list[np.ndarray]:
    """The same in float64 NumPy, head by head, its derivatives by hand."""
    q, k, v, g = (np.asarray(a, np.float64)[0] for a in (q, k, v, g))
    allowed = np.broadcast_to(np.asarray(mask.dense(len(q), len(k))), (1, len(q), len(k)))[0]
    distances = np.broadcast_to(np.asarray(mask.distances(len(q), len(k))), (1, len(q), len(k)))[0]
    out, lse = np.zeros_like(q), np.full(q.shape[:2], float(chunked.NONE))
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for head in range(HEADS):
        shared = head * KV_HEADS // HEADS
        scores = case.scale * q[:, head] @ k[:, shared].T
        bent = np.ones_like(scores)
        if case.softcap:
            bent = 1 - np.tanh(scores / case.softcap) ** 2
            scores = case.softcap * np.tanh(scores / case.softcap)
        if case.alibi:
            scores = scores - float(SLOPES[head]) * distances
        some = allowed.any(1)
        scores, seen = np.where(allowed, scores, -np.inf)[some], allowed[some]
        top = scores.max(1, keepdims=True)
        weights = np.where(seen, np.exp(scores - top), 0)
        lse[some, head] = top[:, 0] + np.log(weights.sum(1))
        weights /= weights.sum(1, keepdims=True)
        out[some, head] = weights @ v[:, shared]
        d_weights = g[some, head] @ v[:, shared].T
        d_scores = case.scale * bent[some] * weights * (d_weights - (weights * d_weights).sum(1, keepdims=True))
        dq[some, head] = d_scores @ k[:, shared]
        dk[:, shared] += d_scores.T @ q[some, head]
        dv[:, shared] += weights.T @ g[some, head]
    return [out, lse, dq, dk, dv]


def rough(case: Case, q, k, v, g, mask: Mask) -> list[jax.Array]:
    """The textbook with everything in the type of the inputs, but for the log-sum-exp, which has nothing to do with it."""

    def run(q, k, v):
        k, v = (jnp.repeat(a, HEADS // KV_HEADS, 2) for a in (k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * jnp.asarray(case.scale, q.dtype)
        if case.softcap:
            scores = case.softcap * jnp.tanh(scores / case.softcap)
        if case.alibi:
            scores -= (SLOPES[:, None, None] * mask.distances(case.queries, case.keys)[:, None]).astype(q.dtype)
        allowed = mask.dense(case.queries, case.keys)[:, None]
        weights = jnp.where(allowed, jax.nn.softmax(jnp.where(allowed, scores, jnp.finfo(q.dtype).min), -1), 0)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

    out, pullback = jax.vjp(run, q, k, v)
    return [out, None, *pullback(g)]


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate])  # to shrink a failure would take minutes
@given(seed=st.integers(0, 2**16))
def test_values_and_gradients_err_no_more_than_twice_as_much_as_the_textbook_in_the_same_type(name, seed):
    case, rng = CASES[name], np.random.default_rng(seed)
    mask, arrays = case.mask(rng), case.arrays(rng)
    found = jax.block_until_ready(kernels(case)(*arrays, mask))
    assert not races_found()
    for what, ours, true, theirs in zip(
        ("out", "lse", "dq", "dk", "dv"), found, exact(case, *arrays, mask), rough(case, *arrays, mask), strict=True
    ):
        if ours is None:
            continue
        ours = np.asarray(ours, np.float64)[0]
        assert np.isfinite(ours).all(), what
        if what == "lse":
            np.testing.assert_allclose(ours, true, rtol=1e-5, atol=1e-4)
            continue
        error = np.abs(ours - true).max()
        allowance = 2 * np.abs(np.asarray(theirs, np.float64)[0] - true).max()
        assert error <= allowance, f"{what} errs by {error}, of {allowance}"


def test_the_interpreter_would_see_a_block_replaced_too_early(monkeypatch):
    def hasty(belt, step):
        for lane in belt.lanes:
            flash_pipeline.pl.when(step + belt.stages < belt.total)(lambda lane=lane: belt.fetch(lane, step + belt.stages))

    monkeypatch.setattr(flash_pipeline.Belt, "renew", hasty)
    monkeypatch.setattr(
        flash_blocks, "table", lambda: {(kernel, DIM, "plain"): flash_blocks.Blocks(64, 64, 2, True) for kernel in flash_blocks.KERNELS}
    )
    from jax.experimental.pallas import mosaic_gpu as plgpu

    q, k, v, _ = CASES["causal"].arrays(np.random.default_rng(0))
    try:  # it takes note, or raises (JAX 0.12), or a barrier completes twice before anybody has seen it
        jax.block_until_ready(flash.attention(q, k, v, Mask(), scale=1.0, interpret=plgpu.InterpretGPUParams(detect_races=True)))
        seen = races_found()
    except jax.errors.JaxRuntimeError as error:
        seen = re.search("RACE DETECTED|no threads observed phase", str(error))
    interpreter().reset_gpu_interpret_mode_state()
    assert seen


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    case=st.builds(
        Case,
        causal=st.just(True),
        window=st.none() | st.integers(1, 20),
        order=st.just("index"),
        segments=st.booleans(),
        index=st.booleans(),
        queries=st.just(24),
        keys=st.just(24),
    )
    | st.builds(Case, causal=st.booleans(), segments=st.booleans(), prefix=st.booleans(), queries=st.just(24), keys=st.just(24)),
    sizes=st.sampled_from([(8, 4), (4, 8)]),
)
def test_blocks_that_are_visited_hold_all_that_is_seen_and_clear_ones_nothing_else(seed, case, sizes):
    mask = case.mask(np.random.default_rng(seed))
    q = np.zeros((1, 24, 1, 1))
    (tile, block), length = sizes, 32
    tiles, blocks = length // tile, length // block
    of_q, of_k = sights.about(mask, q, q, length, length, None)
    sight = sights.sight(mask, 24, length)
    some, clear = sights.blocks_seen(sight, of_q, of_k, (tiles, tile), (blocks, block))
    allowed = np.zeros((length, length), bool)
    allowed[:24, :24] = np.asarray(mask.dense(24, 24))
    cut = allowed.reshape(tiles, tile, blocks, block)
    table = np.asarray(sights.runs(some, clear))
    backwards = np.asarray(sights.runs(some.swapaxes(1, 2), clear.swapaxes(1, 2)))
    for i in range(tiles):
        runs = [sights.Run(*table[0, i])]
        if not sights.told(mask):
            runs.append(sights.keys_run(sight, jnp.int32(i * tile), tile, block, blocks))
        for j in range(blocks):
            here = cut[i, :, j]
            real = here[: max(0, 24 - i * tile)]
            for run in runs:
                visited = run.first <= j < run.last
                assert visited or not here.any()
                assert not visited or run.masked(j) or real.all()
            first, last, begin, end = backwards[0, j]
            assert first <= i < last or not here.any()
            assert not (first <= i < last and begin <= i < end) or real.all()


def test_long_masks_skip_what_they_hide():
    """Tiles of 128 queries and blocks of 128 keys of 4096."""
    blank = jax.ShapeDtypeStruct((1, 4096, 1, 64), jnp.bfloat16)

    def visited(mask):
        of_q, of_k = sights.about(mask, blank, blank, 4096, 4096, None)
        some, clear = sights.blocks_seen(sights.sight(mask, 4096, 4096), of_q, of_k, (32, 128), (32, 128))
        first, last, begin, end = np.asarray(sights.runs(some, clear)).sum((0, 1))
        return last - first, end - begin

    segments = np.repeat(np.arange(1, 9, dtype=np.int32), 512)[None]
    assert visited(Mask(causal=False)) == (1024, 1024)
    assert visited(Mask()) == (32 * 33 // 2, 32 * 31 // 2)
    assert visited(Mask(window=128)) == (63, 0)
    assert visited(Mask(query_segments=segments, key_segments=segments)) == (8 * 10, 8 * 6)


def test_what_it_cannot_do_is_refused():
    blank = partial(jax.ShapeDtypeStruct, (1, 8, 2, 64))
    bf16 = blank(jnp.bfloat16)
    refusal = lambda q=bf16, k=bf16, v=bf16, **knobs: flash.refusal(q, k, v, Mask(), **knobs)  # noqa: E731
    assert refusal() is None
    assert "bfloat16 or float16, one for all, not float32" in refusal(*[blank(jnp.float32)] * 3)
    assert "not bfloat16, float16" in refusal(v=blank(jnp.float16))
    narrow = jax.ShapeDtypeStruct((1, 8, 2, 80), jnp.bfloat16)
    assert "head dimensions of 64, 128, 192, 256, the same for values, not 80 and 80" in refusal(narrow, narrow, narrow)
    assert "a scale and a soft cap above 0, not 1.0 and -1.0" in refusal(softcap=-1.0)
    assert refusal(bias=np.ones(1)) == "takes no learned bias"
    assert refusal(keep=np.ones(1)) == "takes no dropout"
    with pytest.raises(ValueError, match="attention='flash' runs on Hopper GPUs, not cpu; use auto"):
        attention(*[jnp.zeros((1, 8, 2, 64), jnp.bfloat16)] * 3, Mask(), implementation="flash")


def test_auto_says_what_it_takes_and_why(monkeypatch):
    q, k = (jax.ShapeDtypeStruct((1, 4096, heads, 128), jnp.bfloat16) for heads in (8, 2))
    small = jax.ShapeDtypeStruct((1, 64, 8, 128), jnp.float32)
    assert why(small, small, Mask())[0] == "dense"
    assert why(q, k, Mask(), softcap=5.0) == ("chunked", "there are more than 2048 keys")
    assert why(jax.ShapeDtypeStruct((1, 1, 8, 128), jnp.bfloat16), k, Mask())[0] == "single"
    monkeypatch.setattr(devices, "kind", lambda: H100)
    assert why(q, k, Mask())[0] == "cudnn"
    unmeasured = "flash does what is asked, and is taken by name until it has been measured"
    assert why(q, k, Mask(), softcap=5.0) == ("chunked", f"cudnn takes no soft cap; {unmeasured}; there are more than 2048 keys")
    assert unmeasured in why(q, k, Mask(), slopes=np.ones(8))[1]
    assert why(q, k, Mask(), softcap=5.0, implementation="xla")[0] == "chunked"
    name, reason = why(q, k, Mask(), bias=np.ones(1))
    assert (name, reason) == ("chunked", "cudnn takes no learned bias; flash takes no learned bias; there are more than 2048 keys")
    segments = np.ones((1, 4096), np.int32)
    monkeypatch.setattr(cudnn, "LONGEST", 2048)
    assert unmeasured in why(q, k, Mask(query_segments=segments, key_segments=segments))[1]
    monkeypatch.setattr(devices, "kind", lambda: "NVIDIA A100-SXM4-80GB")
    assert why(q, k, Mask(), softcap=5.0)[0] == "chunked"


def test_the_table_is_read_as_it_is_written(tmp_path):
    entries = flash_blocks.table()
    assert {head_dim for kernel, head_dim, _ in entries if kernel == "forward"} == set(flash.WIDTHS)
    assert {head_dim for kernel, head_dim, _ in entries if kernel != "forward"} == {w for w in flash.WIDTHS if w <= flash.BACKWARD}
    flash_blocks.write(entries, "nowhere", tmp_path / "table.json")
    assert flash_blocks.table(tmp_path / "table.json") == entries
    with pytest.raises(ValueError, match="want queries and keys in multiples of 64"):
        flash_blocks.Blocks(64, 96, 2, True)
    with pytest.raises(ValueError, match="at least two stages"):
        flash_blocks.Blocks(64, 64, 1, False)


def test_gradients_of_wide_heads_are_chunked(monkeypatch):
    def wanted(*_):
        return [jnp.float32(i) for i in range(3)] + [None]

    monkeypatch.setattr(chunked, "backward", wanted)
    wide = jnp.zeros((1, 8, 1, 256), jnp.bfloat16)
    line = jnp.zeros((1, 8, 1))
    assert [float(a) for a in flash.gradients(wide, wide, wide, Mask(), line, line, wide, scale=1.0)] == [0, 1, 2]


def whole(case: Case, head_dim: int, sharding=None):
    """A forward and backward pass of a case through the door, and what it takes."""
    struct = partial(jax.ShapeDtypeStruct, sharding=sharding)
    arrays = [struct((2, 1000, heads, head_dim), jnp.bfloat16) for heads in (8, 2, 2)]
    line = struct((2, 1000), jnp.int32)

    def both(q, k, v, segments, slopes):
        mask = Mask(case.causal, case.window, case.order)
        if case.segments:
            mask = mask.replace(query_segments=segments, key_segments=segments, query_positions=segments, key_positions=segments)
        if case.prefix:
            mask = mask.replace(key_prefix=segments)
        knobs = {"softcap": case.softcap, "slopes": slopes if case.alibi else None}
        out, pullback = jax.vjp(lambda *a: attention(*a, mask, **knobs, implementation="flash"), q, k, v)
        return out, pullback(out)

    return both, (*arrays, line, struct((8,), jnp.float32))


@pytest.mark.parametrize(("head_dim", "calls"), [(64, 3), (256, 1)])
def test_it_lowers_for_cuda(head_dim, calls):
    device = AbstractDevice(device_kind=H100, num_cores=132, platform="gpu")
    both, arguments = whole(CASES["causal"], head_dim)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        text = jax.jit(both).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == calls


KINDS = {
    "plain": [Case(), Case(causal=False), Case(window=300), Case(softcap=30.0)],
    "reading": [
        Case(segments=True),
        Case(order="positions", segments=True, alibi=True),
        Case(alibi=True),
        Case(segments=True, prefix=True),
    ],
}


@pytest.mark.aot
def test_each_device_of_a_mesh_runs_it_on_its_rows_and_heads(h100):
    layout = Layout(data=2, tensor=2)
    mesh = absent.mesh(layout, h100)
    where = jax.sharding.NamedSharding(mesh.abstract_mesh, jax.sharding.PartitionSpec("data", None, "tensor", None))
    q, k = (jax.ShapeDtypeStruct((4, 4096, heads, 128), jnp.bfloat16, sharding=where) for heads in (8, 2))

    execution = Execution(rules=rules(layout), attention="flash")

    def both(q, k, v):
        out, pullback = jax.vjp(lambda *a: parallel.attention(*a, Mask(), execution, softcap=30.0), q, k, v)
        return out, pullback(out)

    text = absent.compiled(jax.jit(both), mesh, q, k, k).as_text()
    calls = [line for line in text.splitlines() if 'custom_call_target="mosaic_gpu' in line]
    assert len(calls) == 3
    assert "(bf16[2,4096,4,128]{3,2,1,0}, f32[2,4,4096]{2,1,0}) custom-call" in calls[0]


@pytest.mark.aot
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", flash.WIDTHS)
def test_every_entry_of_the_table_compiles_for_an_h100_without_spilling(h100, kind, head_dim, monkeypatch, capfd):
    """Within shared memory too, beyond which the compiler refuses. XLA's own kernels are not looked at."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    mesh = absent.mesh(Layout(), h100)
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for case in KINDS[kind]:
        both, arguments = whole(case, head_dim, where)
        with jax.set_mesh(mesh):
            jax.jit(both).lower(*arguments).compile()
        said = capfd.readouterr()
        spills = re.findall(r"(\d+) bytes spill stores", said.out + said.err)
        assert len(spills) >= (3 if head_dim <= flash.BACKWARD else 1), f"{case} was not assembled"
        # Where everything comes together on the widest heads, two numbers that are no array find no room.
        assert max(map(int, spills)) <= (8 if head_dim == 256 and case.segments and (case.prefix or case.alibi) else 0), case
