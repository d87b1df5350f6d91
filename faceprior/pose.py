"""The pose of a head from its five landmarks.

A mean head's five points are fitted to them under scaled orthographic projection: the rotation, scale and shift with
the least squared distances. Measured with MTCNN's landmarks on 150 drawn heads of known pose (`tests/test_pose.py`):
the mean absolute error is 4 degrees in yaw, 5 in pitch and 3 in roll up to a yaw of 45 degrees, and 9, 13 and 6 at most
for 95% of the heads. Beyond that yaw is underestimated, by 11 degrees in the mean: a detector that no longer sees an
eye places it as if it did. Pitch is the least certain: a broad smile lifts the corners of the mouth and reads as a head
that looks up by up to 30 degrees more.
"""

from dataclasses import dataclass

import numpy as np

# Left eye, right eye, nose tip, corners of the mouth; mm, x to the image's right, y up, z to the camera. Half of an
# average distance of the pupils; the other points as the mean of the drawn people has them (`procedural.people`), whose
# nose is set back to 28 mm, with which yaw and pitch of drawn heads are the least wrong.
MEAN_HEAD = np.array(
    [[-31.5, 0, 0], [31.5, 0, 0], [0, -39.5, 28], [-24.5, -71.5, 3], [24.5, -71.5, 3]],
    np.float64,
)
_STEPS = 50  # of the fit; it changes by less than 0.01 degrees after 20


@dataclass(frozen=True)
class HeadPose:
    """yaw: degrees, positive where the face looks to the image's right; pitch: positive where it looks up; roll:
    positive where it is tilted clockwise. misfit: root mean square distance of the
    landmarks from the fitted points, in distances between the eyes of the fitted head.
    """

    yaw: float
    pitch: float
    roll: float
    misfit: float


def head_pose(landmarks: np.ndarray) -> HeadPose:
    """Estimate the pose of a face from landmarks (5, 2), pixels, in the order of `detect.LANDMARK_NAMES`.

    Raises ValueError for landmarks of another shape, that are not finite, or that lie on one point.
    """
    points = np.asarray(landmarks, np.float64)
    if points.shape != (5, 2) or not np.isfinite(points).all():
        raise ValueError(f"`landmarks` have to be (5, 2) and finite but are {points.tolist()}")
    points = (points - points.mean(axis=0)) * (1, -1)  # (5, 2), y up
    if not np.abs(points).max() > 0:
        raise ValueError("`landmarks` lie on one point")
    head = MEAN_HEAD - MEAN_HEAD.mean(axis=0)

    # ---- start: the affine camera of least squares, made a rotation
    camera = np.linalg.lstsq(head, points, rcond=None)[0].T  # (2, 3)
    left, stretch, right = np.linalg.svd(camera, full_matrices=False)
    rows, scale = left @ right, stretch.mean()
    rotation = np.vstack([rows, np.cross(*rows)])

    # ---- alternate: depths from the rotation, and the best rotation (Procrustes) for points with these depths
    for _ in range(_STEPS):
        solid = np.column_stack([points, scale * head @ rotation[2]])  # (5, 3)
        left, stretch, right = np.linalg.svd(solid.T @ head)
        sign = np.array([1, 1, np.sign(np.linalg.det(left @ right))])
        rotation, scale = (left * sign) @ right, (stretch * sign).sum() / np.square(head).sum()

    yaw = np.arcsin(np.clip(-rotation[2, 0], -1, 1))
    pitch, roll = np.arctan2(-rotation[2, 1], rotation[2, 2]), np.arctan2(-rotation[1, 0], rotation[0, 0])
    errors = points - scale * head @ rotation[:2].T
    misfit = np.sqrt(np.square(errors).sum(axis=1).mean()) / (2 * MEAN_HEAD[1, 0] * max(scale, 1e-9))
    return HeadPose(*(float(np.degrees(angle)) for angle in (yaw, pitch, roll)), float(misfit))
