"""
What people wear: garments as solids on the shoulders with their collars and colours, and glasses.

Garments live in the body's frame, glasses in the head's.
"""

import colorsys
from types import SimpleNamespace

import numpy as np

from faceprior.procedural.anatomy import WAIST_Y, WRIST_Y
from faceprior.procedural.pigments import skin_color
from faceprior.procedural.shapes import smooth_max, smoothstep
from faceprior.procedural.textures import sample_noise

CLOTH = 0.035  # thickness of a garment
OPEN_BACK = -1.38  # height of the neckline behind


class Garment:
    """The upper garment of a person."""

    def __init__(self, person: SimpleNamespace):
        self.person = person
        rgb = colorsys.hsv_to_rgb(person.cloth_hue, person.cloth_saturation, person.cloth_value)
        self.color = np.power(np.array(rgb, np.float32), 2.2) * 0.85 + 0.005
        accent = colorsys.hsv_to_rgb((person.cloth_hue + 0.45) % 1, 0.5, 0.45)
        self.accent = np.power(np.array(accent, np.float32), 2.2)

    def neckline(self, x, z):
        """Height up to which the garment reaches."""
        front = smoothstep(-0.9, -0.35, z)
        side = np.abs(x)
        kind = self.person.clothes
        if kind == "turtleneck":
            return np.full_like(x, -1.16)
        if kind == "crew neck":
            return OPEN_BACK - 0.30 * front + 0.05 * smoothstep(0.2, 0.6, side)
        depth = {"v-neck": 0.72, "shirt": 0.42, "suit": 0.30}[kind]
        vee = depth * np.clip(1 - side / 0.55, 0, 1)
        return OPEN_BACK + 0.03 - front * (0.08 + vee)

    def distance(self, x, y, z, body):
        """Approximate signed distance (N,); body: the distance to neck and shoulders."""
        thickness = CLOTH + 0.03 * (self.person.clothes in ("shirt", "suit")) * smoothstep(-1.68, -1.44, y)
        thickness = thickness + 0.02 * (self.person.clothes == "turtleneck") * smoothstep(-1.64, -1.34, y)
        folds = 0.012 * sample_noise("clouds", x * 0.35 + 0.2 * y, y * 0.2) * smoothstep(-1.7, -2.1, y)
        return smooth_max(body - thickness - folds, 0.8 * (y - self.neckline(x, z)), 0.02)

    def colors(self, x, y, z) -> np.ndarray:
        """Linear RGB (3, N) at points of the garment."""
        color = np.repeat(self.color[:, None], x.size, axis=1)
        weave = 1 + 0.05 * sample_noise("grain", x * 0.9, y * 0.9)
        edge = self.neckline(x, z) - y
        kind = self.person.clothes
        if kind == "crew neck":
            weave = weave * (1 - 0.25 * np.exp(-np.square((edge - 0.10) / 0.010)))
        if kind == "suit":
            color = self._suit_colors(x, y, z, color)
        if kind == "shirt":
            weave = weave * (1 - 0.4 * np.exp(-np.square((np.abs(x) - 0.02) / 0.008)) * (edge > 0) * (z > -0.6))
        if (y < WRIST_Y).any():
            color = self._lower_colors(x, y, color)
        return color * weave

    def _lower_colors(self, x, y, color):
        """Trousers below the waist, hands below the sleeves, shoes."""
        shades = (
            (0.05, 0.06, 0.10),
            (0.03, 0.03, 0.035),
            (0.17, 0.13, 0.085),
            (0.09, 0.09, 0.09),
            (0.06, 0.05, 0.04),
        )
        trousers = np.array(shades[self.person.seed % len(shades)], np.float32)[:, None]
        arms = (np.abs(x) > self.person.shoulder_width - 0.15) & (y > -8.6)
        color = np.where((y < WAIST_Y) & ~arms, trousers, color)
        color = np.where((y < WRIST_Y) & arms, skin_color(self.person.melanin)[:, None], color)
        return np.where(y < -15.4, np.float32(0.02), color)

    def _suit_colors(self, x, y, z, color):
        side, below = np.abs(x), np.clip((-1.40 - y) / 1.2, 0, 1)
        opening = 0.46 * (1 - below) - 0.02  # half width between the lapels
        shirt = smoothstep(0.012, -0.012, side - opening) * (z > -0.9)
        shirt = np.maximum(shirt, smoothstep(-1.50, -1.48, y + 0.04 * z))
        lapel = opening + 0.26 * np.sin(np.pi * np.clip(0.15 + 0.75 * below, 0, 1))
        shade = (
            1
            - 0.45 * np.exp(-np.square((side - lapel) / 0.014))
            + 0.25 * np.exp(-np.square((side - lapel + 0.03) / 0.02))
        )
        notch = np.exp(-np.square((y + 1.72 - 0.35 * (side - 0.4)) / 0.014)) * (side > opening + 0.04) * (side < lapel)
        shade = (shade - 0.4 * notch) * (1 - 0.5 * np.exp(-np.square((side - opening) / 0.02)) * (1 - shirt))
        color = 0.30 * color * shade + shirt * (0.72 - 0.30 * color * shade)
        knot = smoothstep(-1.60, -1.62, y)
        tie_half = 0.070 + 0.05 * np.clip((-1.70 - y) / 0.9, 0, 1) + 0.035 * (1 - knot)
        tie = smoothstep(0.01, -0.01, side - tie_half) * smoothstep(-1.47, -1.50, y) * (z > -0.8) * shirt
        if self.person.sex == "woman":
            return color
        return color + tie * (self.accent[:, None] * (0.75 + 0.25 * knot) - color)


FRAME_COLORS = {"black": (0.012, 0.011, 0.011), "tortoise": (0.08, 0.035, 0.014), "metal": (0.35, 0.32, 0.27),
                "blue": (0.02, 0.04, 0.10)}  # fmt: skip
LENS_Z = 0.30  # plane of the lenses
TEMPLE_X = 0.685


def lens_distance(person: SimpleNamespace, x, y):
    """Signed distance in the plane of the lenses to the nearer lens outline, negative inside."""
    dx, dy = np.abs(x) - person.eye_x - 0.02, y + 0.035
    if person.glasses == "round":
        return np.hypot(dx, dy) - 0.205
    half_x, half_y, corner = (0.225, 0.145, 0.07) if person.glasses == "rectangular" else (0.225, 0.19, 0.15)
    if person.glasses == "aviator":
        dx = dx - 0.20 * dy * (dy < 0) * -1.0
    qx, qy = np.abs(dx) - half_x + corner, np.abs(dy) - half_y + corner
    return np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0) - corner


def frame_distance(person: SimpleNamespace, x, y):
    """Signed distance in the plane of the lenses to the frame: rims and bridge."""
    width = 0.010 if person.glasses == "aviator" or person.glasses_color == "metal" else 0.017
    rim = np.abs(lens_distance(person, x, y)) - width
    bridge = np.maximum(np.abs(y - 0.02 + 0.35 * np.square(x)) - width, np.abs(x) - 0.13)
    hinge = np.maximum(np.abs(y - 0.03) - 1.3 * width, np.abs(np.abs(x) - 0.61) - 0.07)
    return np.minimum(np.minimum(rim, bridge), hinge)


def temple_distance(y, z):
    """Signed distance in the side plane to the arm of the glasses that runs back to the ear."""
    return np.maximum(np.abs(y - 0.03) - 0.022, np.maximum(z - LENS_Z, -0.62 - z))
