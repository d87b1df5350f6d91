"""Two judges of a face's shape that scorer and tuning do not know: its proportions, and two finders of landmarks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from checkpoints.tiny_models.bench import Bench, best_face
from checkpoints.tiny_models.table import Missing
from faceprior import tiny
from faceprior.detect import Face
from faceprior.metrics import landmark_error

RIDGE = 1e-3  # of the distance between the eyes, squared is added to every variance: pixels are no finer


@dataclass(frozen=True)
class Proportions:
    """How nose and mouth lie to the eyes on drawn people: mean (6,) and covariance (6, 6) in the eyes' frame."""

    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, landmarks: Sequence[np.ndarray]) -> "Proportions":
        """Measure the proportions of faces (5, 2) each."""
        if len(landmarks) < 8:
            raise Missing(f"proportions of {len(landmarks)} faces give no distribution, 8 are needed")
        shapes = np.stack([eye_frame(points) for points in landmarks])
        return cls(shapes.mean(axis=0), np.cov(shapes, rowvar=False) + RIDGE**2 * np.eye(6))

    def distance(self, landmarks: np.ndarray) -> float:
        """Return Mahalanobis' distance of a face (5, 2) from drawn people's, 0 for the mean face."""
        offset = eye_frame(landmarks) - self.mean
        return float(np.sqrt(offset @ np.linalg.solve(self.covariance, offset)))


def eye_frame(landmarks: np.ndarray) -> np.ndarray:
    """Return nose and mouth corners, (6,), in the frame whose unit leads from the left eye to the right one.

    The origin is between the eyes; place, size and roll of the face are gone.
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


def told_residuals(bench: Bench, images: list[Image.Image], faces: list[Face]) -> list[float]:
    """Return how far the feature network's landmarks lie from MTCNN's, as a share of the distance between the eyes.

    Two networks of different making agree on a whole face; on a melted one each guesses for itself.
    """
    if not images:
        return []
    shares = bench.features.landmark_shares(bench.outputs(images)).numpy()
    pairs = zip(shares * tiny.RESOLUTION, faces, strict=True)
    return [landmark_error(told, face.landmarks) for told, face in pairs]
