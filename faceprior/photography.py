"""Photographic tags that are measured on an aligned crop, without a model: light, tones, lens, skin (AuthFace, 3.1).

Every measure is one number with one or two limits, at 256 pixels. The limits were set on drawn portraits whose light is
known; `python -m checkpoints.tiny_models.photography` counts how often they are right on others. The hardness of the
light is not among them: neither the depth and the steepness of shadows nor highlights, alone or combined, tell hard
from soft light on these, as that command counts, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from faceprior.images import as_array, cv2

ANALYSIS_SIZE = 256  # side in pixels of the aligned crops that are measured

# Rows and columns of parts of the face in a crop of ANALYSIS_SIZE, which all faces share after the alignment
CHEEKS = (np.s_[140:175, 72:108], np.s_[140:175, 148:184])  # left and right in the image
SIDES = (  # besides the nose, on the chin, on the forehead: left and right
    (np.s_[145:175, 88:112], np.s_[145:175, 144:168]),
    (np.s_[200:225, 92:124], np.s_[200:225, 132:164]),
    (np.s_[72:92, 85:122], np.s_[72:92, 134:171]),
)
EYES = (np.s_[108:132, 82:116], np.s_[108:132, 140:174])
BESIDE = [np.s_[top : top + 40, side] for top in (0, 40, 80, 120) for side in (slice(32), slice(224, 256))]  # the head
FACE = np.s_[88:222, 72:184]

LUMINANCE = np.float32([0.2126, 0.7152, 0.0722])  # of linear RGB (Rec. 709)
_DARK = np.float32(2e-3)  # linear light, so that logarithms of black stay finite


@dataclass(frozen=True)
class Attribute:
    """What a measured number says: `low` below the first limit, `high` above the second, `middle` between them."""

    name: str
    limits: tuple[float, float]
    low: str = ""
    middle: str = ""
    high: str = ""

    def tag(self, value: float | None) -> str:
        """Return the tag of a measured number, empty where it says nothing or could not be measured."""
        if value is None:
            return ""
        return self.low if value < self.limits[0] else self.high if value > self.limits[1] else self.middle


ATTRIBUTES = (
    # natural logarithm of the light on the left over that on the right, less the turn of the head
    Attribute("light side", (-0.115, 0.115), "light from the right", "front light", "light from the left"),
    # natural logarithm of green over blue in the whites of the eyes
    Attribute("colour temperature", (0.025, 0.104), "cool light", "neutral light", "warm light"),
    # mean grey level
    Attribute("key", (75.0, 165.0), "dark tones", "", "light tones"),
    # standard deviation of the blur of the background's edges in pixels; in focus they have below 1
    Attribute("depth of field", (1.4, 1.4), "", "", "blurred background"),
    # fraction of the face's contrast that is fine
    Attribute("sharpness", (0.2, 0.2), "soft focus", "", "sharp details"),
    # detail of the cheeks in grey levels
    Attribute("skin", (0.5, 0.5), "smooth skin", "", "textured skin"),
    # mean saturation
    Attribute("colours", (0.02, 1.0), "black and white"),
)


def head_turn(landmarks: np.ndarray) -> float:
    """Return how far the nose's tip is to the right of the middle between the eyes, in eye distances.

    landmarks: (5, 2), in the photograph or in the crop. Positive: the head is turned to the image's right.
    """
    left, right, nose = np.asarray(landmarks, np.float64)[:3]
    axis = right - left
    return float((nose - (left + right) / 2) @ axis / (axis @ axis))


def measured_tags(crop: Image.Image, turn: float = 0.0) -> list[str]:
    """Return the photographic tags that are measured on an aligned crop; turn: of the head, by `head_turn`."""
    values = measure_photography(crop, turn)
    tags = {attribute.name: attribute.tag(values[attribute.name]) for attribute in ATTRIBUTES}
    if tags["colours"]:  # without colours, that of the light is not known
        tags["colour temperature"] = ""
    if tags["sharpness"] == "soft focus":  # nor is what a blurred image does not show
        tags["skin"] = tags["depth of field"] = ""
    return [tag for tag in tags.values() if tag]


def measure_photography(crop: Image.Image, turn: float = 0.0) -> dict[str, float | None]:
    """Measure an aligned crop: one number for each of ATTRIBUTES, None where it cannot be measured.

    turn: of the head, by `head_turn`: the half that is turned to the viewer catches light of its own.

    Sharpness, depth of field and skin need the fine detail of 256 pixels: of smaller crops they are None.
    """
    rgb = as_array(crop.resize((ANALYSIS_SIZE, ANALYSIS_SIZE), Image.LANCZOS)).astype(np.float32)  # (256, 256, 3)
    gray = rgb @ np.float32([0.299, 0.587, 0.114])
    linear = _linear(rgb)
    fine = min(crop.size) >= ANALYSIS_SIZE
    return {
        "light side": _light_from_the_left(linear) - turn,
        "colour temperature": float(np.mean([_green_over_blue(linear[eye]) for eye in EYES])),
        "key": float(gray.mean()),
        "depth of field": _background_blur(gray) if fine else None,
        "sharpness": _fine_fraction(gray[FACE]) if fine else None,
        "skin": _skin_texture(gray) if fine else None,
        "colours": float(((rgb.max(2) - rgb.min(2)) / (rgb.max(2) + 1)).mean()),
    }  # fmt: skip


def _linear(rgb: np.ndarray) -> np.ndarray:
    """sRGB, 0 to 255 -> linear light, 0 to 1 (IEC 61966-2-1)."""
    x = rgb / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4).astype(np.float32)


def _light_from_the_left(linear: np.ndarray) -> float:
    return float(np.median([_log_light(linear, left) - _log_light(linear, right) for left, right in SIDES]))


def _log_light(linear: np.ndarray, region: tuple[slice, slice]) -> float:
    """Logarithm of a region's luminance; medians, so that hair, glasses and highlights do not count."""
    channels = np.median(linear[region].reshape(-1, 3), axis=0) + _DARK
    return float(np.log(channels @ LUMINANCE))


def _green_over_blue(eye: np.ndarray) -> float:
    """Logarithm of green over blue of the 40 least colourful pixels among the brighter 60%: the white of an eye.

    Skin is no grey card, and its red and blue depend on its pigments more than on the light.
    """
    pixels = eye.reshape(-1, 3)
    light = pixels @ LUMINANCE
    saturation = (pixels.max(1) - pixels.min(1)) / (pixels.max(1) + 1e-3)
    saturation[light <= np.percentile(light, 40)] = np.inf
    white = pixels[np.argsort(saturation)[:40]].mean(0) + _DARK
    return float(np.log(white[1] / white[2]))


def _fine_fraction(gray: np.ndarray) -> float:
    """Return the contrast below 1 pixel over that of 1 to 4 pixels, both as standard deviations."""
    fine, coarse = (cv2.GaussianBlur(gray, (0, 0), sigma) for sigma in (1.0, 4.0))
    return float((gray - fine).std() / ((fine - coarse).std() + 1.0))


def _background_blur(gray: np.ndarray) -> float | None:
    """Return the blur of the strongest edges beside the head, as a Gaussian's standard deviation in pixels.

    The gradient of an edge of blur s is 1 / sqrt(s^2 + t^2) after more blur by t; so the ratio of the gradients for
    t = 1 and 2, R^2 = (s^2 + 4) / (s^2 + 1), tells s. Of the blocks beside the head that have an edge the median
    counts: hair, which is in focus, fills some. None where no block has one, as before a plain wall.
    """
    fine, coarse = (_gradient(cv2.GaussianBlur(gray, (0, 0), sigma)) for sigma in (1.0, 2.0))
    strongest = [(np.percentile(fine[block], 99.8), np.percentile(coarse[block], 99.8)) for block in BESIDE]
    ratios = [sharp / soft for sharp, soft in strongest if soft > 1]
    if not ratios:
        return None
    squared = float(np.clip(np.median(ratios), 1.05, 2.0)) ** 2  # from 0 pixels to 5
    return float(np.sqrt((4 - squared) / (squared - 1)))


def _gradient(gray: np.ndarray) -> np.ndarray:
    """Return the length of the gradient in grey levels per pixel (Sobel)."""
    return np.hypot(cv2.Sobel(gray, cv2.CV_32F, 1, 0), cv2.Sobel(gray, cv2.CV_32F, 0, 1)) / 8


def _skin_texture(gray: np.ndarray) -> float:
    """Return the median detail of the cheeks below 1 pixel, grey levels."""
    detail = np.abs(gray - cv2.GaussianBlur(gray, (0, 0), 1.0))
    return float(np.median([np.median(detail[cheek]) for cheek in CHEEKS]))
