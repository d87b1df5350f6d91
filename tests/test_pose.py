"""The pose from five landmarks: of the mean head itself, under a camera, and of drawn heads of known pose."""

import numpy as np
import pytest

from faceprior.detect import detect_faces
from faceprior.pose import MEAN_HEAD, head_pose
from faceprior.procedural import VALIDATION_SEEDS, draw_portrait
from faceprior.procedural.tracing import rotation


def seen(yaw=0.0, pitch=0.0, roll=0.0, scale=1.7, shift=(40, -25)):
    """The mean head, turned as a drawn head is, under scaled orthographic projection, (5, 2) in pixels."""
    turned = MEAN_HEAD @ rotation(yaw, -pitch, -roll).T.astype(float)
    return scale * turned[:, :2] * (1, -1) + shift


@pytest.mark.parametrize("angles", [(0, 0, 0), (30, 0, 0), (-50, 10, 0), (0, -25, 0), (20, 15, -30), (-10, 5, 80)])
def test_the_mean_head_gets_its_own_pose_back(angles):
    pose = head_pose(seen(*angles))
    assert (pose.yaw, pose.pitch, pose.roll) == pytest.approx(angles, abs=0.05) and pose.misfit < 1e-3


def test_a_mirrored_face_turns_the_other_way_and_a_turned_image_adds_to_the_roll():
    points = seen(25, 8, 5) + np.random.default_rng(0).normal(0, 2, (5, 2))
    pose = head_pose(points)
    mirrored = head_pose((points * (-1, 1))[[1, 0, 2, 4, 3]])
    assert (mirrored.yaw, mirrored.pitch, mirrored.roll) == pytest.approx((-pose.yaw, pose.pitch, -pose.roll), abs=0.2)
    turned = head_pose(points @ rotation(0, 0, 40)[:2, :2].T)  # in an image, y down, by 40 degrees clockwise
    assert (turned.yaw, turned.pitch, turned.roll) == pytest.approx((pose.yaw, pose.pitch, pose.roll + 40), abs=0.2)


def test_landmarks_of_no_face():
    """A nose beside the face misfits; sides or eyes and mouth exchanged are a head seen from behind."""
    points = seen()
    nose_beside = points.copy()
    nose_beside[2] += (150, 0)
    assert head_pose(nose_beside).misfit > 0.2
    assert abs(head_pose(points[[1, 0, 2, 4, 3]]).pitch) > 90
    assert abs(head_pose(points[[3, 4, 2, 0, 1]]).pitch) > 90


@pytest.mark.parametrize("landmarks", [np.zeros((4, 2)), np.full((5, 2), np.nan), np.ones((5, 2))])
def test_landmarks_that_are_none(landmarks):
    with pytest.raises(ValueError, match="`landmarks`"):
        head_pose(landmarks)


@pytest.mark.slow
def test_the_error_on_drawn_heads_is_the_documented_one():
    """Of MTCNN's landmarks: about 4 degrees in yaw, 5 in pitch, 3 in roll up to a yaw of 45; far turns look smaller."""
    rng, near, far = np.random.default_rng(0), [], []
    for index in range(80):
        yaw = float(rng.uniform(-80, 80) if index % 2 else rng.uniform(-40, 40))
        pitch, roll = float(rng.uniform(-24, 24)), float(rng.uniform(-25, 25))
        drawing = draw_portrait(VALIDATION_SEEDS + 3000 + index, 256, yaw=yaw, pitch=pitch, roll=roll)
        faces = [face for face in detect_faces(drawing.image, "mtcnn", 0.5) if face.landmarks is not None]
        if faces:
            pose = head_pose(faces[0].landmarks)
            (near if abs(yaw) <= 45 else far).append((pose.yaw - yaw, pose.pitch - pitch, pose.roll - roll))
    assert len(near) >= 50
    error = np.abs(near).mean(axis=0)
    assert error[0] < 5 and error[1] < 7 and error[2] < 4
    assert 5 < np.abs(far)[:, 0].mean() < 25
