"""Gates for portraits: what a photographer would reject, each as one measured number with one limit.

    measured = measure_photograph(photograph, resolution=1024)       # numbers, face, aligned crop
    find_faults(measured.values, limits)                             # all that is wrong; nothing: a portrait

The paper (AuthFace, 3.1 and appendix A) drops photographs without a face or with a small one, and looks, by an image
quality assessment and by eye, for pepper noise and over-smooth skin; JPEG blocks, blur and noise are what it finds
wrong with other datasets. GATES holds these and what else makes an aligned portrait useless, as data that stage 3, the
report and `checkpoints.tiny_models.curation` share. The numbers of a photograph are stored, so that another limit needs
no second look at the photograph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from faceprior.align import AlignmentError, align_face, alignment_quad
from faceprior.balance import typology_angle
from faceprior.detect import Face, detect_faces
from faceprior.images import cv2
from faceprior.pose import head_pose
from faceprior.quality import blockiness, finest_octave, noise_level, perceptual_hash

NO_DUPLICATE = 64  # bits by which a photograph differs from none before it


@dataclass(frozen=True)
class Gate:
    """One reason to reject a photograph.

    fault: in words; measure: key of the measured numbers; limit: the setting of stage 3 with the limit; keeps: the side
    of the limit that is kept, of the number's size without its sign; meaning: of the number, with its unit.
    """

    fault: str
    measure: str
    limit: str
    keeps: Literal["at least", "at most", "more than"]
    meaning: str

    def passes(self, value: float, limit: float) -> bool:
        return {"at least": abs(value) >= limit, "at most": abs(value) <= limit, "more than": abs(value) > limit}[
            self.keeps
        ]


# In the order in which a photographer looks; what has no face has no numbers of one.
GATES = (
    Gate("small photograph", "side", "min_side", "at least", "shorter side of the photograph, pixels"),
    Gate("no face found", "confidence", "min_confidence", "at least", "detector's confidence of the main face"),
    Gate("small face", "face_size", "min_face_size", "at least", "shorter side of the face's box, pixels"),
    Gate("two main faces", "second_face", "max_second_face", "at most", "side of the second largest face / largest"),
    Gate("landmarks of no face", "misfit", "max_misfit", "at most", "distance from a mean head's, eye distances"),
    Gate("turned away", "yaw", "max_yaw", "at most", "turn to a side, degrees"),
    Gate("tilted up or down", "pitch", "max_pitch", "at most", "tilt up or down, degrees"),
    Gate("tilted sideways", "roll", "max_roll", "at most", "tilt to a side, degrees"),
    Gate("cut off", "outside", "max_outside", "at most", "fraction of the crop outside of the photograph"),
    Gate("eyes not seen", "eyes", "min_eyes", "at least", "contrast across the weaker eye / cheeks' brightness"),
    Gate("mouth not seen", "mouth", "min_mouth", "at least", "contrast down the mouth / cheeks' brightness"),
    Gate("pepper noise", "pepper", "max_pepper", "at most", "fraction of outlying pixels"),
    Gate("noisy", "noise", "max_noise", "at most", "standard deviation of the noise, grey levels"),
    Gate("JPEG blocks", "blocks", "max_blocks", "at most", "steps across 8 x 8 borders / other steps"),
    Gate("blurred", "sharpness", "min_laplacian", "at least", "deviation of the Laplacian at 256 px, grey levels"),
    Gate("enlarged", "detail", "min_detail", "at least", "finest octave of the crop / the one below"),
    Gate("over-smooth", "smoothest", "min_texture", "at least", "detail of the cheeks' smoothest fifth, grey levels"),
    Gate("underexposed", "highlights", "min_highlights", "at least", "95th percentile of the face, grey levels"),
    Gate("overexposed", "blown", "max_blown", "at most", "fraction of the face without drawing in two channels"),
    Gate(
        "near-duplicate",
        "duplicate",
        "max_hash_distance",
        "more than",
        "bits unlike the nearest earlier portrait's, of 64",
    ),
    Gate("no caption beside it", "beside", "min_beside", "at least", "tags beside the photograph"),
    Gate("low quality", "model_quality", "min_quality", "at least", "learned quality of the crop"),
)
LIMITS = frozenset(gate.limit for gate in GATES)


@dataclass(frozen=True)
class Fault:
    """A gate that a photograph does not pass; as text, the number's name and value, the fault and the limit."""

    gate: Gate
    value: float
    limit: float

    def __str__(self) -> str:
        return f"{self.gate.measure} {self.value:g} ({self.gate.fault}: {self.gate.keeps} {self.limit})"


def find_faults(values: Mapping[str, float], limits: Any) -> list[Fault]:
    """Return all that is wrong with a photograph, in the order of GATES; empty for a portrait.

    values: measured numbers; those that are missing are not judged. limits: an object with the gates' limits as
    attributes, as stage 3's Config.
    """
    judged = [(gate, values[gate.measure], getattr(limits, gate.limit)) for gate in GATES if gate.measure in values]
    return [Fault(gate, value, limit) for gate, value, limit in judged if not gate.passes(value, limit)]


# ---- Measuring

ANALYSIS_SIZE = 256  # side in pixels of the aligned crops on which features, sharpness and texture are measured
OWN_SIDE = 1024  # pixels; of a larger face the middle is measured, so that the memory does not grow with the photograph
SMALLEST_FACE = 0.01  # of the photograph's longer side; smaller ones would take twice the memory to find
NO_LANDMARKS = 2.0  # the misfit of a face whose landmarks do not fit its box: above every limit


@dataclass(frozen=True)
class Measured:
    """What was measured of a photograph, its main face, and that face's aligned crop; None without such a face.

    values: `side`, `confidence`, and with a face `face_size`, `second_face` and the numbers of `measure_face`; a face
    whose landmarks span no face has a `misfit` of NO_LANDMARKS and no other number. hash: of the whole photograph, see
    `quality.perceptual_hash`.
    """

    values: dict[str, float]
    hash: int
    face: Face | None = None
    crop: Image.Image | None = None


def measure_photograph(
    photograph: Image.Image,
    resolution: int = 512,
    detector: str | Callable[[np.ndarray], list[Face]] = "auto",
    min_confidence: float = 0.9,
    min_face_size: float = 20,
) -> Measured:
    """Find the main face of an RGB photograph, align it to `resolution` pixels and measure all that GATES judge.

    The main face is the largest one with landmarks among those of `min_confidence`; min_face_size: pixels; smaller
    faces in the background do not count, nor do those below 1% of the photograph's longer side. Beside the decoded
    photograph the memory is that of the search at 2048 pixels, of parts of at most 1024 pixels, and of a few crops.
    """
    values, own_hash = {"side": min(photograph.size)}, perceptual_hash(photograph)
    searched = max(min_face_size, SMALLEST_FACE * max(photograph.size))
    found = detect_faces(photograph, detector, 0, searched, turned=True)
    faces = [face for face in found if face.confidence >= min_confidence]
    face = next((face for face in faces if face.landmarks is not None), faces[0] if faces else None)
    if face is None:
        highest = max((face.confidence for face in found), default=0.0)
        return Measured({**values, "confidence": math.floor(highest * 1e4) / 1e4}, own_hash)  # stays below the limit

    size = min(face.width, face.height)
    others = [min(other.width, other.height) / size for other in faces if other is not face]
    values |= {"confidence": face.confidence, "face_size": size, "second_face": max(others, default=0.0)}
    crop = None
    try:
        if face.landmarks is None:
            raise AlignmentError("its landmarks do not fit its box")
        crop = align_face(photograph, face.landmarks, resolution).crop
        values |= measure_face(photograph, face, crop)
    except AlignmentError:
        values["misfit"] = NO_LANDMARKS
    return Measured({name: round(value, 4) for name, value in values.items()}, own_hash, face, crop)


def measure_face(photograph: Image.Image, face: Face, crop: Image.Image) -> dict[str, float]:
    """Measure a face that has landmarks. crop: the face aligned at the size at which it will be used.

    From the landmarks: yaw, pitch, roll (degrees, roll from the nearest quarter turn of the photograph) and misfit, see
    `pose.head_pose`; outside, the fraction of the aligned square that lies outside of the photograph.

    On the photograph's own pixels in the face box: noise, Immerkaer's estimate of the standard deviation of Gaussian
    noise, grey levels; pepper, the fraction of pixels that differ from the median of their 3 x 3 neighbourhood by more
    than 40 grey levels; blocks, the mean step across the borders of 8 x 8 blocks over the mean step elsewhere, 1
    without JPEG.

    On the face aligned at 256 pixels: eyes and mouth, see `_contrast`; sharpness, the standard deviation of the
    Laplacian, grey levels; smoothest, see `_smoothest`, small on over-smooth skin; highlights, the 95th percentile of
    the face, grey levels: dark skin has them, too; blown, the fraction of the face where two of the three channels are
    white; skin, the individual typology angle of the cheeks (`balance.typology_angle`), which no gate judges.

    On `crop`: detail, `quality.finest_octave` of the face, near 0 where it was enlarged to this size.
    """
    pose = head_pose(face.landmarks)
    own = _gray(photograph.crop(_block_box(face, photograph.size)))
    aligned = align_face(photograph, face.landmarks, ANALYSIS_SIZE)
    gray, rgb = _gray(aligned.crop), np.asarray(aligned.crop)
    landmarks = face.landmarks @ aligned.matrix[:, :2].T + aligned.matrix[:, 2]
    values = {
        "yaw": pose.yaw,
        "pitch": pose.pitch,
        "roll": (pose.roll + 45) % 90 - 45,
        "misfit": pose.misfit,
        "outside": _fraction_outside(photograph.size, face.landmarks),
        **_contrast(gray, landmarks),
        "noise": noise_level(own),
        "pepper": (np.abs(own - cv2.medianBlur(own, 3)) > 40).mean(),
        "blocks": blockiness(own),
        "sharpness": cv2.Laplacian(gray, cv2.CV_32F).std(),
        "smoothest": _smoothest(gray),
        "detail": finest_octave(_inner(_gray(crop))),
        "highlights": np.quantile(_inner(gray), 0.95),
        "blown": (np.sort(_inner(rgb), axis=2)[..., 1] >= 250).mean(),
        "skin": typology_angle(np.concatenate([patch.reshape(-1, 3) for patch in _cheeks(rgb, landmarks)])),
    }
    return {name: float(value) for name, value in values.items()}


CHEEKS = np.s_[128:180, 64:192]  # rows and columns of a crop of ANALYSIS_SIZE, with the nose between them


def _smoothest(gray: np.ndarray, side: int = 4) -> float:
    """The detail below 1 pixel of the smoothest fifth of the cheeks, grey levels: real skin has some everywhere.

    What smooths skin leaves its strongest edges, and hair, glasses and beard: they dominate the mean, and often the
    median. So the detail is the root mean square in each of the blocks of side x side pixels, of which the quantile 0.2
    counts. gray: crop of ANALYSIS_SIZE.
    """
    detail = np.square(gray - cv2.GaussianBlur(gray, (0, 0), 1.0))[CHEEKS]
    rows, columns = (length // side for length in detail.shape)
    blocks = detail.reshape(rows, side, columns, side).mean(axis=(1, 3))
    return float(np.sqrt(np.quantile(blocks, 0.2)))


def _inner(pixels: np.ndarray) -> np.ndarray:
    """The part of an aligned crop (S, S[, C]) that shows the face from brows to lower lip, without hair."""
    side = len(pixels)
    return pixels[round(0.28 * side) : round(0.81 * side), round(0.28 * side) : round(0.72 * side)]


def _contrast(gray: np.ndarray, landmarks: np.ndarray) -> dict[str, float]:
    """How much eyes and mouth stand out, over the median brightness of the cheeks; about 0 behind a hand or a mask.

    The iris is darker than what lies beside it, and the line between the lips than what lies above and below: the range
    of the mean over an eye's rows, of the weaker eye, and of that over the mouth's columns, without their linear trend.
    So the straight edge of what covers an eye does not count. What has folds or a pattern of its own is not told from
    an eye or a mouth: of 12 surgical masks laid over photographs 4 were found. gray: crop of ANALYSIS_SIZE; landmarks:
    (5, 2) in it.
    """
    eyes = float(np.hypot(*(landmarks[1] - landmarks[0])))
    down = float(np.hypot(*(landmarks[3:].mean(axis=0) - landmarks[:2].mean(axis=0))))
    unit = max(eyes, 0.9 * down)  # in profile the eyes are near each other
    skin = float(np.median(gray[CHEEKS])) + 8
    ranges = [_profile_range(_patch(gray, eye, 0.22 * eyes, 0.11 * eyes).mean(axis=0)) for eye in landmarks[:2]]
    mouth = _profile_range(_patch(gray, landmarks[3:].mean(axis=0), 0.2 * eyes, 0.16 * unit).mean(axis=1))
    return {"eyes": min(ranges) / skin, "mouth": mouth / skin}


def _cheeks(rgb: np.ndarray, landmarks: np.ndarray) -> list[np.ndarray]:
    """Both cheeks, (h, w, 3) each: halfway between the eye and the corner of the mouth, where no beard grows."""
    side = 0.12 * float(np.hypot(*(landmarks[1] - landmarks[0])))
    return [_patch(rgb, 0.55 * landmarks[eye] + 0.45 * landmarks[eye + 3], side, side) for eye in (0, 1)]


def _patch(pixels: np.ndarray, centre: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    """The pixels around a point (x, y), one at least, in an image (H, W[, C])."""
    height, width = pixels.shape[:2]
    x0, x1 = (int(np.clip(round(centre[0] + s * half_width), 0, width - 1)) for s in (-1, 1))
    y0, y1 = (int(np.clip(round(centre[1] + s * half_height), 0, height - 1)) for s in (-1, 1))
    return pixels[y0 : y1 + 1, x0 : x1 + 1]


def _profile_range(profile: np.ndarray) -> float:
    """The range of a profile (N,) around its line of least squares; 0 for fewer than 3 values."""
    if len(profile) < 3:
        return 0.0
    place = np.arange(len(profile))
    return float(np.ptp(profile - np.polyval(np.polyfit(place, profile, 1), place)))


def _fraction_outside(size: tuple[int, int], landmarks: np.ndarray, steps: int = 64) -> float:
    """The fraction of the aligned square that lies outside of a (width, height) photograph, on steps x steps points."""
    quad = alignment_quad(landmarks) + 0.5  # (4, 2) edges: top left, bottom left, bottom right, top right
    places = (np.arange(steps) + 0.5) / steps
    right, down = quad[3] - quad[0], quad[1] - quad[0]
    points = quad[0] + places[:, None, None] * right + places[None, :, None] * down  # (steps, steps, 2)
    return float(((points < 0) | (points > size)).any(axis=2).mean())


def _block_box(face: Face, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The face box inside of the image, on the grid of 8 x 8 blocks: two blocks wide at least, OWN_SIDE at most."""
    box = []
    for start, end, side in zip(face.box[:2], face.box[2:], size, strict=True):
        if end - start > OWN_SIDE:
            start, end = (start + end - OWN_SIDE) / 2, (start + end + OWN_SIDE) / 2
        low = max(min(int(start), side - 16), 0) // 8 * 8
        box.append((low, min(max(int(end), low + 16), side)))
    (x0, x1), (y0, y1) = box
    return x0, y0, x1, y1


def _gray(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"), np.float32)
