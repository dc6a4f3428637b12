"""What a recipe would do, worked out on a sample: shares kept with intervals, time, disk and memory, and documents to read."""

import heapq
import io
import json
import resource
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from lmx.data.clean import bias
from lmx.data.clean.bias import Losses, which_lose
from lmx.data.clean.step import Ragged
from lmx.data.curate.recipe import Recipe, check, files, files_read, is_corpus_step, passes
from lmx.data.curate.records import Record
from lmx.data.curate.tally import Tally
from lmx.data.curate.work import Resolved, count_kept, count_read, read, share, through
from lmx.data.learned import trained
from lmx.data.shards import write_shard
from lmx.data.sources.source import Unit
from lmx.data.tokenizers import load_tokenizer

PADDING = 3 << 15  # bytes of an ArrayRecord file beside what it holds: its last block, and half of one that is not full
RESOLVING = 100  # bytes for each document that a corpus step takes where it is resolved


@dataclass(frozen=True)
class Share:
    """A share that is predicted: the estimate, and between what it lies in 95 of 100 samples."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f}% ({100 * self.low:.1f} to {100 * self.high:.1f})"


@dataclass(frozen=True)
class Forecast:
    """What a recipe is expected to do."""

    sampled: int
    """Documents that were judged."""
    documents: float
    """Documents that all sources hold, about."""
    kept: Share
    """Share of the documents that are kept."""
    kept_bytes: float
    """Share of their text's bytes that is kept."""
    rules: dict[tuple[str, str], Share]
    """Share of all documents that each rule, (step, reason), drops."""
    seconds: dict[str, float]
    """CPU seconds over the whole corpus: of each source and step; of `setup` (models and tables, for each worker), `identity terms`, `records`
    (documents written and read again between passes) and `tokens`. To train a tokenizer comes on top."""
    disk: float
    """Bytes of the run's folder at its end: texts between passes, what corpus steps extract, shards. One tokenizer's shards are about as large
    as another's, so for one that is yet to be trained those of bytes count."""
    memory: float
    """Bytes of the largest process: what this one took, with some dozens for each document where a corpus step is resolved."""
    tally: Tally
    """Counts and examples: of the units what their reader did, of the sample the rest."""

    @property
    def terms(self) -> Losses:
        """Which identity and dialect terms lose most. Empty where the recipe does not count them."""
        return which_lose(self.tally.terms("read"), self.tally.terms("kept"))


def wilson(part: int, whole: int, population: float = inf) -> Share:
    """Wilson's interval of a share (`lmx.data.clean.bias.wilson`), narrowed by how much of the whole population the sample is."""
    if not whole:
        return Share(0.0, 0.0, 1.0)
    left = max(1 - whole / population, 0.0)
    return Share(part / whole, *(bias.wilson(part / left, whole / left) if left else (part / whole, part / whole)))


def dry_run(recipe: Recipe, *, documents: int = 2000, units: int = 32, seed: int = 0) -> Forecast:
    """Judge `documents` documents drawn evenly from `units` of a recipe's units, and say what all would give.

    Those units are read whole, and of their documents those whose ids hash lowest are judged. Where there are more units than are read,
    intervals are widened by how much units differ. Most duplicates of a drawn document are not in the sample; so the share that a corpus
    step drops lies between what it drops there (were all clusters large) and that divided by the sampled share (were all pairs), and that
    is its interval. Damage is counted, never refused. Raises what `check` and the sources' `units` raise.
    """
    check(recipe)
    if documents < 1 or units < 1:
        raise ValueError(f"documents={documents} of units={units} are no sample; both are to be 1 at least")
    everything = [(number, unit) for number, source in enumerate(recipe.sources) for unit in source.units(recipe.unit)]
    if not everything:
        raise ValueError(f"recipe {recipe.name!r}: its sources hold no files")
    for path in files_read(recipe, ()):  # what steps read is there
        path.stat()
    order = np.argsort([share(unit.name, str(number), str(seed)) for number, unit in everything])
    chosen = [everything[i] for i in sorted(order[:units].tolist())]
    tally, count = Tally(recipe.examples), 0
    drawn: list[tuple[int, int, int, Record]] = []  # the hash, negative: the first is the highest; the document's number; the unit's
    for nth, (number, unit) in enumerate(chosen):
        for record in read(recipe.sources[number], unit, tally, damaged="skip"):
            rank = share(record.document.id, recipe.sources[number].name, str(seed))
            count += 1
            if len(drawn) < documents:
                heapq.heappush(drawn, (-rank, count, nth, record))
            elif rank < -drawn[0][0]:
                heapq.heapreplace(drawn, (-rank, count, nth, record))
    sample = [(nth, record) for _, _, nth, record in sorted(drawn, key=lambda item: item[1])]
    if not sample:
        raise ValueError(f"recipe {recipe.name!r}: the {len(chosen)} units that were read hold no document")
    sizes = _sizes(everything)
    scale = sum(sizes.values()) / sum(sizes[pair] for pair in chosen)
    return _forecast(recipe, tally, sample, count, scale, chosen)


def _sizes(units: Sequence[tuple[int, Unit]]) -> dict[tuple[int, Unit], float]:
    """Bytes of files in each unit; of what is cut into several the same share in each, whatever their bounds count."""
    cut = Counter((number, unit.paths) for number, unit in units)
    size = {unit.paths: sum(path.stat().st_size for path in files([unit])) for unit in {unit.paths: unit for _, unit in units}.values()}
    return {(number, unit): max(size[unit.paths], 1) / cut[number, unit.paths] for number, unit in units}


def _forecast(recipe: Recipe, tally: Tally, sample: list, count: int, scale: float, chosen: list) -> Forecast:
    judged, cost = Tally(recipe.examples), Cost()
    fates = _judge(recipe, sample, chosen, judged, cost)
    population, unit_of = count * scale, np.array([nth for nth, _ in sample])
    sizes = np.array([len(record.document.text.encode()) for _, record in sample], np.float64)
    kept = np.array([fate is None for fate, _ in fates])
    drawn = len(sample) / population  # of all documents
    corpus_steps = {step.name for step in recipe.steps if is_corpus_step(step)}

    def predicted(which: np.ndarray) -> Share:
        return _interval(which, unit_of, population, all_read=scale == 1, units=len(chosen))

    rules, more = {}, 0.0
    for rule in sorted({fate for fate, _ in fates if fate is not None}):
        rules[rule] = predicted(np.array([fate == rule for fate, _ in fates]))
        if rule[0] in corpus_steps:
            least, most = rules[rule], min(rules[rule].high / drawn, 1.0)
            rules[rule] = Share(least.value, least.low, most)
            more += most - least.value
    whole = predicted(kept)
    kept_bytes = sum(size for _, size in fates) / max(sizes.sum(), 1)
    up = population / len(sample)
    seconds = {source.name: tally.seconds[source.name] * scale for source in recipe.sources}
    seconds |= {name: judged.seconds[name] * up for name in (*(step.name for step in recipe.steps), "identity terms")}
    seconds |= {"setup": cost.setup, "records": cost.records * up, "tokens": cost.tokens * up}
    splits = 2 if recipe.held_out else 1
    for_each_unit = len(json.dumps(judged.to_json(), indent=1)) + 2 * splits * PADDING
    return Forecast(
        sampled=len(sample),
        documents=population,
        kept=Share(whole.value, max(whole.low - more, 0.0), whole.high),
        kept_bytes=kept_bytes,
        rules=rules,
        seconds=seconds,
        disk=cost.disk * up + for_each_unit * scale * len(chosen),
        memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + RESOLVING * population * bool(corpus_steps),
        tally=_sum(tally, judged),
    )


def _sum(a: Tally, b: Tally) -> Tally:
    a += b
    return a


@dataclass
class Cost:
    """What judging the sample took, beside the steps' own seconds."""

    setup: float = 0.0
    """Seconds."""
    records: float = 0.0
    tokens: float = 0.0
    disk: float = 0.0
    """Bytes."""


def _judge(recipe: Recipe, sample: list, chosen: list, tally: Tally, cost: Cost) -> list[tuple[tuple[str, str] | None, int]]:
    """What became of each document of a sample: the rule that dropped it, if any, and its bytes at the end."""
    sources = [recipe.sources[chosen[nth][0]].name for nth, _ in sample]
    clock = time.process_time()
    for step in recipe.steps:  # models are loaded and tables built once, not once a sample
        if is_corpus_step(step):
            step.extract(sample[0][1].document)
        else:
            through(sample[0][1], (step,), sources[0], Tally(0), io.BytesIO())
    cost.setup, clock = time.process_time() - clock, time.process_time()
    here = [(i, count_read(record, sources[i], tally, terms=recipe.identity_terms)) for i, (_, record) in enumerate(sample)]
    fates: list[tuple[tuple[str, str] | None, int]] = [(None, 0)] * len(sample)
    resolved, names = None, None
    for before, steps, after in passes(recipe):
        left: list[tuple[int, Record]] = []
        for number, (i, record) in enumerate(here):
            gone = io.BytesIO()
            one = (Resolved(before, resolved[number], names),) if before else ()
            out = through(record, (*one, *steps), sources[i], tally, gone)
            if out is None:
                said = json.loads(gone.getvalue())
                fates[i] = ((said["step"], said["reason"]), 0)
                cost.disk += len(gone.getvalue())
            else:
                line = out.to_line()
                cost.disk += len(line)
                left.append((i, Record.from_line(line)))
        here = left
        if after:
            start = time.process_time()
            values = _ragged([np.asarray(after.extract(record.document)) for _, record in here])
            resolved, names = after.resolve(values), _ragged([np.frombuffer(r.document.id.encode(), np.uint8) for _, r in here])
            tally.seconds[after.name] += time.process_time() - start
            # Of each unit and of all together; and the lengths.
            cost.disk += 2 * (values.values.nbytes + names.values.nbytes + 16 * len(values)) + resolved.values.nbytes + 8 * len(values)
    for i, record in here:
        count_kept(record, sources[i], tally)
        fates[i] = (None, len(record.document.text.encode()))
    cost.records, clock = time.process_time() - clock - sum(tally.seconds.values()), time.process_time()
    if here:
        with TemporaryDirectory() as folder:
            tokenizer = load_tokenizer("bytes" if trained(recipe.tokenizer) else recipe.tokenizer, name="tokenizer")
            write_shard((record for _, record in here), tokenizer, Path(folder), 0, corpus="")
            cost.disk += sum(path.stat().st_size for path in Path(folder).iterdir()) - 2 * PADDING
    cost.tokens = time.process_time() - clock
    return fates


def _ragged(arrays: Sequence[np.ndarray]) -> Ragged:
    values = np.concatenate(arrays) if arrays else np.zeros(0, np.uint64)
    return Ragged(values, np.append(0, np.cumsum([len(array) for array in arrays], dtype=np.int64)))


def _interval(which: np.ndarray, unit_of: np.ndarray, population: float, *, all_read: bool, units: int) -> Share:
    """The share of documents in which something is so: Wilson's, with as many documents as the sample is worth.

    Where only some units were read, documents of one unit tell less than as many from all: the variance is that of a ratio between units
    (Cochran, Sampling Techniques, 1977, section 6.8), if it is larger.
    """
    n, k = len(which), int(which.sum())
    if all_read or units < 2 or k in (0, n):
        return wilson(k, n, population)
    p = k / n
    residual = np.bincount(unit_of, which - p, minlength=units)
    between = units / (units - 1) * float((residual**2).sum()) / n**2
    worth = min(n, p * (1 - p) / between) if between else n
    share = wilson(round(p * worth), max(round(worth), 1), population)
    return Share(p, min(share.low, p), max(share.high, p))
