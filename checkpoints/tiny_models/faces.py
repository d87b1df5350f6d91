"""Judges of a face that scorer and tuning do not know: MTCNN's confidence, its proportions, two sets of landmarks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from checkpoints.tiny_models.bench import Bench
from faceprior import tiny
from faceprior.detect import Face, detect_faces
from faceprior.metrics import MetricUnavailable, landmark_error

SEEN = 0.7  # the lowest confidence that MTCNN reports at all
FOUND = 0.9  # confidence from which a face counts as found
RIDGE = 1e-3  # its square is added to every variance, in units of the distance between the eyes: pixels are no finer


def best_face(image: Image.Image) -> Face | None:
    """Return the face that MTCNN is most confident of, None where it finds none."""
    faces = detect_faces(image, "mtcnn", SEEN, min_face_size=20)
    return max(faces, key=lambda face: face.confidence, default=None)


def confidence_of(face: Face | None) -> float:
    """Return MTCNN's confidence, 0 where it finds no face."""
    return 0.0 if face is None else face.confidence


@dataclass(frozen=True)
class Proportions:
    """Where nose and mouth of drawn people are relative to the eyes: mean (6,) and covariance (6, 6) in their frame."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, landmarks: Sequence[np.ndarray]) -> "Proportions":
        """Measure the proportions of landmarks, (5, 2) for each face. Raises MetricUnavailable for fewer than 8."""
        if len(landmarks) < 8:
            raise MetricUnavailable(f"{len(landmarks)} usable faces are too few for proportions, 8 are needed")
        shapes = np.stack([eye_frame(points) for points in landmarks])
        return cls(shapes.mean(axis=0), np.cov(shapes, rowvar=False) + RIDGE**2 * np.eye(6))

    def distance(self, landmarks: np.ndarray) -> float:
        """Return the Mahalanobis distance of landmarks (5, 2) from those of drawn people, 0 for the mean face."""
        offset = eye_frame(landmarks) - self.mean
        return float(np.sqrt(offset @ np.linalg.solve(self.covariance, offset)))


def eye_frame(landmarks: np.ndarray) -> np.ndarray:
    """Return nose and mouth corners, (6,), in the frame whose x unit leads from the left eye to the right eye.

    The origin is between the eyes, so that position, size and roll of the face do not count.
    """
    points = np.asarray(landmarks, np.float64)
    middle, (dx, dy) = points[:2].mean(axis=0), points[1] - points[0]
    unit = dx**2 + dy**2
    if not unit > 0:
        raise ValueError("the landmarks have both eyes on one point")
    x, y = (points[2:] - middle).T
    return np.stack([(x * dx + y * dy) / unit, (y * dx - x * dy) / unit], axis=1).ravel()


def drawn_proportions(bench: Bench) -> Proportions:
    """Return the proportions of drawn test portraits, as MTCNN sees them."""
    drawings = bench.portraits(bench.config.num_portraits)
    faces = [best_face(Image.fromarray(drawing.image)) for drawing in drawings]
    return Proportions.of([face.landmarks for face in faces if face is not None])


def landmark_residuals(bench: Bench, images: list[Image.Image], faces: list[Face]) -> list[float]:
    """Return how far the feature network's landmarks lie from MTCNN's, as a fraction of the distance between the eyes.

    Two independent networks agree on an intact face; on a distorted one each guesses for itself.
    """
    if not images:
        return []
    predicted = tiny.RESOLUTION * bench.features.landmark_fractions(bench.outputs(images)).numpy()  # (B, 5, 2) pixels
    return [landmark_error(points, face.landmarks) for points, face in zip(predicted, faces, strict=True)]
