"""(good, bad) face pairs: the bad twin by inpainting, the manifest, and the dataset (Face Score, 4.4 and 8.4).

A natural photograph is the good side. Its faces are masked and re-inpainted by an off-the-shelf diffusion model, each
with a noise factor that depends on the face's share of the picture, and pasted back, so that every pixel outside of the
mask stays the photograph's own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoPipelineForInpainting, DDIMScheduler, DiffusionPipeline
from PIL import Image
from torch.utils.data import Dataset

from faceprior.diffusion import encode_prompts, is_xl
from faceprior.images import as_array, load_image, to_pixel_values
from faceprior.manifest import read_rows, require_keys, resolve_file

MANIFEST = "manifest.jsonl"
AREA_LIMITS = (0.005, 0.01, 0.1, 1.0)  # upper limits of the face-area ratio, shares of the picture (Table 8)
NOISE_FACTORS = (0.06, 0.1, 0.2, 0.4)  # the noise factor (diffusers' `strength`) in each bin (Table 8)


@dataclass(frozen=True)
class FacePair:
    """One row of the manifest. Paths are relative to the manifest's folder; boxes and landmarks are in pixels of `good`.

    box: xyxy; landmarks: (5, 2) in picture sides, or None; area_ratio: face box / picture; strength: the noise factor;
    seed: of the inpainting; base: the model that inpainted; difference: mean absolute change inside the mask, 0-255.
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

    def to_row(self) -> dict[str, Any]:
        return asdict(self)


_ROW_TYPES = {
    "id": str, "photograph": str, "good": str, "bad": str, "mask": str, "box": list, "confidence": (int, float),
    "area_ratio": (int, float), "strength": (int, float), "prompt": str, "seed": int, "base": str,
    "difference": (int, float),
}  # fmt: skip


def read_pairs(folder: str | Path) -> tuple[list[FacePair], list[tuple[str, str]]]:
    """Read the pairs of a folder that stage 01 made -> (pairs, problems as (place, reason)).

    A torn row, a row without a key, a missing file or a path out of the folder is a problem, and its pair is left out.
    Raises FileNotFoundError without a manifest, ValueError when no usable pair is left.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"no pairs in {folder}: `python stages/01_make_pairs.py` makes them")
    rows, problems = read_rows(folder / MANIFEST)
    pairs = []
    for number, row in enumerate(rows, 1):
        try:
            pairs.append(_pair_from_row(folder, row))
        except (ValueError, TypeError, OSError) as error:
            problems.append((f"{folder / MANIFEST}: {row.get('id', f'row {number}')}", str(error)))
    if not pairs:
        reason = f"; the first problem: {': '.join(problems[0])}" if problems else ""
        raise ValueError(f"{folder / MANIFEST} has no usable pair{reason}")
    return pairs, problems


def _pair_from_row(folder: Path, row: dict[str, Any]) -> FacePair:
    require_keys(row, _ROW_TYPES)
    for key in ("good", "bad", "mask"):
        resolve_file(folder, row[key])
    if len(row["box"]) != 4 or not all(isinstance(v, int | float) for v in row["box"]):
        raise ValueError(f"`box` has to be four numbers but is {row['box']}")
    return FacePair(**{key: row.get(key) for key in FacePair.__dataclass_fields__})


def noise_factor(
    area_ratio: float, limits: tuple[float, ...] = AREA_LIMITS, factors: tuple[float, ...] = NOISE_FACTORS
) -> float:
    """Return the noise factor of a face that covers `area_ratio` of its picture; limits belong to the lower bin."""
    return factors[area_bin(area_ratio, limits)]


def area_bin(area_ratio: float, limits: tuple[float, ...] = AREA_LIMITS) -> int:
    """Return the index of the bin (0, 0.5%], (0.5%, 1%], (1%, 10%], (10%, 100%] that an area ratio falls into."""
    if not 0 < area_ratio <= limits[-1]:
        raise ValueError(f"the face-area ratio has to be in (0, {limits[-1]}] but is {area_ratio}")
    return next(i for i, limit in enumerate(limits) if area_ratio <= limit)


def prepare_photograph(image: Image.Image, resolution: int, multiple: int) -> Image.Image:
    """Bring a photograph to about resolution x resolution pixels: aspect kept, sides cropped to a `multiple`."""
    width, height = image.size
    scale = resolution / (width * height) ** 0.5
    sides = [max(multiple, round(side * scale / multiple) * multiple) for side in (width, height)]
    scale = max(sides[0] / width, sides[1] / height)
    grown = image.resize(
        [max(s, round(v * scale)) for s, v in zip(sides, (width, height), strict=True)], Image.LANCZOS
    )
    left, top = (grown.width - sides[0]) // 2, (grown.height - sides[1]) // 2
    return grown.crop((left, top, left + sides[0], top + sides[1]))


def box_mask(size: tuple[int, int], box) -> Image.Image:
    """Return the mask of a face: 255 inside of its box (xyxy, rounded outwards), 0 elsewhere; size is (width, height)."""
    mask = np.zeros((size[1], size[0]), np.uint8)
    x0, y0 = (int(np.floor(v)) for v in box[:2])
    x1, y1 = (int(np.ceil(v)) for v in box[2:])
    mask[max(y0, 0) : y1, max(x0, 0) : x1] = 255
    return Image.fromarray(mask)


class FaceInpainter:
    """Re-inpaints masked faces with any Stable Diffusion base: SD1.5 type, nine-channel inpainting U-Net, or SDXL.

    steps: the full number of sampling steps, of which the last `int(strength * steps)` are run; guidance_scale: CFG.
    The sampler is DDIM without noise of its own, so a face depends on its own seed only (to float rounding when the
    batch differs).
    """

    def __init__(self, pipeline: DiffusionPipeline, steps: int = 50, guidance_scale: float = 7.5):
        self.pipeline = AutoPipelineForInpainting.from_pipe(pipeline)
        self.pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        self.pipeline.set_progress_bar_config(disable=True)
        self.steps, self.guidance_scale = steps, guidance_scale
        self._embeddings: dict[str, Any] = {}

    @property
    def multiple(self) -> int:
        """The number of pixels that a picture's sides have to be a multiple of."""
        return self.pipeline.vae_scale_factor * 2 ** (len(self.pipeline.unet.config.block_out_channels) - 1)

    def check_strength(self, strength: float) -> None:
        """Raise ValueError when `strength` runs no step at all."""
        if int(strength * self.steps) < 1:
            raise ValueError(
                f"noise factor {strength} x {self.steps} steps runs no step: give at least {int(1 / strength) + 1} steps"
            )

    @torch.no_grad()
    def __call__(
        self,
        images: list[Image.Image],
        masks: list[Image.Image],
        strength: float,
        prompts: list[str],
        seeds: list[int],
    ) -> list[Image.Image]:
        """Return the pictures with their masked regions inpainted; all of one size, all at one strength."""
        self.check_strength(strength)
        width, height = images[0].size
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        inpainted = self.pipeline(
            image=images,
            mask_image=masks,
            height=height,
            width=width,
            strength=strength,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            generator=generators,
            **self._prompt_arguments(prompts),
        ).images
        pairs = zip(images, inpainted, masks, strict=True)
        return [Image.composite(bad.convert("RGB"), good, mask) for good, bad, mask in pairs]

    def _prompt_arguments(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Return the encoded prompts, each text encoded once in the inpainter's life."""
        for prompt in {*prompts, ""} - self._embeddings.keys():
            self._embeddings[prompt] = encode_prompts(self.pipeline, [prompt])
        arguments = {}
        for prefix, texts in (("", prompts), ("negative_", [""] * len(prompts))):
            encoded = [self._embeddings[text] for text in texts]
            arguments[f"{prefix}prompt_embeds"] = torch.cat([e.prompt_embeds for e in encoded])
            if is_xl(self.pipeline):
                arguments[f"{prefix}pooled_prompt_embeds"] = torch.cat(
                    [e.pooled_prompt_embeds for e in encoded]
                )
        return arguments


def masked_difference(good: Image.Image, bad: Image.Image, mask: Image.Image) -> float:
    """Return the mean absolute difference inside of the mask, 0 to 255."""
    inside = np.asarray(mask) > 0
    return float(np.abs(as_array(good).astype(np.float32) - as_array(bad))[inside].mean())


class PairDataset(Dataset):
    """Pairs as tensors of one size.

    Each sample: good, bad (3, R, R) float32 in [-1, 1]; mask (1, R, R) in {0, 1}; prompt. The picture's largest square
    that is centred on the face, as far as the border allows, is resized to `resolution` R.
    """

    def __init__(self, folder: str | Path, pairs: list[FacePair], resolution: int):
        self.folder, self.pairs, self.resolution = Path(folder), pairs, resolution

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        good, bad = (load_image(self.folder / name) for name in (pair.good, pair.bad))
        mask = Image.open(self.folder / pair.mask).convert("L")
        square = face_square(good.size, pair.box)
        size = (self.resolution, self.resolution)
        good, bad = (image.crop(square).resize(size, Image.LANCZOS) for image in (good, bad))
        inside = np.asarray(mask.crop(square).resize(size, Image.NEAREST)) > 0
        return {
            "good": to_pixel_values(good)[0],
            "bad": to_pixel_values(bad)[0],
            "mask": torch.from_numpy(inside)[None].float(),
            "prompt": pair.prompt,
        }


def face_square(size: tuple[int, int], box) -> tuple[int, int, int, int]:
    """Return the largest square (xyxy) inside of a (width, height) picture, as near to the face's centre as it fits."""
    side = min(size)
    corner = []
    for length, low, high in ((size[0], box[0], box[2]), (size[1], box[1], box[3])):
        corner.append(int(np.clip(round((low + high - side) / 2), 0, length - side)))
    return (*corner, corner[0] + side, corner[1] + side)
