"""(good, bad) face pairs: the row of a pair, the manifests that stage 1 writes, and the datasets (Face Score, 4.4).

The good side is a photograph, the bad side the same photograph with one face inpainted (`faceprior.inpaint`), so that
every pixel outside of the mask is the photograph's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from faceprior.detect import Face, area_bin, crop_bounds, face_square
from faceprior.images import as_array, load_image, to_pixel_values, verify_image
from faceprior.jsonl import read_manifest, require_keys, resolve_file

SIDES = ("good", "bad", "mask")


@dataclass(frozen=True)
class FacePair:
    """One row of the manifest.

    photograph: the source's name; good, bad, mask: paths, in the manifest relative to its folder; box: xyxy, and
    landmarks: (5, 2) or None, in pixels of `good`, left and right as seen in the image; confidence: the detector's;
    area_ratio: face box / image; strength, prompt, seed, base: of the inpainting, base being the model; difference:
    mean absolute change inside of the mask, 0-255; round_trip: whether the good face went through the VAE, too; crop:
    the square (xyxy) in which a small face was inpainted, None for the whole image; lost: whether the detector finds no
    face in `bad` any more.
    """

    id: str
    photograph: str
    good: str
    bad: str
    mask: str
    box: list[float]
    landmarks: list[list[float]] | None
    confidence: float
    area_ratio: float
    strength: float
    prompt: str
    seed: int
    base: str
    difference: float
    round_trip: bool = False
    crop: list[int] | None = None
    lost: bool = False

    def to_row(self) -> dict[str, Any]:
        return asdict(self)


# ---- Reading


def gather_pairs(
    folders: str | Path | Sequence[str | Path],
) -> tuple[list[FacePair], list[tuple[str, str]]]:
    """Read the pairs of one or several folders that stage 1 made -> (usable pairs, problems as (place, reason)).

    folders: one path, several in a text, separated by commas, or a list of paths. The pairs' own paths then begin with
    the folder's. A pair is usable if its row is whole and its files are whole images of one size that hold its box;
    every other one is skipped and becomes a problem.

    Raises FileNotFoundError for a folder without a manifest, ValueError for one without a usable row.
    """
    if isinstance(folders, str):
        folders = [name.strip() for name in folders.split(",")]
    elif isinstance(folders, Path):
        folders = [folders]

    # ---- The rows of every manifest
    pairs, problems = [], []
    for folder in folders:
        found, wrong = read_manifest(folder, _pair_from_row, "pair", "01_make_pairs")
        pairs, problems = pairs + found, problems + wrong

    # ---- The files that they name
    with ThreadPoolExecutor() as pool:
        reasons = list(pool.map(_file_problem, pairs))
    problems += [(pair.id, reason) for pair, reason in zip(pairs, reasons, strict=True) if reason]
    return [pair for pair, reason in zip(pairs, reasons, strict=True) if not reason], problems


_ROW_TYPES = {
    "id": str, "photograph": str, "good": str, "bad": str, "mask": str, "box": list, "confidence": (int, float),
    "area_ratio": (int, float), "strength": (int, float), "prompt": str, "seed": int, "base": str,
    "difference": (int, float), "round_trip": bool, "lost": bool,
}  # fmt: skip


def _pair_from_row(folder: Path, row: dict[str, Any]) -> FacePair:
    row = {"landmarks": None, "round_trip": False, "crop": None, "lost": False, **row}
    require_keys(row, _ROW_TYPES)
    files = {side: str(resolve_file(folder, row[side])) for side in SIDES}
    if any(isinstance(edge, str) for edge in row["box"]):
        raise ValueError(f"`box` has to be four numbers but is {row['box']}")
    Face(row["box"], row["landmarks"], row["confidence"])  # checks all three
    area_bin(row["area_ratio"])  # checks it
    row["prompt"].encode()  # a lone surrogate, which no tokenizer takes, is a ValueError
    return FacePair(**{key: row[key] for key in FacePair.__dataclass_fields__} | files)


def _file_problem(pair: FacePair) -> str | None:
    try:
        sizes = [verify_image(getattr(pair, side)) for side in SIDES]
        for size in sizes:
            crop_bounds(pair.box, *size)
    except (ValueError, OSError) as error:
        return str(error)
    if len(set(sizes)) > 1:
        return _other_sizes(pair, sizes)


def _other_sizes(pair: FacePair, sizes: Sequence[tuple[int, int]]) -> str:
    files, found = ([*map(str, values)] for values in ((getattr(pair, side) for side in SIDES), sizes))
    return (
        f"pair {pair.id}: {files[0]}, {files[1]} and {files[2]} must be of one size but are {found[0]}, {found[1]} and "
        f"{found[2]}"
    )


def prompts_by_size(pairs: list[FacePair]) -> list[str]:
    """Return the distinct prompts of pairs, that of the largest face (by `area_ratio`) first."""
    largest_first = sorted(pairs, key=lambda pair: (-pair.area_ratio, pair.id))
    return list(dict.fromkeys(pair.prompt for pair in largest_first))


# ---- Datasets


def _files_of(pair: FacePair) -> dict[str, Path]:
    return {side: Path(getattr(pair, side)) for side in SIDES}


class PairDataset(Dataset):
    """Pairs of `gather_pairs` as tensors of one size.

    Each sample: id; good, bad (3, R, R) float32 in [-1, 1]; mask (1, R, R) in {0, 1}; prompt. It shows the square
    around the face that `face_square` gives, resized to `resolution` R.
    """

    def __init__(self, pairs: list[FacePair], resolution: int):
        self.pairs, self.resolution = pairs, resolution

    def __len__(self) -> int:
        return len(self.pairs)

    def source(self, index: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the sample's prompt, and what its tensors depend on, for `cache.cache_dataset`."""
        pair = self.pairs[index]
        identity = {**_files_of(pair), "box": pair.box, "resolution": self.resolution}
        return {"id": pair.id, "prompt": pair.prompt}, identity

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        good, bad, mask = (load_image(getattr(pair, side)) for side in SIDES)
        if not good.size == bad.size == mask.size:
            raise ValueError(_other_sizes(pair, (good.size, bad.size, mask.size)))

        square, size = face_square(good.size, pair.box, self.resolution), (self.resolution, self.resolution)
        good, bad = (image.crop(square).resize(size, Image.LANCZOS) for image in (good, bad))
        inside = np.asarray(mask.crop(square).convert("L").resize(size, Image.NEAREST)) > 0  # (R, R)
        return {
            "id": pair.id,
            "good": to_pixel_values(good)[0],
            "bad": to_pixel_values(bad)[0],
            "mask": torch.from_numpy(inside)[None].float(),
            "prompt": pair.prompt,
        }


Change = Callable[[Image.Image, FacePair], Image.Image]  # a side's whole image -> the changed one


class FaceCrops(Dataset):
    """The face crops of pairs in their own pixels: id; good and bad, (H, W, 3) uint8, cut out of a changed image."""

    def __init__(self, pairs: list[FacePair], change_good: Change | None = None, change_bad: Change | None = None):
        self.pairs, self.changes = pairs, {"good": change_good, "bad": change_bad}

    def __len__(self) -> int:
        return len(self.pairs)

    def source(self, index: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the sample's id, and what its crops depend on but for the changes (see `describe_samples`)."""
        pair = self.pairs[index]
        return {"id": pair.id}, {**_files_of(pair), "box": pair.box}

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        crops: dict[str, Any] = {"id": pair.id}
        for side, change in self.changes.items():
            image = load_image(getattr(pair, side))
            image = change(image, pair) if change else image
            crops[side] = as_array(image.crop(crop_bounds(pair.box, *image.size)))
        return crops
