"""Denoising objectives as configs: what is taken out of a text, what stands in its place, and how many columns of a row that needs.

What they do to a text is `lmx.data.corruption`; how rows are made of it, `lmx.data.denoised`. Every special token is an explicit id: the
tokens of a tokenizer have no roles that could be guessed.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Form = Literal["encoder_decoder", "prefix"]
FORMS = get_args(Form)
"""How a source and its target become a row. `"encoder_decoder"`: two sides, the decoder's inputs being its targets behind a start token.
`"prefix"`: one text for a decoder that reads the source in both directions, and predicts the target."""

SHORTEST = 2  # tokens of a text: one to keep and one to predict


@dataclass(frozen=True)
class PrefixLM:
    """Predict the rest of a text from its beginning, of random length (Liu et al. 2018; Raffel et al. 2020, 3.2.1)."""

    form: Form = "prefix"
    least: float = 0.0
    """Smallest share of a text that is its prefix, which is uniform between the two (and leaves at least a token on either side)."""
    most: float = 1.0
    eos: int | None = None
    """Put after the target (and after an encoder's source); None: the text as it is."""
    start: int | None = None
    """First input of a decoder, in form encoder_decoder (T5 uses its padding, 0)."""

    def prefixes(self, n: int) -> tuple[int, int]:
        """The shortest and the longest prefix of n tokens."""
        least = min(max(int(self.least * n), 1), n - 1)
        return least, min(max(int(self.most * n), least), n - 1)

    def sizes(self, n: int) -> tuple[int, int]:
        least, most = self.prefixes(n)
        end = self.eos is not None
        return (n + end - 1, 0) if self.form == "prefix" else (most + end, n - least + end)


@dataclass(frozen=True)
class MaskedLM:
    """Predict masked tokens of a text that is seen in both directions (BERT: Devlin et al. 2019)."""

    mask: int
    vocab: int
    """Random tokens are drawn from ids below this."""
    rate: float = 0.15
    """Share of the tokens that are predicted (rounded, at least one)."""
    random: float = 0.1
    """Share of those that become a random token."""
    keep: float = 0.1
    """Share of those that stay as they are; the rest become `mask`."""
    whole_word: bool = False
    """Choose words rather than tokens, as many as fit into the rate (at least one). Needs to know which tokens begin a word."""
    begin: int | None = None
    """Put before the text ([CLS]); never masked."""
    eos: int | None = None
    """Put after the text ([SEP]); never masked."""

    def masked(self, n: int) -> int:
        """How many of n tokens are predicted (with whole_word at most, but for a single longer word)."""
        return max(round(self.rate * n), 1)

    def sizes(self, n: int) -> tuple[int, int]:
        return n + (self.begin is not None) + (self.eos is not None), 0


@dataclass(frozen=True)
class SpanCorruption:
    """Predict spans that were replaced by sentinels, each after its sentinel (T5: Raffel et al. 2020, 3.1.4).

    As in T5's code a text begins with a kept token and ends with a span, and spans and what lies between them are random compositions.
    """

    sentinels: tuple[int, ...]
    """Ids in the order of use: T5's are 32099, 32098, .., 32000."""
    eos: int | None = None
    """Put after the source (of an encoder) and after the target."""
    start: int | None = None
    """First input of a decoder, in form encoder_decoder (T5 uses its padding, 0)."""
    density: float = 0.15
    """Share of the tokens that are predicted (rounded, at least one)."""
    mean_span: float = 3.0
    """Mean length of a span."""
    form: Form = "encoder_decoder"

    def counts(self, n: int) -> tuple[int, int]:
        """How many of n tokens are taken out, and in how many spans."""
        noise = min(max(round(self.density * n), 1), n - 1)
        return noise, min(max(round(noise / self.mean_span), 1), noise, n - noise)

    def sizes(self, n: int) -> tuple[int, int]:
        noise, spans = self.counts(n)
        return _pair(self, n - noise + spans, noise + spans)


@dataclass(frozen=True)
class TextInfilling:
    """Predict a whole text whose sentences were permuted and of which spans became one mask token each (BART: Lewis et al. 2020).

    Lengths of spans are Poisson; one of length 0 is a mask where nothing is missing. Between two spans a token is kept.
    """

    mask: int
    eos: int | None = None
    """Put after the source (of an encoder) and after the target."""
    start: int | None = None
    """First input of a decoder, in form encoder_decoder (BART uses eos)."""
    begin: int | None = None
    """Put before the source and the target (BART's <s>)."""
    sentence_ends: tuple[int, ...] = ()
    """Ids that end a sentence (a full stop, say); with none, sentences stay in order."""
    rate: float = 0.3
    """Share of the tokens that are masked (rounded, at least one)."""
    mean_span: float = 3.0
    """Poisson mean of a span's length."""
    form: Form = "encoder_decoder"

    def counts(self, n: int) -> tuple[int, int]:
        """How many of n tokens are masked, and the most spans that they may be in."""
        return poisson_counts(n, self.rate, self.mean_span)

    def sizes(self, n: int) -> tuple[int, int]:
        masked, spans = self.counts(n)
        begin = self.begin is not None
        return _pair(self, n - masked + spans + begin, n + begin)


@dataclass(frozen=True)
class BlankInfilling:
    """Predict spans that became one mask token each, in random order, behind the text (GLM: Du et al. 2022).

    Part A is the text with its masks, seen in both directions. Part B has each span behind `start`, predicted up to `end`. A token of part
    B has its mask's place in part A as its position, and 1, 2, .. as its block position, which is 0 in part A. Lengths of spans are
    Poisson, without 0.
    """

    mask: int
    start: int
    """First input of a span (GLM's <|startofpiece|>)."""
    end: int
    """Last target of a span (GLM's <|endofpiece|>)."""
    rate: float = 0.15
    """Share of the tokens that are predicted (rounded, at least one)."""
    mean_span: float = 3.0
    """Poisson mean of a span's length, before 0 is left out."""

    def counts(self, n: int) -> tuple[int, int]:
        """How many of n tokens are masked, and the most spans that they may be in."""
        return poisson_counts(n, self.rate, self.mean_span)

    def sizes(self, n: int) -> tuple[int, int]:
        return n + 2 * self.counts(n)[1], 0


@dataclass(frozen=True)
class Denoiser:
    """One of a mixture."""

    objective: PrefixLM | SpanCorruption
    mode: int | None = None
    """Put before the source, so that the model knows what is asked of it."""
    rate: float = 1.0
    """How often it is chosen, in proportion to the others' rates."""


@dataclass(frozen=True)
class Mixture:
    """For each text one of several denoisers, chosen at random, named by a mode token (UL2: Tay et al. 2023)."""

    denoisers: tuple[Denoiser, ...]

    # What they have in common, `check` sees to that.
    @property
    def form(self) -> Form:
        return self.denoisers[0].objective.form

    @property
    def eos(self) -> int | None:
        return self.denoisers[0].objective.eos

    @property
    def start(self) -> int | None:
        return self.denoisers[0].objective.start

    def sizes(self, n: int) -> tuple[int, int]:
        sizes = [(d.objective.sizes(n), d.mode is not None) for d in self.denoisers]
        return max(first + mode for (first, _), mode in sizes), max(second for (_, second), _ in sizes)


Objective = PrefixLM | MaskedLM | SpanCorruption | TextInfilling | BlankInfilling | Mixture
"""Each has `sizes(n)`: the most columns that a text of n tokens needs in a row and, in form encoder_decoder, on the decoder's side (else 0).
Neither becomes smaller when n grows."""

OBJECTIVES: dict[str, type] = {
    "prefix_lm": PrefixLM,
    "masked_lm": MaskedLM,
    "span_corruption": SpanCorruption,
    "text_infilling": TextInfilling,
    "blank_infilling": BlankInfilling,
    "mixture": Mixture,
}
"""Objectives by name."""


def ul2(
    *,
    sentinels: tuple[int, ...],
    modes: tuple[int, int, int],
    eos: int | None = None,
    start: int | None = None,
    form: Form = "encoder_decoder",
) -> Mixture:
    """The seven denoisers of UL2 (Tay et al. 2023, table 1), equally often: R with short spans, S a prefix, X with long spans or many.

    `modes` are the ids of [R], [S] and [X]. The paper's S predicts a quarter of a text on average: here a share uniform below a half.
    """
    regular, sequential, extreme = modes
    spans = [(regular, 3, 0.15), (regular, 8, 0.15), (extreme, 3, 0.5), (extreme, 8, 0.5), (extreme, 64, 0.15), (extreme, 64, 0.5)]
    parts = [Denoiser(SpanCorruption(sentinels, eos, start, density, mean, form), mode) for mode, mean, density in spans]
    parts.insert(2, Denoiser(PrefixLM(form, 0.5, 1.0, eos, start), sequential))
    return Mixture(tuple(parts))


def poisson_counts(n: int, rate: float, mean: float) -> tuple[int, int]:
    """How many of n tokens are masked, and the most spans of Poisson length that they are in.

    More spans than that, three standard deviations above the expected number, would waste room in every row for what a text in a thousand
    needs: there the last span takes what is left.
    """
    masked = min(max(round(rate * n), 1), n - 1)
    return masked, min(masked, n - masked + 1, int((masked + 3 * math.sqrt(masked)) / mean) + 2)


def _pair(objective: SpanCorruption | TextInfilling, source: int, target: int) -> tuple[int, int]:
    end = objective.eos is not None
    return (source + target + end - 1, 0) if objective.form == "prefix" else (source + end, target + end)


def marks(objective: Objective) -> tuple[int, ...]:
    """Ids that say what was done to a text and so may not be in it."""
    match objective:
        case MaskedLM(mask=mask) | TextInfilling(mask=mask):
            return (mask,)
        case BlankInfilling(mask=mask, start=start):
            return (mask, start)
        case SpanCorruption(sentinels=sentinels):
            return sentinels
        case Mixture(denoisers=parts):
            return tuple({id for part in parts for id in (part.mode, *marks(part.objective)) if id is not None})
    return ()


def has_decoder(objective: Objective) -> bool:
    """Whether its rows have two sides."""
    return getattr(objective, "form", "prefix") == "encoder_decoder"


def check(objective: Objective, *, vocab: int, length: int, decoder_length: int | None = None) -> None:
    """Raise ValueError, in one line, for what can be seen to be wrong without reading the text.

    `vocab` is the number of ids that the model knows; the lengths are those of `fit`.
    """
    _check_fields(objective, vocab)
    text, _ = fit(objective, length, decoder_length)
    parts = [part.objective for part in objective.denoisers] if isinstance(objective, Mixture) else [objective]
    for part in parts:
        if isinstance(part, SpanCorruption):
            require_sentinels(part, text)


def require_sentinels(objective: SpanCorruption, n: int) -> None:
    """Raise ValueError when a text of n tokens has more spans than there are sentinels."""
    spans = objective.counts(n)[1]
    if spans > len(objective.sentinels):
        raise ValueError(
            f"a text of {n} tokens has {spans} spans, but objective.sentinels has only {len(objective.sentinels)}; "
            f"give more, or use a larger objective.mean_span or shorter rows"
        )


def fit(objective: Objective, length: int, decoder_length: int | None = None) -> tuple[int, int]:
    """The longest text whose row has at most `length` columns (on the encoder's side) and `decoder_length` on the decoder's.

    Returns its tokens and the columns of the decoder's side. Those may be left to this function in form encoder_decoder: as many as the
    longest text needs that `length` has room for (T5's `random_spans_helper`: 512 give texts of 568 tokens and 114). Raises ValueError when
    not even the shortest text fits, or for a decoder's length where there is no decoder.
    """
    two_sides = has_decoder(objective)
    if decoder_length is not None and not two_sides:
        raise ValueError(f"data.decoder_length={decoder_length}, but rows of this {type(objective).__name__} have one side; leave it out")
    room = (length, length if two_sides else 0) if decoder_length is None else (length, decoder_length)

    def fits(n: int) -> bool:
        first, second = objective.sizes(n)
        return first <= room[0] and (second <= room[1] or (two_sides and decoder_length is None))

    if not fits(SHORTEST):
        needed = " and ".join(str(size) for size in objective.sizes(SHORTEST)[: 1 + two_sides])
        asked = f"data.length={length}" + (f", data.decoder_length={decoder_length}" if decoder_length is not None else "")
        raise ValueError(f"{asked} has no room: {type(objective).__name__} needs {needed} for a text of {SHORTEST} tokens; use more")
    low, high = SHORTEST, 2 * SHORTEST
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, objective.sizes(low)[1] if decoder_length is None else decoder_length


def _check_fields(objective: Objective, vocab: int) -> None:
    name = type(objective).__name__
    if isinstance(objective, Mixture):
        return _check_mixture(objective, vocab)
    roles = {role: getattr(objective, role) for role in ("mask", "start", "end", "begin", "eos") if hasattr(objective, role)}
    named = [(f"objective.{role}", id) for role, id in roles.items() if id is not None]
    named += [("an id of objective.sentinels", id) for id in getattr(objective, "sentinels", ())]
    named += [("an id of objective.sentence_ends", id) for id in getattr(objective, "sentence_ends", ())]
    for what, id in named:
        if not 0 <= id < vocab:
            raise ValueError(f"{what} is {id}, outside the vocabulary 0..{vocab - 1}; add the token to the vocabulary, or give another id")
    form = getattr(objective, "form", "prefix")
    if form not in FORMS:
        raise ValueError(f"objective.form={form!r} is not one of {', '.join(FORMS)}")
    if form == "encoder_decoder" and objective.start is None:
        raise ValueError(f"objective.start=None, but a decoder's inputs begin with a token; give {name} its id (T5 uses its padding, 0)")
    distinct = marks(objective)
    if len(set(distinct)) < len(distinct):
        raise ValueError(f"{name}'s mark tokens {distinct} are not distinct; give each its own id")
    for share in ("rate", "density"):
        value = getattr(objective, share, 0.5)
        if not 0 < value < 1:
            raise ValueError(f"objective.{share}={value} is not between 0 and 1; use the share of tokens to predict, 0.15 say")
    if getattr(objective, "mean_span", 1) < 1:
        raise ValueError(f"objective.mean_span={objective.mean_span} is less than 1; use the mean length of a span, 3 say")
    if isinstance(objective, SpanCorruption) and not objective.sentinels:
        raise ValueError("objective.sentinels is empty; give the ids that stand for spans")
    if isinstance(objective, PrefixLM) and not 0 <= objective.least <= objective.most <= 1:
        raise ValueError(
            f"objective.least={objective.least} and most={objective.most} are not shares of a text; use 0 <= least <= most <= 1"
        )
    if isinstance(objective, MaskedLM):
        if min(objective.random, objective.keep) < 0 or objective.random + objective.keep > 1:
            raise ValueError(f"objective.random={objective.random} and keep={objective.keep} are not shares that leave some for the mask")
        if not 0 < objective.vocab <= vocab:
            raise ValueError(f"objective.vocab={objective.vocab} is outside 1..{vocab}, the vocabulary of the model")
    return None


def _check_mixture(objective: Mixture, vocab: int) -> None:
    if not objective.denoisers:
        raise ValueError("objective.denoisers is empty; give at least one, or use lmx.data.denoising.ul2")
    for part in objective.denoisers:
        if not isinstance(part.objective, PrefixLM | SpanCorruption):
            raise ValueError(f"a mixture of denoisers cannot have {type(part.objective).__name__}; use PrefixLM or SpanCorruption")
        _check_fields(part.objective, vocab)
        if part.mode is not None and not 0 <= part.mode < vocab:
            raise ValueError(f"a denoiser's mode is {part.mode}, outside the vocabulary 0..{vocab - 1}; give the token's id")
        if not 0 < part.rate < math.inf:
            raise ValueError(f"a denoiser's rate={part.rate} is not positive; use how often it is chosen, in proportion to the others")
    for field in ("form", "eos", "start"):
        values = {getattr(part.objective, field) for part in objective.denoisers}
        if len(values) > 1:
            raise ValueError(f"the denoisers of a mixture have different {field}: {', '.join(map(str, values))}; use one")
    both = {part.mode for part in objective.denoisers} & {id for part in objective.denoisers for id in marks(part.objective)}
    if both:
        raise ValueError(f"ids {sorted(both)} are modes and sentinels of a mixture; give modes their own ids")
