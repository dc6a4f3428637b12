"""One family of each structure, in the settings that its checkpoints have: trained on data x fsdp x tensor, it has one device's numbers."""

from dataclasses import replace

import pytest

import runs
from lmx import verify
from lmx.interop.families import FAMILIES
from lmx.models.config import EncoderDecoder, Model
from lmx.parallel.layout import Layout
from lmx.train.experiment import check
from lmx.train.objectives import CausalLM, MaskedLM, Seq2Seq
from lmx.verify import BOUND, differences

pytestmark = pytest.mark.usefixtures("scanned")

LAYOUT = Layout(data=2, fsdp=2, tensor=2)
SIZES = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 32}
CONFIGS = {
    "gpt2": {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "llama": LLAMA,
    "gemma2": LLAMA | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "mixtral": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16},
    "glm": LLAMA | {"head_dim": 8, "pad_token_id": 0},
    "t5": {"vocab_size": 48, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 4, "num_layers": 1, "n_positions": 40},
    "bert": SIZES | {"max_position_embeddings": 32, "architectures": ["BertForMaskedLM"]},
    "rwkv": {
        "vocab_size": 48,
        "hidden_size": 16,
        "attention_hidden_size": 24,
        "num_hidden_layers": 2,
        "context_length": 32,
        "rescale_every": 2,
    },
}
"""As their `config.json` says it."""


def model_of(family: str) -> Model:
    """What `lmx.interop` makes of the config, with larger initial weights: small ones train alike whatever is wrong."""
    config = FAMILIES[family].read({"model_type": family} | CONFIGS[family])
    if isinstance(config, EncoderDecoder):
        config = replace(config, encoder=replace(config.encoder, init_std=0.1))
    return replace(config, init_std=0.1)


@pytest.fixture
def batches(monkeypatch):
    """Beside what every model reads: a prefix that GLM reads in both directions, and the sentences that BERT tells apart."""
    packed = verify.packed

    def more(run, step: int) -> dict:
        batch = packed(run, step)
        if isinstance(run.objective, MaskedLM):
            return batch | {"token_types": batch["segments"] % 2}
        return batch | ({"prefix": (batch["positions"] < 3).astype("int32")} if run.name == "glm" else {})

    monkeypatch.setattr(verify, "packed", more)


@pytest.mark.usefixtures("batches")
@pytest.mark.parametrize("family", CONFIGS)
def test_numbers_on_eight_devices_are_those_of_one(family):
    model = model_of(family)
    objective = Seq2Seq() if isinstance(model, EncoderDecoder) else CausalLM() if model.causal else MaskedLM()
    run = runs.experiment(name=family, model=model, objective=objective, layout=LAYOUT)
    check(run)
    one = runs.train_from_shared_start(replace(run, layout=Layout()), steps=2)
    found = differences(runs.train_from_shared_start(run, steps=2), one)
    assert max(found.values()) < BOUND, {name: value for name, value in found.items() if not value < BOUND}
    assert one["losses"][1] != one["losses"][0]
