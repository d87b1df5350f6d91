"""
What a BLIP reward model reads: a picture's face crops as normalised pixels, and a prompt as tokens.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor
from transformers import BertTokenizer

from faceprior.images import load_image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
DEFAULT_PROMPT = "A face."
TOKENIZER = "bert-base-uncased"
_TOKENIZER_FILES = ["config.json", "tokenizer*.json", "vocab.txt"]
MAX_PROMPT_TOKENS = 35  # the official code cuts prompts here

# of a picture longer than this many times its short side only the middle is resized: the rest is cut off
_MAX_ASPECT = 16


def preprocess(images: Any, size: int, boxes: Sequence[Sequence[float]] | None = None) -> Tensor:
    """Crop, resize the short side to `size`, crop the centre, normalise; see `FaceScorer.preprocess`.

    images: a picture or a list of B, or a tensor (B, 3, H, W) or (3, H, W) in [-1, 1]. boxes: one (x0, y0,
    x1, y1) in pixels per picture, or None. Returns (B, 3, size, size) float32.
    """
    if isinstance(images, Tensor):
        pixels = _as_batch(images)
        cropped = [
            pixel[:, y0:y1, x0:x1]
            for pixel, (x0, y0, x1, y1) in _with_bounds(pixels, boxes, lambda p: (p.shape[2], p.shape[1]))
        ]
        rows = [_resize_tensor(crop, size) for crop in cropped]
    else:
        pictures = [load_image(image) for image in _as_list(images)]
        cropped = [p.crop(bounds) for p, bounds in _with_bounds(pictures, boxes, lambda p: p.size)]
        rows = [_resize_pil(crop, size) for crop in cropped]
    return normalise(torch.stack(rows))


def face_pixels(picture: Image.Image, boxes: Sequence[Sequence[float]], size: int) -> Tensor:
    """`preprocess` of a picture's faces as far as PIL does it: (number of boxes, 3, size, size) uint8, maybe empty.

    `normalise` does the rest, for the faces of many pictures at once and where the network is.
    """
    rows = [_resize_pil(picture.crop(crop_bounds(box, *picture.size)), size) for box in boxes]
    return torch.stack(rows) if rows else torch.empty(0, 3, size, size, dtype=torch.uint8)


def normalise(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) uint8, or floats in [0, 1] -> floats, by CLIP's mean and std."""
    if pixels.dtype == torch.uint8:
        pixels = pixels.float() / 255
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def crop_bounds(box: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    """Pixels of a face crop: int(x0 - 1), int(y0 - 1), int(x1 + 1), int(y1 + 1), clamped to the picture.

    The official crop; that one is not clamped and fails at the picture's left and upper edge.

    Raises:
        ValueError: the box is not four finite numbers, is inverted or empty, or lies outside of the picture.
    """
    where = f"the box {box} in a picture of {width}x{height} pixels"
    if len(box) != 4 or not all(math.isfinite(edge) for edge in box):
        raise ValueError(f"{where}: a box has to be four finite numbers (x0, y0, x1, y1)")
    left, top, right, bottom = box
    if right <= left or bottom <= top:
        raise ValueError(f"{where}: x0 has to be smaller than x1, and y0 than y1 (not width and height)")
    if left >= width or top >= height or right <= 0 or bottom <= 0:
        raise ValueError(f"{where}: the box has to overlap the picture")
    x0, y0 = max(0, int(left - 1)), max(0, int(top - 1))
    return x0, y0, min(width, int(right + 1)), min(height, int(bottom + 1))


def tokenize_prompt(prompt: str, tokenizer: str | Path = TOKENIZER) -> list[int]:
    """Tokens of a prompt, [CLS] first and [SEP] last, at most 35 as in the official code.

    Raises:
        OSError: the tokenizer is neither on the disk nor on the hub.
    """
    ids = _load_tokenizer(str(tokenizer))(prompt, truncation=True, max_length=MAX_PROMPT_TOKENS)["input_ids"]
    return list(ids)


@lru_cache(maxsize=4)
def _load_tokenizer(name: str) -> Any:
    try:
        # the hub first: offline, the tokenizer's own loading retries for most of a minute
        folder = name if Path(name).is_dir() else snapshot_download(name, allow_patterns=_TOKENIZER_FILES)
        if not any(Path(folder, file).is_file() for file in ("tokenizer.json", "vocab.txt")):
            raise OSError(f"no tokenizer.json or vocab.txt in {folder}")  # else: an empty vocabulary
        return BertTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise OSError(
            f"a prompt other than {DEFAULT_PROMPT!r} needs the tokenizer {name!r}, which is neither on this "
            f"disk nor to be had from the hub ({str(error).splitlines()[0]}). With a network, fetch it once "
            f"with `hf download {name}`; or pass `input_ids` to the scorer itself"
        ) from error


def _as_list(images: Any) -> list[Any]:
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _as_batch(pixels: Tensor) -> Tensor:
    batch = pixels[None] if pixels.ndim == 3 else pixels
    if batch.ndim != 4 or batch.shape[1] != 3 or not batch.is_floating_point():
        raise ValueError(
            f"a tensor has to be (B, 3, H, W) or (3, H, W), floats in [-1, 1], but is {tuple(pixels.shape)} "
            f"{pixels.dtype}: `to_pixel_values` makes one from pictures"
        )
    return batch


def _with_bounds(
    images: Sequence[Any], boxes: Sequence[Sequence[float]] | None, size_of: Callable
) -> Iterator[tuple[Any, tuple[int, int, int, int]]]:
    """Each picture with the pixels to crop; `size_of` gives its width and height."""
    if len(images) == 0:
        raise ValueError("`images` is empty: there is nothing to preprocess")
    if boxes is None:
        return ((image, (0, 0, *size_of(image))) for image in images)
    if len(boxes) != len(images):
        raise ValueError(f"`boxes` has to have one box per picture: {len(boxes)} for {len(images)} pictures")
    return ((image, crop_bounds(box, *size_of(image))) for image, box in zip(images, boxes, strict=True))


def _resize_plan(width: int, height: int, size: int) -> tuple[tuple[int, ...], tuple[int, int], tuple[int, int]]:
    """torchvision's Resize and CenterCrop: (pixels that are resized), (new width, height), (left, top)."""
    short = min(width, height)
    wide, high = min(width, _MAX_ASPECT * short), min(height, _MAX_ASPECT * short)
    x0, y0 = (width - wide) // 2, (height - high) // 2
    new = (max(size, int(size * wide / short)), max(size, int(size * high / short)))
    left, top = (int(round((side - size) / 2)) for side in new)
    return (x0, y0, x0 + wide, y0 + high), new, (left, top)


def _resize_pil(image: Image.Image, size: int) -> Tensor:
    """(3, size, size) uint8; the reference.

    Rows first, then columns, as Pillow did in one call until version 12; from 13 on it turns the order round
    for some tall pictures, which would make a score depend on the version installed.
    """
    bounds, (width, height), (left, top) = _resize_plan(*image.size, size)
    if bounds != (0, 0, *image.size):
        image = image.crop(bounds)
    image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    image = image.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _resize_tensor(pixels: Tensor, size: int) -> Tensor:
    """(3, H, W) in [-1, 1] -> (3, size, size) float32 in [0, 1].

    In two passes, clamped after each, as PIL does it: overshoot of the first is gone before the second.
    """
    height, width = pixels.shape[1:]
    (x0, y0, x1, y1), (new_width, new_height), (left, top) = _resize_plan(width, height, size)
    pixels = ((pixels[None, :, y0:y1, x0:x1].float() + 1) / 2).clamp(0, 1)
    for shape in ((y1 - y0, new_width), (new_height, new_width)):
        pixels = F.interpolate(pixels, shape, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    return pixels[0, :, top : top + size, left : left + size]
