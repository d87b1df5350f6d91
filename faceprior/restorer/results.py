"""What a restored photograph says of itself."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from faceprior.detect import Face
from faceprior.images import SourceImage


@dataclass(frozen=True)
class RestoredFace:
    """One face: where it is in the photograph, and its aligned crop before and after."""

    face: Face
    before: Image.Image
    after: Image.Image


@dataclass(frozen=True)
class LeftFace:
    """A face that was left unchanged, and why."""

    face: Face
    reason: str


@dataclass(frozen=True)
class RestoredImage:
    """A restored photograph (RGB, or RGBA if it has transparency; the size of the input) and its faces, largest first.

    left: the faces that could not be restored. source: the photograph, with what else its file holds.
    """

    image: Image.Image
    faces: list[RestoredFace]
    left: list[LeftFace]
    source: SourceImage
