"""Run a recipe: pass after pass over its units, then tokens into shards, then a manifest. Killed, it goes on where it was."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lmx.core.config import versions
from lmx.data.clean.step import CorpusStep, Ragged
from lmx.data.curate.recipe import Recipe, check, code, described, files_read, fingerprint, passes
from lmx.data.curate.records import open_ragged, read_records, write_ragged
from lmx.data.curate.report import write_report
from lmx.data.curate.tally import Tally, from_json
from lmx.data.curate.work import Clean, Place, Tokenise, splits
from lmx.data.curate.workers import Local
from lmx.data.learned import replace_file, train_tokenizer, trained
from lmx.data.shards import index_of, is_shards, write_manifest
from lmx.data.sources.source import Unit
from lmx.data.tokenizers import load_tokenizer
from lmx.data.whole import alone, file_hash, whole, write_json


class Workers(Protocol):
    """Who does the work: `Local`, or Beam's."""

    def each(self, task: Any, items: Sequence[int], what: str) -> None: ...

    def resolve(self, step: CorpusStep, folder: Path) -> Ragged: ...


def curate(recipe: Recipe, folder: str | Path, *, workers: Workers | None = None) -> dict[str, Any]:
    """Make a recipe's corpus in a folder: `train/` (and `validation/`) of shards, `tally.json`, `manifest.json`; returns the manifest.

    A run that ended early goes on where it was; one that is complete returns at once; one that another process is at is waited for. What is
    in the folder does not depend on the workers or on how often it was killed, and its shards not on where sources lie. Raises ValueError
    when the folder holds another recipe's work, or sources or tokenizer have changed since, or meanwhile, or where a split would be empty;
    RuntimeError where a document is not accounted for; and what sources, steps and tokenizers raise.
    """
    check(recipe)
    folder, workers = Path(folder), workers or Local()
    units = tuple((number, unit) for number, source in enumerate(recipe.sources) for unit in source.units(recipe.unit))
    if not units:
        raise ValueError(f"recipe {recipe.name!r}: its sources hold no files")
    done = folder / "manifest.json"
    if not done.exists():
        with alone(folder):
            _claim(recipe, folder, units)
            if not done.exists():  # by whoever was here first
                _make(recipe, folder, units, workers)
    _claim(recipe, folder, units)
    return json.loads(done.read_bytes())


def _make(recipe: Recipe, folder: Path, units: Sequence[tuple[int, Unit]], workers: Workers) -> None:
    place, numbers, stages = Place(folder), range(len(units)), passes(recipe)
    starts: tuple[int, ...] = ()
    for number, (_, _, after) in enumerate(stages):
        place.of(number, 0, "").parent.mkdir(parents=True, exist_ok=True)
        left = [unit for unit in numbers if not place.of(number, unit, "tally.json").exists()]
        workers.each(Clean(recipe, folder, units, number, starts), left, f"pass {number + 1} of {len(stages)}")
        if after:
            starts = _resolve(place, number, len(units), after, workers)
    tokenizer = _tokenizer(recipe, folder, len(stages) - 1, len(units))
    roots = tuple(_root([unit for at, unit in units if at == number]) for number in range(len(recipe.sources)))
    left = [unit for unit in numbers if not index_of(folder / "train", unit).exists()]
    workers.each(Tokenise(recipe, folder, units, tokenizer, roots), left, "tokens")
    _finish(recipe, folder, units, tokenizer)


def _root(units: Sequence[Unit]) -> str:
    """The folder that all files of these units lie in; empty where they have none in common."""
    folders = {path if os.path.isdir(path) else os.path.dirname(path) for unit in units for path in unit.paths}
    return os.path.commonpath(folders) if folders and len({os.path.isabs(path) for path in folders}) == 1 else ""


def _claim(recipe: Recipe, folder: Path, units: Sequence[tuple[int, Unit]]) -> None:
    """Write down what the folder is for, or refuse one that is for something else."""
    stats = {str(path): [(stat := path.stat()).st_size, stat.st_mtime_ns] for path in files_read(recipe, (unit for _, unit in units))}
    tokenizer = None if trained(recipe.tokenizer) else load_tokenizer(recipe.tokenizer, name="tokenizer").fingerprint
    claim = {"fingerprint": fingerprint(recipe), "files": stats, "tokenizer": tokenizer, "recipe": described(recipe)}
    path = folder / "recipe.json"
    if not (folder / "manifest.json").exists():
        claim["code"] = code(recipe)  # half of a corpus by each of two would be neither's; one that is complete is only read
    if not path.exists():
        write_json(path, claim)
        return
    old = json.loads(path.read_bytes())
    if old["fingerprint"] != claim["fingerprint"]:
        raise ValueError(f"{folder} holds the work of another recipe ({_difference(old['recipe'], claim['recipe'])}); use another folder")
    changed = _changed(folder, old["files"], stats)
    if old.get("tokenizer") != tokenizer:
        changed.append(f"tokenizer={recipe.tokenizer!r}")
    if "code" in claim and old.get("code") != claim["code"]:
        changed.append("the code of its steps or of lmx.data")
    if changed:
        raise ValueError(f"{folder}: {changed[0]} has changed since this corpus was begun; use another folder, or remove this one")


def _changed(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The files that are not what they were: of another size, or of another time and not known to have the same contents."""
    known: dict[str, str] = {}
    for path in (folder / "work" / "0").glob("*.files.json"):
        known |= json.loads(path.read_bytes())

    def same(name: str) -> bool:
        a, b = old.get(name), new.get(name)
        return a == b or (a is not None and b is not None and a[0] == b[0] and known.get(name) == file_hash(Path(name)))

    return [name for name in {**old, **new} if not same(name)]


def _difference(old: Any, new: Any, name: str = "recipe") -> str:
    """The first place where two described recipes differ."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return next((_difference(old[key], new[key], f"{name}.{key}") for key in old if old[key] != new[key]), "")
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return next((_difference(a, b, f"{name}.{i}") for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b), "")
    return f"{name}: {str(old)[:60]} there, {str(new)[:60]} here"


def _resolve(place: Place, number: int, units: int, step: CorpusStep, workers: Workers) -> tuple[int, ...]:
    """Join what the units' documents gave, and find what a corpus step needs of it. Returns the number of each unit's first document."""
    for kind in ("extracted", "ids"):
        if not (place.ragged(number, kind) / "offsets.npy").exists():
            _join(place, number, units, kind)
    done = place.ragged(number, "resolved")
    if not (done / "offsets.npy").exists():
        resolved = workers.resolve(step, place.ragged(number, "extracted"))
        if len(resolved) != len(open_ragged(place.ragged(number, "ids"))):
            raise RuntimeError(f"step {step.name} resolved {len(resolved)} documents, not all")
        write_ragged(done, resolved)
    counts = [np.load(place.of(number, unit, "ids.lengths.npy")).size for unit in range(units)]
    return tuple(int(start) for start in np.cumsum([0, *counts[:-1]]))


def _join(place: Place, number: int, units: int, kind: str) -> None:
    """The units' arrays as one, with one of them in memory at a time."""
    lengths = [np.load(place.of(number, unit, f"{kind}.lengths.npy")) for unit in range(units)]
    offsets = np.append(0, np.cumsum(np.concatenate(lengths)))
    path = place.ragged(number, kind)
    path.mkdir(exist_ok=True)
    filled = [unit for unit in range(units) if lengths[unit].sum()]
    dtype = np.load(place.of(number, filled[0], f"{kind}.values.npy")).dtype if filled else np.dtype(np.uint64)
    with whole(path / "values.npy") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (int(offsets[-1]),)}
        np.lib.format.write_array_header_1_0(file, header)
        for unit in filled:
            values = np.load(place.of(number, unit, f"{kind}.values.npy"))
            if values.dtype != dtype:
                raise RuntimeError(f"{kind} of unit {unit} is {values.dtype}, that of others {dtype}")
            file.write(values.tobytes())
    with whole(path / "offsets.npy") as file:
        np.save(file, offsets)


def _tokenizer(recipe: Recipe, folder: Path, last: int, units: int) -> str:
    """The recipe's tokenizer, trained on what is kept if it says so, and put into the corpus's folder: what `load_tokenizer` takes."""
    if trained(recipe.tokenizer):
        place = Place(folder)
        texts = (r.document.text for unit in range(units) for r in read_records(place.of(last, unit, "kept.jsonl")))
        return str(train_tokenizer(texts, folder / "tokenizer", recipe.tokenizer))
    source = Path(recipe.tokenizer)
    if recipe.tokenizer == "bytes":
        return recipe.tokenizer
    if source.is_file():
        copy = folder / f"tokenizer{source.suffix}"
        replace_file(copy, source.read_bytes())
        return str(copy)
    for path in source.iterdir():
        if path.is_file() and path.suffix in (".json", ".model", ".txt"):
            replace_file(folder / "tokenizer" / path.name, path.read_bytes())
    return str(folder / "tokenizer")


def _finish(recipe: Recipe, folder: Path, units: Sequence[tuple[int, Unit]], tokenizer: str) -> None:
    """Sum up: the tally over all passes, a manifest for each split and one for the whole."""
    place, tally, hashes = Place(folder), Tally(recipe.examples), {}
    for unit in range(len(units)):
        hashes |= json.loads(place.of(0, unit, "files.json").read_bytes())
    for number in range(len(passes(recipe))):
        for unit in range(len(units)):
            tally += from_json(json.loads(place.of(number, unit, "tally.json").read_bytes()))
    write_json(folder / "tally.json", tally.to_json())
    _account(recipe, folder, tally, len(units))
    loaded = load_tokenizer(tokenizer)
    counts = [[*event, documents, size] for event, documents, size in tally.rows()]
    about = {
        "name": recipe.name,
        "fingerprint": fingerprint(recipe),
        "recipe": described(recipe),
        "versions": versions(),
        "sources": dict(sorted((hashes | {str(path): file_hash(path) for path in files_read(recipe, ())}).items())),
    }
    parts = {}
    for split in splits(recipe):
        if is_shards(folder / split):
            parts[split] = json.loads((folder / split / "manifest.json").read_bytes())
        else:
            parts[split] = write_manifest(folder / split, range(len(units)), loaded, {"recipe": about["fingerprint"]})
    totals = {split: {key: part[key] for key in ("documents", "tokens", "bytes", "content")} for split, part in parts.items()}
    manifest = {**about, "tokenizer": {"name": Path(tokenizer).name, "fingerprint": loaded.fingerprint}, "splits": totals, "counts": counts}
    write_report(recipe, folder, tally, parts, loaded, manifest)
    _claim(recipe, folder, units)  # what was read is still there
    write_json(folder / "manifest.json", manifest)


def _account(recipe: Recipe, folder: Path, tally: Tally, units: int) -> None:
    """Raise ValueError where nothing was kept, or nothing held out; RuntimeError where not every document was kept or dropped by one rule."""
    read, kept = (sum(documents for _, documents, _ in tally.rows(what=what)) for what in ("read", "kept"))
    dropped: Counter[str] = Counter()
    for event, documents, _ in tally.rows(what="dropped"):
        dropped[f"{event.step} ({event.reason})"] += documents
    made = {
        split: sum(json.loads(index_of(folder / split, unit).read_bytes())["documents"] for unit in range(units))
        for split in splits(recipe)
    }
    if not read == kept + dropped.total() or not kept == sum(made.values()):
        raise RuntimeError(
            f"{folder}: of {read} documents {dropped.total()} were dropped and {kept} kept, of which {made} are in shards; "
            "files between passes have been lost or changed: remove the folder, and make the corpus again"
        )
    if not kept:
        most = ", ".join(f"{rule} dropped {documents}" for rule, documents in dropped.most_common(3)) or "its sources hold none"
        raise ValueError(f"recipe {recipe.name!r}: no document was kept of {read}; {most}; see python -m lmx.data inspect {folder}")
    if empty := [split for split, documents in made.items() if not documents]:
        raise ValueError(f"held_out={recipe.held_out} leaves none of {kept} documents for {empty[0]}; use another share, or 0")
