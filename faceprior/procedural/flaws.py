"""Drawn portraits with a flaw for which a photographer would reject them: FLAWS, each a function by its name.

Each is a function (drawing, seed, rng) -> image (h, w, 3) uint8. drawing: the person of the seed without the flaw; rng:
chooses the flaw's strength, which is one that nobody overlooks. Lengths are in units of the image's side, so a portrait
is spoilt equally at every size.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from faceprior.images import cv2
from faceprior.procedural.backdrop import draw_backdrop
from faceprior.procedural.people import sample_person
from faceprior.procedural.portraits import MAX_SIZE, Drawing, draw_portrait
from faceprior.procedural.rendering import develop, make_lights
from faceprior.procedural.scenes import draw_scene

Flaw = Callable[[Drawing, int, np.random.Generator], np.ndarray]

SPOIL_EVERY = 4


class Spoil:
    """Gives every fourth drawn portrait, in turns, one of FLAWS: a `change` for `draw_folder`."""

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, drawing: Drawing, seed: int) -> tuple[np.ndarray, str]:
        """Return the image, (h, w, 3) uint8, and the name of its flaw (empty: none)."""
        if seed % SPOIL_EVERY:
            return drawing.image, ""
        name = list(FLAWS)[seed // SPOIL_EVERY % len(FLAWS)]
        return FLAWS[name](drawing, seed, np.random.default_rng([self.seed, seed])), name


# ---- of the camera and the file


def blur(drawing: Drawing, seed: int, rng: np.random.Generator) -> np.ndarray:
    """Shrunk to a sixth .. a twelfth and enlarged again."""
    size = drawing.image.shape[1::-1]
    factor = rng.uniform(6, 12)
    small = Image.fromarray(drawing.image).resize([round(side / factor) for side in size], Image.Resampling.BOX)
    return np.asarray(small.resize(size, Image.Resampling.BICUBIC))


def motion(drawing: Drawing, seed: int, rng: np.random.Generator) -> np.ndarray:
    """The camera moved by 5% .. 9% of the image's side."""
    length = rng.uniform(0.05, 0.09) * len(drawing.image)
    angle, reach = rng.uniform(0, np.pi), int(np.ceil(length / 2))
    kernel = np.zeros((2 * reach + 1,) * 2, np.float32)
    for step in np.linspace(-length / 2, length / 2, 8 * reach):
        kernel[round(reach + step * np.sin(angle)), round(reach + step * np.cos(angle))] += 1
    return cv2.filter2D(drawing.image, -1, kernel / kernel.sum())


def noise(drawing: Drawing, seed: int, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise with a standard deviation of 12 .. 25 grey levels."""
    return _clip(drawing.image + rng.normal(0, rng.uniform(12, 25), drawing.image.shape))


def pepper(drawing: Drawing, seed: int, rng: np.random.Generator) -> np.ndarray:
    """3% .. 8% of the pixels are black."""
    black = rng.random(drawing.image.shape[:2]) < rng.uniform(0.03, 0.08)
    return np.where(black[..., None], 0, drawing.image).astype(np.uint8)


def blocks(drawing: Drawing, seed: int, rng: np.random.Generator) -> np.ndarray:
    """A JPEG of quality 4 .. 10."""
    return _compressed(drawing.image, int(rng.integers(4, 11)))


def underexposed(drawing: Drawing, seed: int, rng: np.random.Generator) -> np.ndarray:
    """3 .. 4.5 stops too dark."""
    return _exposed(drawing.image, -rng.uniform(3, 4.5))


def overexposed(drawing: Drawing, seed: int, rng: np.random.Generator) -> np.ndarray:
    """2 .. 3.5 stops too bright."""
    return _exposed(drawing.image, rng.uniform(2, 3.5))


def duplicate(drawing: Drawing, seed: int, rng: np.random.Generator) -> np.ndarray:
    """The portrait of the seed before, as it is found again on the web: a little smaller, brighter, compressed."""
    size = len(drawing.image)
    original = Image.fromarray(draw_portrait(max(seed - 1, 0), size).image)
    small = np.asarray(original.resize([round(size * rng.uniform(0.7, 1))] * 2, Image.Resampling.LANCZOS))
    return _compressed(_clip(small * rng.uniform(0.92, 1.08)), int(rng.integers(75, 95)))


# ---- of the person


def smooth(drawing: Drawing, seed: int, rng: np.random.Generator) -> np.ndarray:
    """The skin is retouched until no texture is left; eyes, mouth and hair stay as they are."""
    size = len(drawing.image)
    soft = drawing.image
    for _ in range(3):
        soft = cv2.bilateralFilter(soft, 0, rng.uniform(25, 40), 0.012 * size)
    skin = cv2.GaussianBlur(drawing.region_masks["skin"].astype(np.float32), (0, 0), 0.004 * size)[..., None]
    return _clip(drawing.image + skin * (soft - drawing.image.astype(np.float32)))


def covered(drawing: Drawing, seed: int, rng: np.random.Generator) -> np.ndarray:
    """The eyes are behind a dark band or a hand, or the mouth is behind a mask or a hand."""
    left, right, nose, *mouth = drawing.landmarks
    unit, along = float(np.hypot(*(right - left))), (right - left) / np.hypot(*(right - left))
    down = np.array([-along[1], along[0]])
    hides_eyes = rng.random() < 0.5
    centre = (left + right) / 2 if hides_eyes else np.mean(mouth, axis=0) + 0.05 * unit * down
    half = (1.15 * unit, 0.33 * unit) if hides_eyes else (0.85 * unit, 0.55 * unit)
    y, x = np.mgrid[: drawing.image.shape[0], : drawing.image.shape[1]].astype(np.float32)
    across, below = ((x - centre[0]) * axis[0] + (y - centre[1]) * axis[1] for axis in (along, down))
    inside = 1 - (np.abs(across) / half[0]) ** 4 - (np.abs(below) / half[1]) ** 4
    cover = np.clip(0.5 + inside * half[1] / 4, 0, 1)[..., None]  # an edge of about two pixels
    if rng.random() < 0.5:  # a hand, of the skin's colour
        color = np.median(drawing.image[drawing.region_masks["skin"]], axis=0)
    else:
        color = np.array((25, 25, 28)) if hides_eyes else np.array((150, 185, 200))
    shade = (1 - 0.25 * np.clip(across / half[0], -1, 1))[..., None]
    grain = cv2.GaussianBlur(rng.normal(0, 1, x.shape).astype(np.float32), (0, 0), 1.5)[..., None]
    return _clip(drawing.image + cover * (color * shade + 6 * grain - drawing.image))


def cut(drawing: Drawing, seed: int, rng: np.random.Generator) -> np.ndarray:
    """The edge of the photograph goes through the mouth, or through an eye."""
    left, right, nose, *mouth = drawing.landmarks
    edge = rng.integers(3)
    if edge == 0:
        return drawing.image[: round(float(np.mean(mouth, axis=0)[1] + 0.1 * (right - left)[0]))]
    return drawing.image[:, round(float(left[0])) :] if edge == 1 else drawing.image[:, : round(float(right[0]))]


def turned(drawing: Drawing, seed: int, rng: np.random.Generator) -> np.ndarray:
    """The head is turned to the side by 60 .. 85 degrees."""
    return draw_portrait(seed, len(drawing.image), yaw=float(rng.choice([-1, 1]) * rng.uniform(60, 85))).image


def two(drawing: Drawing, seed: int, rng: np.random.Generator) -> np.ndarray:
    """Two people side by side, in a photograph that is 1.5 times as large."""
    return draw_scene(seed, min(3 * len(drawing.image) // 2, MAX_SIZE), faces=2, area_bin=2).image


def small(drawing: Drawing, seed: int, rng: np.random.Generator) -> np.ndarray:
    """A person far away, whose face has below 0.5% of the area."""
    return draw_scene(seed, len(drawing.image), faces=1, area_bin=0).image


def nobody(drawing: Drawing, seed: int, rng: np.random.Generator) -> np.ndarray:
    """The background alone."""
    person = sample_person(seed)
    light = 0.85 * make_lights(person).key_color
    backdrop = draw_backdrop(person.background, len(drawing.image), np.random.default_rng([person.seed, 11]), light)
    return develop(backdrop, person.exposure, person.melanin, seed=person.seed)


FLAWS: dict[str, Flaw] = {
    function.__name__: function
    for function in (
        blur, noise, pepper, blocks, smooth, underexposed, overexposed, covered, turned, two, nobody, duplicate,
        motion, cut, small,
    )
}  # fmt: skip


def _exposed(image: np.ndarray, stops: float) -> np.ndarray:
    """Expose anew, in linear light (sRGB without its linear foot: exponent 2.2)."""
    return _clip(255 * np.minimum((image / 255) ** 2.2 * 2**stops, 1) ** (1 / 2.2))


def _compressed(image: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def _clip(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)
