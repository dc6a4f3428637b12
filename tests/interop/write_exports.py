"""What lmx makes of every reference case, for its peers to read: run by hand, not by pytest.

    python tests/interop/write_exports.py SHARED FOLDER

Each case with a golden.safetensors (of SHARED/goldens, of tests/data_files and of the encoders beside this file) is loaded and saved again as
FOLDER/CASE, its golden.safetensors beside it. So are families that are others by another name, as FOLDER/NAME, vocabularies grown as
`make_vocabularies.py` grows them, as FOLDER/CASE_grown, and the adapters of `make_adapters.py` and SHARED/goldens/peft, as
FOLDER/adapters/CASE. Then, with torch,

    python tests/interop/check_exports.py FOLDER
    python tests/interop/make_adapters.py check SHARED FOLDER/adapters
"""

import json
import shutil
import sys
from pathlib import Path

from lmx import interop
from lmx.interop.files import mapped, write_file

HERE = Path(__file__).parent
DATA = HERE.parent / "data_files"
RENAMED = {
    "camembert": ("roberta_classifier", "CamembertForSequenceClassification"),
    "xlm-roberta": ("roberta_masked", "XLMRobertaForMaskedLM"),
    "mt5": ("t5_untied", "MT5ForConditionalGeneration"),
}
"""A case by the name of another family, which computes the same."""


def bases(shared: Path) -> dict[str, Path]:
    """Every case's folder."""
    places = (shared / "goldens", DATA / "interop", DATA / "images", HERE / "encoders")
    found = {folder.name: folder for place in places for folder in sorted(place.iterdir())}
    return {name: folder for name, folder in found.items() if (folder / "config.json").exists()}


def again(source: Path, target: Path) -> None:
    """A case, and what transformers computes with it."""
    interop.save(*interop.load(source), target)
    shutil.copyfile(source / "golden.safetensors", target / "golden.safetensors")


def renamed(source: Path, target: Path, family: str, architecture: str) -> None:
    said = json.loads((source / "config.json").read_text()) | {"model_type": family, "architectures": [architecture]}
    shutil.copytree(source, target / "before")
    (target / "before" / "config.json").write_text(json.dumps(said))
    again(target / "before", target)


def grown(source: Path, target: Path, golden: dict) -> None:
    model, params = interop.load(source)
    interop.save(*interop.resize_vocabulary(model, params, model.config.vocab + 3, pad_to_multiple_of=8), target)
    write_file(target / "golden.safetensors", golden)


def write(shared: Path, folder: Path) -> None:
    found = bases(shared)
    for name, source in found.items():
        again(source, folder / name)
    for family, (name, architecture) in RENAMED.items():
        renamed(found[name], folder / family, family, architecture)
    vocabularies = mapped(DATA / "interop" / "vocabularies.safetensors")
    for name in {key.split(".")[0] for key in vocabularies}:
        ids, logits = (vocabularies[f"{name}.{kind}"] for kind in ("input_ids", "logits"))
        golden = {"input.input_ids": ids, "logits": logits}
        grown(found[name], folder / f"{name}_grown", golden | {"input.decoder_input_ids": ids} if name in ("bart", "t5") else golden)
    for source in (*(DATA / "interop" / "adapters").iterdir(), *(shared / "goldens" / "peft").iterdir()):
        base = json.loads((source / "adapter_config.json").read_text())["base_model_name_or_path"]
        interop.save_adapter(interop.load_adapter(source, interop.load(found[base])[0]), folder / "adapters" / source.name)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
