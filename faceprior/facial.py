"""The time-aware latent facial feature loss: eyes and mouth of the predicted latents (AuthFace, section 3.2).

    w(t) * sum over regions of [ lambda_d softplus(-D_r(ROI_r z0_hat)) + lambda_s style ]

z0_hat are the clean latents that the model's output predicts; D_r are discriminators of cropped latents, one for the
eyes and one for the mouth; style is the distance of their features' Gram matrices from those of the clean latents. From
the paper are w(t), the regions, that separate discriminators are trained, and that it follows GFP-GAN (arXiv
2101.04061). The rest is reconstructed from GFP-GAN, as the text at hand breaks off there: the discriminators'
architecture, the Gram matrices, both lambdas, the boxes, the optimizer. That the discriminators see no t, and that w(t)
does not weight their own loss, is our reading, too.

The regions and the discriminators are here, the formulas in `faceprior.losses`, their sum in stage 6.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import roi_align
from tqdm.auto import tqdm

from faceprior.detect import detect_faces
from faceprior.errors import explain, is_disk_full
from faceprior.files import common_folder, printable
from faceprior.images import load_image
from faceprior.jsonl import append_row, resume_rows, rewrite_rows
from faceprior.losses import discriminator_loss, generator_loss, style_distance

logger = logging.getLogger(__name__)
LANDMARKS_FILE = "landmarks.jsonl"
EYE_BOX, MOUTH_BOX = 80 / 512, 120 / 512  # sides of the boxes over the image's width
EYE_CELLS, MOUTH_CELLS = 10, 15  # sides of the cropped latents: the boxes' sides at 512 pixels and 8 pixels a cell


class EqualizedConv2d(nn.Module):
    """A convolution with "same" padding whose normal weights are scaled at run time (StyleGAN's equalized rate).

    GFP-GAN's learning rate of 2e-3 is meant for it. downsample: blurs by [1, 3, 3, 1] and takes a stride of 2.
    """

    def __init__(self, in_channels: int, out_channels: int, downsample: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.downsample = downsample
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("blur", torch.outer(taps, taps)[None, None], persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self.weight / math.sqrt(self.weight[0].numel())
        if not self.downsample:
            return F.conv2d(hidden, weight, self.bias, padding=1)
        channels = hidden.shape[1]
        blurred = F.conv2d(F.pad(hidden, (2, 2, 2, 2)), self.blur.expand(channels, 1, 4, 4), groups=channels)
        return F.conv2d(blurred, weight, self.bias, stride=2)


class LatentDiscriminator(nn.Module):
    """GFP-GAN's facial component discriminator, on latents: (N, C, h, w) -> two levels of features and logits.

    The features are (N, 128, h/2, w/2) and (N, 256, h/4, w/4), the logits (N, 1, h/4, w/4), high for clean latents.
    """

    def __init__(self, in_channels: int = 4):
        super().__init__()
        self.first = nn.ModuleList(
            [EqualizedConv2d(in_channels, 64), EqualizedConv2d(64, 128, downsample=True), EqualizedConv2d(128, 128)]
        )
        self.second = nn.ModuleList([EqualizedConv2d(128, 256, downsample=True), EqualizedConv2d(256, 256)])
        self.last = EqualizedConv2d(256, 1)

    def forward(self, latents: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        hidden, features = latents, []
        for level in (self.first, self.second):
            for layer in level:
                hidden = F.leaky_relu(layer(hidden), 0.2) * math.sqrt(2)
            features.append(hidden)
        return tuple(features), self.last(hidden)


class FacialDiscriminators(nn.Module):
    """One discriminator for both eyes and one for the mouth: cropped latents by region -> features and logits."""

    def __init__(self, in_channels: int = 4):
        super().__init__()
        self.regions = nn.ModuleDict({name: LatentDiscriminator(in_channels) for name in ("eyes", "mouth")})

    def forward(self, crops: dict[str, Tensor]) -> dict[str, tuple[tuple[Tensor, Tensor], Tensor]]:
        return {name: discriminator(crops[name]) for name, discriminator in self.regions.items()}


def crop_regions(latents: Tensor, landmarks: Tensor, resolution: int) -> dict[str, Tensor]:
    """Crop eyes and mouth from latents by ROI align -> eyes (2B, C, 10, 10), mouth (B, C, 15, 15), float32.

    latents: (B, C, h, w); landmarks: (B, 5, 2) in pixels (integers are pixel centres) of the resolution x resolution
    image, in the order of `faceprior.detect.LANDMARK_NAMES`. The left eyes of all samples come first. The part of a box
    that is outside of the image is 0.
    """
    eyes = landmarks[:, :2].transpose(0, 1).flatten(0, 1)
    mouth = landmarks[:, 3:].mean(dim=1)
    return {
        "eyes": _crop(latents, eyes, EYE_BOX, EYE_CELLS, resolution),
        "mouth": _crop(latents, mouth, MOUTH_BOX, MOUTH_CELLS, resolution),
    }


def _crop(latents: Tensor, centres: Tensor, side: float, cells: int, resolution: int) -> Tensor:
    """Crop a square of `side` image widths around each of centres (k B, 2) -> (k B, C, cells, cells)."""
    samples = torch.arange(len(latents), device=latents.device).repeat(len(centres) // len(latents))
    edges = centres.to(latents.device, torch.float32) + 0.5  # boxes name the edges of pixels
    half = side * resolution / 2
    boxes = torch.cat([samples[:, None].float(), edges - half, edges + half], dim=1)  # (k B, 5): sample, xyxy
    scale = latents.shape[-1] / resolution
    return roi_align(latents.float(), boxes, cells, spatial_scale=scale, aligned=True)


class FacialFeatureLoss:
    """The parts of the loss for the restorer, and the training of the discriminators, its opponents.

        adversarial, style = facial(prediction, latents, landmarks)
        accelerator.backward(noise + facial_loss(weights[timesteps], adversarial, style))
        ...
        facial.train_discriminators(prediction, latents, landmarks)

    prediction: z0_hat, (B, C, h, w), and latents: z_0, the clean ones; landmarks: (B, 5, 2) in pixels, NaN for a face
    where none were found, which adds 0 to every loss. The discriminators run in float32 whatever the accelerator's
    mixed precision is, so their own loss needs no scaling. `accuracy` are measures of the last batch, for the log: for
    each region and side, as `eyes_real` and `mouth_fake`, the fraction of the logits with the right sign, averaged over
    the batch, to which a face without landmarks adds 0.5, chance. At 0.5 the discriminators cannot tell z0_hat from
    z_0, at 1 they see every difference.

    discriminators: on the accelerator's device, the same in every process, not prepared by it.
    """

    def __init__(
        self,
        discriminators: FacialDiscriminators,
        accelerator: Accelerator,
        resolution: int,
        learning_rate: float = 2e-3,
    ):
        self.discriminators, self.accelerator, self.resolution = discriminators, accelerator, resolution
        self.optimizer = torch.optim.Adam(discriminators.parameters(), learning_rate, betas=(0.9, 0.99))
        self.accuracy: dict[str, Tensor] = {}

    def __call__(self, prediction: Tensor, latents: Tensor, landmarks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the adversarial and the style part, (B,) each, summed over left eye, right eye and mouth.

        Gradients reach `prediction` only, not the discriminators' parameters.
        """
        frozen = {name: parameter.detach() for name, parameter in self.discriminators.named_parameters()}
        with self._float32():
            crops, found = self._crops(prediction, landmarks)
            fake = torch.func.functional_call(self.discriminators, frozen, (crops,))
            with torch.no_grad():
                real = self.discriminators(self._crops(latents, landmarks)[0])
            adversarial = found * self._per_sample(generator_loss(logits) for _, logits in fake.values())
            style = found * self._per_sample(style_distance(fake[name][0], real[name][0]) for name in fake)
        return adversarial, style

    def train_discriminators(self, prediction: Tensor, latents: Tensor, landmarks: Tensor) -> Tensor:
        """Backpropagate one micro-batch, step after the last one of a step, and return the loss (B,), detached.

        Clean latents are real, predicted ones are fake. No gradient reaches the restorer. Sets `accuracy`.
        """
        with self._float32():
            (fake, found), (real, _) = (self._crops(z.detach(), landmarks) for z in (prediction, latents))
            fakes, reals = self.discriminators(fake), self.discriminators(real)
            loss = found * self._per_sample(discriminator_loss(reals[name][1], fakes[name][1]) for name in fakes)
            self.accuracy = {
                f"{name}_{side}": self._accuracy(sign * logits[name][1], found)
                for name in fakes
                for side, sign, logits in (("real", 1, reals), ("fake", -1, fakes))
            }
        (loss.mean() / self.accelerator.gradient_accumulation_steps).backward()
        if self.accelerator.sync_gradients:
            if self.accelerator.num_processes > 1:
                for parameter in self.discriminators.parameters():
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()

    def _crops(self, latents: Tensor, landmarks: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return the cropped regions, and (B,) 1 or 0: whether landmarks were found (boxes in the middle if not)."""
        found = landmarks.isfinite().all(dim=2).all(dim=1)
        middle = torch.full_like(landmarks, self.resolution / 2)
        crops = crop_regions(latents, torch.where(found[:, None, None], landmarks, middle), self.resolution)
        return crops, found.float()

    @staticmethod
    def _per_sample(regions) -> Tensor:
        """Sum over the regions: (2B,) of the eyes, left ones first, and (B,) of the mouth -> (B,)."""
        eyes, mouth = regions
        left, right = eyes.chunk(2)
        return left + right + mouth

    @staticmethod
    def _accuracy(logits: Tensor, found: Tensor) -> Tensor:
        """Return the fraction of logits above 0; those of faces that were not found, (B,) 0, count as 0.5."""
        correct = (logits > 0).float().flatten(1).mean(dim=1).view(-1, len(found)).mean(dim=0)  # (B,), of both eyes
        return (found * correct + (1 - found) / 2).mean()

    def _float32(self):
        return torch.autocast(self.accelerator.device.type, enabled=False)


def find_landmarks(
    paths: Sequence[Path],
    output: str | Path,
    resolution: int,
    accelerator: Accelerator,
    find: Callable[[Image.Image], Tensor | None],
) -> Tensor:
    """Find every image's landmarks once -> (N, 5, 2) float32 in pixels at `resolution`, NaN where there are none.

    find: from an image to (5, 2) landmarks in its own pixels, or None. Each image is a row of `landmarks.jsonl` in
    `output` as soon as it is done, so that an interrupted search resumes. Several processes share the images; each
    writes its own file until the end.
    """
    output, rank = Path(output), accelerator.process_index
    root = common_folder(list(paths))
    names = [path.relative_to(root).as_posix() for path in paths]
    if accelerator.is_main_process:
        _gather(output, names)
    accelerator.wait_for_everyone()

    done = {row["image"] for row in resume_rows(output / LANDMARKS_FILE)}
    todo = [(name, path) for name, path in zip(names, paths, strict=True) if name not in done][
        rank :: accelerator.num_processes
    ]
    accelerator.wait_for_everyone()
    for name, path in tqdm(todo, desc="landmarks", unit="face", disable=not (todo and accelerator.is_main_process)):
        try:
            landmarks = _scaled(load_image(path), find, resolution)
        except Exception as error:  # of one image, which is trained as one without a face
            if (reason := explain(error)) is None or is_disk_full(error):
                raise
            logger.warning("%s", printable(f"{name}: no landmarks: {reason}"))
            landmarks = None
        append_row(output / _part(rank), {"image": name, "landmarks": landmarks})
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _gather(output, names)
    accelerator.wait_for_everyone()

    found = {row["image"]: row["landmarks"] for row in resume_rows(output / LANDMARKS_FILE)}
    return torch.tensor([found[name] or [[math.nan] * 2] * 5 for name in names])


def largest_landmarks(image: Image.Image, detector: str) -> np.ndarray | None:
    """Return the landmarks (5, 2) of the largest face; an aligned face fills a large part of its image."""
    faces = detect_faces(image, detector, min_confidence=0.5, min_face_size=min(image.size) / 4)
    return next((face.landmarks for face in faces if face.landmarks is not None), None)


def without_landmarks(paths: Sequence[Path], landmarks: Tensor) -> list[str]:
    """Return the names of the images in which `find_landmarks` found none."""
    missing = landmarks.isnan().flatten(1).any(dim=1).tolist()
    return [path.name for path, is_missing in zip(paths, missing, strict=True) if is_missing]


def _part(rank: int) -> str:
    return f"landmarks.{rank}.jsonl"


def _gather(output: Path, names: list[str]) -> None:
    """Merge the rows of all processes into one file, in the order of the images."""
    parts = sorted(output.glob(_part("*")))
    rows = {row["image"]: row for path in (output / LANDMARKS_FILE, *parts) for row in resume_rows(path)}
    rewrite_rows(output / LANDMARKS_FILE, [rows[name] for name in names if name in rows])
    for path in parts:
        path.unlink()


def _scaled(image: Image.Image, find: Callable, resolution: int) -> list[list[float]] | None:
    """Return the landmarks in pixels of the image at resolution x resolution; integers are pixel centres."""
    landmarks = find(image)
    if landmarks is None:
        return None
    factors = torch.tensor([resolution / side for side in image.size])
    points = (torch.as_tensor(landmarks, dtype=torch.float64) + 0.5) * factors - 0.5
    return [[round(x, 3) for x in point] for point in points.tolist()]
