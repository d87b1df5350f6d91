"""
Seamless noise: square tiles of unit variance, each made once from its own fixed seed by filtering white noise in the
Fourier domain, and looked up wherever skin, hair, cloth or leaves need irregularity.
"""

from functools import cache

import numpy as np

from faceprior.images import cv2
from faceprior.procedural.shapes import lookup

TILE = 512  # side of a tile in samples


def _spectrum(name: str, fu: np.ndarray, fv: np.ndarray) -> np.ndarray:
    """Amplitude at the frequencies fu, fv (cycles per tile) of the named noise."""
    f = np.hypot(fu, fv)
    if name == "clouds":  # broad blotches
        return (f >= 1) / np.maximum(f, 1) ** 1.8
    if name == "patches":  # blotches without the broadest waves
        return (f >= 6) / np.maximum(f, 6) ** 1.6
    if name == "grain":  # fine and irregular, no preferred size
        return (f >= 12) / np.maximum(f, 12) ** 0.9
    if name == "pores":  # dots of one size
        return np.exp(-0.5 * np.square((f - 90) / 30))
    if name == "curls":  # blobs of one size
        return np.exp(-0.5 * np.square((f - 14) / 5))
    if name == "strands":  # fine across u, long along v
        return (fu >= 4) / np.maximum(fu, 4) ** 0.55 * np.exp(-np.square(fv / 5))
    if name == "locks":  # the same, bundled
        return np.exp(-0.5 * np.square((fu - 12) / 9)) * np.exp(-np.square(fv / 3))
    raise ValueError(f"`name` has to be a known noise but is {name!r}")


@cache
def noise_tile(name: str, variant: int = 0) -> np.ndarray:
    """(TILE, TILE) float32 periodic noise with mean 0 and variance 1; u runs along columns, v along rows."""
    seed = [variant, *name.encode()]
    white = np.random.default_rng(seed).standard_normal((TILE, TILE))
    fv, fu = np.meshgrid(*(np.abs(np.fft.fftfreq(TILE, 1 / TILE)),) * 2, indexing="ij")
    noise = np.fft.ifft2(np.fft.fft2(white) * _spectrum(name, fu, fv)).real
    return ((noise - noise.mean()) / noise.std()).astype(np.float32)


def sample_noise(name: str, u, v, variant: int = 0) -> np.ndarray:
    """Noise at u, v (arrays of one shape), measured in tiles: the pattern repeats after 1."""
    column, row = (np.mod(w, 1).astype(np.float32) * TILE for w in (u, v))
    return lookup(noise_tile(name, variant), column, row, cv2.BORDER_WRAP).reshape(np.shape(u))
