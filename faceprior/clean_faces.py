"""Clean, aligned faces of a folder, and the degraded faces that are made of them as they are loaded.

    faces = CleanFaces(readable_images("ffhq")[0], 512)
    for batch in run.batches(faces, batch_size, seed, DegradedPair(PRESETS["authface"])):
        batch["pixel_values"], batch["controlnet_cond"]         # clean and degraded

The clean side does not change, so that its latents can be cached: see `CleanFaces.cached`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from faceprior.cache import cache_dataset
from faceprior.degrade import DegradationConfig, degrade
from faceprior.diffusion import encode_latents, encode_moments, latents_from_moments
from faceprior.files import find_images
from faceprior.images import ImageError, as_array, load_image, save_image, to_pixel_values
from faceprior.jsonl import rewrite_rows

MIRRORED = [1, 0, 2, 4, 3]  # the landmarks of a mirrored face, in the order of `faceprior.detect.LANDMARK_NAMES`
FLIPPED = "flipped_"  # before the names of a mirrored face's moments
SAMPLES_FILE = "samples.jsonl"
MOMENTS = ("latent_mean", "latent_std")


def readable_images(folder: str | Path) -> tuple[list[Path], list[tuple[str, str]]]:
    """Return the images of a folder that can be read, and (path, reason) of the others.

    Raises ValueError if there is none.
    """
    paths, problems = [], []
    for path in find_images(folder):
        try:
            load_image(path)
            paths.append(path)
        except ImageError as error:
            problems.append((str(path), str(error)))
    if not paths:
        raise ValueError(f"no image in {folder} can be read; the first: {problems[0][1]}")
    return paths, problems


class CleanFaces(Dataset):
    """Square faces: id, the file; clean (R, R, 3) uint8; landmarks (5, 2) in pixels if known. See `DegradedPair`.

    landmarks: (N, 5, 2) of all faces; moments: a dataset of the faces' encoded latents, see `cached`.
    """

    def __init__(
        self,
        paths: list[Path],
        resolution: int,
        landmarks: Tensor | None = None,
        moments: Dataset | None = None,
    ):
        self.paths, self.resolution, self.landmarks, self.moments = paths, resolution, landmarks, moments

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        size = (self.resolution, self.resolution)
        clean = as_array(load_image(self.paths[index]).resize(size, Image.LANCZOS))
        sample = {"id": str(self.paths[index]), "clean": clean}
        sample |= {} if self.moments is None else self.moments[index]
        return sample if self.landmarks is None else {**sample, "landmarks": self.landmarks[index]}

    def source(self, index: int) -> tuple[dict[str, Any], Any]:
        """Return the values that are no tensors, and what the latents depend on (see `cache_dataset`)."""
        return {"id": str(self.paths[index])}, [self.paths[index], self.resolution]

    def cached(
        self,
        folder: str | Path,
        pipeline: DiffusionPipeline,
        accelerator: Accelerator,
        batch_size: int = 1,
        num_workers: int = 0,
        flips: bool = False,
    ) -> CleanFaces:
        """Return the same faces with the posteriors of their latents from the cache, computed where missing.

        flips: of the mirrored faces, too. Training with it equals training without, as the VAE encodes image by image
        (`enable_slicing`) and the latents are drawn from the posterior in the same way. The VAE is on the accelerator's
        device only while it fills the cache.
        """
        encode, kind = MomentEncoder(pipeline.vae, flips), "faces_flips" if flips else "faces"
        plain = CleanFaces(self.paths, self.resolution)
        moments = cache_dataset(
            plain, folder, kind, pipeline, encode, accelerator, batch_size, num_workers=num_workers, prompt=None
        )
        return CleanFaces(self.paths, self.resolution, self.landmarks, moments)


class MomentEncoder:
    """Makes of a batch's images what the cache keeps: `latent_mean` and `latent_std`, (B, C, h, w) each.

    The images are `clean`, B faces of `CleanFaces`, or (B, 3, H, W) `pixel_values` in [-1, 1].

    flips: also of the mirrored ones, under the same names after FLIPPED.
    """

    def __init__(self, vae: AutoencoderKL, flips: bool = False):
        self.vae, self.flips = vae, flips

    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        pixels = to_pixel_values(batch["clean"]) if "clean" in batch else batch["pixel_values"]
        moments = dict(zip(MOMENTS, encode_moments(self.vae, pixels), strict=True))
        if self.flips:
            mirrored = encode_moments(self.vae, pixels.flip(-1))
            moments |= {FLIPPED + name: value for name, value in zip(MOMENTS, mirrored, strict=True)}
        return moments


class DegradedPair:
    """Turns a clean face into pixel_values and controlnet_cond, (3, R, R) in [-1, 1] and [0, 1].

    flip_prob: probability that the face is mirrored first, with its landmarks and its cached latents.
    """

    def __init__(self, config: DegradationConfig, flip_prob: float = 0.0):
        self.config, self.flip_prob = config, flip_prob

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        clean, flips = sample.pop("clean"), {k: sample.pop(k) for k in list(sample) if k.startswith(FLIPPED)}
        if self.flip_prob and rng.random() < self.flip_prob:
            clean = np.ascontiguousarray(clean[:, ::-1])
            sample |= {name.removeprefix(FLIPPED): value for name, value in flips.items()}
            if "landmarks" in sample:
                sample["landmarks"] = mirror_landmarks(sample["landmarks"], clean.shape[1])
        pixel_values, condition = to_pixel_values([clean, degrade(clean, self.config, rng)])
        return {**sample, "pixel_values": pixel_values, "controlnet_cond": condition / 2 + 0.5}


def mirror_landmarks(landmarks: Tensor, width: int) -> Tensor:
    """Return the landmarks (5, 2) of the mirrored image, in pixels, integers being pixel centres."""
    mirrored = landmarks[MIRRORED].clone()
    mirrored[:, 0] = width - 1 - mirrored[:, 0]
    return mirrored


def clean_latents(vae: AutoencoderKL, batch: dict[str, Any], generators: list[torch.Generator]) -> Tensor:
    """Return a batch's clean latents (B, C, h, w), drawn from the posterior: encoded here, or before to the cache."""
    if MOMENTS[0] in batch:
        return latents_from_moments(vae, *(batch[name] for name in MOMENTS), generators)
    return encode_latents(vae, batch["pixel_values"], generators)


def save_samples(
    output: str | Path,
    faces: CleanFaces,
    ranges: DegradationConfig,
    restore_crops: Callable[[list[Image.Image]], list[Image.Image]],
    count: int,
    seed: int,
) -> None:
    """Degrade the first `count` faces, restore them, and save the three of each, with a row in `samples.jsonl`."""
    output, rows = Path(output), []
    for index in range(min(count, len(faces))):
        clean = faces[index]["clean"]
        degraded = Image.fromarray(degrade(clean, ranges, np.random.default_rng([seed, index])))
        images = {"clean": Image.fromarray(clean), "degraded": degraded, "restored": restore_crops([degraded])[0]}
        files = {kind: f"samples/{index:03d}_{kind}.png" for kind in images}
        for kind, image in images.items():
            save_image(image, output / files[kind])
        rows.append(files)
    rewrite_rows(output / SAMPLES_FILE, rows)
