"""Reference cases of images as transformers prepares them: run by hand, not by pytest.

    python tests/interop/make_prepared_images.py

Makes tests/data_files/prepared_images: small images (one with an alpha channel, one gray), `NAME.json` for each case, as a checkpoint has it,
and what transformers' processors that use Pillow give: `NAME.IMAGE` in golden.safetensors. Needs torch, transformers 5 and Pillow.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

HERE = Path(__file__).parent.parent / "data_files" / "prepared_images"
CASES = {
    "llava": (
        CLIPImageProcessorPil,
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}, "resample": 3},
    ),
    "old": (CLIPImageProcessorPil, {"feature_extractor_type": "CLIPFeatureExtractor", "size": 9, "crop_size": 6, "resample": 2}),
    "bordered": (
        CLIPImageProcessorPil,
        {"image_processor_type": "CLIPImageProcessorFast", "do_resize": False, "crop_size": {"height": 16, "width": 9}},
    ),
    "plain": (
        CLIPImageProcessorPil,
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 10}, "do_center_crop": False, "do_normalize": False},
    ),
    "siglip": (SiglipImageProcessorPil, {"image_processor_type": "SiglipImageProcessor", "size": {"height": 7, "width": 11}}),
}


def main() -> None:
    HERE.mkdir(exist_ok=True)
    for name, shape, mode in (("wide", (13, 21, 3), "RGB"), ("tall", (25, 12, 4), "RGBA"), ("gray", (10, 10, 1), "L")):
        down, across, channel = np.indices(shape)
        # Smooth, since versions of Pillow interpolate noise differently.
        waves = 128 + 100 * np.sin(0.25 * down + 0.1 * channel) * np.cos(0.2 * across - 0.7 * channel)
        Image.fromarray(waves.astype(np.uint8).squeeze(), mode).save(HERE / f"{name}.png")
    golden = {}
    for name, (kind, said) in CASES.items():
        (HERE / f"{name}.json").write_text(json.dumps(said, indent=1) + "\n")
        process = kind(**{key: value for key, value in said.items() if not key.endswith("_type")})
        for path in sorted(HERE.glob("*.png")):
            pixels = process(Image.open(path), return_tensors="np")["pixel_values"][0]
            golden[f"{name}.{path.stem}"] = np.ascontiguousarray(pixels, np.float32)
    save_file(golden, HERE / "golden.safetensors")


if __name__ == "__main__":
    main()
