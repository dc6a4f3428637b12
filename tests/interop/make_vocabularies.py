"""What transformers makes of a grown vocabulary: run by hand, not by pytest.

    python tests/interop/make_vocabularies.py SHARED

Makes tests/data_files/interop/vocabularies.safetensors: of some cases of SHARED/goldens, with three more tokens and padded to a multiple
of 8 by `resize_token_embeddings` (its noise of 1e-9 of the variance left out), `CASE.input_ids` and `CASE.logits` of them. `check_exports.py`
compares what transformers computes with lmx's exports of the same. Needs torch and transformers 5.
"""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

HERE = Path(__file__).parent.parent / "data_files" / "interop" / "vocabularies.safetensors"
CASES = {
    "gpt2": transformers.AutoModelForCausalLM,
    "llama": transformers.AutoModelForCausalLM,
    "gemma2": transformers.AutoModelForCausalLM,
    "bert": transformers.AutoModelForMaskedLM,
    "bart": transformers.AutoModelForSeq2SeqLM,
    "t5": transformers.AutoModelForSeq2SeqLM,
    "gptj": transformers.AutoModelForCausalLM,
}


def outputs(model, tokens):
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=tokens, **more).logits


class Middle:
    """A distribution that gives its mean."""

    def __init__(self, mean, covariance_matrix):
        self.mean = mean

    def sample(self, sample_shape):
        return self.mean.expand(*sample_shape, -1)


def write(shared: Path) -> None:
    torch.distributions.multivariate_normal.MultivariateNormal = Middle
    kept = {}
    for case, kind in CASES.items():
        folder = shared / "goldens" / case
        model = kind.from_pretrained(folder if folder.exists() else HERE.parent / case, dtype=torch.float32)
        old = model.config.vocab_size
        model.resize_token_embeddings(old + 3, pad_to_multiple_of=8)
        torch.manual_seed(len(case))
        tokens = torch.randint(3, old + 3, (1, 8))
        tokens[0, -2:] = torch.tensor([old, old + 2])
        kept |= {f"{case}.input_ids": tokens.int(), f"{case}.logits": outputs(model, tokens).detach().contiguous()}
    save_file(kept, HERE)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    write(Path(sys.argv[1]))
