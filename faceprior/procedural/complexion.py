"""
The colours of a face: skin with its tones and marks, eyes, brows, lips and teeth, beards.

Everything is painted in the head's frontal plane (x, y) with edges as soft as a pixel is wide, so that a face looks
the same at every size. Colours are linear RGB, arrays (3, N).
"""

from types import SimpleNamespace

import numpy as np

from faceprior.procedural import anatomy
from faceprior.procedural.pigments import IRIS_COLORS, LIPSTICKS, brow_color, hair_color, skin_color, to_linear
from faceprior.procedural.shapes import bump, ridge, smoothstep
from faceprior.procedural.textures import sample_noise


def mix(colors: np.ndarray, target, amount) -> np.ndarray:
    """Blend colors (3, N) towards target (3,) or (3, N) by amount (N,)."""
    target = np.asarray(target, np.float32)
    if target.ndim == 1:
        target = target[:, None]
    return colors + (target - colors) * amount


class Face:
    """Colours of the skin at points of the head's frame, and the masks of its parts.

    x, y, z: (N,); pixel: side of a pixel in units. After construction:
    albedo (3, N), gloss (N,) and the soft masks eye, lip, mouth, beard (N,), 0 .. 1; eye_direction
    (3, N), the normals of the eyeballs in the head's frame.
    """

    def __init__(self, person: SimpleNamespace, x, y, z, pixel: float):
        self.person, self.x, self.z, self.pixel = person, x, z, pixel
        self.y = anatomy.warp_asymmetry(person, x, y)
        self.side = np.abs(x)
        self.front = smoothstep(-0.45, -0.2, z)
        self.gloss = np.full_like(x, 0.5 + 0.7 * person.oiliness)
        self.eye, self.lip, self.mouth, self.beard = (np.zeros_like(x) for _ in range(4))
        self.eye_direction = np.zeros((3, x.size), np.float32)
        self.albedo = np.repeat(skin_color(person.melanin)[:, None], x.size, axis=1)
        self._tone()
        self._ears()
        self._marks()
        self._beard()
        self._brows()
        self._lips()
        self._nostrils()
        self._eyes()

    def _window(self, x_low: float, x_high: float, y_low: float, y_high: float) -> np.ndarray:
        """Indices of frontal points with |x| and y in the window."""
        inside = (self.side > x_low) & (self.side < x_high) & (self.y > y_low) & (self.y < y_high)
        return np.flatnonzero(inside & (self.z > -0.45))

    def _tint(self, amount, change) -> None:
        """Multiply the colours by 1 + amount * change, channel by channel."""
        self.albedo *= 1 + np.asarray(change, np.float32)[:, None] * amount

    def _tone(self) -> None:
        """Where blood, shade and age colour the skin."""
        p, side, y = self.person, self.side, self.y
        fair = 1.0 - 0.65 * p.melanin
        flush = 0.8 * bump(side, y, 0.37, -0.34, 0.14, 0.13) + 0.9 * bump(side, y, 0.03, p.nose_y - 0.01, 0.13, 0.07)
        flush += 0.4 * bump(side, y, 0, anatomy.chin_y(p) + 0.17, 0.15, 0.10)
        flush = flush * self.front + 0.9 * smoothstep(0.70, 0.76, side) * (y > -0.5)
        self._tint(flush * p.redness * fair, (0.03, -0.20, -0.17))
        shade = bump(side, y, p.eye_x - 0.03, -0.125, 0.10, 0.035) * (0.4 + 0.8 * p.age) * self.front
        self._tint(shade, (-0.10, -0.15, -0.07))
        lids = bump(side, y, p.eye_x, 0.05, 0.14, 0.06) * self.front
        self._tint(lids * (0.5 + 0.5 * p.eyeliner), (-0.08, -0.17, -0.14))
        self._tint(bump(side, y, 0, 0.5, 0.4, 0.25) * self.front, (0.02, 0.02, -0.04))
        blotches = sample_noise("patches", self.x * 0.45 + 0.13, y * 0.45 + 0.31, variant=p.seed % 7)
        self._tint(blotches * p.blotches, (0.018, 0.040, 0.045))

    def _ears(self) -> None:
        """The hollows of the ears, too small for their relief to shade."""
        i = np.flatnonzero((self.side > 0.66) & (self.y < 0.3) & (self.y > -0.55) & (self.z < -0.4))
        _, dy, radius = anatomy.ear_coordinates(self.person, self.x[i], self.y[i], self.z[i])
        hollow = np.exp(-np.square(radius / 0.42)) + 0.6 * ridge(radius - 0.74, 0.07) * smoothstep(-0.16, 0.0, dy)
        self.albedo[:, i] *= 1 - np.array([[0.42], [0.55], [0.55]], np.float32) * np.clip(hollow, 0, 1)

    def _marks(self) -> None:
        """Pores, freckles and moles; what is smaller than a pixel fades."""
        p = self.person
        fine = float(np.clip(1.6 - self.pixel / 0.010, 0, 1))
        if fine:
            pores = sample_noise("pores", self.x * 0.62, self.y * 0.62) + 0.6 * sample_noise("grain", self.x, self.y)
            self._tint(pores * fine, (0.034, 0.044, 0.046))
        if p.freckles:
            zone = bump(self.side, self.y, 0.24, -0.26, 0.28, 0.16) + 0.25
            spots = smoothstep(0.9, 1.9, sample_noise("pores", self.x * 0.36 + 0.4, self.y * 0.36, variant=1))
            self._tint(spots * zone * p.freckles * self.front, (-0.26, -0.40, -0.46))
        if p.age > 0.65:
            spots = smoothstep(2.0, 2.6, sample_noise("curls", self.x * 0.3, self.y * 0.3, variant=p.seed % 5))
            self._tint(spots * (p.age - 0.5), (-0.25, -0.38, -0.42))
        rng = np.random.default_rng([p.seed, 5])
        for _ in range(p.moles):
            spot = bump(self.x, self.y, rng.uniform(-0.5, 0.5), rng.uniform(-0.95, 0.6), 0.012, 0.012) * self.front
            self._tint(spot, (-0.6, -0.7, -0.75))

    def _beard(self) -> None:
        p = self.person
        if p.sex == "woman" and p.beard == "none":
            return
        area = anatomy.beard_area(p, self.side, self.y, self.z)
        shadow = area["jaw"] + area["moustache"]
        self._tint(np.minimum(shadow, 1) * (0.35 if p.beard == "none" else 0.6), (-0.22, -0.16, -0.08))
        if p.beard == "none":
            return
        grown = np.clip(sum(area[k] for k in anatomy.BEARD_PARTS[p.beard]), 0, 1)
        strands = sample_noise("strands", self.x * 0.55 + 0.06 * self.y, self.y * 0.25, variant=2)
        specks = sample_noise("grain", self.x * 0.9, self.y * 0.9)
        patches = sample_noise("patches", self.x * 0.9 + 0.17, self.y * 0.9 + (p.seed % 89) / 89)
        density, texture = (0.42, specks) if p.beard == "stubble" else (0.88, 0.5 * strands + 0.5 * specks)
        thin = 4 * grown * (1 - grown)  # single hairs show at its edge, patches everywhere
        grown = smoothstep(0.12, 0.95, grown + thin * (0.13 * texture + 0.10 * patches))
        self.beard = np.clip(grown * (density + 0.08 * texture + 0.07 * patches), 0, 0.97)
        strands = 0.5 * strands + 0.45 * patches + 0.25 * specks
        color = (0.7 * hair_color(p) + 0.3 * brow_color(p))[:, None] * np.clip(1 + 0.28 * strands, 0.2, 2.2)
        self.albedo = mix(self.albedo, np.maximum(color, 0.002), self.beard)
        self.gloss *= 1 - 0.85 * self.beard

    def _brows(self) -> None:
        p = self.person
        i = self._window(0.06, 0.56, p.brow_y - 0.15, p.brow_y + 0.20)
        if i.size == 0:
            return
        side, y = self.side[i], self.y[i]
        u = (side - 0.125) / 0.345
        line = brow_line(p, u)
        half = p.brow_thickness * (0.72 + 0.5 * u - 0.95 * u * u) * 1.15 + 0.002
        off = (y - line) / half
        edge = 0.28 + 0.5 * self.pixel / p.brow_thickness
        body = smoothstep(1 + edge, 1 - edge, np.abs(off)) * smoothstep(-0.06, 0.12, u) * smoothstep(1.06, 0.9, u)
        hairs = sample_noise("strands", (y - line) * 2.4 - side * 1.0, side * 0.5 + y * 0.3, variant=3)
        hairs = hairs * np.clip(1.4 - self.pixel / 0.012, 0.1, 1)
        amount = np.clip(body * p.brow_density * (0.78 + 0.13 * hairs), 0, 0.95)
        self.albedo[:, i] = mix(self.albedo[:, i], brow_color(p), amount)
        self.gloss[i] *= 1 - amount

    def _lips(self) -> None:
        p = self.person
        half = anatomy.mouth_half_width(p)
        i = self._window(0.0, half + 0.04, p.mouth_y - 0.28, p.mouth_y + 0.2)
        if i.size == 0:
            return
        x, y, soft = self.x[i], self.y[i], 0.008 + 0.6 * self.pixel
        upper, inner_top, inner_bottom, lower = anatomy.lips(p, x)
        ends = smoothstep(half + soft, half - soft, np.abs(x))
        lip = smoothstep(-soft, soft, upper - y) * smoothstep(-soft, soft, y - lower) * ends
        creases = 1 + 0.05 * sample_noise("strands", x * 0.9, y * 0.3) * np.clip(1.5 - self.pixel / 0.012, 0, 1)
        color = skin_color(p.melanin) * np.array([0.93, 0.60, 0.62], np.float32)
        color = color + p.lipstick * 0.8 * (to_linear(LIPSTICKS[p.lipstick_color]) - color)
        self.albedo[:, i] = mix(self.albedo[:, i], color[:, None] * creases, 0.92 * lip)
        self.gloss[i] += lip * (0.6 + 1.2 * p.lipstick)
        seam = ridge(y - 0.5 * (inner_top + inner_bottom), 0.007 + 0.35 * self.pixel) * smoothstep(
            half + 0.02, half - 0.01, np.abs(x)
        )
        self.albedo[:, i] *= 1 - 0.72 * seam * (p.mouth_gap < 0.02)
        self.lip[i] = lip
        if p.mouth_gap > 0.005:
            self._open_mouth(i, x, y, inner_top, inner_bottom, half)

    def _open_mouth(self, i, x, y, inner_top, inner_bottom, half: float) -> None:
        soft = 0.004 + 0.5 * self.pixel
        inside = smoothstep(-soft, soft, inner_top - y) * smoothstep(-soft, soft, y - inner_bottom)
        inside *= smoothstep(half, half - 2 * soft, np.abs(x))
        tooth = 0.074 * np.sign(x) * np.floor(np.abs(x) / 0.074)
        middle = np.abs(np.abs(x - tooth) / 0.074 - 0.5)  # 0 in a tooth's middle, .5 between two
        bite = self.person.mouth_y + 0.30 * np.square(x) - 0.055 + 0.06 * np.square(middle)
        teeth = smoothstep(-soft, soft, y - bite) * smoothstep(0.97, 0.70, np.abs(x) / half)
        gaps = 1 - 0.28 * smoothstep(0.40, 0.5, middle) * float(np.clip(1.7 - self.pixel / 0.014, 0.15, 1))
        shade = (0.62 + 0.38 * smoothstep(0.0, 0.03, inner_top - y)) * (1 - 0.45 * np.square(x / half))
        cavity = np.array([0.075, 0.022, 0.020], np.float32)[:, None] * np.ones_like(x)
        enamel = np.array([0.76, 0.72, 0.63], np.float32)[:, None] * (1 - 0.3 * self.person.melanin) * gaps * shade
        self.albedo[:, i] = mix(self.albedo[:, i], mix(cavity, enamel, teeth), inside)
        self.gloss[i] = self.gloss[i] * (1 - inside) + 0.8 * inside * teeth
        self.mouth[i] = inside

    def _nostrils(self) -> None:
        p = self.person
        x0, y0 = anatomy.nostril_centre(p)
        hole = bump(self.side, self.y, x0, y0, 0.021 * p.nose_width, 0.0115, 0.35) * (self.z > 0.1)
        self._tint(np.clip(1.2 * hole, 0, 1), (-0.66, -0.78, -0.80))
        self.gloss *= 1 - hole

    def _eyes(self) -> None:
        p = self.person
        i = self._window(p.eye_x - 0.24, p.eye_x + 0.24, -0.14, 0.17)
        if i.size == 0:
            return
        x, y = self.x[i], self.y[i]
        sign = np.sign(x)
        dx = self.side[i] - p.eye_x  # outwards
        upper, lower = anatomy.eyelids(p, dx)
        soft = 0.004 + 0.5 * self.pixel
        width = smoothstep(p.eye_half_width + soft, p.eye_half_width - soft, np.abs(dx))
        opening = smoothstep(-soft, soft, upper - y) * smoothstep(-soft, soft, y - lower) * width
        self._lashes(i, dx, y, upper, lower)
        gaze_x, gaze_y = gaze_offset(p)
        ix, iy = dx * sign - gaze_x, y - gaze_y
        ball = self._eyeball(dx, ix, iy, upper - y)
        self.albedo[:, i] = mix(self.albedo[:, i], ball, opening)
        self.gloss[i] = self.gloss[i] * (1 - opening) + 1.2 * opening
        self.eye[i] = opening
        nx, ny = dx * sign / anatomy.EYEBALL_RADIUS, y / anatomy.EYEBALL_RADIUS
        nz = np.sqrt(np.maximum(1 - 0.6 * nx * nx - ny * ny, 0.15))
        self.eye_direction[:, i] = np.stack([0.8 * nx, ny, nz]) / np.sqrt(0.64 * nx * nx + ny * ny + nz * nz)

    def _eyeball(self, dx, ix, iy, below_lid):
        """Colours (3, N) of white, iris and pupil in the shadow of the upper lid."""
        p = self.person
        soft = 0.003 + 0.5 * self.pixel
        radius = np.hypot(ix, iy)
        r = radius / p.iris_radius
        # a camera that opens up for dark skin (`develop`) would show the whites brighter than they are seen
        white = np.array([0.62, 0.585, 0.555], np.float32)[:, None] / (1 + 1.5 * p.melanin)
        white = white * (1 - 0.38 * np.square(dx / p.eye_half_width))
        inner = smoothstep(-0.72, -0.95, dx / p.eye_half_width)  # the pink inner corner
        white = mix(white, np.array([0.50, 0.24, 0.21], np.float32), 0.8 * inner)
        angle = np.arctan2(iy, ix) / (2 * np.pi)
        fibres = sample_noise("strands", angle, 0.1 * r, variant=4) * np.clip(1.5 - self.pixel / 0.012, 0, 1)
        base = to_linear(IRIS_COLORS[p.eye_color])[:, None]
        iris = base * (1 + 0.22 * fibres) * (0.75 + 0.75 * smoothstep(0.3, 0.75, r) * (iy < 0.6 * ix + 0.01))
        iris = iris * (1 - 0.72 * smoothstep(0.74, 1.0, r))
        iris = iris * smoothstep(0.36, 0.36 + soft / p.iris_radius, r) + 0.003
        ball = mix(white, iris, smoothstep(p.iris_radius + soft, p.iris_radius - soft, radius))
        shadow = 0.55 * smoothstep(0.035, 0.0, below_lid) + 0.30 * smoothstep(0.10, 0.0, below_lid)
        return ball * (1 - shadow)

    def _lashes(self, i, dx, y, upper, lower) -> None:
        """The dark line of the upper lashes, single lashes in large images, and a faint lower line."""
        p = self.person
        inside = smoothstep(1.12, 0.95, np.abs(dx) / p.eye_half_width)
        thick = 0.007 + 0.006 * p.lashes + 0.008 * p.eyeliner + 0.25 * self.pixel
        line = ridge(y - upper - 0.003, thick) * inside * (0.50 + 0.40 * p.lashes)
        under = ridge(y - lower, 0.006 + 0.25 * self.pixel) * inside * (0.16 + 0.35 * p.eyeliner)
        spikes = sample_noise("strands", dx * 1.1 - 0.8 * (y - upper) * dx / 0.15, y * 0.1, variant=5)
        fan = smoothstep(0.0, 0.008, y - upper) * smoothstep(0.045, 0.012, y - upper) * inside
        fan = fan * smoothstep(0.2, 0.9, spikes) * smoothstep(-0.12, 0.10, dx) * p.lashes
        amount = np.clip(line + under + 0.6 * fan, 0, 0.95)
        self.albedo[:, i] = mix(self.albedo[:, i], 0.5 * brow_color(p), amount)


def gaze_offset(person: SimpleNamespace) -> tuple[float, float]:
    """Where the irises' centres lie, relative to the eyes' centres: the eyes turn towards the camera."""
    yaw = np.radians(np.clip(person.gaze_x - 0.42 * person.yaw, -16, 16))
    pitch = np.radians(np.clip(person.gaze_y - 0.42 * person.pitch, -8, 8))
    return 0.128 * float(np.sin(yaw)), 0.128 * float(np.sin(pitch)) + 0.006


def brow_line(person: SimpleNamespace, u):
    """Height of a brow's middle; u runs from 0 at the nose to 1 at the temple."""
    t = np.clip(u, 0, 1)
    arch = person.brow_arch * (np.sin(np.pi * t**1.25) - 0.25 * t)
    frown = 0.030 * max(-person.brow_lift, 0) * (1 - t) ** 2
    return person.brow_y + 0.028 * max(person.brow_lift, 0) + 0.012 + arch - frown - 0.012 * person.age * t * t
