"""Ladders: images of one face, the best first, that a judge of faces is trained and measured on.

Three ways down: a base's own damage, as an image goes through it at growing strength (image to image), so that every
rung is a little more the base's invention; degradations, each stronger than the one before; and both together, where a
mildly blurred good face still stands above a broken one. Faces are seen in whole portraits, in tight boxes, and
aligned, as the restorer sees them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import numpy as np
import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from checkpoints.tiny_models.damage import LEVELS, PHOTOMETRIC
from checkpoints.tiny_models.data import save_arrays
from faceprior import tiny
from faceprior.align import align_face
from faceprior.bases import load_pipeline
from faceprior.degrade import PRESETS, Degradation, apply_degradation, sample_degradation, scaled
from faceprior.diffusion import decode_latents, is_xl, sampled_with
from faceprior.images import cv2, to_pil
from faceprior.procedural import TRAIN_SEEDS, draw_portrait

RUNGS = 4  # images of a ladder in training
STRENGTHS = (0.04, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the image to image passes, whole ladders
# A person of the training climbs every second rung, with one sampler: what a sampler leaves must not decide.
CLIMBS = [(strengths, sampler) for sampler in ("base", "ddim") for strengths in (STRENGTHS[::2], STRENGTHS[1::2])]
STEPS, GUIDANCE_SCALE = 25, 2.5
CHUNK = 16  # people of a file, who climb together
# First seed of the people on each base's ladders. The judge learns from sdxl's, the scorer from sd15's: other people.
SEEDS = {"sd15": TRAIN_SEEDS + 3000, "sdxl": TRAIN_SEEDS + 6000}
MILD = (0.005, 0.04)  # sigma of a mild blur, as a fraction of the face's width: 0.3 to 2.4 pixels of 60
STRONG = (0.015, 0.15)  # sigma at the foot of a ladder of blur, the same
DEGRADATIONS = (*("blur",) * 4, *PRESETS)  # in a tight box, blur is what is seen latest
HARD = ("warp", "eye_shift", "nose_shift", "stretch", "shear")  # moved features: chosen three times as often


@dataclass(frozen=True)
class View:
    """An image (H, W, 3) uint8 of one face, and the face's box in it, xyxy in pixels."""

    image: np.ndarray
    box: Sequence[float]

    @property
    def whole(self) -> tuple[float, float, float, float]:
        """The whole image as a box."""
        return 0.0, 0.0, float(self.image.shape[1]), float(self.image.shape[0])

    @property
    def face_width(self) -> float:
        return float(self.box[2] - self.box[0])


@dataclass(frozen=True)
class Person:
    """A drawn person: the portrait, the aligned face, and what a base makes of the portrait at growing strength.

    rungs: one view for each of the strengths, which rise. The box is the drawing's own at every strength.
    """

    portrait: View
    aligned: View
    rungs: list[View]
    strengths: tuple[float, ...]


# ---- the files


def make_ladders(config, work: Path) -> None:
    """Draw people, and take them through both bases: work/ladders_sd15 and work/ladders_sdxl."""
    for base, first_seed in SEEDS.items():
        pipeline = None
        for first in tqdm(range(0, config.num_ladder_people, CHUNK), desc=f"ladders {base}", unit="file"):
            path = work / f"ladders_{base}" / f"{first:06d}.npz"
            if not path.is_file():
                pipeline = pipeline or load_pipeline(tiny.tiny_folder() / base)
                seeds = range(first_seed + first, first_seed + min(first + CHUNK, config.num_ladder_people))
                climb = CLIMBS[first // CHUNK % len(CLIMBS)]
                save_arrays(path, **climbing_people(pipeline, seeds, *climb, config.mixed_precision))


def climbing_people(pipeline, seeds: Sequence[int], strengths: Sequence[float], sampler: str, precision: str) -> dict:
    """Return people's arrays: portraits, aligned (N, R, R, 3), rungs (N, S, R, R, 3), boxes (N, 4), strengths (S,)."""
    drawings = [draw_portrait(seed, tiny.RESOLUTION) for seed in seeds]
    portraits, captions = [drawing.image for drawing in drawings], [drawing.caption() for drawing in drawings]
    aligned, aligned_boxes = zip(*map(draw_aligned, seeds), strict=True)
    return {
        "portraits": np.stack(portraits),
        "aligned": np.stack(aligned),
        "rungs": climb(pipeline, portraits, captions, seeds, strengths, sampler, precision),
        "boxes": np.array([drawing.box for drawing in drawings]),
        "aligned_boxes": np.array(aligned_boxes),
        "strengths": np.array(strengths),
    }


def draw_aligned(seed: int) -> tuple[np.ndarray, tuple[float, ...]]:
    """Draw a person's aligned face, sharp at (R, R), and the face's box in it."""
    drawing = draw_portrait(seed, 2 * tiny.RESOLUTION)
    face = align_face(drawing.image, drawing.landmarks, tiny.RESOLUTION)
    x0, y0, x1, y1 = drawing.box
    corners = np.array([[x0, y0, 1], [x1, y0, 1], [x1, y1, 1], [x0, y1, 1]]) @ np.asarray(face.matrix)[:2].T
    box = *corners.min(axis=0), *corners.max(axis=0)
    return np.asarray(face.crop), tuple(float(edge) for edge in np.clip(box, 0, tiny.RESOLUTION))


@torch.no_grad()
def climb(
    pipeline,
    images: Sequence[np.ndarray],
    captions: list[str],
    seeds: Sequence[int],
    strengths: Sequence[float] = STRENGTHS,
    sampler: str = "ddim",
    precision: str = "no",
) -> np.ndarray:
    """Take images (R, R, 3) through a base at every strength, from the same noise: (N, S, R, R, 3) uint8.

    pipeline: the base's text to image pipeline, of the SD or SDXL type; sampler: see `make_sampler`; precision: that of
    the U-Net. The autoencoder's traces are on every rung.
    """
    name = "StableDiffusionXLImg2ImgPipeline" if is_xl(pipeline) else "StableDiffusionImg2ImgPipeline"
    optional = {"requires_safety_checker": False} if "XL" not in name else {"add_watermarker": False}
    through = getattr(diffusers, name)(**pipeline.components, **optional)
    through.set_progress_bar_config(disable=True)
    pictures, rungs = as_images(images), []
    with sampled_with(sampler, through), half_precision(precision, through.device.type, through.unet):
        for strength in strengths:
            latents = through(
                captions,
                image=pictures,
                strength=strength,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE_SCALE,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="latent",
            ).images
            decoded = to_pil(decode_latents(through.vae, latents.float()).cpu())
            rungs.append(np.stack([np.asarray(image) for image in decoded]))
    return np.stack(rungs, axis=1)


@contextmanager
def half_precision(precision: str, device: str, *networks: torch.nn.Module) -> Iterator[None]:
    """Run the networks' matrix products in bfloat16 if `precision` is bf16; all else stays float32, the VAE too."""
    originals = [network.forward for network in networks]
    if precision == "bf16":
        for network in networks:
            network.forward = _under_autocast(network.forward, device)
    try:
        yield
    finally:
        for network, forward in zip(networks, originals, strict=True):
            network.forward = forward


def _under_autocast(forward: Callable, device: str) -> Callable:
    def call(*args, **kwargs):
        with torch.autocast(device, torch.bfloat16):
            return forward(*args, **kwargs)

    return convert_outputs_to_fp32(call)


class People(Dataset):
    """The people on a base's ladders. Raises FileNotFoundError where there are none."""

    def __init__(self, work: Path, base: str):
        folder = work / f"ladders_{base}"
        self.files = [dict(np.load(path)) for path in sorted(folder.glob("??????.npz"))]
        if not self.files:
            raise FileNotFoundError(
                f"no ladders in {folder}: `python -m checkpoints.tiny_models.make_tiny --only ladders`"
            )
        self.places = [(number, i) for number, file in enumerate(self.files) for i in range(len(file["portraits"]))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Person:
        number, i = self.places[index]
        file = self.files[number]
        box = file["boxes"][i].tolist()
        return Person(
            View(file["portraits"][i], box),
            View(file["aligned"][i], file["aligned_boxes"][i].tolist()),
            [View(image, box) for image in file["rungs"][i]],
            tuple(file["strengths"].tolist()),
        )


# ---- ladders, best first


def degradation_ladder(view: View, rng: np.random.Generator, kind: str | None = None) -> list[np.ndarray]:
    """Return a face and three copies, each more degraded than the one before, by one degradation in rising strength.

    kind: blur, or a preset of `faceprior.degrade`; chosen at random if None. A preset acts as on an image of a size
    between the face's and the image's own.
    """
    kind = str(rng.choice(DEGRADATIONS)) if kind is None else kind
    fractions = np.linspace(0, 1, RUNGS)[1:] + rng.uniform(-0.1, 0.1, RUNGS - 1)
    if kind == "blur":
        sigma = np.exp(rng.uniform(*np.log(STRONG))) * view.face_width
        return [view.image, *(blurred(view.image, sigma * fraction) for fraction in fractions)]
    size = round(rng.uniform(view.face_width, view.image.shape[1]))
    worst, seed = sample_degradation(scaled(PRESETS[kind], size), rng), int(rng.integers(2**31))
    copies = [
        apply_degradation(view.image, weaker(worst, fraction), np.random.default_rng(seed)) for fraction in fractions
    ]
    return [view.image, *copies]


def weaker(degradation: Degradation, fraction: float) -> Degradation:
    """Return a degradation with every strength times `fraction`: 0 changes nothing, 1 changes nothing of it."""
    return replace(
        degradation,
        blur_sigma=tuple(fraction * sigma for sigma in degradation.blur_sigma),
        downsample=1 + fraction * (degradation.downsample - 1),
        noise=fraction * degradation.noise,
        jpeg=None if degradation.jpeg is None else round(min(100, max(1, 100 - fraction * (100 - degradation.jpeg)))),
        jitter=tuple(fraction * shift for shift in degradation.jitter),
        gray=degradation.gray and fraction >= 1,
    )


def strength_ladder(person: Person, rng: np.random.Generator) -> list[np.ndarray]:
    """Return four of a person's rungs in rising strength."""
    chosen = np.sort(rng.choice(len(person.rungs), RUNGS, replace=False))
    return [person.rungs[i].image for i in chosen]


def mixed_ladder(person: Person, rng: np.random.Generator) -> list[np.ndarray]:
    """Return a good rung, the same mildly blurred, a bad rung, and that one under the same blur."""
    good, bad = person.rungs[rng.integers(2)], person.rungs[-1 - rng.integers(2)]
    return with_blurred(good, bad, rng)


def with_blurred(good: View, bad: View, rng: np.random.Generator) -> list[np.ndarray]:
    """Return good, good blurred, bad, bad blurred: a mild blur is worse than none, and better than a broken face."""
    sigma = rng.uniform(*MILD) * good.face_width
    return [good.image, blurred(good.image, sigma), bad.image, blurred(bad.image, sigma)]


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur by a Gaussian; sigma: in pixels, above 0."""
    return cv2.GaussianBlur(image, (0, 0), max(sigma, 1e-3))


def spoil(
    view: View, landmarks: np.ndarray, damages: dict[str, Callable], rng: np.random.Generator
) -> tuple[list[np.ndarray], str]:
    """Return a face and worse ones, and their kind: "broken", "degraded" or "blurred".

    They show one damage in rising strength, or (the last kind) a light photometric damage on the face, on the face with
    a structural one, and on neither. damages: by name, as in DAMAGES.
    """
    seed = int(rng.integers(2**31))
    structural = [name for name in damages if name not in PHOTOMETRIC]
    structural += [name for name in HARD if name in damages] * 2

    def damaged(image: np.ndarray, name: str, strength: float) -> np.ndarray:
        return damages[name](image, landmarks, strength, np.random.default_rng(seed)) if strength else image

    if rng.random() < 0.6:
        name = str(rng.choice([*PHOTOMETRIC, *structural]))
        levels = np.sort(rng.choice((0.0, *LEVELS), RUNGS, replace=False))
        return [damaged(view.image, name, level) for level in levels], "degraded" if name in PHOTOMETRIC else "broken"
    broken = damaged(view.image, str(rng.choice(structural)), rng.uniform(0.4, 1.0))
    veil, strength = str(rng.choice(PHOTOMETRIC)), rng.uniform(0.05, 0.25)
    return [view.image, damaged(view.image, veil, strength), broken, damaged(broken, veil, strength)], "blurred"


def framed(view: View, rng: np.random.Generator) -> list[float]:
    """Return the whole image or the face's box, whose edges move by up to a tenth: detectors do not agree on them."""
    return list(view.whole) if rng.random() < 0.5 else jitter(view.box, view.image.shape[1], rng)


def jitter(box: Sequence[float], side: int, rng: np.random.Generator) -> list[float]:
    """Move each edge by up to a tenth of the box in a square image."""
    width, height = box[2] - box[0], box[3] - box[1]
    moved = np.array(box) + rng.uniform(-0.1, 0.1, 4) * (width, height, width, height)
    return moved.clip(0, side).tolist()


def mirrored_and_lit(images: Sequence[np.ndarray], box: Sequence[float], rng: np.random.Generator) -> tuple[list, list]:
    """Flip all images or none, and change their light alike: what does not make a face worse. Returns images, box."""
    gain, width = rng.uniform(0.8, 1.2), images[0].shape[1]
    images = [(image * gain).clip(0, 255).astype(np.uint8) for image in images]
    if rng.random() < 0.5:
        return images, list(box)
    x0, y0, x1, y1 = box
    return [np.ascontiguousarray(image[:, ::-1]) for image in images], [width - x1, y0, width - x0, y1]


def alike(images: Sequence[np.ndarray], box: Sequence[float], rng: np.random.Generator) -> tuple[list, list]:
    """Apply the same mild blur, resampling, JPEG, light and flip to all images. Returns them and the box."""
    width = images[0].shape[1]
    sigma, size = rng.uniform(0, 1.1) * (rng.random() < 0.4) * width / 128, round(width * rng.uniform(0.5, 1))
    quality = int(rng.integers(40, 96))
    resampled, compressed = rng.random() < 0.3, rng.random() < 0.4
    result = []
    for image in images:
        if sigma > 0.1:
            image = cv2.GaussianBlur(image, (0, 0), sigma)
        if resampled:
            shape = image.shape[1::-1]
            image = cv2.resize(
                cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA), shape, interpolation=cv2.INTER_CUBIC
            )
        if compressed:
            image = cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)
        result.append(image)
    return mirrored_and_lit(result, box, rng)


def ladder_loss(scores: Tensor, steepness: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """-log sigmoid(k (s(upper) - s(lower))) / k, averaged over all pairs of rungs (Face Score, Eq. 5, on every pair).

    scores: (B, L), the best rung first; steepness: (B, L (L - 1) / 2), k of each pair, the pairs as
    `torch.triu_indices` has them, 1 if None: a pair is content with a margin k times as small, and pulls no harder;
    weights: the same shape, of each pair in the average.
    """
    upper, lower = torch.triu_indices(scores.shape[1], scores.shape[1], 1)
    steepness = torch.ones(()) if steepness is None else steepness
    losses = -F.logsigmoid(steepness * (scores[:, upper] - scores[:, lower])) / steepness
    return losses.mean() if weights is None else (weights * losses).sum() / weights.sum()


def in_order(scores: Tensor) -> Tensor:
    """Return the fraction of the pairs of rungs that are in order; scores: (B, L), the best rung first."""
    upper, lower = torch.triu_indices(scores.shape[1], scores.shape[1], 1)
    return (scores[:, upper] > scores[:, lower]).float().mean()


def as_images(rungs: Sequence[np.ndarray]) -> list[Image.Image]:
    return [Image.fromarray(rung) for rung in rungs]
