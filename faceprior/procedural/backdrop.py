"""
Backgrounds out of focus: a studio wall, foliage, street lights, a room. Linear RGB, (size, size, 3) float32.

They are built from discs and boxes at a small fixed size and blurred there, so that every image size shows the same.
"""

import numpy as np

from faceprior.images import cv2

GRID = 256  # side at which the discs and boxes are drawn


def draw_backdrop(kind: str, size: int, rng: np.random.Generator, tint) -> np.ndarray:
    """One background of `kind`, lit with the linear RGB colour `tint`."""
    draw = {"studio": _studio, "foliage": _foliage, "street lights": _street_lights, "room": _room}[kind]
    image = draw(rng) * np.asarray(tint, np.float32)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC).clip(0.002, None)


GROUNDS = {"studio": None, "foliage": (0.10, 0.15, 0.05), "street lights": (0.055, 0.055, 0.065),
           "room": (0.20, 0.14, 0.09)}  # fmt: skip  # linear RGB


def lay_ground(image: np.ndarray, kind: str, horizon: float, rng: np.random.Generator) -> None:
    """Paint a ground into the background, in place; horizon: height of the camera from the image's top, 0 .. 1."""
    size = image.shape[0]
    y = (np.arange(size, dtype=np.float32) + 0.5) / size
    start = horizon + rng.uniform(0.10, 0.22)  # where the ground meets what stands on it
    color = image.mean(axis=(0, 1)) if GROUNDS[kind] is None else np.array(GROUNDS[kind]) * rng.uniform(0.7, 1.4)
    depth = np.clip((y - horizon) / (1 - horizon), 0.02, 1)
    patches = rng.standard_normal((8, 4)).astype(np.float32)
    patches = cv2.resize(patches, (size, size), interpolation=cv2.INTER_CUBIC)
    light = (1.25 - 0.45 * depth)[:, None] * (1 + 0.08 * patches)
    ground = light[..., None] * color.astype(np.float32)
    amount = np.clip((y - start) / 0.03 + 0.5, 0, 1)[:, None, None]
    image += amount * (ground - image)


def _grid():
    steps = (np.arange(GRID, dtype=np.float32) + 0.5) / GRID
    return np.meshgrid(steps, steps)


def _fill(color) -> np.ndarray:
    return np.tile(np.asarray(color, np.float32), (GRID, GRID, 1))


def _discs(image, rng, count: int, radii, colors, strength) -> np.ndarray:
    """Add or lay translucent discs, the images of points out of focus, over the image."""
    for _ in range(count):
        color = np.asarray(colors[rng.integers(len(colors))]) * rng.uniform(0.5, 1.3)
        radius = rng.uniform(*radii) * GRID
        x, y = rng.uniform(-0.05, 1.05, 2) * GRID
        amount = rng.uniform(*strength)
        rows, columns = (slice(max(int(v - radius) - 1, 0), max(int(v + radius) + 2, 0)) for v in (y, x))
        part = image[rows, columns]
        if part.size == 0:
            continue
        dy, dx = (
            np.arange(rows.start, rows.start + part.shape[0]),
            np.arange(columns.start, columns.start + part.shape[1]),
        )
        distance = np.hypot(dy[:, None] + 0.5 - y, dx[None] + 0.5 - x)
        layer = np.clip(radius - distance + 0.5, 0, 1)[..., None]  # a soft edge, one sample wide
        part += (layer * amount * (color - part)).astype(np.float32)
    return image


def _studio(rng) -> np.ndarray:
    x, y = _grid()
    hue = rng.normal(0, 0.10, 3)
    color = np.clip(np.exp(rng.uniform(np.log(0.02), np.log(0.6))) * (1 + hue), 0.01, 0.75)
    cx, cy = rng.uniform(0.2, 0.8), rng.uniform(0.15, 0.6)
    glow = np.exp(-(np.square(x - cx) + np.square(y - cy)) / rng.uniform(0.12, 0.5))
    return _fill(color) * (0.45 + 0.75 * glow)[..., None]


def _foliage(rng) -> np.ndarray:
    _, y = _grid()
    greens = [
        (0.05, 0.12, 0.02),
        (0.10, 0.20, 0.04),
        (0.02, 0.05, 0.015),
        (0.20, 0.30, 0.07),
        (0.16, 0.15, 0.03),
    ]
    image = _fill((0.05, 0.09, 0.03)) * (1.5 - 0.9 * y)[..., None]
    image = _discs(image, rng, 60, (0.05, 0.16), greens, (0.25, 0.7))
    image = _discs(image, rng, 26, (0.02, 0.05), [(0.75, 0.80, 0.45), (0.85, 0.88, 0.75)], (0.1, 0.55))
    return cv2.GaussianBlur(image, (0, 0), 2.2)


def _street_lights(rng) -> np.ndarray:
    _, y = _grid()
    image = _fill((0.018, 0.022, 0.040)) * (0.7 + 0.9 * y)[..., None]
    for _ in range(7):  # dim shapes of houses
        x0, width = rng.uniform(-0.1, 1.0), rng.uniform(0.1, 0.3)
        top = int(rng.uniform(0, 0.5) * GRID)
        image[top:, int(max(x0, 0) * GRID) : int((x0 + width) * GRID)] *= rng.uniform(0.6, 1.7)
    image = cv2.GaussianBlur(image, (0, 0), 6)
    lights = [(1.0, 0.55, 0.16), (1.0, 0.75, 0.4), (0.9, 0.16, 0.07), (0.35, 0.5, 0.9), (0.9, 0.85, 0.75)]
    image = _discs(image, rng, 34, (0.018, 0.055), lights, (0.2, 0.85))
    return cv2.GaussianBlur(image, (0, 0), 0.9)


def _room(rng) -> np.ndarray:
    x, _ = _grid()
    wall = np.array([0.42, 0.38, 0.32]) * rng.uniform(0.35, 1.2) * (1 + rng.normal(0, 0.06, 3))
    image = _fill(wall) * (0.75 + 0.5 * (x if rng.random() < 0.5 else 1 - x))[..., None]
    if rng.random() < 0.6:  # a window
        x0, y0 = rng.uniform(-0.15, 0.75), rng.uniform(0.0, 0.2)
        window = (
            slice(int(y0 * GRID), int((y0 + 0.5) * GRID)),
            slice(max(int(x0 * GRID), 0), int((x0 + 0.32) * GRID)),
        )
        image[window] = (1.1, 1.15, 1.2)
    for _ in range(rng.integers(3, 8)):  # shelves, pictures, furniture
        x0, y0 = rng.uniform(-0.1, 0.95), rng.uniform(0.1, 0.95)
        width, height = rng.uniform(0.05, 0.35), rng.uniform(0.05, 0.35)
        color = np.array([0.20, 0.13, 0.08]) * rng.uniform(0.3, 2.0) * (1 + rng.normal(0, 0.3, 3))
        image[int(y0 * GRID) : int((y0 + height) * GRID), int(max(x0, 0) * GRID) : int((x0 + width) * GRID)] = color
    image = _discs(image, rng, rng.integers(0, 4), (0.03, 0.08), [(1.2, 0.9, 0.5)], (0.5, 0.9))
    return cv2.GaussianBlur(image.clip(0.01, None), (0, 0), 5.0)
