"""Portraits for the prior: quality gates, the manifest and the dataset (AuthFace, section 3.1).

The paper drops images without a face or with a small one, and looks, by an image quality assessment and by eye, for
pepper noise and over-smooth skin; JPEG blocks, blur and noise are what it finds wrong with other datasets. Here each of
these is one measured number with one limit, so that a rejection has a stated reason.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from faceprior.align import align_face
from faceprior.detect import Face
from faceprior.images import cv2, to_pixel_values
from faceprior.jsonl import read_manifest, require_keys, resolve_file
from faceprior.quality import blockiness, noise_level
from faceprior.tags import GROUPS, Tags, WhichTags, split_tags

ANALYSIS_SIZE = 256  # side in pixels of the aligned crops on which sharpness and texture are measured

# ---- Gates

CHEEKS = np.s_[128:180, 64:192]  # rows and columns of a crop of ANALYSIS_SIZE


def measure_quality(photograph: Image.Image, face: Face) -> dict[str, float]:
    """Measure the quality of a face that has landmarks.

    On the photograph's own pixels in the face box: noise, Immerkaer's estimate of the standard deviation of Gaussian
    noise, grey levels; pepper, the fraction of pixels that differ from the median of their 3 x 3 neighbourhood by more
    than 40 grey levels; blocks, the mean step across the borders of 8 x 8 blocks over the mean step elsewhere, 1
    without JPEG. On a crop that is aligned at 256 pixels: sharpness, the standard deviation of the Laplacian, grey
    levels; texture, the median detail (below 2 pixels) of the cheeks, grey levels, small on over-smooth skin; clipped,
    the fraction of black or white pixels.
    """
    own = _gray(photograph.crop(_block_box(face, photograph.size)))
    gray = _gray(align_face(photograph, face.landmarks, ANALYSIS_SIZE).crop)
    detail = np.abs(gray - cv2.GaussianBlur(gray, (0, 0), 2.0))
    values = {
        "noise": noise_level(own),
        "pepper": (np.abs(own - cv2.medianBlur(own, 3)) > 40).mean(),
        "blocks": blockiness(own),
        "sharpness": cv2.Laplacian(gray, cv2.CV_32F).std(),
        "texture": np.median(detail[CHEEKS]),  # the mean would be that of nose, glasses and beard
        "clipped": ((gray < 3) | (gray > 252)).mean(),
    }
    return {name: round(float(value), 4) for name, value in values.items()}


def _block_box(face: Face, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the face box inside of the image, from the grid of 8 x 8 blocks on and at least two blocks wide."""
    low = [max(min(int(edge), side - 16), 0) // 8 * 8 for edge, side in zip(face.box[:2], size, strict=True)]
    high = [max(int(edge), start + 16) for edge, start in zip(face.box[2:], low, strict=True)]
    return *low, *(min(edge, side) for edge, side in zip(high, size, strict=True))


def _gray(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"), np.float32)


# ---- Manifest and dataset


@dataclass(frozen=True)
class Portrait:
    """One row of the manifest: an aligned crop, its tags, and what was measured on it.

    image: path relative to the manifest's folder; semantic, photographic: tags (`faceprior.tags`); face_size: shorter
    side of the face box in the photograph, pixels; quality: the numbers of `measure_quality`. The row in the manifest
    also has `caption`, both groups joined.
    """

    id: str
    photograph: str
    image: str
    semantic: tuple[str, ...]
    photographic: tuple[str, ...]
    confidence: float
    face_size: float
    quality: dict[str, float]

    @property
    def caption(self) -> str:
        return self.prompt()

    def prompt(self, tags: WhichTags = "both") -> str:
        """Return the prompt with the tags of some groups, joined by commas: none (an empty one), semantic, or both."""
        return Tags(self.semantic, self.photographic).prompt(tags)

    def to_row(self) -> dict[str, Any]:
        row = {**asdict(self), "caption": self.caption}
        return {**row, **{group: list(row[group]) for group in GROUPS}}  # as JSON reads them


_ROW_TYPES = {
    "id": str, "photograph": str, "image": str, "confidence": (int, float), "face_size": (int, float), "quality": dict,
}  # fmt: skip


def read_portraits(folder: str | Path) -> tuple[list[Portrait], list[tuple[str, str]]]:
    """Read the portraits of a folder that stage 3 made -> (portraits, problems as (place, reason)).

    A portrait with a torn row, a row without a key, a missing file or a path out of the folder is skipped and becomes a
    problem. Raises FileNotFoundError without a manifest, ValueError when no usable portrait is left.
    """
    return read_manifest(folder, _portrait_from_row, "portrait", "03_curate_portraits")


def _portrait_from_row(folder: Path, row: dict[str, Any]) -> Portrait:
    require_keys(row, _ROW_TYPES)
    if not row.keys() & set(GROUPS):  # an older manifest, which has the caption only
        require_keys(row, {"caption": str})
        row = {**row, "semantic": split_tags(row["caption"]), "photographic": []}
    for group in GROUPS:
        require_keys(row, {group: list})
        if not all(isinstance(tag, str) for tag in row[group]):
            raise ValueError(f"`{group}` has to be a list of strings but is {row[group]!r}")
    resolve_file(folder, row["image"])
    return Portrait(**{key: row[key] for key in _ROW_TYPES}, **{group: tuple(row[group]) for group in GROUPS})


class PortraitDataset(Dataset):
    """Portraits as tensors: id, pixel_values (3, R, R) float32 in [-1, 1], and caption.

    tags: the groups of tags that make the caption: none, semantic or both (AuthFace, Table 3).
    """

    def __init__(self, folder: str | Path, portraits: list[Portrait], resolution: int, tags: WhichTags = "both"):
        self.folder, self.portraits, self.resolution, self.tags = Path(folder), portraits, resolution, tags

    def __len__(self) -> int:
        return len(self.portraits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        portrait = self.portraits[index]
        pixel_values = to_pixel_values(self.folder / portrait.image, self.resolution)[0]
        return {"pixel_values": pixel_values, **self.source(index)[0]}

    def source(self, index: int) -> tuple[dict[str, Any], Any]:
        """Return the values that are no tensors, and what the latents depend on (see `cache_dataset`)."""
        portrait = self.portraits[index]
        values = {"id": portrait.id, "caption": portrait.prompt(self.tags)}
        return values, [self.folder / portrait.image, self.resolution]
