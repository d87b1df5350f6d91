"""Degraded faces: blur, downsampling, noise and JPEG with random strengths.

The order is that of GFP-GAN (Wang et al. 2021, section 4.1) and later work: Gaussian blur -> bilinear downsampling ->
Gaussian noise -> JPEG -> bilinear upsampling -> colour shift -> grey -> rounding. Strengths are sampled first
(`sample_degradation`) and applied second (`apply_degradation`), so that a degradation can be stored and repeated.
"""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from faceprior.images import cv2

REFERENCE_SIZE = 512

Range = tuple[float, float]


@dataclass
class DegradationConfig:
    """Ranges from which strengths are sampled, each uniformly; the defaults are AuthFace's.

    Sizes in pixels (kernel, sigma) and factors are for a 512 px face: `scaled` adapts them to smaller ones.
    """

    blur_kernel: int = 41  # side of the blur kernel in pixels, odd
    blur_sigma: Range = (0.1, 10.0)  # standard deviation of the blur in pixels; (0, 0) for none
    isotropic_prob: float = 0.5  # probability of a round kernel; else it is elliptic at a random angle
    downsample: Range = (0.8, 8.0)  # downsampling factor; (1, 1) for none
    noise: Range = (0.0, 20.0)  # standard deviation of the noise, of 255; (0, 0) for none
    jpeg: tuple[int, int] | None = (60, 100)  # JPEG quality; None for no JPEG
    gray_prob: float = 0.0  # probability of a grey image
    jitter_prob: float = 0.0  # probability of a colour shift
    jitter_shift: float = 20.0  # largest shift of a colour channel, of 255

    def __post_init__(self) -> None:
        if self.blur_kernel < 1 or self.blur_kernel % 2 == 0:
            raise ValueError(f"`blur_kernel` has to be an odd number of pixels but is {self.blur_kernel}")
        _check_range("blur_sigma", self.blur_sigma, 0)
        _check_range("downsample", self.downsample, 1e-3)
        _check_range("noise", self.noise, 0)
        if self.jpeg is not None:
            _check_range("jpeg", self.jpeg, 1, 100)
        for name in ("isotropic_prob", "gray_prob", "jitter_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` has to lie in [0, 1] but is {getattr(self, name)}")


def _check_range(name: str, bounds: Any, least: float, most: float = math.inf) -> None:
    if len(bounds) != 2 or not least <= bounds[0] <= bounds[1] <= most:
        raise ValueError(f"`{name}` has to be (low, high) with {least} <= low <= high <= {most} but is {bounds}")


PRESETS = {
    # AuthFace (arXiv 2410.09864) trains like BFRffusion: no colour changes
    "authface": DegradationConfig(),
    # GFP-GAN, options/train_gfpgan_v1.yml (without its second, torchvision colour jitter)
    "gfpgan": DegradationConfig(gray_prob=0.01, jitter_prob=0.3, jitter_shift=20),
    # DiffBIR, configs/train/train_stage1.yaml
    "diffbir": DegradationConfig(blur_sigma=(0.1, 12.0), downsample=(1.0, 12.0), noise=(0.0, 15.0), jpeg=(30, 100)),
    # CodeFormer, options/CodeFormer_stage2.yml, "large degradation"
    "codeformer": DegradationConfig(blur_sigma=(1.0, 15.0), downsample=(4.0, 30.0), jpeg=(30, 80)),
}


NO_JPEG = (0, 0)  # a stage's `jpeg` for none


def ranges_of(settings: Any, size: int) -> DegradationConfig:
    """Return the ranges that a stage's settings name, for faces of `size` pixels.

    settings: has `degradation`, the preset; `scale_degradation`, whether `scaled` adapts the ranges to the size; and
    every field of `DegradationConfig` under its own name, () or None for the preset's. A `jpeg` of NO_JPEG is none.
    """
    given = {field.name: getattr(settings, field.name) for field in fields(DegradationConfig)}
    changes = {name: value for name, value in given.items() if value not in (None, ())}
    if changes.get("jpeg") == NO_JPEG:
        changes["jpeg"] = None
    ranges = replace(PRESETS[settings.degradation], **changes)
    return scaled(ranges, size) if settings.scale_degradation else ranges


@dataclass(frozen=True)
class Degradation:
    """Sampled strengths; the defaults change nothing."""

    blur_kernel: int = 1  # side of the blur kernel in pixels
    blur_sigma: Range = (0.0, 0.0)  # standard deviations along its two axes in pixels; 0 for no blur
    blur_angle: float = 0.0  # angle from the x axis to the first of them in radians
    downsample: float = 1.0  # downsampling factor
    noise: float = 0.0  # standard deviation of the noise, of 255
    jpeg: int | None = None  # JPEG quality
    jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)  # added to R, G, B, of 255
    gray: bool = False  # whether the image becomes grey

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON."""
        values = asdict(self)
        return values | {"blur_sigma": list(self.blur_sigma), "jitter": list(self.jitter)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Degradation":
        """The inverse of `to_dict`."""
        return cls(**values | {name: tuple(values[name]) for name in ("blur_sigma", "jitter")})


def scaled(config: DegradationConfig, size: int) -> DegradationConfig:
    """Adapt the config to faces of `size` pixels, so that a smaller face looks the same as one of 512 pixels.

    With r = size / 512 < 1, kernel (rounded to an odd number, at least 3) and blur sigma are multiplied by r, so the
    blur covers the same fraction of the face; the downsampling range is multiplied by r but not below 1 (a lower end
    that was below 1 stays), so the face is reduced to the same number of pixels as at 512. Noise and JPEG act on that
    reduced face and stay the same. At 512 and above nothing changes.
    """
    ratio = size / REFERENCE_SIZE
    if ratio >= 1:
        return replace(config)
    low, high = config.downsample
    return replace(
        config,
        blur_kernel=max(3, 2 * round((config.blur_kernel * ratio - 1) / 2) + 1),
        blur_sigma=(config.blur_sigma[0] * ratio, config.blur_sigma[1] * ratio),
        downsample=(max(low * ratio, min(low, 1.0)), max(high * ratio, min(high, 1.0))),
    )


def sample_degradation(config: DegradationConfig, rng: np.random.Generator) -> Degradation:
    """Sample the strengths of one degradation. The number of random numbers does not depend on their values."""
    first, second = rng.uniform(*config.blur_sigma, size=2)
    isotropic = rng.random() < config.isotropic_prob
    angle = rng.uniform(-math.pi, math.pi)
    downsample, noise = rng.uniform(*config.downsample), rng.uniform(*config.noise)
    quality = rng.random()
    jittered, gray = rng.random(2) < (config.jitter_prob, config.gray_prob)
    shift = rng.uniform(-config.jitter_shift, config.jitter_shift, size=3)
    return Degradation(
        blur_kernel=config.blur_kernel,
        blur_sigma=(float(first), float(first if isotropic else second)),
        blur_angle=0.0 if isotropic else float(angle),
        downsample=float(downsample),
        noise=float(noise),
        jpeg=None if config.jpeg is None else round(np.interp(quality, (0, 1), config.jpeg)),
        jitter=tuple(shift.tolist()) if jittered else (0.0, 0.0, 0.0),
        gray=bool(gray),
    )


def gaussian_kernel(size: int, sigma: Range, angle: float = 0.0) -> np.ndarray:
    """A Gaussian with standard deviations `sigma` along two axes rotated by `angle`: (size, size) float32, sum 1.

    sigma: in pixels, above 0. angle: in radians from the x axis (right) towards the y axis (down). The density is
    exp(-p^T S^-1 p / 2) with S = R diag(sigma^2) R^T, sampled at pixel centres.
    """
    if min(sigma) <= 0:
        raise ValueError(f"`sigma` has to be above 0 but is {sigma}")
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    along = (math.cos(angle) * x + math.sin(angle) * y) / sigma[0]
    across = (math.cos(angle) * y - math.sin(angle) * x) / sigma[1]
    kernel = np.exp(-(along**2 + across**2) / 2)
    return (kernel / kernel.sum()).astype(np.float32)


def apply_degradation(image: np.ndarray, degradation: Degradation, rng: np.random.Generator) -> np.ndarray:
    """Degrade an image; the same degradation and the same state of `rng` give the same pixels.

    image: (H, W, 3) uint8 RGB, not changed. rng: used for the noise only. Returns (H, W, 3) uint8.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"`image` has to be (H, W, 3) uint8 but is {image.shape} {image.dtype}")
    height, width = image.shape[:2]
    pixels = _blur(image.astype(np.float32) / 255, degradation)
    if degradation.downsample != 1:
        reduced = max(1, int(width / degradation.downsample)), max(1, int(height / degradation.downsample))
        pixels = cv2.resize(pixels, reduced, interpolation=cv2.INTER_LINEAR)
    pixels = _jpeg(_noise(pixels, degradation.noise, rng), degradation.jpeg)
    if pixels.shape[:2] != (height, width):
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    pixels = _recolour(pixels, degradation)
    return np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8)


def degrade(image: np.ndarray, config: DegradationConfig, rng: np.random.Generator) -> np.ndarray:
    """Sample a degradation from `config` and apply it: (H, W, 3) uint8 RGB -> the same shape."""
    return apply_degradation(image, sample_degradation(config, rng), rng)


def _blur(pixels: np.ndarray, degradation: Degradation) -> np.ndarray:
    if degradation.blur_kernel == 1 or min(degradation.blur_sigma) <= 0:
        return pixels
    kernel = gaussian_kernel(degradation.blur_kernel, degradation.blur_sigma, degradation.blur_angle)
    return cv2.filter2D(pixels, -1, kernel)


def _noise(pixels: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    if sigma == 0:
        return pixels
    noise = rng.standard_normal(pixels.shape, dtype=np.float32)
    return np.clip(pixels + noise * np.float32(sigma / 255), 0, 1)


def _jpeg(pixels: np.ndarray, quality: int | None) -> np.ndarray:
    if quality is None:
        return pixels
    bgr = np.clip(np.rint(pixels[..., ::-1] * 255), 0, 255).astype(np.uint8)
    _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1].astype(np.float32) / 255


def _recolour(pixels: np.ndarray, degradation: Degradation) -> np.ndarray:
    if any(degradation.jitter):
        pixels = np.clip(pixels + np.array(degradation.jitter, dtype=np.float32) / 255, 0, 1)
    if degradation.gray:  # luma of ITU-R BT.601
        pixels = np.repeat(pixels @ np.array([[0.299], [0.587], [0.114]], dtype=np.float32), 3, axis=2)
    return pixels


def degrade_alike(sides: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Flip both face crops of a pair with probability 1/2, and degrade both mildly and alike with probability 1/2.

    Sharpness and compression then do not depend on the side. It acts before the crops are resized, so its strengths are
    relative to the face: a blur of at most 1% of its side, and downsampling to no less than two thirds of its side.
    sides: "good" and "bad", (H, W, 3) uint8.
    """
    flip, degraded = rng.random(2) < 0.5
    side = min(sides["good"].shape[:2])
    mild = DegradationConfig(
        blur_kernel=2 * math.ceil(0.03 * side) + 1,
        blur_sigma=(0.0, 0.01 * side),
        isotropic_prob=1.0,
        downsample=(1.0, 1.5),
        noise=(0.0, 0.0),
        jpeg=(70, 100),
    )
    degradation = sample_degradation(mild, rng)
    if degraded:
        sides = {name: apply_degradation(crop, degradation, rng) for name, crop in sides.items()}
    return {name: np.ascontiguousarray(crop[:, ::-1]) for name, crop in sides.items()} if flip else sides
