"""What is compiled for several CPU devices is never read from the compilation cache."""

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

import runs
from lmx.parallel.layout import Layout
from lmx.train.program import build


@pytest.fixture
def cache(tmp_path):
    """A compilation cache of this test's own, which keeps everything."""
    own = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_enable_compilation_cache": True,
    }
    before = {name: getattr(jax.config, name) for name in own}
    for name, value in own.items():
        jax.config.update(name, value)
    reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


@pytest.mark.parametrize(("layout", "kept"), [(Layout(), True), (Layout(data=2), False), (Layout(context=2, pipeline=2), False)])
def test_programs_for_several_cpu_devices_are_not_kept(cache, layout, kept):
    program = build(runs.experiment(layout=layout, microbatches=2))
    jax.block_until_ready(program.initial())
    assert any(path.name.startswith("jit_initial_state") for path in cache.iterdir()) == kept
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.0
