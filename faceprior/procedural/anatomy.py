"""
The solid forms of a person without hair and clothes: head, ears, neck and shoulders as signed distances, and the curves
of lids and lips that both the relief and the colours follow.

The head is a stack of ellipses joined to an ellipsoid for the cranium; everything that makes a face is a relief over
(|x|, y) that pushes this surface along z. Frames and units: see `people`.
"""

from types import SimpleNamespace

import numpy as np

from faceprior.procedural.shapes import (
    Stack,
    bump,
    ellipsoid_distance,
    lookup,
    ridge,
    smooth_max,
    smooth_min,
    smoothstep,
)

EYEBALL_RADIUS = 0.128
LID_RADIUS = 0.150
RELIEF_BACK = (-0.45, -0.15)  # z over which the relief fades towards the back of the head


def warp_asymmetry(person: SimpleNamespace, x, y):
    """Heights in the symmetric face that belong to (x, y): one eye sits higher, the mouth slants."""
    side = np.tanh(x / 0.15)
    upper = smoothstep(-0.35, -0.15, y)
    lower = smoothstep(-0.45, -0.60, y)
    return y - side * (person.asymmetry_eyes * upper + person.asymmetry_mouth * lower)


def eyelids(person: SimpleNamespace, dx):
    """Edges of the upper and the lower lid, as heights over the eye's centre.

    dx: distance from the eye's centre, outwards positive.
    """
    u = np.clip(dx / person.eye_half_width, -1, 1)
    upper_u = u + 0.12 * (1 - u * u)  # the upper lid peaks towards the nose
    lower_u = u - 0.16 * (1 - u * u)  # the lower one dips towards the temple
    upper = person.eye_upper * person.eye_openness * np.maximum(1 - np.abs(upper_u) ** 2.3, 0) ** 0.85
    squint = 0.55 + 0.45 * person.eye_openness - 0.18 * max(person.smile, 0)
    lower = -person.eye_lower * squint * np.maximum(1 - np.square(lower_u), 0) ** 0.9
    tilt = person.eye_tilt * u - 0.012 * np.maximum(-u - 0.7, 0) / 0.3
    return upper + tilt, lower + tilt


def lips(person: SimpleNamespace, x):
    """Heights of the four lip curves over x: (upper edge, upper inner, lower inner, lower edge)."""
    half = mouth_half_width(person)
    u = np.clip(x / half, -1, 1)
    arch = np.maximum(1 - u * u, 0)
    corner = -0.012 + 0.042 * person.smile
    line = person.mouth_y + 0.022 * max(person.smile, 0) * (1 - arch) + corner * u * u * (0.5 + 0.5 * u * u)
    line = line - 0.008 * ridge(u, 0.16) + 0.005 * ridge(np.abs(u) - 0.38, 0.18)
    inner_top = line + 0.35 * person.mouth_gap * arch**0.75
    inner_bottom = line - 0.65 * person.mouth_gap * arch**0.6
    smile = max(person.smile, 0)
    bow = 1 + person.cupid_bow * (0.28 * ridge(np.abs(u) - 0.2, 0.13) - 0.32 * ridge(u, 0.09))
    upper = 0.066 * person.lip_fullness * (1 - 0.25 * smile) * arch**0.75 * bow * (1 - 0.25 * u * u)
    lower = 0.090 * person.lip_fullness * (1 - 0.20 * smile) * arch**0.62 * (1 - 0.18 * u * u)
    return inner_top + upper, inner_top, inner_bottom, inner_bottom - lower


def mouth_half_width(person: SimpleNamespace) -> float:
    """Half the width of the mouth in its present expression."""
    return person.mouth_half_width * (1 + 0.18 * max(person.smile, 0) - 0.25 * person.mouth_gap * (person.smile < 0.4))


def mouth_corner_y(person: SimpleNamespace) -> float:
    """Height of the mouth's corners."""
    return float(lips(person, np.array([mouth_half_width(person)]))[1][0])


def jaw_drop(person: SimpleNamespace) -> float:
    """How far the open mouth lowers the chin."""
    return 0.55 * person.mouth_gap


def chin_y(person: SimpleNamespace) -> float:
    """Height of the chin's lowest point."""
    return -1.125 * person.jaw_length - jaw_drop(person)


class Head:
    """Signed distance to the bald head without ears.

    cell: sampling distance of the relief, in units; finer images take finer cells.
    """

    X_MAX, Y_MIN, Y_MAX = 0.90, -1.34, 1.02

    def __init__(self, person: SimpleNamespace, cell: float):
        self.person = person
        self.cell = cell
        self.chin = chin_y(person)
        self._stack = self._build_stack()
        self.skull_centre = (0.0, 0.33, -0.66)
        self.skull_radii = (0.745 * person.skull_width, 0.80 * person.skull_height, 0.96)
        self.relief = self._build_relief()

    def _build_stack(self) -> Stack:
        p = self.person
        face, jaw, chin, bottom = p.face_width, p.jaw_width, p.chin_width, self.chin

        def lower(y: float) -> float:
            return y * p.jaw_length - 0.7 * jaw_drop(p)

        heights = [
            bottom,
            bottom + 0.05,
            lower(-0.97),
            lower(-0.83),
            lower(-0.66),
            -0.43,
            -0.2,
            0.05,
            0.3,
            0.55,
            0.8,
            1.0,
        ]
        half_width = np.array([0.12 * chin, 0.22 * chin, 0.172 * (chin + jaw), 0.450 * jaw, 0.540 * jaw,
                               0.62 * face * (0.5 + 0.5 * jaw), 0.675 * face, 0.685 * face, 0.665 * face, 0.665 * face,
                               0.61, 0.41])  # fmt: skip
        half_width[2:6] += p.double_chin * np.array([0.35, 0.45, 0.5, 0.35])
        forward = p.chin_forward
        front = [0.10 + forward, 0.215 + forward, 0.270 + forward, 0.275, 0.29, 0.255, 0.205, 0.205, 0.275, 0.255,
                 0.10, -0.12]  # fmt: skip
        back = [-0.12, -0.25, -0.36, -0.5, -0.66, -0.9, -1.0, -1.0, -1.0, -1.0, -1.0, -0.9]
        centre = [0.0, -0.03, -0.08, -0.15, -0.24, -0.34, -0.38, -0.40, -0.42, -0.46, -0.5, -0.55]
        return Stack(heights, half_width, front, back, centre)

    def _build_relief(self) -> np.ndarray:
        """Push along z over |x| (columns) and y (rows), float32."""
        x, y = np.meshgrid(
            np.arange(0, self.X_MAX, self.cell, dtype=np.float32),
            np.arange(self.Y_MIN, self.Y_MAX, self.cell, dtype=np.float32),
        )
        base = self._stack.front(x, y)
        z = base.copy()
        for form in (_cheeks, _chin, _brow, _sockets, _nose, _mouth, _folds, _wrinkles, _beard):
            z = form(self.person, x, y, z)
        fade = smoothstep(0.80, 0.58, x) * smoothstep(1.0, 0.75, y)
        return ((z - base) * fade).astype(np.float32)

    def _base(self, x, y, z):
        stack = self._stack.distance(x, y, z)
        skull = ellipsoid_distance(x, y, z, self.skull_centre, self.skull_radii)
        return smooth_min(stack, skull, 0.10)

    def distance(self, x, y, z):
        """Approximate signed distance of points (N,) in the head's frame."""
        y_face = warp_asymmetry(self.person, x, y)
        push = lookup(self.relief, np.abs(x) / self.cell, (y_face - self.Y_MIN) / self.cell)
        return self._base(x, y, z - push * smoothstep(*RELIEF_BACK, z))

    def front_z(self, x: float, y: float) -> float:
        """z of the skin in front of (x, y), for a few landmarks."""
        point = np.array([x], np.float32), np.array([y], np.float32)
        y_face = warp_asymmetry(self.person, *point)
        push = lookup(self.relief, np.abs(point[0]) / self.cell, (y_face - self.Y_MIN) / self.cell)
        return float((self._stack.front(*point) + push)[0])


# Each form takes the person, |x|, y and the surface so far, and returns the surface with the form in it.


def _cheeks(p, x, y, z):
    smile = max(p.smile, 0)
    z = z + p.cheekbone * bump(x, y, 0.46, -0.19, 0.13, 0.10, 0.25)
    z = z + (p.cheek_fullness + 0.040 * smile) * bump(x, y, 0.37, -0.33 + 0.03 * smile, 0.13, 0.13)
    z = z - p.cheek_hollow * bump(x, y, 0.48, -0.60, 0.11, 0.15, 0.35)
    z = z - 0.02 * bump(x, y, 0.64, 0.20, 0.10, 0.2)  # temple
    return z + p.muzzle * bump(x, y, 0, p.mouth_y + 0.03, 0.21, 0.17)


def _chin(p, x, y, z):
    bottom = chin_y(p)
    lip_edge = float(lips(p, np.zeros(1))[3][0])
    z = z + p.chin_boss * bump(x, y, 0, bottom + 0.17, 0.14 * p.chin_width, 0.10)
    z = z - p.chin_cleft * bump(x, y, 0, bottom + 0.15, 0.02, 0.07)
    return z - 0.028 * bump(x, y, 0, lip_edge - 0.07, 0.16, 0.04)  # the furrow below the lower lip


def _brow(p, x, y, z):
    brow = p.brow_y + 0.025 * p.brow_lift
    z = z + p.brow_ridge * bump(x, y, 0.27, brow - 0.03, 0.17, 0.06, -0.06)
    z = z + 0.5 * p.brow_ridge * bump(x, y, 0, brow - 0.02, 0.10, 0.06)
    return z + 0.02 * bump(x, y, 0.25, 0.50, 0.16, 0.14)


def _sockets(p, x, y, z):
    z = z - p.socket_depth * bump(x, y, p.eye_x + 0.005, 0.05, 0.16, 0.085)
    z = z - 0.050 * bump(x, y, 0.175, 0.03, 0.055, 0.08)
    z = z - (0.010 + 0.020 * p.age) * bump(x, y, p.eye_x - 0.05, -0.16, 0.11, 0.04, -0.25)  # tear trough
    dx, dy = x - p.eye_x, y
    upper, lower = eyelids(p, dx)
    near = np.clip(1 - np.square(dx / 0.21), 0, 1)
    z = smooth_max(z, _lid_ball(dx, dy) - 0.25 * smoothstep(0.11, 0.27, np.hypot(dx, dy)), 0.035)
    crease = upper + p.crease_height * (0.6 + 0.4 * np.clip(1 - np.square(dx / 0.18), 0, 1))
    z = z - p.crease_depth * ridge(dy - crease, 0.015) * np.sqrt(near)
    z = z + (0.008 + 0.012 * p.age) * ridge(dy - crease - 0.05, 0.03) * near  # the fold above it
    bag = lower - 0.055
    z = z + (p.eye_bags + 0.010 * max(p.smile, 0)) * ridge(dy - bag, 0.026) * near
    z = z - (0.3 * p.eye_bags + 0.004) * ridge(dy - bag + 0.045, 0.014) * near
    rims = ridge(dy - lower, 0.013) + ridge(dy - upper, 0.014)
    z = z + 0.010 * rims * near * (np.abs(dx) < p.eye_half_width)
    inside = smoothstep(0.0, 0.010, upper - dy) * smoothstep(0.0, 0.010, dy - lower)
    return z - (LID_RADIUS - EYEBALL_RADIUS) * 0.8 * inside


def _lid_ball(dx, dy):
    """Front of the ball that the lids cover, falling off steeply outside it."""
    square = LID_RADIUS**2 - 0.82 * np.square(dx) - np.square(dy)
    outside = -0.08 - 0.8 * np.sqrt(np.maximum(-square, 0))
    return np.where(square > 0, np.sqrt(np.maximum(square, 1e-6)), outside) - 0.005


def _nose(p, x, y, z):
    root_y, tip_y = 0.06, p.nose_y
    t = (root_y - y) / (root_y - tip_y)  # 0 at the root, 1 at the tip
    line = (
        p.nose_root + (p.nose_tip - 0.03 - p.nose_root) * np.clip(t, 0, 1) ** 1.08 + p.nose_hump * ridge(t - 0.4, 0.2)
    )
    middle = z[:, :1]  # the surface at x = 0
    under = smoothstep(tip_y - 0.115, tip_y + 0.0, y)
    height = np.maximum(line - middle, 0) * smoothstep(-0.35, 0.05, t) * under
    width = (0.058 + 0.014 * np.clip(t, 0, 1) ** 2) * p.bridge_width + 0.014 * smoothstep(0.35, -0.2, t)
    profile = np.exp(-0.5 * np.square(x / width))
    z = z + height * profile
    wing_x, wing_y = 0.112 * p.nose_width, tip_y - 0.028
    z = z + 0.060 * bump(x, y, 0, tip_y + 0.002, 0.062 * p.bridge_width, 0.058)  # tip
    z = z + 0.120 * bump(x, y, wing_x, wing_y + 0.004, 0.036 * p.nose_width, 0.044)
    z = z + 0.045 * bump(x, y, 0, tip_y - 0.055, 0.05 * p.nose_width, 0.040)  # the wall between the nostrils
    z = z - 0.016 * bump(x, y, wing_x - 0.036, wing_y + 0.055, 0.022, 0.035)  # groove above the wing
    z = z - 0.016 * bump(x, y, wing_x + 0.070, wing_y - 0.005, 0.020, 0.045)  # groove behind the wing
    nostril_x, nostril_y = nostril_centre(p)
    return z - 0.030 * bump(x, y, nostril_x, nostril_y, 0.024 * p.nose_width, 0.016, 0.35)


def nostril_centre(p) -> tuple[float, float]:
    """(|x|, y) of the nostrils' middle."""
    return 0.060 * p.nose_width, p.nose_y - 0.066


def _mouth(p, x, y, z):
    half = mouth_half_width(p)
    upper, inner_top, inner_bottom, lower = lips(p, x)
    arch = np.clip(1 - np.square(x / half), 0, 1)
    within = smoothstep(half * 1.03, half * 0.93, x)
    up = (y - inner_top) / (upper - inner_top + 0.006)
    down = (inner_bottom - y) / (inner_bottom - lower + 0.006)
    full = np.sqrt(p.lip_fullness)
    z = z + 0.034 * full * np.exp(-np.square((up - 0.45) / 0.55)) * (up > -0.2) * arch**0.4 * within
    z = z + 0.046 * full * np.exp(-np.square((down - 0.48) / 0.55)) * (down > -0.2) * arch**0.4 * within
    z = z - 0.028 * ridge(y - 0.5 * (inner_top + inner_bottom), 0.012) * within  # the line between the lips
    z = z - 0.055 * smoothstep(0, 0.015, inner_top - y) * smoothstep(0, 0.015, y - inner_bottom) * within
    z = z + 0.005 * ridge(y - upper - 0.008, 0.012) * arch  # pale rim over the upper lip
    groove = smoothstep(0.0, 0.08, y - upper) * smoothstep(0.02, -0.06, y - (p.nose_y - 0.09))
    z = z + groove * (0.009 * ridge(x - 0.055, 0.024) - 0.012 * ridge(x, 0.026))
    corner = mouth_corner_y(p)
    z = z - (0.014 + 0.018 * max(p.smile, 0)) * bump(x, y, half + 0.012, corner, 0.024, 0.032)
    return z + 0.010 * max(p.smile, 0) * bump(x, y, half + 0.075, corner, 0.04, 0.07)


def _folds(p, x, y, z):
    """Nasolabial folds, and below the mouth's corners the lines of age."""
    smile = max(p.smile, 0)
    top, end = p.nose_y + 0.01, mouth_corner_y(p) - 0.07
    t = np.clip((top - y) / (top - end), -0.2, 1.2)
    outer = mouth_half_width(p) + 0.085
    path = 0.165 * p.nose_width + (outer - 0.165 * p.nose_width) * np.maximum(t, 0) ** 0.8
    along = smoothstep(-0.12, 0.15, t) * smoothstep(1.15, 0.75, t)
    depth = 0.022 * p.fold_depth + 0.020 * smile
    z = z + depth * along * (ridge(x - path - 0.05, 0.04) - 0.6 * ridge(x - path, 0.022))
    sag = 0.018 * p.wrinkles
    corner_drop = np.maximum(mouth_corner_y(p) - y, 0)
    line = mouth_half_width(p) + 0.03 + 0.15 * corner_drop
    return z - sag * ridge(x - line, 0.018) * smoothstep(0.0, 0.06, corner_drop) * smoothstep(0.28, 0.14, corner_drop)


def _wrinkles(p, x, y, z):
    """Forehead lines, frown lines and crow's feet."""
    rng = np.random.default_rng([p.seed, 77])
    frown = 0.006 * max(-p.brow_lift, 0) + 0.010 * p.wrinkles
    z = z - frown * ridge(x - 0.045, 0.012) * bump(x, y, 0, 0.17, 0.2, 0.07)
    raised = 0.0035 * max(p.brow_lift - 0.4, 0) + 0.0075 * p.wrinkles
    for i in range(4 if raised > 0.001 else 0):
        level = 0.37 + 0.095 * i + rng.uniform(-0.015, 0.015) + 0.02 * np.cos(x * rng.uniform(3, 7))
        z = z - raised * ridge(y - level, 0.011) * ridge(x, rng.uniform(0.2, 0.34))
    feet = 0.008 * p.wrinkles + 0.003 * max(p.smile - 0.3, 0)
    for i in range(4 if feet > 0.001 else 0):
        angle = -0.7 + 0.42 * i + rng.uniform(-0.1, 0.1)
        dx, dy = x - p.eye_x - p.eye_half_width - 0.02, y
        along, across = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
        z = z - feet * ridge(across, 0.008) * smoothstep(-0.01, 0.03, along) * smoothstep(0.16, 0.06, along)
    return z


def beard_area(person: SimpleNamespace, side, y, z) -> dict[str, np.ndarray]:
    """Soft masks (N,) of where hair grows: jaw (with cheeks and sideburns), moustache, goatee."""
    half = mouth_half_width(person)
    upper, _, _, lower = lips(person, side)
    bottom = chin_y(person)
    cheek = np.interp(side, [half - 0.02, half + 0.10, 0.52, 0.62, 0.68], [-0.62, -0.58, -0.42, -0.20, 0.02])
    on_lips = smoothstep(-0.03, 0.0, upper - y) * smoothstep(-0.035, -0.01, y - lower)
    off_lips = 1 - on_lips * smoothstep(half + 0.05, half, side)
    below_neck = smoothstep(bottom - 0.26, bottom + 0.02, y + 0.25 * (z + 0.2))
    jaw = smoothstep(0.10, -0.09, y - cheek) * below_neck * off_lips * smoothstep(-0.62, -0.5, z)
    jaw = jaw * (1 - 0.6 * bump(side, y, 0.10, np.min(lower) - 0.03, 0.06, 0.03))
    base = person.nose_y - 0.105
    ends = half + 0.03
    top = base + 0.02 - 0.042 * np.square(side / half)
    below = upper - 0.012 - 0.5 * np.maximum(side - half, 0)
    band = smoothstep(0.035, -0.045, y - top) * smoothstep(-0.012, 0.02, y - below)
    moustache = band * smoothstep(ends + 0.035, ends - 0.07, side) * (y > person.mouth_y - 0.1) * off_lips
    goatee = jaw * smoothstep(half + 0.09, half - 0.02, side)
    return {"jaw": jaw, "moustache": moustache, "goatee": goatee}


BEARD_PARTS = {"none": (), "stubble": ("jaw", "moustache"), "full beard": ("jaw", "moustache"),
               "goatee": ("goatee", "moustache"), "moustache": ("moustache",)}  # fmt: skip


def _beard(p, x, y, z):
    """A beard stands off the skin: a little, and more on the chin."""
    if p.beard in ("none", "stubble"):
        return z
    area = beard_area(p, x.ravel(), y.ravel(), z.ravel())
    grown = np.clip(sum(area[k] for k in BEARD_PARTS[p.beard]), 0, 1).reshape(x.shape)
    chin = bump(x, y, 0, chin_y(p) + 0.06, 0.22, 0.12)
    return z + (0.022 + 0.035 * chin * (p.beard != "moustache")) * smoothstep(0.1, 1.0, grown)


EAR_CENTRE = (0.735, -0.12, -0.70)


def ear_coordinates(person: SimpleNamespace, x, y, z):
    """Coordinates on the plate of the nearer ear: height over it, up from its middle, and radius (1 at its rim)."""
    size = person.ear_size
    angle = 0.50 + float(np.radians(person.ear_angle))
    out, dy, dz = np.abs(x) - EAR_CENTRE[0] * person.skull_width, y - EAR_CENTRE[1], z - EAR_CENTRE[2]
    across = np.cos(angle) * out + np.sin(angle) * dz
    along = np.cos(angle) * dz - np.sin(angle) * out + 0.18 * dy
    taper = 0.150 + 0.055 * np.clip(dy / 0.3, -1, 1)
    radius = np.hypot(dy / (0.30 * size), (along + 0.02) / (taper * size))
    return across, dy, radius


def ear_distance(person: SimpleNamespace, x, y, z):
    """Approximate signed distance to both ears: a tilted, bowl-shaped plate with a rim."""
    across, dy, radius = ear_coordinates(person, x, y, z)
    edge = (radius - 1) * 0.15
    bowl = 0.045 * np.exp(-np.square(radius / 0.55)) - 0.032 * np.exp(-np.square((radius - 0.9) / 0.14))
    antihelix = -0.020 * np.exp(-np.square((radius - 0.55) / 0.12)) * smoothstep(-0.15, 0.05, dy)
    plate = np.abs(across + bowl + antihelix - 0.01) - 0.022
    return 0.6 * smooth_max(edge, plate, 0.03)


def ear_lobe(person: SimpleNamespace) -> tuple[float, float, float]:
    """(|x|, y, z) of the place on a lobe's outer side where an ear ring hangs."""
    angle, dy = 0.50 + float(np.radians(person.ear_angle)), -0.255 * person.ear_size
    across, along = 0.045, -0.03 - 0.18 * dy
    out, dz = np.cos(angle) * across - np.sin(angle) * along, np.sin(angle) * across + np.cos(angle) * along
    return EAR_CENTRE[0] * person.skull_width + float(out), EAR_CENTRE[1] + dy, EAR_CENTRE[2] + float(dz)


def limb_distance(x, y, z, start, end, radii):
    """Approximate signed distance of points (N,) to a capsule from start to end that tapers between two radii."""
    ax, ay, az = (e - s for s, e in zip(start, end, strict=True))
    px, py, pz = x - start[0], y - start[1], z - start[2]
    t = np.clip((px * ax + py * ay + pz * az) / (ax * ax + ay * ay + az * az), 0, 1)
    length = np.sqrt(np.square(px - t * ax) + np.square(py - t * ay) + np.square(pz - t * az))
    return length - (radii[0] + (radii[1] - radii[0]) * t)


WRIST_Y, WAIST_Y = -7.5, -6.9  # where sleeves and upper garments end


class Body:
    """Signed distance to everything below the head, in the body's frame (as the head's, before it turns)."""

    def __init__(self, person: SimpleNamespace):
        self.person = person
        neck, shoulder = person.neck_width, person.shoulder_width
        chest, waist, hips = shoulder - 0.22, 0.70 * shoulder + 0.1 * max(person.weight, 0), 1.42
        heights = [-8.5, -7.6, -5.6, -3.9, -2.9, -2.18, -1.94, -1.77, -1.64, -1.52, -1.40, -1.25, -1.0, -0.6]
        half_width = [0.9, hips, waist, chest - 0.05, chest, chest * 0.97, shoulder * 0.82, shoulder * 0.62, 0.80,
                      neck + 0.16, neck + 0.05, neck, neck, 0.5 * neck]  # fmt: skip
        front = [0.1, 0.25, 0.25, 0.36, 0.30, 0.12, 0.02, -0.06, -0.13, -0.175, -0.20, -0.225, -0.22, -0.3]
        back = [-1.4, -1.7, -1.4, -1.6, -1.55, -1.5, -1.46, -1.42, -1.36, -1.29, -1.23, -1.18, -1.12, -0.85]
        self._stack = Stack(heights, half_width, front, back, [-0.65] * len(heights))

    def distance(self, x, y, z):
        """Approximate signed distance of points (N,) in the body's frame."""
        d = self._stack.distance(x, y, z)
        low = np.flatnonzero(y < -1.6)
        if low.size:
            d[low] = smooth_min(d[low], self._limbs(np.abs(x[low]), y[low], z[low]), 0.22)
        front = smoothstep(-0.75, -0.5, z)
        side = np.abs(x)
        cord_x = 0.40 - 0.30 * np.clip((-0.95 - y) / 0.62, 0, 1)
        cords = 0.012 * ridge(side - cord_x, 0.075) * smoothstep(-1.62, -1.45, y) * smoothstep(-0.95, -1.10, y)
        collarbones = 0.020 * ridge(y + 1.64 - 0.10 * side, 0.04) * smoothstep(0.06, 0.25, side)
        apple = 0.020 * max(self.person.masculine - 0.4, 0) * bump(side, y, 0, -1.18, 0.07, 0.08)
        return d - front * (cords + collarbones + apple)

    def _limbs(self, side, y, z):
        """Arms and legs; side: |x|."""
        shoulder = self.person.shoulder_width
        joint, elbow, wrist, finger = ((shoulder - 0.36, -2.36, -0.68), (shoulder + 0.22, -5.0, -0.85),
                                       (shoulder + 0.12, -7.4, -0.35), (shoulder + 0.05, -8.2, -0.25))  # fmt: skip
        arm = limb_distance(side, y, z, joint, elbow, (0.42, 0.34))
        arm = smooth_min(arm, limb_distance(side, y, z, elbow, wrist, (0.34, 0.22)), 0.1)
        if y.min() < -7:
            arm = smooth_min(arm, limb_distance(side, y, z, wrist, finger, (0.24, 0.20)), 0.1)
            leg = limb_distance(side, y, z, (0.72, -8.0, -0.65), (0.66, -15.6, -0.7), (0.85, 0.42))
            foot = limb_distance(side, y, z, (0.66, -15.8, -0.8), (0.80, -15.9, 0.7), (0.34, 0.28))
            arm = np.minimum(arm, smooth_min(leg, foot, 0.2))
        return arm
