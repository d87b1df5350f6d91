"""What a restored photograph says of itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import Image

from faceprior.detect import Face
from faceprior.images import SourceImage


@dataclass(frozen=True)
class FaceResult:
    """One face of a photograph: where it is, what was done with it, and why.

    action: `restored` or `left`, as it was in the photograph. reason: why it was left, in words; empty for a restored
    face. before, after: its aligned crops at the model's resolution; `before` is None where the face could not be
    aligned, `after` where it was not sampled; a crop that was sampled and not pasted is there. score_before,
    score_after: Face Score of the crops, where a scorer was given. identity_distance: how far the person in `after` is
    from the one in `before`, where an identity model was given and both could be compared.
    """

    face: Face
    action: str
    reason: str = ""
    before: Image.Image | None = None
    after: Image.Image | None = None
    score_before: float | None = None
    score_after: float | None = None
    identity_distance: float | None = None


@dataclass(frozen=True)
class RestoredImage:
    """A restored photograph (RGB, or RGBA if it has transparency) and all its faces, largest first.

    source: the photograph, with what else its file holds. timings: seconds per phase, `read` (but of what
    `read_source` had read), `detect`, `align`, `restore`, `paste` and, where they were asked for, `score` and
    `identity`; of a batch that several photographs shared each has its faces' part.
    """

    image: Image.Image
    faces: list[FaceResult]
    source: SourceImage
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def restored(self) -> list[FaceResult]:
        return [face for face in self.faces if face.action == "restored"]

    @property
    def left(self) -> list[FaceResult]:
        return [face for face in self.faces if face.action == "left"]
