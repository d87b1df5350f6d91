"""The bad face of a pair: a photograph's face is masked, inpainted and pasted back (Face Score, 4.4 and 8.4).

In the order of the data: a photograph is brought to the size that the base works at (`prepare_photograph`), every face
gets a plan with its strength (`plan_face`, Table 8), faces of one strength and size make a batch (`PairBatch`), which
the network inpaints (`FaceInpainter`), and two measurements tell whether the pair is valid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoPipelineForInpainting, DDIMScheduler, DiffusionPipeline
from PIL import Image
from torch import Tensor

from faceprior.bases import require_base
from faceprior.detect import AREA_LIMITS, Face, area_bin, box_mask, face_square
from faceprior.diffusion import decode_latents, encode_latents
from faceprior.images import as_array, load_image, to_pil, to_pixel_values
from faceprior.photos import pair_id

Square = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels of an image


# ---- The photograph


def prepare_photograph(image: Image.Image, resolution: int, multiple: int, max_resolution: int = 0) -> Image.Image:
    """Bring a photograph to a size between resolution^2 and max_resolution^2 pixels, sides cropped to a `multiple`.

    It is never distorted, and one that lies between is not resampled: its pixels stay as they are. max_resolution: 0
    for `resolution`, so that every photograph is brought to about that size.
    """
    width, height = image.size
    side = (width * height) ** 0.5
    scale = min(max(side, resolution), max_resolution or resolution) / side

    # the sides as multiples: of a photograph that keeps its pixels they can only be cut, of others rounded
    kept = scale == 1
    round_to = math.floor if kept else round
    sides = [max(multiple, round_to(length * scale / multiple) * multiple) for length in (width, height)]

    # one scale for both sides, so that the larger one overlaps and is cropped around the middle
    scale = max(sides[0] / width, sides[1] / height, kept)
    resized = [max(s, round(length * scale)) for s, length in zip(sides, (width, height), strict=True)]
    image = image.resize(resized, Image.LANCZOS)
    left, top = (image.width - sides[0]) // 2, (image.height - sides[1]) // 2
    return image.crop((left, top, left + sides[0], top + sides[1]))


# ---- The plan of a face

STRENGTHS = (0.06, 0.1, 0.2, 0.4)  # strength of the inpainting in each bin of AREA_LIMITS: Table 8's noise factor


def strength_of(
    area_ratio: float, limits: tuple[float, ...] = AREA_LIMITS, strengths: tuple[float, ...] = STRENGTHS
) -> float:
    """Return the strength for a face that covers `area_ratio` of its image (Table 8); a limit is in the lower bin."""
    return strengths[area_bin(area_ratio, limits)]


@dataclass(frozen=True)
class FacePlan:
    """How one face of a photograph is to be inpainted.

    view_size: (width, height) in pixels of what the network sees, which is the square `crop` or the whole image. The
    rest as in `FacePair`.
    """

    id: str
    photograph: str
    good: str
    prompt: str
    face: Face
    area_ratio: float
    crop: Square | None
    view_size: tuple[int, int]
    strength: float
    seed: int


def plan_face(
    row: dict[str, Any],
    index: int,
    seed: int,
    resolution: int,
    limits: tuple[float, ...] = AREA_LIMITS,
    strengths: tuple[float, ...] = STRENGTHS,
    crop_strengths: tuple[float, ...] | None = None,
) -> FacePlan:
    """Plan face number `index` of a photograph.

    row: photograph, good, prompt, size and faces of `photographs.jsonl`; crop_strengths: the strengths of faces that
    are inpainted in the square around them, brought to `resolution`, because it is smaller than the image. None: every
    face is inpainted in the whole image, as in the paper.
    """
    face, (width, height) = Face.from_dict(row["faces"][index]), row["size"]
    ratio = min(face.area / (width * height), limits[-1])
    square = face_square((width, height), face.box, resolution)
    crop = square if crop_strengths and (square[2] - square[0]) ** 2 < width * height else None
    return FacePlan(
        id=pair_id(row["photograph"], index),
        **{key: row[key] for key in ("photograph", "good", "prompt")},
        face=face,
        area_ratio=ratio,
        crop=crop,
        view_size=(resolution, resolution) if crop else (width, height),
        strength=strength_of(ratio, limits, crop_strengths if crop else strengths),
        seed=seed,
    )


# ---- A batch of faces


@dataclass(frozen=True)
class Candidate:
    """A pair that is not judged yet: whole images, and the sides differ from the photograph inside of the mask only."""

    plan: FacePlan
    photograph: Image.Image
    good: Image.Image
    bad: Image.Image
    mask: Image.Image


@dataclass
class PairBatch:
    """A batch of faces of one strength and view size on its way from the disk through the inpainter.

    photographs, masks: the whole images; views, view_masks: what the network sees of them. `inpaint` adds views, too:
    bads, inpainted, and goods, behind the VAE, which stays empty where the good side is the photograph itself.
    """

    plans: list[FacePlan]
    photographs: list[Image.Image]
    masks: list[Image.Image]
    views: list[Image.Image]
    view_masks: list[Image.Image]
    bads: list[Image.Image] = field(default_factory=list)
    goods: list[Image.Image] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path, resolution: int, plans: list[FacePlan]) -> PairBatch:
        """Read the photographs, as prepared, from the folder of the pairs."""
        files = {plan.good: load_image(folder / plan.good) for plan in plans}  # once for all faces of a photograph
        photographs = [files[plan.good] for plan in plans]
        masks = [box_mask(image.size, plan.face.box) for image, plan in zip(photographs, plans, strict=True)]
        crops = [plan.crop for plan in plans]
        views, view_masks = (cut_out(images, crops, resolution) for images in (photographs, masks))
        return cls(plans, photographs, masks, views, view_masks)

    def inpaint(self, inpainter: FaceInpainter, round_trip: bool) -> PairBatch:
        """Run the networks and return the batch itself; round_trip: the good side goes through the VAE, too."""
        prompts, seeds = [plan.prompt for plan in self.plans], [plan.seed for plan in self.plans]
        self.bads = inpainter(self.views, self.view_masks, self.plans[0].strength, prompts, seeds)
        self.goods = inpainter.round_trip(self.views, self.view_masks) if round_trip else []
        return self

    def candidates(self) -> Iterator[Candidate]:
        """Paste the faces back and yield the pairs."""
        crops = [plan.crop for plan in self.plans]
        goods = put_back(self.photographs, self.goods, crops, self.masks) if self.goods else self.photographs
        bads = put_back(self.photographs, self.bads, crops, self.masks)
        yield from map(Candidate, self.plans, self.photographs, goods, bads, self.masks)


def cut_out(images: list[Image.Image], squares: list[Square | None], resolution: int) -> list[Image.Image]:
    """Return the squares of the images, resized to `resolution`; the whole image where there is None."""
    views = []
    for image, square in zip(images, squares, strict=True):
        if square:
            resampling = Image.NEAREST if image.mode == "L" else Image.LANCZOS  # a mask stays one
            image = image.crop(square).resize((resolution, resolution), resampling)
        views.append(image)
    return views


def put_back(
    images: list[Image.Image], views: list[Image.Image], squares: list[Square | None], masks: list[Image.Image]
) -> list[Image.Image]:
    """Return the images with the masked pixels of the views that `cut_out` gave; all others are as they were."""
    results = []
    for image, view, square, mask in zip(images, views, squares, masks, strict=True):
        changed = view
        if square:
            changed = image.copy()
            changed.paste(view.resize((square[2] - square[0], square[3] - square[1]), Image.LANCZOS), square[:2])
        results.append(Image.composite(changed, image, mask))
    return results


# ---- The inpainter

BATCH_TOLERANCE = 1e-3  # of values in [-1, 1], between batches in float32: an eighth of a grey level
_EMBEDDINGS = (
    "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
)  # fmt: skip


def check_strength(strength: float, steps: int) -> None:
    """Raise ValueError when `strength` is out of (0, 1] or so small that none of the sampling steps is run."""
    if not 0 < strength <= 1:
        raise ValueError(f"the strength has to be in (0, 1] but is {strength}")
    if int(strength * steps) < 1:
        least = math.ceil(1 / strength)
        raise ValueError(f"strength {strength} x {steps} steps runs no step: give at least {least} steps")


class FaceInpainter:
    """Inpaints masked faces with any Stable Diffusion base: SD1.5 type, nine-channel inpainting U-Net, or SDXL.

    steps: the full number of sampling steps, of which the last `int(strength * steps)` are run; guidance_scale: CFG,
    1 is off. The VAE may have another dtype than the U-Net.

    The sampler is DDIM without added noise, and the mean of the VAE's posterior is taken, so a face depends on its
    image, mask, prompt and seed only, whatever else is in the batch and in which order: in another batch decoded
    values, in [-1, 1], differ by BATCH_TOLERANCE at most in float32, and 8-bit values by one, since sums are rounded.
    """

    def __init__(self, pipeline: DiffusionPipeline, steps: int = 50, guidance_scale: float = 7.5):
        require_base(pipeline, "inpaint")
        self.pipeline = AutoPipelineForInpainting.from_pipe(pipeline)
        # whatever sampler the base has: Stable Diffusion's settings of DDIM stay
        self.pipeline.scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.steps, self.guidance_scale = steps, guidance_scale
        self._embeddings: dict[str, dict[str, Tensor]] = {}  # of the last batch's prompts

    @property
    def multiple(self) -> int:
        """The number of pixels that an image's sides must be a multiple of."""
        return self.pipeline.vae_scale_factor * 2 ** (len(self.pipeline.unet.config.block_out_channels) - 1)

    def check_side(self, side: int) -> None:
        """Raise ValueError when this base cannot work on squares of `side` pixels."""
        if side % self.multiple:
            raise ValueError(f"`resolution` has to be a multiple of {self.multiple} for this base but is {side}")

    @torch.no_grad()
    def __call__(
        self,
        images: list[Image.Image],
        masks: list[Image.Image],
        strength: float,
        prompts: list[str],
        seeds: list[int],
    ) -> list[Image.Image]:
        """Return the images with their masked regions inpainted; all of one size (H, W), all at one strength.

        images: RGB, sides a multiple of `multiple`; masks: L, 255 is inpainted and 0 kept.
        """
        check_strength(strength, self.steps)
        self._check_sizes(images, masks)

        # ---- Encode; an inpainting U-Net of nine channels also sees the latents of the image without the face
        pixel_values = to_pixel_values(images)  # (B, 3, H, W)
        latents = masked_latents = encode_latents(self.pipeline.vae, pixel_values)  # (B, 4, h, w)
        if self.pipeline.unet.config.in_channels == 9:
            kept = torch.from_numpy(np.stack([np.asarray(mask) < 128 for mask in masks]))[:, None]  # (B, 1, H, W)
            masked_latents = encode_latents(self.pipeline.vae, pixel_values * kept)

        # ---- The last int(strength * steps) steps; noise from a generator per face
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
        ).images  # (B, 4, h, w)

        # ---- Decode, and keep every pixel outside of the mask
        decoded = to_pil(decode_latents(self.pipeline.vae, inpainted))
        return [Image.composite(new, old, mask) for new, old, mask in zip(decoded, images, masks, strict=True)]

    @torch.no_grad()
    def round_trip(self, images: list[Image.Image], masks: list[Image.Image]) -> list[Image.Image]:
        """Return the images with their masked regions encoded and decoded by the VAE, nothing else; as `__call__`."""
        self._check_sizes(images, masks)
        decoded = through_vae(self.pipeline.vae, images)
        return [Image.composite(new, old, mask) for new, old, mask in zip(decoded, images, masks, strict=True)]

    def _check_sizes(self, images: list[Image.Image], masks: list[Image.Image]) -> None:
        sizes = sorted({image.size for image in (*images, *masks)})
        if len(sizes) != 1 or any(side % self.multiple for side in sizes[0]):
            raise ValueError(
                f"images and masks must be of one size, sides a multiple of {self.multiple}, but are {sizes}: "
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
    """Return the images, all of one size, as a VAE gives them back."""
    return to_pil(decode_latents(vae, encode_latents(vae, to_pixel_values(images))))


# ---- Is the pair valid?


def change_outside(before: Image.Image, after: Image.Image, mask: Image.Image) -> int:
    """Return the largest change of any value outside of the mask, 0 to 255."""
    change = np.abs(as_array(before).astype(int) - as_array(after))
    return int(change[np.asarray(mask) == 0].max(initial=0))


def masked_difference(good: Image.Image, bad: Image.Image, mask: Image.Image) -> float:
    """Return the mean absolute difference inside of the mask, 0 to 255."""
    inside = np.asarray(mask) > 0
    return float(np.abs(as_array(good).astype(np.float32) - as_array(bad))[inside].mean())
