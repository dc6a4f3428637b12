"""What transformers' beam search finds with the decoders of `beam_models.py`: run by hand, not by pytest.

    python tests/infer/make_beams.py

writes transformers_beams.json. Needs torch and transformers of version 5, which lmx itself does not.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers
from beam_models import CONFIGS, VOCAB, write
from transformers import AutoModelForCausalLM, GenerationConfig

HERE = Path(__file__).parent
PROMPTS = 4
STOPS = ([], [2], [2, 5, 11], [1, 3, 8, 13, 21, 34])
PENALTIES = (1.0, 0.0, 2.0, -1.0, 0.6)


def cases(rng: np.random.Generator) -> list[dict]:
    """Every kind of early stopping with every number of beams, the rest at random."""
    found = []
    for beams in (2, 3, 5):
        for early in (False, True, "never"):
            for _ in range(3):
                settings = {
                    "beams": beams, "early_stopping": early, "max_new_tokens": int(rng.choice([1, 4, 9, 14])),
                    "length_penalty": float(rng.choice(PENALTIES)), "stop_ids": STOPS[rng.choice(4, p=[0.1, 0.2, 0.3, 0.4])],
                }  # fmt: skip
                found.append({**settings, "prompts": rng.integers(VOCAB, size=(PROMPTS, rng.integers(1, 9))).tolist()})
    return found


def searched(model, case: dict) -> list[list[list]]:
    """Of each prompt the texts, [tokens, score] with the stop token, best first."""
    beams, stops, prompts = case["beams"], case["stop_ids"], torch.tensor(case["prompts"])
    how = GenerationConfig(
        num_beams=beams, num_return_sequences=beams, do_sample=False, max_new_tokens=case["max_new_tokens"], pad_token_id=0,
        eos_token_id=stops or None, length_penalty=case["length_penalty"], early_stopping=case["early_stopping"],
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    model.generation_config.eos_token_id = None  # which would stand in for none
    out = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=how)
    texts = []
    for row, ids in enumerate(out.sequences[:, prompts.shape[1] :].tolist()):
        end = next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))
        texts.append([ids[:end], round(float(out.sequences_scores[row]), 5)])
    return [texts[i : i + beams] for i in range(0, len(texts), beams)]


def telling(model, rng: np.random.Generator) -> list[dict]:
    """Cases that differ by early stopping alone, and whose texts do."""
    found = []
    for penalty in (1.0, 2.0):
        for _ in range(40):
            case = {
                "beams": 2, "early_stopping": False, "max_new_tokens": 14, "length_penalty": penalty, "stop_ids": STOPS[3],
                "prompts": rng.integers(VOCAB, size=(PROMPTS, 4)).tolist(),
            }  # fmt: skip
            pair = [case | {"early_stopping": early} for early in (False, "never")]
            pair = [one | {"texts": searched(model, one)} for one in pair]
            if pair[0]["texts"] != pair[1]["texts"]:
                found += pair
                break
    return found


def main() -> None:
    found = {}
    for name in CONFIGS:
        with TemporaryDirectory() as folder:
            write(name, Path(folder))
            model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
        found[name] = [{**case, "texts": searched(model, case)} for case in cases(np.random.default_rng(len(name)))]
        found[name] += telling(model, np.random.default_rng(1))
        ended = [len(t[0]) < c["max_new_tokens"] for c in found[name] for texts in c["texts"] for t in texts]
        print(f"{name}: {len(found[name])} cases, {sum(ended)} of {len(ended)} texts stopped early")
    made_by = f"transformers {transformers.__version__}: generate(num_beams=...)"
    lines = {name: ",\n".join(json.dumps(case, separators=(",", ":")) for case in group) for name, group in found.items()}
    whole = ",\n".join(f'"{name}": [\n{text}\n]' for name, text in lines.items())
    (HERE / "transformers_beams.json").write_text(f'{{"made_by": "{made_by}",\n{whole}\n}}\n')


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
