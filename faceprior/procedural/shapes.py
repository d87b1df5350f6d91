"""
Small vocabulary of smooth shapes from which drawn people are built: ramps, bumps, soft unions, ellipsoids, stacks of
cross sections. Coordinates are arrays of any shape; lengths are decimetres (a pair of eyes is .63 apart).
"""

import numpy as np

from faceprior.images import cv2

_LOOKUP_WIDTH = 256  # cv2.remap takes images of at most 32767 rows: points are folded into rows of this length


def smoothstep(low: float, high: float, x):
    """Cubic ramp from 0 at `low` to 1 at `high`; `low` may be the larger one, then the ramp falls."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def ridge(distance, width: float):
    """Gaussian profile of height 1 around distance 0; `width` is the standard deviation."""
    return np.exp(-0.5 * np.square(distance / width))


def bump(x, y, x0: float, y0: float, width: float, height: float, angle: float = 0.0):
    """Gaussian hill of height 1 at (x0, y0); `angle` in radians turns it counter-clockwise."""
    dx, dy = x - x0, y - y0
    if angle:
        cos, sin = float(np.cos(angle)), float(np.sin(angle))
        dx, dy = cos * dx + sin * dy, cos * dy - sin * dx
    return np.exp(-0.5 * (np.square(dx / width) + np.square(dy / height)))


def smooth_max(a, b, radius: float):
    """Maximum of a and b, rounded where they differ by less than `radius`."""
    blend = np.clip(0.5 + 0.5 * (a - b) / radius, 0, 1)
    return b + (a - b) * blend + radius * blend * (1 - blend)


def smooth_min(a, b, radius: float):
    """Minimum of a and b, rounded where they differ by less than `radius`."""
    return -smooth_max(-a, -b, radius)


def ellipsoid_distance(x, y, z, centre, radii):
    """Approximate signed distance to an axis-parallel ellipsoid (exact on its surface, negative inside)."""
    px, py, pz = (x - centre[0]) / radii[0], (y - centre[1]) / radii[1], (z - centre[2]) / radii[2]
    level = np.sqrt(px * px + py * py + pz * pz)
    slope = np.sqrt(np.square(px / radii[0]) + np.square(py / radii[1]) + np.square(pz / radii[2]))
    return level * (level - 1) / (slope + 1e-6)


def interpolate(x, knots_x, knots_y):
    """Monotone cubic (Fritsch-Carlson) through the knots; constant outside them. knots_x ascends."""
    kx, ky = np.asarray(knots_x, np.float64), np.asarray(knots_y, np.float64)
    width = np.diff(kx)
    secant = np.diff(ky) / width
    slope = np.zeros_like(ky)
    same_sign = secant[:-1] * secant[1:] > 0
    w1, w2 = 2 * width[1:] + width[:-1], width[1:] + 2 * width[:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        harmonic = (w1 + w2) / (w1 / secant[:-1] + w2 / secant[1:])
    slope[1:-1] = np.where(same_sign, harmonic, 0)
    slope[0], slope[-1] = secant[0], secant[-1]
    x = np.clip(x, kx[0], kx[-1])
    i = np.clip(np.searchsorted(kx, x, side="right") - 1, 0, len(width) - 1)
    t = (x - kx[i]) / width[i]
    h = width[i]
    return (
        ky[i] * (1 + 2 * t) * (1 - t) ** 2
        + slope[i] * h * t * (1 - t) ** 2
        + ky[i + 1] * t * t * (3 - 2 * t)
        + slope[i + 1] * h * t * t * (t - 1)
    )


def lookup(table: np.ndarray, column, row, border: int = cv2.BORDER_REPLICATE) -> np.ndarray:
    """Bilinear values of `table` (H, W) or (H, W, C) at float positions; column, row: (N,) -> (N,) or (N, C)."""
    count = column.size
    rows = max(1, -(-count // _LOOKUP_WIDTH))
    folded = np.zeros((2, rows * _LOOKUP_WIDTH), np.float32)
    folded[0, :count], folded[1, :count] = column.ravel(), row.ravel()
    map_x, map_y = folded.reshape(2, rows, _LOOKUP_WIDTH)
    values = cv2.remap(table, map_x, map_y, cv2.INTER_LINEAR, borderMode=border)
    return values.reshape(rows * _LOOKUP_WIDTH, *table.shape[2:])[:count]


class Stack:
    """A solid made of ellipses stacked along y, each with its own half width and its own front and back.

    heights: (K,) ascending; half_width, front, back, centre: (K,), front > centre > back along z.
    """

    RESOLUTION = 256

    def __init__(self, heights, half_width, front, back, centre):
        self.bottom, self.top = float(heights[0]), float(heights[-1])
        y = np.linspace(self.bottom, self.top, self.RESOLUTION)
        width, zf, zb, zc = (interpolate(y, heights, v) for v in (half_width, front, back, centre))
        table = np.stack([width, zf - zc, zc - zb, zc], axis=-1)
        self._table = table.astype(np.float32)[None]  # (1, RESOLUTION, 4)

    def _section(self, y):
        column = (np.clip(y, self.bottom, self.top) - self.bottom) * ((self.RESOLUTION - 1) / (self.top - self.bottom))
        return lookup(self._table, column, np.zeros_like(column)).T

    def distance(self, x, y, z):
        """Approximate signed distance of points (N,) to the solid."""
        width, ahead, behind, centre = self._section(y)
        dz = z - centre
        depth = np.where(dz > 0, ahead, behind)
        level = np.sqrt(np.square(x / width) + np.square(dz / depth) + 1e-9)
        side = (level - 1) * np.minimum(width, depth)
        beyond = np.maximum(self.bottom - y, y - self.top)
        capped = np.sqrt(np.square(np.maximum(side, 0)) + np.square(np.maximum(beyond, 0)))
        return np.where(beyond > 0, capped, side)

    def front(self, x, y):
        """z of the front surface above (x, y); arrays of one shape."""
        shape = x.shape
        width, ahead, _, centre = (v.reshape(shape) for v in self._section(y.ravel()))
        return centre + ahead * np.sqrt(np.maximum(1 - np.square(np.clip(np.abs(x) / width, 0, 1)), 0))
