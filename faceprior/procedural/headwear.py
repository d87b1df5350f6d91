"""
What people wear on their heads over their hair: brimmed hats and caps with a visor; and ear rings.

Frames and units: see `people`. Hats are solids; ear rings are so small that they are painted where the lobes are.
"""

from types import SimpleNamespace

import numpy as np

from faceprior.procedural.shapes import bump, smooth_max, smooth_min, smoothstep
from faceprior.procedural.textures import sample_noise

CENTRE_Z = -0.64  # the vertical axis of a hat
TILT = 0.20  # how much higher the rim is in front, per unit of z
BRIM = 0.022  # half the thickness of a brim
METALS = {"gold": (0.62, 0.40, 0.13), "silver": (0.50, 0.50, 0.52)}  # linear RGB


class Hat:
    """Signed distance to a hat or a cap in the head's frame, and its colours; nothing for other hair styles."""

    def __init__(self, person: SimpleNamespace):
        self.person = person
        self.kind = person.hair_style if person.hair_style in ("hat", "cap") else None
        self.half_width = 0.80 * person.skull_width + 0.02
        self.half_depth = 1.05
        self.rim_y = 0.60 if self.kind == "hat" else 0.49

    def height(self, y, z):
        """Height over the rim, whose front is higher than its back."""
        return y - self.rim_y - TILT * z

    def distance(self, x, y, z):
        """Approximate signed distance of points (N,)."""
        up = self.height(y, z)
        return self._hat(x, up, z) if self.kind == "hat" else self._cap(x, up, z)

    def _ring(self, x, z, scale=1.0):
        """Distance in the rim's plane to its outline, made smaller or larger by `scale`."""
        level = np.hypot(x / self.half_width, (z - CENTRE_Z) / self.half_depth)
        return (level - scale) * (self.half_width + (self.half_depth - self.half_width) * 0.5)

    def _hat(self, x, up, z):
        p = self.person
        tall = 0.76 + 0.08 * p.hat_shape
        top = tall - 0.10 * p.hat_shape * bump(x, z, 0, CENTRE_Z + 0.15, 0.22, 0.7)  # a fedora's crease
        taper = 1 - (0.10 + 0.08 * p.hat_shape) * np.clip(up / tall, 0, 1)
        crown = smooth_max(smooth_max(self._ring(x, z, taper), up - top, 0.22), -up - 0.03, 0.03)
        out = np.maximum(self._ring(x, z), 0)
        sides = np.square(x / (self.half_width + p.brim))
        curve = p.hat_shape * (0.12 * sides - 0.10 * out) - (1 - p.hat_shape) * 0.28 * out
        brim = smooth_max(self._ring(x, z) - p.brim, np.abs(up - curve) - BRIM, 0.02)
        return 0.75 * smooth_min(crown, brim, 0.03)

    def _cap(self, x, up, z):
        level = np.sqrt(np.square(x / self.half_width) + np.square((z - CENTRE_Z) / self.half_depth)
                        + np.square((up - 0.02) / 0.82))  # fmt: skip
        crown = smooth_max((level - 1) * 0.8, -up - 0.02, 0.03)
        front = z - CENTRE_Z - self.half_depth
        outline = np.hypot(x / 0.66, (front + 0.28) / 0.78) - 1
        curve = -0.16 * (front + 0.2) - 0.30 * np.square(x)
        visor = smooth_max(smooth_max(0.6 * outline, np.abs(up - 0.02 - curve) - BRIM, 0.02), -front - 0.5, 0.02)
        return 0.75 * np.minimum(crown, visor)

    def colors(self, x, y, z, color, accent) -> np.ndarray:
        """Linear RGB (3, N) at points of the hat; color: (3,), accent: (3,) that of its band."""
        up = self.height(y, z)
        weave = 1 + 0.06 * sample_noise("grain", 0.9 * (x + 0.4 * z), 0.9 * y)
        if self.kind == "hat":
            on_crown = smoothstep(0.02, 0.0, self._ring(x, z))
            band = smoothstep(0.015, 0.03, up) * smoothstep(0.17, 0.155, up) * on_crown
        else:  # the seams between a cap's six panels
            seam = np.abs(np.sin(3 * np.arctan2(x, z - CENTRE_Z)))
            weave = weave * (1 - 0.25 * smoothstep(0.06, 0.02, seam) * (up > 0.06))
            band = 0.7 * smoothstep(0.01, 0.03, self._ring(x, z)) * (z > CENTRE_Z)  # the visor
        return (color[:, None] + (accent - color)[:, None] * band) * weave


def paint_ear_ring(kind: str, dx, dy, turn: float, soft: float) -> tuple[np.ndarray, np.ndarray]:
    """Coverage (N,) and normals (3, N) of an ear ring, around the place where it hangs.

    kind: "stud", "hoop" or "drop". dx, dy: (N,) to the right and up from the lobe, in units. turn: 0 for a hoop seen
    from its edge, 1 from its side. soft: half a pixel, in units.
    """
    if kind == "hoop":
        radius, tube = 0.085, 0.013
        stretched = dx / max(turn, 0.25)
        distance = np.abs(np.hypot(stretched, dy + radius) - radius) * (0.5 + 0.5 * max(turn, 0.25)) - tube
        depth = np.clip(1 + distance / tube, 0, 1)
        normals = np.stack([0.6 * np.sign(stretched) * depth, -0.6 * np.sign(dy + radius) * depth, 1 - 0.6 * depth])
    else:
        drop = kind == "drop"
        hang, radius = (0.115, 0.034) if drop else (0.0, 0.027)
        stretch = 0.75 if drop else 1.0  # a drop is longer than wide
        distance = np.hypot(dx, stretch * (dy + hang)) - radius
        normals = np.stack([dx, dy + hang, np.sqrt(np.maximum(radius**2 - dx**2 - (dy + hang) ** 2, 1e-6))])
        if drop:
            distance = np.minimum(distance, np.maximum(np.abs(dx) - 0.006, np.abs(dy + 0.5 * hang) - 0.5 * hang))
    return smoothstep(soft, -soft, distance), normals / (np.linalg.norm(normals, axis=0) + 1e-6)
