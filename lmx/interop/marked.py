"""The tokens by which a denoising marks texts (`lmx.data.denoising`), read and written as words, whether a run's tokenizer knows them or not."""

import re
from collections.abc import Sequence

from lmx.data.denoising import BlankInfilling, MaskedLM, Mixture, Objective, SpanCorruption, TextInfilling
from lmx.data.tokenizers import Tokenizer
from lmx.infer.blanks import Marks

BLANK = "[MASK]"
"""What stands for a blank in a prompt (GLM: Du et al., 2022)."""


class Marked:
    """A run's tokenizer, and behind its last token those that the run's denoising has more.

    In texts a mark is written as the tokenizer writes it, else as its paper does: `[MASK]` (GLM: `BLANK`), `<mask>` (BART), `<extra_id_0>`, ... (T5).
    So `decode` shows it. Other tokens behind the tokenizer's last (what begins and ends a text or a piece) are left out.
    """

    def __init__(self, tokenizer: Tokenizer, objective: Objective):
        self.tokenizer = tokenizer
        named = _named(objective)
        known = {tokenizer.token(id): id for id in named.values() if id < tokenizer.vocab}
        self._names = {name: id for name, id in named.items() if id >= tokenizer.vocab}
        # What the tokenizer itself finds in texts it finds as it was made to, with the white space beside.
        names = self._names | {name: id for name, id in known.items() if id not in tokenizer.encode(name)}
        self._split = re.compile(f"({'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})") if names else None
        self._ids, self._shown = names, {id: name for name, id in self._names.items()}
        self.vocab = max((tokenizer.vocab, *(id + 1 for id in (*named.values(), *_silent(objective)))))
        self.bos_id, self.eos_id, self.pad_id = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
        self.fingerprint = tokenizer.fingerprint

    def encode(self, text: str) -> list[int]:
        if self._split is None:
            return list(self.tokenizer.encode(text))
        parts = [part for part in self._split.split(text) if part]
        return [id for part in parts for id in ([self._ids[part]] if part in self._ids else self.tokenizer.encode(part))]

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        text, plain = "", []
        for id in map(int, ids):
            if not 0 <= id < self.vocab:
                raise ValueError(f"token id {id} is outside the vocabulary 0..{self.vocab - 1}")
            if id in self._shown:
                text, plain = text + self.tokenizer.decode(plain) + self._shown[id], []
            elif id < self.tokenizer.vocab:
                plain.append(id)
        return text + self.tokenizer.decode(plain)

    def token(self, id: int) -> str:
        return self.tokenizer.token(id) if id < self.tokenizer.vocab else self._shown.get(id, f"<{id}>")


def marks_of(objective: Objective | None) -> Marks | None:
    """Those of the blanks that a run was trained to fill; None of any other."""
    return Marks((objective.mask,), objective.start, objective.end) if isinstance(objective, BlankInfilling) else None


def _named(objective: Objective) -> dict[str, int]:
    """How the marks of texts are written."""
    match objective:
        case BlankInfilling(mask=mask):
            return {BLANK: mask}
        case MaskedLM(mask=mask) | TextInfilling(mask=mask):
            return {"<mask>": mask}
        case SpanCorruption(sentinels=sentinels):
            return {f"<extra_id_{i}>": id for i, id in enumerate(sentinels)}
        case Mixture(denoisers=parts):
            return {name: id for part in parts for name, id in _named(part.objective).items()}
    return {}


def _silent(objective: Objective) -> tuple[int, ...]:
    """What begins and ends a text, or a piece of one."""
    ids = (getattr(objective, name, None) for name in ("begin", "start", "end", "eos"))
    return tuple(id for id in ids if id is not None)
