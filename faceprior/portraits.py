"""Portraits for the prior: the manifest and the dataset (AuthFace, section 3.1)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from faceprior.images import to_pixel_values, verify_image
from faceprior.jsonl import read_manifest, require_keys, resolve_file
from faceprior.tags import GROUPS, Tags, WhichTags, split_tags

# ---- Manifest and dataset


@dataclass(frozen=True)
class Portrait:
    """One row of the manifest: an aligned crop, its tags, and what was measured on it.

    image: path relative to the manifest's folder; semantic, photographic: tags (`faceprior.tags`); face_size: shorter
    side of the face box in the photograph, pixels; quality: the measured numbers (`faceprior.gates`). The row in the
    manifest also has `caption`, both groups joined.
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

    A portrait with a torn row, a row without a key, a missing or damaged file or a path out of the folder is skipped
    and becomes a problem. Raises FileNotFoundError without a manifest, ValueError when no usable portrait is left.
    """
    portraits, problems = read_manifest(folder, _portrait_from_row, "portrait", "03_curate_portraits")
    with ThreadPoolExecutor() as pool:
        reasons = list(pool.map(partial(_file_problem, Path(folder)), portraits))
    problems += [(portrait.id, reason) for portrait, reason in zip(portraits, reasons, strict=True) if reason]
    usable = [portrait for portrait, reason in zip(portraits, reasons, strict=True) if not reason]
    if not usable:
        raise ValueError(f"{folder} has no usable portrait; the first problem: {': '.join(problems[0])}")
    return usable, problems


def _file_problem(folder: Path, portrait: Portrait) -> str | None:
    try:
        verify_image(folder / portrait.image)
    except (ValueError, OSError) as error:
        return str(error)


def _portrait_from_row(folder: Path, row: dict[str, Any]) -> Portrait:
    require_keys(row, _ROW_TYPES)
    if not row.keys() & set(GROUPS):  # an older manifest, which has the caption only
        require_keys(row, {"caption": str})
        row = {**row, "semantic": split_tags(row["caption"]), "photographic": []}
    for group in GROUPS:
        require_keys(row, {group: list})
        if not all(isinstance(tag, str) for tag in row[group]):
            raise ValueError(f"`{group}` has to be a list of strings but is {row[group]!r}")
        "".join(row[group]).encode()  # a lone surrogate, which no tokenizer takes, is a ValueError
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
