"""Portraits for the prior: photographic tags, the manifest and the dataset (AuthFace, section 3.1)."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from faceprior.images import as_array, to_pixel_values
from faceprior.jsonl import read_manifest, require_keys, resolve_file

ANALYSIS_SIZE = 256  # side in pixels of the aligned crops whose light is measured

# ---- Tags


def photographic_tags(crop: Image.Image) -> list[str]:
    """Describe the light of an aligned crop by measuring it: hardness, side, colour temperature, key.

    The paper has a vision-language model write such tags (photography-guided annotation); these need no model.
    """
    rgb = as_array(crop.resize((ANALYSIS_SIZE, ANALYSIS_SIZE), Image.LANCZOS)).astype(np.float32)  # (256, 256, 3)
    face = rgb[80:200, 56:200]  # (120, 144, 3)

    # hardness and side: brightness of the left half against the right one
    gray = face @ np.float32([0.299, 0.587, 0.114])
    left, right = gray[:, :72].mean(), gray[:, 72:].mean()
    balance = (left - right) / (left + right + 1e-6)
    side = "front light" if abs(balance) < 0.06 else f"light from the {'left' if balance > 0 else 'right'}"
    tags = ["hard light" if abs(balance) > 0.2 else "soft light", side]

    # colour temperature: red over blue
    warmth = (face[..., 0].mean() + 1) / (face[..., 2].mean() + 1)
    tags.append("warm light" if warmth > 1.6 else "cool light" if warmth < 1.15 else "neutral light")

    # key: brightness of the whole crop
    brightness = rgb.mean()
    return tags + (["dark tones"] if brightness < 70 else ["light tones"] if brightness > 180 else [])


# "light" that ends a tag or a sentence or does something ("soft light", "light from the left"), not the shade of a
# colour ("light brown hair", "light skin"); and words that are about light only.
_LIGHT = re.compile(
    r"""\b(?:
    (?<!is\s)(?<!are\s)(?<!traffic\s)(?<!street\s)lights?
        (?= \s*(?:$|[.,;:!?)])
          | \s+(?:from|on|through|across|over|behind|above|and|in\s(?:the|a)|is|source)\b
          | \s+(?:falls?|falling|comes?|coming|shines?|shining)\b )
    | lighting | illuminat(?:ed|ion) | golden\ hour
    | (?:back|sun|moon|candle|lamp|day|spot|rim|key|window)[-\ ]?(?:light(?:ing)?|lit)
    | (?:well|softly|dimly|side|front)[-\ ]lit
    )\b""",
    re.VERBOSE | re.IGNORECASE,
)


def mentions_light(caption: str) -> bool:
    """Whether a caption says how its subject is lit: "soft light", "backlit"; not "light brown hair"."""
    return _LIGHT.search(caption) is not None


# ---- Manifest and dataset


@dataclass(frozen=True)
class Portrait:
    """One row of the manifest: an aligned crop, its caption, and what was measured on it.

    image: path relative to the manifest's folder; caption: tags, separated by commas; face_size: shorter side of the
    face box in the photograph, pixels; quality: the measured numbers (`faceprior.gates`).
    """

    id: str
    photograph: str
    image: str
    caption: str
    confidence: float
    face_size: float
    quality: dict[str, float]

    def to_row(self) -> dict[str, Any]:
        return asdict(self)


_ROW_TYPES = {
    "id": str, "photograph": str, "image": str, "caption": str, "confidence": (int, float), "face_size": (int, float),
    "quality": dict,
}  # fmt: skip


def read_portraits(folder: str | Path) -> tuple[list[Portrait], list[tuple[str, str]]]:
    """Read the portraits of a folder that stage 3 made -> (portraits, problems as (place, reason)).

    A portrait with a torn row, a row without a key, a missing file or a path out of the folder is skipped and becomes a
    problem. Raises FileNotFoundError without a manifest, ValueError when no usable portrait is left.
    """
    return read_manifest(folder, _portrait_from_row, "portrait", "03_curate_portraits")


def _portrait_from_row(folder: Path, row: dict[str, Any]) -> Portrait:
    require_keys(row, _ROW_TYPES)
    resolve_file(folder, row["image"])
    return Portrait(**{key: row[key] for key in _ROW_TYPES})


class PortraitDataset(Dataset):
    """Portraits as tensors: id, pixel_values (3, R, R) float32 in [-1, 1], and caption."""

    def __init__(self, folder: str | Path, portraits: list[Portrait], resolution: int):
        self.folder, self.portraits, self.resolution = Path(folder), portraits, resolution

    def __len__(self) -> int:
        return len(self.portraits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        portrait = self.portraits[index]
        pixel_values = to_pixel_values(self.folder / portrait.image, self.resolution)[0]
        return {"id": portrait.id, "pixel_values": pixel_values, "caption": portrait.caption}
