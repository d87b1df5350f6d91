"""Twelve ways to spoil a face, in five strengths: the tiny reward model is pretrained on eight and measured on all.

Each is a function (image (H, W, 3) uint8, landmarks (5, 2) pixels, strength 0 .. 1, rng) -> a spoiled copy. Lengths are
in units of the distance between the eyes, so a face is spoiled equally at every size.
"""

from collections.abc import Callable

import numpy as np

from faceprior.images import cv2

LEVELS = (0.2, 0.4, 0.6, 0.8, 1.0)


def between_eyes(landmarks: np.ndarray) -> float:
    return float(np.hypot(*(landmarks[1] - landmarks[0])))


def blur(image, landmarks, strength, rng):
    return cv2.GaussianBlur(image, (0, 0), 0.02 + 0.15 * strength * between_eyes(landmarks))


def noise(image, landmarks, strength, rng):
    return clip(image + rng.normal(0, 45 * strength, image.shape))


def jpeg(image, landmarks, strength, rng):
    quality = round(40 * (1 - strength) ** 1.5) + 6
    return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)


def downsample(image, landmarks, strength, rng):
    height, width = image.shape[:2]
    factor = max(1.0, 1 + 0.22 * strength * between_eyes(landmarks))
    small = cv2.resize(
        image, (max(2, round(width / factor)), max(2, round(height / factor))), interpolation=cv2.INTER_AREA
    )
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def ghost(image, landmarks, strength, rng):
    """A shifted, half transparent second face."""
    unit, angle = between_eyes(landmarks), rng.uniform(0, 2 * np.pi)
    distance = 0.55 * strength * unit
    moved = move(image, np.cos(angle) * distance, np.sin(angle) * distance)
    return blend(image, moved, 0.5 * face_weight(image, landmarks))


def warp(image, landmarks, strength, rng):
    """A smooth random displacement: features melt."""
    unit = between_eyes(landmarks)
    field = [
        cv2.GaussianBlur(rng.normal(0, 1, image.shape[:2]).astype(np.float32), (0, 0), 0.28 * unit) for _ in range(2)
    ]
    scale = 0.24 * strength * unit * face_weight(image, landmarks)
    return displace(image, *(scale * f / f.std() for f in field))


def swirl(image, landmarks, strength, rng):
    """A rotation that fades outwards, around one feature."""
    unit, (cx, cy) = between_eyes(landmarks), landmarks[rng.integers(5)]
    rows, columns = grid(image)
    dx, dy = columns - cx, rows - cy
    angle = rng.choice([-1, 1]) * 1.5 * strength * np.exp(-(dx**2 + dy**2) / (0.45 * unit) ** 2)
    return displace(image, dx * np.cos(angle) - dy * np.sin(angle) - dx, dx * np.sin(angle) + dy * np.cos(angle) - dy)


def eye_shift(image, landmarks, strength, rng):
    return shift_feature(image, landmarks, landmarks[rng.integers(2)], 0.4, strength, rng)


def mouth_shift(image, landmarks, strength, rng):
    return shift_feature(image, landmarks, landmarks[3:].mean(axis=0), 0.6, strength, rng)


def erase(image, landmarks, strength, rng):
    """Eyes, nose or mouth are filled from their surroundings."""
    unit, count = between_eyes(landmarks), 1 + round(2 * strength)
    mask = np.zeros(image.shape[:2], np.uint8)
    for x, y in landmarks[rng.permutation(5)[:count]]:
        axes = (max(1, round((0.12 + 0.22 * strength) * unit)), max(1, round((0.08 + 0.14 * strength) * unit)))
        cv2.ellipse(mask, (round(float(x)), round(float(y))), axes, 0, 0, 360, 255, -1)
    return cv2.inpaint(image, mask, 3, cv2.INPAINT_TELEA)


def smear(image, landmarks, strength, rng):
    """A motion blur of the face only."""
    length = max(1, round(0.55 * strength * between_eyes(landmarks)))
    kernel = np.zeros((2 * length + 1,) * 2, np.float32)
    angle = rng.uniform(0, np.pi)
    for step in np.linspace(-length / 2, length / 2, 4 * length + 1):
        kernel[round(length + step * np.sin(angle)), round(length + step * np.cos(angle))] = 1
    return blend(image, cv2.filter2D(image, -1, kernel / kernel.sum()), face_weight(image, landmarks))


def patches(image, landmarks, strength, rng):
    """Small squares of the face change places."""
    unit, result = between_eyes(landmarks), image.copy()
    side, (cx, cy) = max(2, round(0.28 * unit)), landmarks.mean(axis=0)
    corners = [
        (
            int(np.clip(cx + dx * unit - side / 2, 0, image.shape[1] - side)),
            int(np.clip(cy + dy * unit - side / 2, 0, image.shape[0] - side)),
        )
        for dx, dy in rng.uniform(-0.85, 0.85, (round(8 * strength) + 1, 2))
    ]
    for (x0, y0), (x1, y1) in zip(corners, corners[1:], strict=False):
        result[y0 : y0 + side, x0 : x0 + side] = image[y1 : y1 + side, x1 : x1 + side]
    return result


def slices(image, landmarks, strength, rng):
    """Bands of the face slide sideways, with hard edges."""
    unit, (rows, _) = between_eyes(landmarks), grid(image)
    height, side = max(2.0, 0.3 * unit), rng.choice([-1, 1], 64)
    slide = 0.3 * strength * unit * side[(rows / height).astype(int) % 64]
    return displace(image, slide * (face_weight(image, landmarks) > 0.3), np.zeros_like(rows))


def sharpen(image, landmarks, strength, rng):
    """Edges with halos: what is sharper than the face is not better."""
    soft = cv2.GaussianBlur(image, (0, 0), 0.02 + 0.08 * between_eyes(landmarks)).astype(np.float32)
    return clip(image + 3 * strength * (image - soft))


def nose_shift(image, landmarks, strength, rng):
    return shift_feature(image, landmarks, landmarks[2], 0.4, strength, rng)


def stretch(image, landmarks, strength, rng):
    """One feature grows or shrinks."""
    rows, columns = grid(image)
    dx, dy = (axis - center for axis, center in zip((columns, rows), landmarks[rng.integers(5)], strict=True))
    factor = np.exp(rng.choice([-1, 1]) * 0.7 * strength)
    weight = (factor - 1) * np.exp(-(dx**2 + dy**2) / (0.35 * between_eyes(landmarks)) ** 2)
    return displace(image, weight * dx, weight * dy)


def shear(image, landmarks, strength, rng):
    """The face breaks along a line, and its halves slide along each other."""
    unit, angle = between_eyes(landmarks), rng.uniform(0, np.pi)
    cx, cy = landmarks.mean(axis=0) + rng.uniform(-0.3, 0.3, 2) * unit
    rows, columns = grid(image)
    along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    side = np.tanh(((columns - cx) * across[0] + (rows - cy) * across[1]) / (0.08 * unit))
    slide = 0.16 * strength * unit * side * face_weight(image, landmarks)
    return displace(image, along[0] * slide, along[1] * slide)


DAMAGES: dict[str, Callable] = {
    function.__name__: function
    for function in (blur, noise, jpeg, downsample, ghost, warp, swirl, eye_shift, mouth_shift, erase, smear, patches)
}
# More ways, for the pretraining only: the figures are about the twelve above.
TRAINING_ONLY: dict[str, Callable] = {
    function.__name__: function for function in (nose_shift, stretch, shear, slices, sharpen)
}
UNSEEN = ("ghost", "swirl", "mouth_shift", "patches")  # held out from the pretraining
PHOTOMETRIC = ("blur", "noise", "jpeg", "downsample", "sharpen")


def shift_feature(image, landmarks, center, radius, strength, rng):
    """Move the surroundings of a point by up to a third of the distance between the eyes."""
    unit, angle = between_eyes(landmarks), rng.uniform(0, 2 * np.pi)
    rows, columns = grid(image)
    distance = np.hypot(columns - center[0], rows - center[1]) / (radius * unit)
    weight = 0.34 * strength * unit * np.clip(1.6 * (1 - distance), 0, 1)
    return displace(image, np.cos(angle) * weight, np.sin(angle) * weight)


def face_weight(image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """(H, W) float32: 1 in the middle of the face, 0 outside of it."""
    unit, (cx, cy) = between_eyes(landmarks), landmarks.mean(axis=0)
    rows, columns = grid(image)
    distance = np.hypot((columns - cx) / 1.25, (rows - cy) / 1.5) / unit
    return np.clip(2.5 * (1 - distance), 0, 1).astype(np.float32)


def grid(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.mgrid[: image.shape[0], : image.shape[1]].astype(np.float32))


def displace(image: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    rows, columns = grid(image)
    maps = ((columns + dx).astype(np.float32), (rows + dy).astype(np.float32))
    return cv2.remap(image, *maps, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)


def move(image: np.ndarray, dx: float, dy: float) -> np.ndarray:
    return displace(image, np.full(image.shape[:2], dx, np.float32), np.full(image.shape[:2], dy, np.float32))


def blend(image: np.ndarray, other: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return clip(image + weight[..., None] * (other.astype(np.float32) - image))


def clip(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)
