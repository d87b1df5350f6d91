"""(good, bad) face pairs: the bad twin by inpainting, the manifest, and the dataset (Face Score, 4.4 and 8.4).

A natural photograph is the good side. Its faces are masked and re-inpainted by an off-the-shelf diffusion model, each
with a noise factor that depends on the face's share of the picture, and pasted back, so that every pixel outside of the
mask stays the photograph's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoPipelineForInpainting, DDIMScheduler, DiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from faceprior.blip_inputs import crop_bounds
from faceprior.detect import Face
from faceprior.diffusion import decode_latents, encode_latents
from faceprior.images import as_array, load_image, to_pil, to_pixel_values, verify_image
from faceprior.manifest import pair_id, read_manifest, require_keys, resolve_file

AREA_LIMITS = (0.005, 0.01, 0.1, 1.0)  # upper limits of the face-area ratio, shares of the picture (Table 8)
BATCH_TOLERANCE = 1e-3  # of values in [-1, 1], between batches in float32: an eighth of a grey level
NOISE_FACTORS = (0.06, 0.1, 0.2, 0.4)  # the noise factor (diffusers' `strength`) in each bin (Table 8)


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


@dataclass(frozen=True)
class FacePlan:
    """How one face of a photograph is to be inpainted.

    view_size: (width, height) in pixels of what the network sees, which is the square `crop` or the whole picture. The
    rest as in `FacePair`.
    """

    id: str
    photograph: str
    good: str
    prompt: str
    face: Face
    area_ratio: float
    crop: tuple[int, int, int, int] | None
    view_size: tuple[int, int]
    strength: float
    seed: int


def plan_face(
    row: dict[str, Any],
    index: int,
    seed: int,
    resolution: int,
    limits: tuple[float, ...] = AREA_LIMITS,
    factors: tuple[float, ...] = NOISE_FACTORS,
    crop_factors: tuple[float, ...] | None = None,
) -> FacePlan:
    """Plan face number `index` of a photograph.

    row: photograph, good, prompt, size and faces of `photographs.jsonl`; crop_factors: the noise factors of faces whose
    square around them is smaller than the picture: they are worked on in it, brought to `resolution`. None where the
    whole picture always is.
    """
    face, (width, height) = Face.from_dict(row["faces"][index]), row["size"]
    ratio = min(face.area / (width * height), limits[-1])
    square = face_square((width, height), face.box, resolution)
    crop = square if crop_factors and (square[2] - square[0]) ** 2 < width * height else None
    return FacePlan(
        id=pair_id(row["photograph"], index),
        **{key: row[key] for key in ("photograph", "good", "prompt")},
        face=face,
        area_ratio=ratio,
        crop=crop,
        view_size=(resolution, resolution) if crop else (width, height),
        strength=noise_factor(ratio, limits, crop_factors if crop else factors),
        seed=seed,
    )


def count_bins(pairs: list[dict[str, Any]], limits: Sequence[float], factors: Sequence[float]) -> list[dict[str, Any]]:
    """Return a row for each bin of the face's area: its upper limit, noise factor, pairs, and their mean difference."""
    rows = []
    for number, (limit, factor) in enumerate(zip(limits, factors, strict=True)):
        changes = [pair["difference"] for pair in pairs if area_bin(pair["area_ratio"], limits) == number]
        mean = sum(changes) / max(len(changes), 1)
        rows.append({"up_to": limit, "noise_factor": factor, "pairs": len(changes), "difference": mean})
    return rows


def prepare_photograph(image: Image.Image, resolution: int, multiple: int, max_resolution: int = 0) -> Image.Image:
    """Bring a photograph to a size between resolution^2 and max_resolution^2 pixels, sides cropped to a `multiple`.

    It is never distorted, and one that lies between is not resampled: its pixels stay as they are. max_resolution: 0
    for `resolution`, so that every photograph is brought to about that size.
    """
    width, height = image.size
    side = (width * height) ** 0.5
    scale = min(max(side, resolution), max_resolution or resolution) / side
    kept = scale == 1
    round_to = math.floor if kept else round
    sides = [max(multiple, round_to(length * scale / multiple) * multiple) for length in (width, height)]
    scale = max(sides[0] / width, sides[1] / height, kept)
    grown = image.resize([max(s, round(v * scale)) for s, v in zip(sides, (width, height), strict=True)], Image.LANCZOS)
    left, top = (grown.width - sides[0]) // 2, (grown.height - sides[1]) // 2
    return grown.crop((left, top, left + sides[0], top + sides[1]))


def box_mask(size: tuple[int, int], box) -> Image.Image:
    """Return the mask of a face in a (width, height) picture: 255 in its box (xyxy, rounded outwards), else 0."""
    mask = np.zeros((size[1], size[0]), np.uint8)
    x0, y0 = (max(math.floor(edge), 0) for edge in box[:2])
    x1, y1 = (max(math.ceil(edge), 0) for edge in box[2:])
    mask[y0:y1, x0:x1] = 255
    if not mask.any():
        raise ValueError(f"the box {tuple(box)} covers no pixel of a picture of {size[0]} x {size[1]}")
    return Image.fromarray(mask)


class FaceInpainter:
    """Re-inpaints masked faces with any Stable Diffusion base: SD1.5 type, nine-channel inpainting U-Net, or SDXL.

    steps: the full number of sampling steps, of which the last `int(strength * steps)` are run; guidance_scale: CFG,
    1 is off. The VAE may have a dtype of its own.

    The sampler is DDIM without noise of its own, and the mean of the VAE's posterior is taken, so a face depends on its
    own picture, mask, prompt and seed only, whatever else is in the batch and in which order: in another batch decoded
    values, in [-1, 1], differ by BATCH_TOLERANCE at most in float32, and 8-bit values by one, since sums are rounded.
    """

    def __init__(self, pipeline: DiffusionPipeline, steps: int = 50, guidance_scale: float = 7.5):
        if not hasattr(pipeline, "unet"):
            raise ValueError(f"a Stable Diffusion base with a U-Net is needed, but this is a {type(pipeline).__name__}")
        self.pipeline = AutoPipelineForInpainting.from_pipe(pipeline)
        own = pipeline.scheduler.config  # whatever sampler it is of: Stable Diffusion's settings of DDIM stay
        self.pipeline.scheduler = DDIMScheduler.from_config(own, clip_sample=False, set_alpha_to_one=False)
        self.pipeline.set_progress_bar_config(disable=True)
        self.steps, self.guidance_scale = steps, guidance_scale
        self._embeddings: dict[str, dict[str, Tensor]] = {}  # of the last batch's prompts

    @property
    def multiple(self) -> int:
        """The number of pixels that a picture's sides have to be a multiple of."""
        return self.pipeline.vae_scale_factor * 2 ** (len(self.pipeline.unet.config.block_out_channels) - 1)

    def check_strength(self, strength: float) -> None:
        """Raise ValueError when `strength` is out of (0, 1] or so small that no step is run."""
        if not 0 < strength <= 1:
            raise ValueError(f"the noise factor has to be in (0, 1] but is {strength}")
        if int(strength * self.steps) < 1:
            least = math.ceil(1 / strength)
            raise ValueError(f"noise factor {strength} x {self.steps} steps runs no step: give at least {least} steps")

    def check_side(self, side: int) -> None:
        """Raise ValueError when this base cannot work on squares of `side` pixels."""
        if side % self.multiple:
            raise ValueError(f"`resolution` has to be a multiple of {self.multiple} for this base but is {side}")

    @torch.no_grad()
    def round_trip(self, images: list[Image.Image], masks: list[Image.Image]) -> list[Image.Image]:
        """Return the pictures with their masked regions encoded and decoded by the VAE, nothing else; as `__call__`."""
        self._check_sizes(images, masks)
        decoded = through_vae(self.pipeline.vae, images)
        return [Image.composite(new, old, mask) for new, old, mask in zip(decoded, images, masks, strict=True)]

    @torch.no_grad()
    def __call__(
        self,
        images: list[Image.Image],
        masks: list[Image.Image],
        strength: float,
        prompts: list[str],
        seeds: list[int],
    ) -> list[Image.Image]:
        """Return the pictures with their masked regions inpainted; all of one size, all at one strength.

        images: RGB, sides a multiple of `multiple`; masks: L, 255 is inpainted and 0 kept.
        """
        self.check_strength(strength)
        self._check_sizes(images, masks)
        pixel_values = to_pixel_values(images)
        latents = masked_latents = encode_latents(self.pipeline.vae, pixel_values)
        if self.pipeline.unet.config.in_channels == 9:  # the others do not look at it
            kept = torch.stack([_kept(mask) for mask in masks])
            masked_latents = encode_latents(self.pipeline.vae, pixel_values * kept)
        inpainted = self.pipeline(
            image=latents,
            mask_image=masks,
            masked_image_latents=masked_latents,
            height=images[0].height,
            width=images[0].width,
            strength=strength,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
            **self._prompt_arguments(prompts),
        ).images
        bads = to_pil(decode_latents(self.pipeline.vae, inpainted))
        return [Image.composite(bad, good, mask) for bad, good, mask in zip(bads, images, masks, strict=True)]

    def _check_sizes(self, images: list[Image.Image], masks: list[Image.Image]) -> None:
        sizes = sorted({picture.size for picture in (*images, *masks)})
        if len(sizes) != 1 or any(side % self.multiple for side in sizes[0]):
            raise ValueError(
                f"pictures and masks have to be of one size, sides a multiple of {self.multiple}, but are {sizes}: "
                "`prepare_photograph` makes them so"
            )

    def _prompt_arguments(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return the encoded prompts and the empty one; what the last batch had is not encoded again."""
        self._embeddings = {p: self._embeddings.get(p) or self._encode(p) for p in dict.fromkeys(prompts)}
        rows = [self._embeddings[prompt] for prompt in prompts]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        encoded = self.pipeline.encode_prompt(
            prompt,
            device=self.pipeline.text_encoder.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )
        return dict(zip(_EMBEDDINGS, encoded, strict=False))  # SD1.5 has the first two


@torch.no_grad()
def through_vae(vae: AutoencoderKL, images: list[Image.Image]) -> list[Image.Image]:
    """Return the pictures, all of one size, as a VAE gives them back."""
    return to_pil(decode_latents(vae, encode_latents(vae, to_pixel_values(images))))


def cut_out(
    images: list[Image.Image], squares: list[tuple[int, int, int, int] | None], resolution: int
) -> list[Image.Image]:
    """Return the squares (xyxy) of the pictures, resized to `resolution`; the whole picture where there is None."""
    size = (resolution, resolution)
    cut = zip(images, squares, strict=True)
    return [image.crop(square).resize(size, _filter(image)) if square else image for image, square in cut]


def put_back(
    images: list[Image.Image],
    views: list[Image.Image],
    squares: list[tuple[int, int, int, int] | None],
    masks: list[Image.Image],
) -> list[Image.Image]:
    """Return the pictures with the masked pixels of the views that `cut_out` gave; all others are as they were."""
    results = []
    for image, view, square, mask in zip(images, views, squares, masks, strict=True):
        changed = view
        if square:
            changed = image.copy()
            changed.paste(view.resize((square[2] - square[0], square[3] - square[1]), Image.LANCZOS), square[:2])
        results.append(Image.composite(changed, image, mask))
    return results


@dataclass
class PairBatch:
    """A batch of faces of one strength and view size on its way from the disk through the inpainter.

    goods, masks: the whole pictures; views, view_masks: what the network sees of them. `inpaint` adds bads and trips,
    views too: inpainted, and behind the VAE, empty where the good side is the photograph itself.
    """

    plans: list[FacePlan]
    goods: list[Image.Image]
    masks: list[Image.Image]
    views: list[Image.Image]
    view_masks: list[Image.Image]
    bads: list[Image.Image] = field(default_factory=list)
    trips: list[Image.Image] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path, resolution: int, plans: list[FacePlan]) -> PairBatch:
        """Read the pictures from the folder of the pairs."""
        goods = [load_image(folder / plan.good) for plan in plans]
        masks = [box_mask(good.size, plan.face.box) for good, plan in zip(goods, plans, strict=True)]
        crops = [plan.crop for plan in plans]
        return cls(plans, goods, masks, *(cut_out(pictures, crops, resolution) for pictures in (goods, masks)))

    def inpaint(self, inpainter: FaceInpainter, round_trip: bool) -> PairBatch:
        """Run the networks."""
        prompts, seeds = [plan.prompt for plan in self.plans], [plan.seed for plan in self.plans]
        self.bads = inpainter(self.views, self.view_masks, self.plans[0].strength, prompts, seeds)
        self.trips = inpainter.round_trip(self.views, self.view_masks) if round_trip else []
        return self

    def pairs(self) -> Iterator[tuple[FacePlan, Image.Image, Image.Image, Image.Image, Image.Image]]:
        """Yield plan, photograph, good, bad and mask, whole pictures."""
        crops = [plan.crop for plan in self.plans]
        goods = put_back(self.goods, self.trips, crops, self.masks) if self.trips else self.goods
        bads = put_back(self.goods, self.bads, crops, self.masks)
        yield from zip(self.plans, self.goods, goods, bads, self.masks, strict=True)


def _filter(image: Image.Image) -> Image.Resampling:
    return Image.NEAREST if image.mode == "L" else Image.LANCZOS  # a mask stays one


_EMBEDDINGS = (
    "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
)  # fmt: skip


def _kept(mask: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(mask) < 128)[None]  # (1, H, W)


def masked_difference(good: Image.Image, bad: Image.Image, mask: Image.Image) -> float:
    """Return the mean absolute difference inside of the mask, 0 to 255."""
    inside = np.asarray(mask) > 0
    return float(np.abs(as_array(good).astype(np.float32) - as_array(bad))[inside].mean())


def change_outside(before: Image.Image, after: Image.Image, mask: Image.Image) -> int:
    """Return the largest change of any value outside of the mask, 0 to 255."""
    change = np.abs(as_array(before).astype(int) - as_array(after))
    return int(change[np.asarray(mask) == 0].max(initial=0))


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


def face_square(size: tuple[int, int], box, resolution: int) -> tuple[int, int, int, int]:
    """Return a square (xyxy) inside of a (width, height) picture, as near to the face's centre as it fits.

    Its side is 1.5 times the face's longer one, but `resolution` at least, so that a small face in a large picture
    keeps its scale, and the picture's shorter side at most.
    """
    face = max(box[2] - box[0], box[3] - box[1])
    side = min(max(math.ceil(1.5 * face), resolution), *size)
    corner = []
    for length, low, high in ((size[0], box[0], box[2]), (size[1], box[1], box[3])):
        corner.append(int(np.clip(round((low + high - side) / 2), 0, length - side)))
    return (*corner, corner[0] + side, corner[1] + side)
