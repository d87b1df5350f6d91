"""
From solids to surface points: the camera, the figure as one signed distance, sphere tracing from coarse to fine, and
the light that reaches a point (occlusion and soft shadow).

Points are float32 arrays (3, N) in the world's frame, which is the head's frame before the head turns.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from faceprior.images import cv2
from faceprior.procedural.anatomy import Body, Head, ear_distance
from faceprior.procedural.hair import Hair
from faceprior.procedural.headwear import Hat
from faceprior.procedural.shapes import smooth_min, smoothstep
from faceprior.procedural.wardrobe import Garment

NECK_PIVOT = np.array([0.0, -0.75, -0.55], np.float32)  # the head turns about this point
FAR = 9.0  # a distance that means "nowhere near"
EAR_BLEND, NECK_BLEND = 0.035, 0.09
NEAREST, FARTHEST = -1.1, 2.4  # depth range of the scene about the camera's distance
STEP, FREE_STEP = 0.72, 0.97  # fraction of the distance by which a ray advances, near the steep relief and away from it
SECANT_REACH, MAX_GAIN = 0.06, 2.5  # closer than this a ray follows the slope that it measured, up to this multiple
LEAVING, LEAVING_GAIN = 0.03, 1.6  # a ray whose distance grows again passed an edge: it may hurry on
MAX_STEPS = (40, 24, 32)  # of a ray on the coarse, the middle and the fine grid


def rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """(3, 3) float32 that turns head coordinates into world coordinates; degrees."""
    (cy, cp, cr), (sy, sp, sr) = (f(np.radians([yaw, pitch, roll])) for f in (np.cos, np.sin))
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return (about_z @ about_y @ about_x).astype(np.float32)


class Camera:
    """A pinhole camera that looks along -z at `centre`, (x, y) of the world.

    size: the image's side in pixels; height: what that side covers at the face; distance: from the eyes.
    """

    def __init__(self, size: int, height: float, centre: tuple[float, float], distance: float):
        self.size = size
        self.height = height
        self.distance = distance
        self.position = np.array([*centre, distance], np.float32)
        self.pixel = height / size  # side of a pixel at the face

    @classmethod
    def for_portrait(cls, person: SimpleNamespace, size: int) -> "Camera":
        """The camera that the person's traits ask for: the head in the upper middle."""
        middle = -0.19 - 0.22 * (person.view_height - 3.3) + person.offset_y
        return cls(size, person.view_height, (person.offset_x, middle), person.camera_distance)

    def directions(self, size: int) -> np.ndarray:
        """Unit directions (3, size * size) through the middles of a size x size grid."""
        steps = ((np.arange(size) + 0.5) / size - 0.5) * self.height
        x, y = np.meshgrid(steps, -steps)
        d = np.stack([x.ravel(), y.ravel(), np.full(size * size, -self.distance)]).astype(np.float32)
        return d / np.linalg.norm(d, axis=0)

    def project(self, points: np.ndarray) -> np.ndarray:
        """World points (3, N) -> pixels (N, 2), x right and y down, (0, 0) the corner of the image."""
        q = np.asarray(points, np.float32) - self.position[:, None]
        scale = self.distance / -q[2] / self.height
        return np.stack([(q[0] * scale + 0.5) * self.size, (0.5 - q[1] * scale) * self.size], axis=-1)


class Figure:
    """Head, ears, neck, hair, hat and garment of one person, posed in the world."""

    def __init__(self, person: SimpleNamespace, pixel: float):
        self.person = person
        self.head = Head(person, cell=float(np.clip(0.8 * pixel, 0.004, 0.012)))
        self.body = Body(person)
        self.hair = Hair(person, self.head)
        self.hat = Hat(person)
        self.garment = Garment(person)
        self.head_turn = rotation(person.yaw, -person.pitch, -person.roll)
        self.body_turn = rotation(0.35 * person.yaw, 0, -0.1 * person.roll)

    def to_head(self, points: np.ndarray) -> np.ndarray:
        """World points (3, N) -> head frame (3, N)."""
        return self.head_turn.T @ (points - NECK_PIVOT[:, None]) + NECK_PIVOT[:, None]

    def to_body(self, points: np.ndarray) -> np.ndarray:
        """World points (3, N) -> body frame (3, N)."""
        return self.body_turn.T @ (points - NECK_PIVOT[:, None]) + NECK_PIVOT[:, None]

    def from_head(self, points: np.ndarray) -> np.ndarray:
        """Head frame (3, N) -> world points (3, N)."""
        points = np.asarray(points, np.float32)
        return self.head_turn @ (points - NECK_PIVOT[:, None]) + NECK_PIVOT[:, None]

    def parts(self, points: np.ndarray) -> dict[str, np.ndarray]:
        """Distances (N,) to head, ears, neck, hair, hat and garment, each alone."""
        x, y, z = self.to_head(points)
        head = self.head.distance(x, y, z)
        ears, neck, cloth = (np.full_like(head, FAR) for _ in range(3))
        near = (np.abs(x) > 0.5) & (y < 0.4) & (y > -0.62) & (z < -0.2)
        if near.any() and not self.hair.covers_ears:
            ears[near] = ear_distance(self.person, x[near], y[near], z[near])
        bx, by, bz = self.to_body(points)
        below = by < -0.5
        if below.any():
            b = bx[below], by[below], bz[below]
            neck[below] = self.body.distance(*b)
            cloth[below] = self.garment.distance(*b, neck[below])
        hair = self.hair.distance(x, y, z)
        hat = self.hat.distance(x, y, z) if self.hat.kind else np.full_like(head, FAR)
        return {"head": head, "ears": ears, "neck": neck, "hair": hair, "hat": hat, "cloth": cloth}

    def distance(self, points: np.ndarray) -> np.ndarray:
        """Approximate signed distance (N,) to the whole figure."""
        return merge(self.parts(points))


def merge(parts: dict[str, np.ndarray]) -> np.ndarray:
    """One distance for all parts: the skin grows together, hair, hat and garment lie on it."""
    skin = smooth_min(smooth_min(parts["head"], parts["ears"], EAR_BLEND), parts["neck"], NECK_BLEND)
    return np.minimum(np.minimum(skin, parts["hair"]), np.minimum(parts["hat"], parts["cloth"]))


@dataclass
class Hits:
    """What the camera's rays met.

    depth: (size, size), far beyond the figure where nothing was met. coverage: (size, size), 1 on the figure, between 0
    and 1 where a ray passed it within a pixel.
    """

    depth: np.ndarray
    coverage: np.ndarray
    points: np.ndarray  # (3, N) world points of the pixels on the figure
    index: np.ndarray  # (N,) their flat indices


def trace(figure: Figure, camera: Camera) -> Hits:
    """Sphere-trace all pixels, starting on a grid of a quarter of the size."""
    levels = (camera.size // 4, camera.size // 2, camera.size)
    far = np.float32(camera.distance + FARTHEST)
    depth = None
    for level, steps in zip(levels, MAX_STEPS, strict=True):
        rays = camera.directions(level)
        pixel = camera.height / level
        start = _first_guess(depth, level, far, pixel, camera.distance + NEAREST)
        tolerance = pixel * (0.06 if level == camera.size else 0.3)
        depth, miss = _march(figure, camera, rays, start, far, tolerance, pixel, steps)
        depth = depth.reshape(level, level)
    coverage = np.where(miss > 0, np.clip(0.75 - miss, 0, 1), 1).astype(np.float32)
    index = np.flatnonzero(miss == 0)
    points = camera.position[:, None] + rays[:, index] * depth.ravel()[index]
    return Hits(depth, coverage.reshape(depth.shape), points, index)


def _first_guess(depth, level: int, far, pixel: float, near: float) -> np.ndarray:
    """Depths to start from: the coarser level's where it is smooth, else just before the nearest of its neighbours."""
    if depth is None:
        return np.full(level * level, near, np.float32)
    around = np.ones((3, 3), np.uint8)
    closest, furthest = cv2.erode(depth, around), cv2.dilate(depth, around)
    smooth = cv2.resize(depth, (level, level), interpolation=cv2.INTER_LINEAR)
    closest, furthest = (cv2.resize(v, (level, level), interpolation=cv2.INTER_NEAREST) for v in (closest, furthest))
    start = np.where(furthest - closest < 4 * pixel, smooth, closest - np.float32(0.01 + pixel))
    return np.where(closest >= far, far, start).ravel()


def _march(figure, camera, rays, start, far, tolerance: float, pixel: float, steps: int):
    """Walk along the rays until they meet the figure or pass `far`.

    Returns depths (N,), `far` for the rays that met nothing, and by how many pixels they missed, 0 for those that met.
    """
    depth = start.copy()
    miss = np.full(depth.shape, FAR, np.float32)
    active = np.flatnonzero(depth < far)
    d_before, step = np.full(active.size, np.nan, np.float32), np.zeros(active.size, np.float32)
    for _ in range(steps):
        if active.size == 0:
            break
        t = depth[active]
        d = figure.distance(camera.position[:, None] + rays[:, active] * t)
        miss[active] = np.minimum(miss[active], np.maximum(d, 0) / pixel)
        step = d * _gain(d, d_before, step)
        depth[active] = t + step
        going = (np.abs(d) > tolerance) & (depth[active] < far)
        active, d_before, step = active[going], d[going], step[going]
    met = depth < far
    met[active[d_before > pixel]] = False  # grazing rays that never arrived
    return np.where(met, depth, far), np.where(met, 0, np.maximum(miss, 1e-3))


def _gain(d, d_before, step):
    """By which multiple of its distance a ray advances: carefully at first, then by the slope of its last step."""
    plain = STEP + (FREE_STEP - STEP) * smoothstep(0.05, 0.25, d)
    with np.errstate(divide="ignore", invalid="ignore"):
        measured = step / (d_before - d)
    usable = (np.abs(d) < SECANT_REACH) & (measured > STEP)
    plain = np.where((d > d_before) & (d > LEAVING), LEAVING_GAIN, plain)
    return np.where(usable, np.minimum(measured, MAX_GAIN), plain)


def normals_of(hits: Hits, size: int) -> np.ndarray:
    """Unit normals (3, N) from the positions of neighbouring pixels, across the smaller step in depth."""
    grid = np.full((3, size * size), np.nan, np.float32)
    grid[:, hits.index] = hits.points
    grid = grid.reshape(3, size, size)
    across, down = _shorter_difference(grid, axis=2), _shorter_difference(grid, axis=1)
    normal = np.cross(down, across, axis=0).reshape(3, -1)[:, hits.index]
    normal = np.where(np.isfinite(normal), normal, np.array([0, 0, 1], np.float32)[:, None])
    return normal / (np.linalg.norm(normal, axis=0) + 1e-12)


def _shorter_difference(grid: np.ndarray, axis: int) -> np.ndarray:
    """Forward or backward difference of positions (3, H, W), whichever is shorter; NaN if there is no neighbour."""
    gap_shape = list(grid.shape)
    gap_shape[axis] = 1
    step = np.concatenate([np.diff(grid, axis=axis), np.full(gap_shape, np.nan, np.float32)], axis=axis)
    before = np.roll(step, 1, axis=axis)
    length, length_before = (np.nan_to_num(np.square(v).sum(axis=0), nan=FAR) for v in (step, before))
    both = np.abs(length - length_before) < 0.5 * np.minimum(length, length_before)
    return np.where(both, 0.5 * (step + before), np.where(length < length_before, step, before))


def occlusion(figure: Figure, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Fraction (N,) of the surroundings' light that reaches the points, 0 .. 1."""
    closed = np.zeros(points.shape[1], np.float32)
    for reach, weight in ((0.07, 1.1), (0.2, 0.8), (0.45, 0.5)):
        distance = figure.distance(points + normals * np.float32(reach))
        closed += weight * np.clip(1 - distance / reach, 0, 1) * 0.33
    return np.clip(1 - closed, 0.12, 1)


def soft_shadow(figure: Figure, points: np.ndarray, normals: np.ndarray, light: np.ndarray, sharpness: float):
    """Fraction (N,) of the key light that reaches the points; `light` is the unit direction towards it."""
    reached = np.ones(points.shape[1], np.float32)
    active = np.flatnonzero(light @ normals > -0.2)
    reached[light @ normals <= -0.2] = 0
    t = np.full(active.size, 0.05, np.float32)
    start = points + 0.03 * normals
    for _ in range(14):
        if active.size == 0:
            break
        d = figure.distance(start[:, active] + light[:, None] * t)
        reached[active] = np.minimum(reached[active], np.clip(0.5 + 0.5 * sharpness * d / t, 0, 1))
        t = t + np.clip(d, 0.04, 0.3)
        going = (reached[active] > 0.02) & (t < 1.9)
        active, t = active[going], t[going]
    return smoothstep(0.0, 1.0, reached)
