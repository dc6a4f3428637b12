"""Images from files, prepared as a checkpoint's `preprocessor_config.json` says: what transformers' CLIPImageProcessor does, SigLIP's and ViT's.

That is, in this order: three channels, resized, the middle cut out, numbers between 0 and 1, normalised. Pillow reads and resizes, as there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from lmx.interop.files import read_json

FILES = ("preprocessor_config.json", "processor_config.json")
"""The second has it as its `image_processor`."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
BILINEAR, BICUBIC = 2, 3
SQUARE = {"height": 224, "width": 224}
USUAL: dict[str, dict[str, Any]] = {
    "CLIP": {"size": {"shortest_edge": 224}, "crop_size": SQUARE, "resample": BICUBIC, "image_mean": CLIP_MEAN, "image_std": CLIP_STD},
    "Siglip": {"size": SQUARE, "resample": BICUBIC, "image_mean": HALF, "image_std": HALF},
    "ViT": {"size": SQUARE, "resample": BILINEAR, "image_mean": HALF, "image_std": HALF},
}
"""Of each kind what its file may leave out. What has a `crop_size` here is cropped unless the file says otherwise."""
SUFFIXES = ("ImageProcessorFast", "ImageProcessorPil", "ImageProcessor", "FeatureExtractor")


@dataclass(frozen=True)
class Preparation:
    """What is done to an image; None: that is left out."""

    size: dict[str, int] | None
    """`shortest_edge`, the other in proportion; or `height` and `width`."""
    crop: tuple[int, int] | None
    """Height and width of the middle that is kept; what is smaller gets a black border."""
    scale: float | None
    """What bytes are multiplied by."""
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    resample: int
    """How Pillow interpolates."""

    def __call__(self, path: str | Path) -> Float[np.ndarray, "channels height width"]:
        """An image of a file. Raises ValueError for one that is none."""
        image, Image = _opened(path)
        if image.has_transparency_data:  # on white, as transformers has it
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert("RGB")
        if self.size is not None:
            image = image.resize(_size(self.size, image.size), resample=Image.Resampling(self.resample))
        pixels = np.asarray(image)
        if self.crop is not None:
            pixels = _middle(pixels, self.crop)
        pixels = (pixels * (1.0 if self.scale is None else self.scale)).astype(np.float32)
        if self.mean is not None:
            pixels = (pixels - np.float32(self.mean)) / np.float32(self.std)
        return np.moveaxis(pixels, -1, 0)


def read_preparation(folder: str | Path) -> Preparation:
    """That of a checkpoint's folder. Raises ValueError where it has none, or one that is not known here."""
    folder = Path(folder)
    found = next((read_json(path) for name in FILES if (path := folder / name).is_file()), None)
    if found is not None and "image_processor" in found:
        found = found["image_processor"]
    kind = None if found is None else found.get("image_processor_type", found.get("feature_extractor_type"))
    if kind is None:
        raise ValueError(f"{folder} has no {' or '.join(FILES)} that says how images are prepared (image_processor_type)")
    name = next((kind.removesuffix(end) for end in SUFFIXES if kind.endswith(end)), kind)
    if name not in USUAL or found.get("do_pad"):
        pads = " with do_pad" * bool(found.get("do_pad"))
        raise ValueError(f"{folder} prepares images by {kind}{pads}, which is not known here; there are those of {', '.join(USUAL)}")
    said = USUAL[name] | {key: value for key, value in found.items() if value is not None}
    crops = said.get("do_center_crop", "crop_size" in USUAL[name])
    normal = said.get("do_normalize", True)
    return Preparation(
        _sides(said["size"], short=name == "CLIP") if said.get("do_resize", True) else None,
        tuple(_sides(said["crop_size"], short=False)[side] for side in ("height", "width")) if crops else None,
        float(said.get("rescale_factor", 1 / 255)) if said.get("do_rescale", True) else None,
        tuple(said["image_mean"]) if normal else None,
        tuple(said["image_std"]) if normal else None,
        said["resample"],
    )


def prepared(paths: Sequence[str | Path], preparation: Preparation) -> Float[np.ndarray, "images channels height width"]:
    """Images of files. Raises ValueError for what is no image, and where they come out in different sizes."""
    images = [preparation(path) for path in paths]
    if len(shapes := {image.shape for image in images}) > 1:
        raise ValueError(f"images come out as {', '.join(map(str, sorted(shapes)))}; a model's are all of one size")
    return np.stack(images)


def _opened(path: str | Path):
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("reading images takes Pillow, which comes with matplotlib; pip install pillow") from error
    if not Path(path).is_file():
        raise ValueError(f"image {path} does not exist")
    try:
        image = Image.open(path)
        image.load()
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"image {path} cannot be read ({error})") from error
    return image, Image


def _sides(said: int | dict[str, int], *, short: bool) -> dict[str, int]:
    """A size as files have it: a number is of the shorter side, or of both."""
    if isinstance(said, int):
        return {"shortest_edge": said} if short else {"height": said, "width": said}
    if set(said) not in ({"shortest_edge"}, {"height", "width"}):
        raise ValueError(f"size={said} of images is none of shortest_edge, or height and width")
    return dict(said)


def _size(wanted: dict[str, int], size: tuple[int, int]) -> tuple[int, int]:
    """Width and height, as Pillow has them."""
    if "height" in wanted:
        return wanted["width"], wanted["height"]
    short, longer = wanted["shortest_edge"], int(wanted["shortest_edge"] * max(size) / min(size))
    return (short, longer) if size[0] <= size[1] else (longer, short)


def _middle(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    for axis, wanted in enumerate(size):
        there = pixels.shape[axis]
        if there < wanted:
            before = math.ceil((wanted - there) / 2)
            pixels = np.pad(pixels, [(before, wanted - there - before) if a == axis else (0, 0) for a in range(3)])
        first = (pixels.shape[axis] - wanted) // 2
        pixels = np.take(pixels, np.arange(first, first + wanted), axis)
    return pixels
