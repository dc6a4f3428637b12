"""What writes texts, from the folder of a run, a checkpoint or an adapter: the model, its parameters, its tokenizer, and where texts begin and
end."""

from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from lmx.core.config import from_json, nearest
from lmx.core.tree import Tree
from lmx.data.recipe import has_two_sides, prepare_tokenizer
from lmx.data.tokenizers import Tokenizer
from lmx.data.tokenizers import load_tokenizer as plain_tokenizer
from lmx.infer.blanks import Marks
from lmx.interop.checkpoint import Model, load
from lmx.interop.files import read_json
from lmx.interop.marked import Marked, marks_of
from lmx.interop.peft import CONFIG, adapt, load_adapter
from lmx.interop.runs import HUB, imported, is_run, read_run, run_params
from lmx.interop.tokenizer_files import read_files
from lmx.interop.tokenizers import CheckpointTokenizer, load_tokenizer
from lmx.models import adapters
from lmx.models import config as model_config
from lmx.models.config import EncoderDecoder
from lmx.train.experiment import Experiment
from lmx.train.logging import RECORD, read_record


@dataclass(frozen=True)
class Writer:
    """What `lmx.infer.Engine` is made of, and what its requests begin and end with.

    Attributes:
      stop_ids: tokens that end a text.
      start_id: behind which an encoder-decoder's texts begin; None of others.
      files: the folder of a checkpoint's files, which says how images are prepared (`lmx.interop.image_files`); None of a run that began with none.
      marks: of blanks in prompts, for a model that was trained to fill them; None of others.
    """

    model: model_config.Model
    params: Tree
    tokenizer: Tokenizer | CheckpointTokenizer
    stop_ids: tuple[int, ...]
    start_id: int | None
    files: Path | None = None
    marks: Marks | None = None


def load_writer(
    path: str | Path,
    *,
    adapter: str | Path | None = None,
    merge: bool = False,
    tokenizer: str | None = None,
    step: int | None = None,
    dtype=jnp.float32,
) -> Writer:
    """Reads a folder; that of an adapter of PEFT's with the base that it names.

    Args:
      adapter: the folder of an adapter over the checkpoint.
      merge: whether it is added into the weights, which is faster and no longer the same to the last digit.
      tokenizer: another than the folder's: `bytes`, a file, or a folder.
      step: of a run, whose newest parameters are read otherwise.
      dtype: of a checkpoint's parameters.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: a folder that is neither, one without a tokenizer, a run whose tokenizer is another now, an encoder-decoder of which nothing
        says where its texts begin, an adapter whose base is not here, or that is over something else; what `load`, `load_adapter`,
        `merge` and `load_tokenizer` refuse.
    """
    path = _there(path)
    if adapter is None and (path / CONFIG).is_file():
        path, adapter = _base_of(path), path
    adapter = None if adapter is None else _there(adapter)
    if merge and adapter is None:
        raise ValueError(f"merge=True, and there is no adapter to add to {path}; name one, or leave it out")
    if is_run(path):
        return _of_run(path, tokenizer, step, adapter, merge)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is no run, which has {RECORD}, and no Hugging Face checkpoint, which has config.json")
    if step is not None:
        raise ValueError(f"step={step} is of a run, and {path} is a checkpoint; leave it out")
    model, params = load(path, dtype=dtype)
    return _of_checkpoint(model, params, path, tokenizer, adapter, merge)


def _there(path: str | Path) -> Path:
    path = Path(path)
    if not path.exists():
        there = path.parent.iterdir() if path.parent.is_dir() else ()
        near = nearest(path.name, (other.name for other in there))
        hint = f"; did you mean {path.parent / near}?" if near else ""
        raise FileNotFoundError(f"{path} does not exist{hint} (expected the folder of a run or of a Hugging Face checkpoint)")
    return path


def _base_of(adapter: Path) -> Path:
    """The folder that an adapter names as its base: as it stands there, or seen from beside the adapter."""
    named = read_json(adapter / CONFIG).get("base_model_name_or_path") or ""
    for path in (Path(named), adapter.parent / named):
        if named and path.is_dir():
            return path
    raise ValueError(
        f"{adapter} is an adapter over base_model_name_or_path={named!r}, which is no folder here; name the base's, and it as adapter"
    )


def _of_checkpoint(model: Model, params: Tree, files: Path, tokenizer: str | None, adapter: Path | None, merge: bool) -> Writer:
    """With the tokenizer and the special tokens that a checkpoint's files say."""
    if adapter is not None:
        params = adapt(params, load_adapter(adapter, model))
        params = adapters.merge(params) if merge else params
    reads, found = _given(tokenizer) or load_tokenizer(files), read_files(files)
    stops = reads.stop_ids if isinstance(reads, CheckpointTokenizer) else found.stop_ids
    start = None
    if isinstance(model.config, EncoderDecoder):
        said = ((found.generation or {}), model.hub, model.table.tokens)
        start = next((some["decoder_start_token_id"] for some in said if some.get("decoder_start_token_id") is not None), None)
        if start is None:
            raise ValueError(
                f"neither config.json nor generation_config.json of {files} has decoder_start_token_id, behind which texts begin"
            )
    return Writer(model.config, params, reads, tuple(stops), start, files)


def _of_run(run: Path, tokenizer: str | None, step: int | None, adapter: Path | None, merge: bool) -> Writer:
    record = read_record(run)
    experiment = from_json(Experiment, record["config"])
    params = run_params(run, experiment.model, step=step)
    if imported(run):
        return _of_checkpoint(read_run(run), params, run / HUB, tokenizer, adapter, merge)
    if adapter is not None:
        raise ValueError(f"{adapter} is an adapter over a checkpoint, and {run} is a run that began with none; leave it out")
    reads, wanted = _given(tokenizer) or prepare_tokenizer(experiment.data), record["data"].get("tokenizer")
    if tokenizer is None and wanted not in (None, reads.fingerprint):
        raise ValueError(
            f"{run} was trained with another tokenizer than data.tokenizer={experiment.data.tokenizer!r} gives now; name its file"
        )
    objective, ends = experiment.data.denoising, () if reads.eos_id is None else (reads.eos_id,)
    if objective is None:
        return Writer(experiment.model, params, reads, ends, None)
    own = () if getattr(objective, "eos", None) is None else (objective.eos,)
    if has_two_sides(experiment.data):
        return Writer(experiment.model, params, Marked(reads, objective), own, objective.start)
    return Writer(experiment.model, params, Marked(reads, objective), tuple({*ends, *own}), None, marks=marks_of(objective))


def _given(tokenizer: str | None) -> Tokenizer | CheckpointTokenizer | None:
    """The tokenizer that was asked for: as a checkpoint's where it is a folder."""
    if tokenizer is None:
        return None
    return load_tokenizer(tokenizer) if Path(tokenizer).is_dir() else plain_tokenizer(tokenizer)
