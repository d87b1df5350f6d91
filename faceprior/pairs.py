"""(good, bad) face pairs: the bad twin by inpainting, the manifest, and the dataset (Face Score, 4.4 and 8.4).

A natural photograph is the good side. Its faces are masked and re-inpainted by an off-the-shelf diffusion model, each
with a noise factor that depends on the face's share of the picture, and pasted back, so that every pixel outside of the
mask stays the photograph's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from faceprior.detect import Face, area_bin, crop_bounds, face_square
from faceprior.images import as_array, load_image, to_pixel_values, verify_image
from faceprior.jsonl import read_manifest, require_keys, resolve_file


@dataclass(frozen=True)
class FacePair:
    """One row of the manifest.

    photograph: the source's name; good, bad, mask: paths relative to the manifest's folder; box: xyxy, and landmarks:
    (5, 2) in picture sides or None, in pixels of `good`; confidence: the detector's; area_ratio: face box / picture;
    strength: the noise factor; prompt, seed, base: of the inpainting, base being the model; difference: mean absolute
    change inside of the mask, 0-255; round_trip: whether the good face went through the VAE, too; crop: the square
    (xyxy) in which a small face was worked on, None for the whole picture; lost: whether the detector finds no face
    in `bad` any more.
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


_ROW_TYPES = {
    "id": str, "photograph": str, "good": str, "bad": str, "mask": str, "box": list, "confidence": (int, float),
    "area_ratio": (int, float), "strength": (int, float), "prompt": str, "seed": int, "base": str,
    "difference": (int, float), "round_trip": bool, "lost": bool,
}  # fmt: skip


def read_pairs(folder: str | Path) -> tuple[list[FacePair], list[tuple[str, str]]]:
    """Read the pairs of a folder that stage 01 made -> (pairs, problems as (place, reason)).

    A torn row, a row without a key, a missing file or a path out of the folder is a problem, and its pair is left out.
    Raises FileNotFoundError without a manifest, ValueError when no usable pair is left.
    """
    return read_manifest(folder, _pair_from_row, "pair", "01_make_pairs")


def gather_pairs(folders: str) -> tuple[list[FacePair], list[tuple[str, str]]]:
    """Read the pairs of one or several folders, separated by commas -> (usable ones, problems as (id, reason)).

    Their paths then begin with the folder's. A pair is usable if its files are whole pictures that hold its box.
    """
    pairs, problems = [], []
    for folder in (name.strip() for name in folders.split(",")):
        found, wrong = read_pairs(folder)
        for pair in found:
            files = {key: str(Path(folder) / getattr(pair, key)) for key in ("good", "bad", "mask")}
            pairs.append(replace(pair, **files))
        problems += wrong
    with ThreadPoolExecutor() as pool:
        reasons = list(pool.map(_what_is_wrong, pairs))
    judged = list(zip(pairs, reasons, strict=True))
    problems += [(pair.id, reason) for pair, reason in judged if reason]
    return [pair for pair, reason in judged if not reason], problems


def _what_is_wrong(pair: FacePair) -> str | None:
    try:
        for path in (pair.good, pair.bad, pair.mask):
            crop_bounds(pair.box, *verify_image(path))
    except (ValueError, OSError) as error:
        return str(error)


def _pair_from_row(folder: Path, row: dict[str, Any]) -> FacePair:
    row = {"landmarks": None, "round_trip": False, "crop": None, "lost": False, **row}
    require_keys(row, _ROW_TYPES)
    for key in ("good", "bad", "mask"):
        resolve_file(folder, row[key])
    if any(isinstance(edge, str) for edge in row["box"]):
        raise ValueError(f"`box` has to be four numbers but is {row['box']}")
    Face(row["box"], row["landmarks"], row["confidence"])  # checks all three
    area_bin(row["area_ratio"])  # checks it
    return FacePair(**{key: row[key] for key in FacePair.__dataclass_fields__})


def count_bins(pairs: list[dict[str, Any]], limits: Sequence[float], factors: Sequence[float]) -> list[dict[str, Any]]:
    """Return a row for each bin of the face's area: its upper limit, noise factor, pairs, and their mean difference."""
    rows = []
    for number, (limit, factor) in enumerate(zip(limits, factors, strict=True)):
        changes = [pair["difference"] for pair in pairs if area_bin(pair["area_ratio"], limits) == number]
        mean = sum(changes) / max(len(changes), 1)
        rows.append({"up_to": limit, "noise_factor": factor, "pairs": len(changes), "difference": mean})
    return rows


class PairDataset(Dataset):
    """Pairs as tensors of one size.

    Each sample: good, bad (3, R, R) float32 in [-1, 1]; mask (1, R, R) in {0, 1}; prompt. It shows the square around
    the face that `face_square` gives, resized to `resolution` R.
    """

    def __init__(self, folder: str | Path, pairs: list[FacePair], resolution: int):
        self.folder, self.pairs, self.resolution = Path(folder), pairs, resolution

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        good, bad, mask = (load_image(self.folder / name) for name in (pair.good, pair.bad, pair.mask))
        if not good.size == bad.size == mask.size:
            raise ValueError(
                f"pair {pair.id} in {self.folder}: good, bad and mask have to be of one size but are "
                f"{good.size}, {bad.size} and {mask.size}"
            )
        square, size = face_square(good.size, pair.box, self.resolution), (self.resolution, self.resolution)
        good, bad = (image.crop(square).resize(size, Image.LANCZOS) for image in (good, bad))
        inside = np.asarray(mask.convert("L").crop(square).resize(size, Image.NEAREST)) > 0
        return {
            "good": to_pixel_values(good)[0],
            "bad": to_pixel_values(bad)[0],
            "mask": torch.from_numpy(inside)[None].float(),
            "prompt": pair.prompt,
        }


Change = Callable[[Image.Image, FacePair], Image.Image]  # a side's whole picture -> the changed one


class FaceCrops(Dataset):
    """The face crops of pairs in their own pixels: good and bad, each (H, W, 3) uint8, cut out of a changed picture."""

    def __init__(self, pairs: list[FacePair], change_good: Change | None = None, change_bad: Change | None = None):
        self.pairs, self.changes = pairs, {"good": change_good, "bad": change_bad}

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        pair, crops = self.pairs[index], {}
        for side, change in self.changes.items():
            image = load_image(getattr(pair, side))
            image = change(image, pair) if change else image
            crops[side] = as_array(image.crop(crop_bounds(pair.box, *image.size)))
        return crops

    def name(self, index: int) -> str:
        """Tell both crops from all others: their files as they are now, and the box."""
        pair = self.pairs[index]
        files = [(Path(path).resolve(), Path(path).stat()) for path in (pair.good, pair.bad)]
        return f"{[(str(path), stat.st_mtime_ns, stat.st_size) for path, stat in files]} {pair.box}"
