"""Images prepared as transformers prepares them (`make_prepared_images.py`)."""

import json

import numpy as np
import pytest

from lmx.interop.files import mapped
from lmx.interop.image_files import prepared, read_preparation


@pytest.fixture
def cases(root):
    return root / "tests" / "data_files" / "prepared_images"


@pytest.fixture
def said(tmp_path):
    def write(settings, name="preprocessor_config.json"):
        (tmp_path / name).write_text(json.dumps(settings))
        return tmp_path

    return write


@pytest.mark.parametrize("name", ["llava", "old", "bordered", "plain", "siglip"])
def test_pixels_are_those_of_transformers(name, cases, said):
    prepare, golden = read_preparation(said(json.loads((cases / f"{name}.json").read_text()))), mapped(cases / "golden.safetensors")
    for path in sorted(cases.glob("*.png")):
        # Versions of Pillow interpolate otherwise by two steps of a byte at most.
        steps = 0 if name == "bordered" else 2 / 255 / min(prepare.std or (1,))
        np.testing.assert_allclose(prepare(path), golden[f"{name}.{path.stem}"], rtol=0, atol=steps + 1e-6)


def test_a_processors_file_says_it_too(cases, said):
    settings = json.loads((cases / "llava.json").read_text())
    folder = said({"processor_class": "LlavaProcessor", "image_processor": settings}, "processor_config.json")
    np.testing.assert_array_equal(prepared([cases / "wide.png"], read_preparation(folder)).shape, (1, 3, 8, 8))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, r"has no preprocessor_config.json or processor_config.json that says"),
        (
            {"image_processor_type": "LlavaNextImageProcessor"},
            "by LlavaNextImageProcessor, which is not known here; there are those of CLIP",
        ),
        ({"image_processor_type": "CLIPImageProcessor", "do_pad": True}, "by CLIPImageProcessor with do_pad, which is not known"),
        ({"image_processor_type": "CLIPImageProcessor", "size": {"longest_edge": 8}}, "longest_edge.* is none of shortest_edge"),
    ],
)
def test_what_is_not_known_is_refused(settings, words, said):
    with pytest.raises(ValueError, match=words):
        read_preparation(said(settings))


def test_files_that_are_no_images_and_images_of_several_sizes_are_refused(cases, said, tmp_path):
    prepare = read_preparation(said(json.loads((cases / "plain.json").read_text())))
    (tmp_path / "text.png").write_text("no image")
    for path, words in ((tmp_path / "text.png", "text.png cannot be read"), (tmp_path / "none.png", "none.png does not exist")):
        with pytest.raises(ValueError, match=words):
            prepare(path)
    with pytest.raises(ValueError, match=r"images come out as .*; a model's are all of one size"):
        prepared([cases / "wide.png", cases / "gray.png"], prepare)
