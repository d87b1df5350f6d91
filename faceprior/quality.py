"""Measurements of an image: sharpness, fine detail, noise, JPEG blocks, and a perceptual hash."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from faceprior.images import cv2

SHARPNESS_SIDE = 64  # pixels; larger faces are shrunk to it before their sharpness is measured


def sharpness(image: Image.Image, box: Sequence[float]) -> float:
    """Return the variance of the Laplacian over that of the grey levels in a face's box (xyxy): 0 flat, 20 white noise.

    Larger faces are first shrunk to 64 pixels, so that blur is measured relative to the face. The ratio is independent
    of contrast. A sharp face has 0.15 to 1; one blurred by a Gaussian of 1%, 2%, 3% of its side about 0.15, 0.045 and
    0.025, drawn or photographed.
    """
    x0, y0, x1, y1 = (round(edge) for edge in box)
    face = image.crop((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))
    gray = np.asarray(face.convert("L"), np.float32)
    scale = SHARPNESS_SIDE / max(gray.shape)
    if scale < 1:
        gray = cv2.resize(gray, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return float(cv2.Laplacian(gray, cv2.CV_32F).var() / max(gray.var(), 1.0))


def perceptual_hash(image: Image.Image) -> int:
    """Return 64 bits that change little under resizing and compression (pHash).

    Each tells whether one of the 8 x 8 lowest frequencies (DCT of the grey image at 32 x 32) lies above their median.
    """
    gray = np.asarray(image.convert("L").resize((32, 32), Image.BOX), np.float32)
    frequencies = cv2.dct(gray)[:8, :8].ravel()
    bits = frequencies > np.median(frequencies[1:])  # without the mean brightness
    return int("".join("01"[int(bit)] for bit in bits), 2)


class NearDuplicates:
    """Photographs by their perceptual hash; two are near-duplicates if at most `max_distance` of 64 bits differ."""

    def __init__(self, max_distance: int):
        self.max_distance = max_distance  # below 0 there are no duplicates
        self._names: list[str] = []
        self._hashes = np.zeros(0, np.uint64)

    def add(self, name: str, value: int) -> None:
        self._names.append(name)
        self._hashes = np.append(self._hashes, np.uint64(value))

    def nearest(self, value: int) -> tuple[str, int] | None:
        """Return the most similar photograph added, the first of equals, and the number of different bits."""
        distances = np.bitwise_count(self._hashes ^ np.uint64(value))
        place = int(distances.argmin()) if len(distances) else 0
        return (self._names[place], int(distances[place])) if len(distances) else None

    def find(self, value: int) -> tuple[str, int] | None:
        """Return the first photograph added that is a near-duplicate, and the number of different bits."""
        distances = np.bitwise_count(self._hashes ^ np.uint64(value))
        near = np.flatnonzero(distances.astype(int) <= self.max_distance)
        return (self._names[near[0]], int(distances[near[0]])) if len(near) else None


def noise_level(gray: np.ndarray) -> float:
    """Estimate the standard deviation of Gaussian noise in a grey image (H, W) float32 (Immerkaer, 1996).

    The kernel is the difference of two Laplacians: it ignores constant, linear and quadratic structure. Finer
    structure, such as hair, counts as noise.
    """
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    response = np.abs(cv2.filter2D(gray, cv2.CV_32F, kernel))[1:-1, 1:-1]
    return float(np.sqrt(np.pi / 2) * response.mean() / 6)


def blockiness(gray: np.ndarray) -> float:
    """Return the mean step across 8 x 8 block borders over the mean step elsewhere; about 1 without JPEG blocks."""
    ratios = []
    for steps in (np.abs(np.diff(gray, axis=1)).mean(axis=0), np.abs(np.diff(gray, axis=0)).mean(axis=1)):
        border = np.arange(len(steps)) % 8 == 7
        if border.any():
            ratios.append((steps[border].mean() + 1e-3) / (steps[~border].mean() + 1e-3))
    return float(np.mean(ratios)) if ratios else 1.0


def fine_detail(gray: np.ndarray, scale: float) -> float:
    """Return how much detail an image has that would be lost if it were `scale` times smaller, relative to the rest.

    gray: (H, W). scale: above 1. The energy of the octave above the smaller image's highest frequency, 0.5 / scale
    cycles per pixel, divided by that of the octave below: about 1 for a sharp photograph, whose octaves have equal
    energies, and 0 for one that was enlarged or blurred. So much blur that the octave below is empty, too, leaves two
    remainders of compression, whose ratio says nothing: that octave counts at least 1 / 2^(k + 1) of the k-th one
    below it, for k from 2 to 4. A scale below 2 leaves less than an octave; what it has is scaled up to one. One below
    1.25, or an image below 16 pixels, leaves too little to measure: 0.

    Noise does not count: spread evenly, it determines the median of the band, from which its variance follows as for
    Gaussian values (1.4826 median)^2, whereas detail stands in few places. Nor do the borders of JPEG blocks: of the 64
    positions modulo 8 the energy is that of the lower quartile.
    """
    octaves = min(1.0, math.log2(scale)) if scale > 1 else 0.0
    height, width = (side - side % 8 for side in gray.shape)
    if octaves < math.log2(1.25) or min(height, width) < 16:
        return 0.0
    spectrum = cv2.dct(np.ascontiguousarray(gray[:height, :width], np.float32))
    frequency = np.hypot(np.arange(height)[:, None] / (2 * height), np.arange(width) / (2 * width))
    limit = 0.5 / scale
    octave = [
        float(np.square(spectrum[(frequency > limit / 2 ** (k + 1)) & (frequency <= limit / 2**k)]).sum())
        for k in range(5)
    ]
    below = max(octave[0], *(octave[k] / 2 ** (k + 1) for k in range(2, 5))) / spectrum.size
    band = cv2.idct(np.where((frequency > limit) & (frequency <= min(2 * limit, 0.5)), spectrum, 0))
    noise = (1.4826 * np.median(np.abs(band))) ** 2
    phases = np.square(band).reshape(height // 8, 8, width // 8, 8).mean(axis=(0, 2))
    return max(0.0, float(np.quantile(phases, 0.25) - noise)) / octaves / max(below, 1e-3)


def finest_octave(gray: np.ndarray) -> float:
    """Return the energy of an image's finest octave over that of the one below: does it have the detail of its size?

    gray: (H, W), 16 pixels at least on a side, else 0. The octaves are those of the DCT from 1/4 to 1/2 and from 1/8 to
    1/4 cycles per pixel. A photograph that was shrunk to this size has 0.15 to 1, one that was enlarged to twice its
    own size 0.11 at most; drawn or photographed. An octave counts at least 1 / 2^(k + 1) of the k-th one below it, for
    k from 2 to 4, as in `fine_detail`; unlike there noise counts: pores, too, stand everywhere.
    """
    height, width = gray.shape
    if min(height, width) < 16:
        return 0.0
    height, width = height - height % 2, width - width % 2  # OpenCV's DCT takes even sides
    spectrum = cv2.dct(np.ascontiguousarray(gray[:height, :width], np.float32))
    frequency = np.hypot(np.arange(height)[:, None] / (2 * height), np.arange(width) / (2 * width))
    finest, *octaves = (
        float(np.square(spectrum[(frequency > 0.25 / 2**k) & (frequency <= 0.5 / 2**k)]).sum()) for k in range(6)
    )
    below = max(octaves[0], *(octaves[k] / 2 ** (k + 1) for k in range(2, 5)))
    return finest / max(below, 1e-3 * spectrum.size)
