"""
Hair of the head: for each style an envelope around the skull, with or without lengths that hang down, a hairline
that bounds it, and the coordinates along which its strands run.

Azimuths are radians about the vertical axis through the skull, 0 in front, pi behind.
"""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from faceprior.procedural.headwear import Hat
from faceprior.procedural.shapes import Stack, ellipsoid_distance, lookup, smooth_max, smooth_min, smoothstep
from faceprior.procedural.textures import sample_noise

AXIS_Z = -0.5  # the vertical axis passes here


class Style(NamedTuple):
    """Shape of a hair style; lengths in decimetres, thickness over the scalp."""

    top: float
    sides: float
    back: float
    front: float = 0.03
    edge: float = 0.10  # radius with which the hairline is rounded
    length: float | None = None  # height at which hanging hair ends
    flare: float = 0.0  # how much wider it hangs at its end
    curtain: tuple[float, float] = (1.1, 1.3)  # azimuth of its inner edge, at the eyes and at the shoulders
    flow: str = "crown"  # where the strands come from: "crown", "part" or "back"
    line: str = "natural"  # the hairline
    wave: float = 0.0
    curl: float = 0.0  # height of the curls
    curl_scale: tuple[float, float] = (0.5, 0.5)  # how many tiles of noise to the decimetre, across and down
    cloth: bool = False  # whether a scarf or a cap takes the place of hair
    messy: float = 0.0  # how far strands stray from their line
    fringe: bool = False  # whether a fringe can go with it


STYLES = {
    "short": Style(0.16, 0.03, 0.06, 0.07, messy=0.10, fringe=True),
    "side part": Style(0.18, 0.035, 0.07, 0.09, flow="part", messy=0.04),
    "buzz cut": Style(0.022, 0.016, 0.02, 0.012, edge=0.05),
    "receding": Style(0.035, 0.035, 0.05, 0.01, edge=0.06, line="receding"),
    "bald": Style(0.01, 0.022, 0.03, 0.0, edge=0.05, line="bald"),
    "short curly": Style(0.20, 0.10, 0.12, 0.09, curl=0.060, fringe=True),
    "afro": Style(0.42, 0.36, 0.35, 0.20, edge=0.22, curl=0.030, curl_scale=(1.0, 1.0)),
    "bob": Style(
        0.10, 0.10, 0.10, 0.05, length=-1.12, flare=0.06, curtain=(1.05, 0.98), flow="part", fringe=True
    ),
    "long straight": Style(
        0.08, 0.07, 0.08, 0.04, length=-2.3, flare=0.02, curtain=(1.08, 0.95), flow="part", fringe=True
    ),
    "long wavy": Style(
        0.11, 0.11, 0.10, 0.05, length=-2.15, flare=0.16, curtain=(1.08, 0.95), flow="part", wave=0.042
    ),
    "long curly": Style(
        0.18, 0.20, 0.18, 0.07, length=-1.75, flare=0.28, curtain=(1.12, 1.0), flow="part",
        curl=0.075, curl_scale=(0.5, 0.28),
    ),
    "tied back": Style(0.045, 0.025, 0.05, 0.02, edge=0.07, flow="back"),
    "head scarf": Style(
        0.09, 0.06, 0.09, 0.06, edge=0.05, length=-1.75, flare=0.02, curtain=(0.98, 0.3), line="scarf", cloth=True
    ),
    "knit cap": Style(0.16, 0.09, 0.12, 0.09, edge=0.05, line="cap", cloth=True),
}  # fmt: skip

# Height of the hairline over the azimuth; the first entries are relative to the person's own hairline in front.
_AZIMUTHS = (0.0, 0.40, 0.70, 0.93, 1.12, 1.32, 1.46, 1.62, 1.85, 2.1, 2.5, np.pi)


def _hairline(person: SimpleNamespace, style: Style) -> np.ndarray:
    """Heights of the hairline at _AZIMUTHS."""
    y = person.hairline_y
    sideburn = -0.12 if person.sex == "man" else 0.02
    heights = [y, y - 0.01, y - 0.09, 0.44, 0.24, 0.02, sideburn, 0.08, 0.14, -0.2, -0.55, -0.75]
    if style.line == "receding":
        heights[:5] = [y + 0.10, y + 0.20, y + 0.22, 0.72, 0.38]
    elif style.line == "bald":
        heights[:7] = [3.0, 3.0, 3.0, 2.2, 1.1, 0.30, 0.05]
    elif style.line == "scarf":
        heights[:6] = [0.60, 0.58, 0.50, 0.34, 0.0, -0.4]
    elif style.line == "cap":
        heights[:] = [0.46, 0.45, 0.42, 0.38, 0.33, 0.27, 0.22, 0.20, 0.16, 0.10, 0.0, -0.05]
    elif style.length is not None:
        heights[1:6] = [y - 0.10, y - 0.28, 0.26, -0.05, -0.4]
    elif person.sex == "man":  # it recedes over the temples, more with age
        recess = 0.02 + 0.07 * person.age + 0.05 * ((person.seed // 7) % 10) / 10
        heights[:5] = [y - 0.01, y + 0.6 * recess, y + recess - 0.02, 0.52 + 0.6 * recess, 0.27]
    if person.fringe and style.fringe:
        low = 0.34 if style.length is not None else 0.54
        heights[:4] = [low, low - 0.01, low - 0.05, min(low, 0.30)]
    return np.array(heights)


_RAGGED = {"scarf": 0.0, "cap": 0.0, "bald": 0.03, "receding": 0.045}  # by how much a hairline wanders; others: .04


class Hair:
    """Signed distance to the hair, and its strands, in the head's frame."""

    def __init__(self, person: SimpleNamespace, head):
        self.person = person
        self.style = STYLES[person.hair_below]
        self._hat = Hat(person)
        self.side = -1.0 if person.part_side == "left" else 1.0
        self.part_x = self.side * 0.2 if self.style.flow == "part" else 0.0
        self._line = self._build_line()
        volume = person.hair_volume
        s = self.style
        self._closed_y = head.chin + 0.04  # a scarf is closed below the chin
        cx, cy, cz = head.skull_centre
        rx, ry, rz = head.skull_radii
        self._centre = (cx, cy, cz + 0.5 * volume * (s.front - s.back))
        self._radii = (rx + s.sides * volume, ry + s.top * volume, rz + 0.5 * volume * (s.front + s.back))
        self._column = self._build_column() if s.length is not None else None

    def _build_line(self) -> np.ndarray:
        """(1, 512, 2): height of the hairline over signed azimuth, -pi .. pi, and 1 / its steepness."""
        azimuth = np.linspace(-np.pi, np.pi, 512)
        height = np.interp(np.abs(azimuth), _AZIMUTHS, _hairline(self.person, self.style))
        height = np.convolve(np.pad(height, 8, mode="edge"), np.ones(17) / 17, mode="valid")
        slope = np.gradient(height, azimuth) / 0.7
        return np.stack([height - self._wander(azimuth), 1 / np.sqrt(1 + slope * slope)], axis=-1).astype(np.float32)[
            None
        ]

    def _build_column(self) -> Stack:
        s, volume = self.style, self.person.hair_volume
        end = self.end_y
        sides = s.sides * volume
        heights = [end, end + 0.12, 0.5 * (end - 0.3), -0.3, 0.1, 0.5]
        width = 0.735 * self.person.skull_width
        half_width = [width + sides + s.flare - 0.12, width + sides + s.flare, width + sides + 0.6 * s.flare,
                      width + sides + 0.02, width + sides, width + sides - 0.06]  # fmt: skip
        front = [0.0, 0.05, 0.06, 0.10, 0.12, 0.10]
        back = [-1.45, -1.5, -1.55, -1.62, -1.7, -1.7]
        return Stack(heights, half_width, front, back, [-0.6] * 6)

    @property
    def covers_ears(self) -> bool:
        """Whether the ears are under the hair."""
        return self.style.length is not None

    @property
    def end_y(self) -> float:
        """Height at which the hanging lengths end."""
        return self.style.length * self.person.hair_length if self.style.length is not None else 0.0

    def azimuth(self, x, z):
        """Absolute azimuth of points, measured from the parting."""
        return np.arctan2(np.abs(x), z - AXIS_Z)

    def reach(self, x, y, z):
        """How far inside the hair's area a point lies: positive where hair covers, negative on face and neck."""
        part = self.part_x * smoothstep(0.2, 0.7, y) * smoothstep(-0.6, 0.0, z)
        azimuth = self.azimuth(x - part, z)
        column = (np.copysign(azimuth, x - part) + np.pi) * (511 / (2 * np.pi))
        line = lookup(self._line, column, np.zeros_like(azimuth)).T
        reach = (y - line[0]) * line[1]
        if self.style.length is None:
            return reach
        t = np.clip((-0.1 - y) / 1.6, 0, 1)
        inner = self.style.curtain[0] + (self.style.curtain[1] - self.style.curtain[0]) * t
        reach = np.maximum(reach, (azimuth - inner) * 0.7)
        return np.maximum(reach, 0.8 * (self._closed_y - y)) if self.style.line == "scarf" else reach

    def _wander(self, around):
        """How far a natural hairline or fringe strays from its even curve, left and right differently."""
        place, off_sides = (self.person.seed % 997) / 997, smoothstep(1.9, 1.4, np.abs(around))
        even = np.full_like(around, place)
        wander = sample_noise("patches", 0.16 * around + place, even)
        if not (self.person.fringe and self.style.fringe):
            return _RAGGED.get(self.style.line, 0.04) * wander * off_sides
        # locks that end at different heights, swept to one side
        locks = np.abs(sample_noise("locks", 0.21 * around + place, 0.2 + 0 * even, variant=1)) - 0.8
        sweep = self.side * 0.16 * (((self.person.seed // 997) % 101) / 101 - 0.2)
        return (0.06 * locks + 0.03 * wander + sweep * np.sin(around)) * smoothstep(1.3, 0.7, np.abs(around))

    def envelope(self, x, y, z):
        """Distance to the hair as if it had no hairline."""
        d = ellipsoid_distance(x, y, z, self._centre, self._radii)
        if self._column is not None:
            d = smooth_min(d, self._column.distance(x, y, z), 0.15)
        if self.person.hair_style == "tied back" and self.person.hair_volume > 1.02:
            bun = ellipsoid_distance(x, y, z, (0.0, 1.08, -1.0), (0.30, 0.28, 0.28))
            d = smooth_min(d, bun, 0.04)
        return d

    def distance(self, x, y, z):
        """Approximate signed distance of points (N,)."""
        d = self.envelope(x, y, z)
        near = np.flatnonzero(d < 0.2)
        if near.size == 0:
            return d
        xn, yn, zn = x[near], y[near], z[near]
        dn = d[near] - self._locks(xn, yn, zn)
        d[near] = smooth_max(dn, -self.reach(xn, yn, zn), self.style.edge)
        if self._hat.kind:
            d[near] = smooth_max(d[near], self._hat.height(yn, zn) - 0.02, 0.10)
        return d

    def _locks(self, x, y, z):
        """Relief of curls, waves and bundles of hair."""
        s = self.style
        if s.cloth:
            return 0.016 * self.folds(x, y) * (s.length is not None)
        if s.curl:
            return s.curl * self.curls(x, y, z)
        across, along = self.strands(x, y, z)
        amplitude = (0.010 + 0.06 * s.top) * smoothstep(0.03, 0.08, s.top)
        return amplitude * sample_noise("locks", across * 0.5, along * 0.12) * self.spread(x, z)

    def spread(self, x, z):
        """0 where strands converge at the crown or the parting's end, 1 away from it."""
        start, end = self._root_line()
        dx, dz = x - self.part_x, z - np.clip(z, start, end)
        return smoothstep(0.02, 0.25, np.hypot(dx, dz)) if self.style.flow != "back" else np.ones_like(x)

    def _root_line(self) -> tuple[float, float]:
        """The stretch of z from which the strands spring."""
        return (-0.75, 0.10) if self.style.flow == "part" else (-0.6, -0.5)

    def folds(self, x, y):
        """Folds of a scarf, which fan out from below the chin."""
        fan = np.arctan2(x - 0.5 * self.side, y + 2.2)
        return sample_noise("locks", 0.32 * fan + 0.05, 0.06 * y)

    def curls(self, x, y, z):
        """Height of the curls, about -1 .. .5: ringlets run where a noise changes its sign."""
        u, v = self.style.curl_scale
        winding = sample_noise("curls", (x + 0.37 * z) * u, (y - 0.53 * z) * v)
        return 0.5 - np.minimum(np.abs(winding), 1.5)

    def strands(self, x, y, z):
        """Coordinates (across, along) of points, in decimetres: strands run along lines of equal `across`."""
        if self.style.flow == "back":
            return 0.9 * np.arctan2(x, y - 0.1), -z
        start, end = self._root_line()
        dx = x - self.part_x
        nearest = np.clip(z, start, end)
        angle = np.arctan2(np.abs(dx), z - nearest)
        hanging = smoothstep(0.35, -0.25, y)
        on_top = 0.5 * angle + end - nearest + 0.15
        across = np.sign(dx) * (on_top + hanging * (0.7 * self.azimuth(x, z) + 0.42 - on_top))
        along = np.hypot(dx, z - nearest) + 1.2 - y
        if self.style.messy:
            across = across + self.style.messy * sample_noise("clouds", x * 0.22, (y + z) * 0.22)
        if self.style.wave:
            swing = np.sin(along * 7.5 + 1.4 * sample_noise("clouds", across * 0.1, along * 0.02))
            across = across + self.style.wave * swing * smoothstep(0.5, 1.4, along)
        return across, along

    def tangents(self, points, normals):
        """Unit directions (3, N) of the strands on the surface, head frame."""
        x, y, z = points
        if self.style.flow == "back":
            run = np.stack([np.zeros_like(x), 0.3 * (y > 0.6), np.full_like(z, -1)])
        else:
            start, end = self._root_line()
            hanging = smoothstep(0.5, -0.2, y)
            dx = (x - self.part_x) * (1 - hanging)
            dz = (z - np.clip(z, start, end)) * (1 - hanging)
            run = np.stack([dx, -0.15 - hanging, dz])
        run = run - normals * (run * normals).sum(axis=0)
        return run / (np.linalg.norm(run, axis=0) + 1e-6)
