"""Photographs: aligned faces out of them."""

from __future__ import annotations

import logging

from PIL import Image

from faceprior.align import AlignedFace, align_face
from faceprior.detect import Face
from faceprior.restorer.results import LeftFace

logger = logging.getLogger(__name__)


def align_faces(
    photograph: Image.Image, faces: list[Face], size: int
) -> tuple[list[tuple[Face, AlignedFace]], list[LeftFace]]:
    """Align the faces; those that cannot be aligned are named in the log."""
    aligned, left = [], []
    for face in faces:
        try:
            if face.landmarks is None:
                raise ValueError("it has no landmarks")
            aligned.append((face, align_face(photograph, face.landmarks, size)))
        except ValueError as error:
            left.append(LeftFace(face, str(error)))
            box = ", ".join(f"{edge:.0f}" for edge in face.box)
            logger.warning("the face at (%s) is left unchanged: %s", box, error)
    return aligned, left
