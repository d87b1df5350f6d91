"""Photographs: faces out of them, in batches through the network, and back into them."""

from __future__ import annotations

import itertools
import logging
import math
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from faceprior.align import AlignedFace, AlignmentError, align_face, alignment_quad, enlarged, face_mask, paste_onto
from faceprior.detect import Face, detect_all_orientations, require_detector
from faceprior.errors import is_out_of_memory
from faceprior.images import ImageSource, SourceImage, read_source
from faceprior.quality import fine_detail
from faceprior.restorer.results import FaceResult, RestoredImage
from faceprior.restorer.settings import require_whole

logger = logging.getLogger(__name__)

MAX_UPSCALE = 4
MAX_WAITING = 64_000_000  # pixels of the photographs whose faces wait for a full batch
MAX_PHOTOGRAPHS = 64  # of any size that wait, also without a face, behind one whose face waits
# Of `fine_detail`: a face that has as much is sharper than the model. Two portraits have 0.10 to 0.27 in squares 1.2 to
# 2.8 times as large as the resolution, after shrinking to it and enlarging 0.05 at most, 0.04 after a blur of 1 pixel.
SHARP_DETAIL = 0.07


@dataclass(frozen=True)
class PhotographOptions:
    """How the faces of a photograph are found, which of them are pasted back, and onto what.

    The fields are those of `AuthFaceRestorer.restore`, which describes them.
    """

    detector: Any = "auto"
    min_confidence: float = 0.9
    min_face_size: float = 20
    upscale: int = 1
    background: Callable[[Image.Image], Image.Image] | None = None
    keep_sharp: bool = True
    scorer: Any = None
    keep_better: bool | None = None
    min_gain: float = 0.0
    identity: Any = None
    max_drift: float | None = None
    batch_size: int = 4

    def __post_init__(self):
        require_whole("upscale", self.upscale, 1, MAX_UPSCALE)
        require_whole("batch_size", self.batch_size)
        require_detector(self.detector)
        if not 0 <= self.min_confidence <= 1:  # so written that NaN is refused, here and below
            raise ValueError(f"`min_confidence` has to be in [0, 1] but is {self.min_confidence}")
        if not 0 < self.min_face_size < math.inf:
            raise ValueError(f"`min_face_size` has to be above 0 pixels but is {self.min_face_size}")
        if not math.isfinite(self.min_gain):
            raise ValueError(f"`min_gain` has to be a finite number but is {self.min_gain}")
        if self.max_drift is not None and not 0 <= self.max_drift < math.inf:
            raise ValueError(f"`max_drift` has to be a finite number of at least 0 but is {self.max_drift}")
        for name, method in (("scorer", "score_crops"), ("identity", "distance")):
            judge = getattr(self, name)
            if judge is not None and not callable(getattr(judge, method, None)):
                raise TypeError(f"`{name}` has to be an object with `{method}` but is a {type(judge).__name__}")
        if self.background is not None and not callable(self.background):
            kind = type(self.background).__name__
            raise TypeError(f"`background` has to be a function from an image to an image but is {kind}")
        if self.keep_better and self.scorer is None:
            raise ValueError("`keep_better` compares Face Scores: pass a `scorer`, such as a FaceScorer")
        if self.max_drift is not None and self.identity is None:
            raise ValueError("`max_drift` compares identities: pass an `identity`, such as an IdentityModel")

    @property
    def judges_score(self) -> bool:
        return self.scorer is not None if self.keep_better is None else self.keep_better


def restore_photographs(
    images: Iterable[ImageSource | SourceImage],
    faces: Iterable[list[Face] | None] | None,
    restore_crops: Callable[[list[Image.Image]], list[Image.Image]],
    resolution: int,
    options: PhotographOptions,
) -> Iterator[RestoredImage | Exception]:
    """Restore photographs, in their order; one that fails yields its exception.

    faces: for each photograph its known faces, or None to detect them. restore_crops: from aligned square crops of
    `resolution` pixels, at most `options.batch_size`, to the restored ones. Photographs are read when the next result
    is asked for, as many as fill a batch, and at most about MAX_WAITING pixels wait.
    """
    waiting: deque[_Photograph] = deque()  # in the input's order
    pending: deque[tuple[_Photograph, _Work]] = deque()  # their faces that were not sampled yet

    def sample(least: int) -> None:
        while len(pending) >= least:
            batch = [pending.popleft() for _ in range(min(options.batch_size, len(pending)))]
            _restore_batch([entry for entry in batch if entry[0].error is None], restore_crops, options)

    def finished() -> Iterator[RestoredImage | Exception]:
        while waiting and waiting[0].is_done:
            yield waiting.popleft().result(options)

    pairs, failure = _paired(images, faces), None
    while True:
        try:
            image, known = next(pairs)
        except StopIteration:
            break
        except Exception as error:  # the caller's own: what was read before is finished first
            failure = error
            break

        # ---- read; where too many pixels wait, their faces are sampled in a batch that is not full
        photograph = _Photograph.read(image)
        pixels = sum(other.pixels for other in waiting) + photograph.pixels
        if pixels > MAX_WAITING or len(waiting) == MAX_PHOTOGRAPHS:
            sample(1)
            yield from finished()

        # ---- detect and align
        photograph.find_faces(known, resolution, options)
        waiting.append(photograph)
        pending.extend((photograph, work) for work in photograph.works if work.is_pending)
        del image, known, photograph

        # ---- full batches through the network, then back into their photographs
        sample(options.batch_size)
        yield from finished()
    sample(1)
    yield from finished()
    if failure is not None:
        raise failure


def _paired(images: Iterable[Any], faces: Iterable[Any] | None) -> Iterator[tuple[Any, Any]]:
    """Each photograph with its known faces, or None."""
    if faces is None:
        yield from zip(images, itertools.repeat(None))
        return
    end = object()
    for number, (image, known) in enumerate(itertools.zip_longest(images, faces, fillvalue=end)):
        if image is end or known is end:
            more, fewer = ("faces", "images") if image is end else ("images", "faces")
            raise ValueError(
                f"`{more}` has more entries than `{fewer}`, which has {number}: give one for each photograph"
            )
        yield image, known


# ---- one photograph


@dataclass
class _Work:
    """A face on its way: `aligned` once it is cut out, `after` once it is restored, `reason` once it is left."""

    face: Face
    aligned: AlignedFace | None = None
    after: Image.Image | None = None
    reason: str = ""
    score_before: float | None = None
    score_after: float | None = None
    identity_distance: float | None = None

    @property
    def is_pending(self) -> bool:
        return self.after is None and not self.reason

    def result(self) -> FaceResult:
        return FaceResult(
            self.face,
            "left" if self.reason else "restored",
            self.reason,
            self.aligned and self.aligned.crop,
            self.after,
            self.score_before,
            self.score_after,
            self.identity_distance,
        )


@dataclass
class _Photograph:
    """A photograph on its way, or the `error` that ended it."""

    source: SourceImage | None = None
    works: list[_Work] = field(default_factory=list)  # largest face first
    timings: dict[str, float] = field(default_factory=dict)
    error: Exception | None = None

    @classmethod
    def read(cls, image: ImageSource | SourceImage) -> _Photograph:
        photograph = cls()
        if isinstance(image, SourceImage):
            photograph.source = image
            return photograph
        with photograph._phase("read"):
            photograph.source = read_source(image)
        return photograph

    @property
    def pixels(self) -> int:
        return 0 if self.source is None else math.prod(self.source.rgb.size)

    @property
    def is_done(self) -> bool:
        return self.error is not None or not any(work.is_pending for work in self.works)

    def fail(self, error: Exception) -> None:
        """End with an error; its traceback stays, without the pixels in it."""
        traceback.clear_frames(error.__traceback__)
        self.error, self.source, self.works = error, None, []

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Time a phase; its error ends the photograph."""
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            self.fail(error)
        self.add_time(name, time.perf_counter() - start)

    def add_time(self, phase: str, seconds: float) -> None:
        self.timings[phase] = self.timings.get(phase, 0.0) + seconds

    def find_faces(self, known: list[Face] | None, resolution: int, options: PhotographOptions) -> None:
        if self.error is not None:
            return
        with self._phase("detect"):
            if known is None:
                limits = options.min_confidence, options.min_face_size
                known = detect_all_orientations(self.source.rgb, options.detector, *limits)
        if self.error is not None:
            return
        with self._phase("align"):
            for face in sorted(known, key=lambda face: face.area, reverse=True):
                self.works.append(_cut_out(self.source.rgb, face, resolution, options.keep_sharp))

    def result(self, options: PhotographOptions) -> RestoredImage | Exception:
        """Paste the faces back."""
        image = None
        if self.error is None:
            with self._phase("paste"):
                image = self._pasted(options)
        if self.error is not None:
            return self.error
        return RestoredImage(image, [work.result() for work in self.works], self.source, self.timings)

    def _pasted(self, options: PhotographOptions) -> Image.Image:
        restored = [work for work in self.works if not work.reason]
        photograph = _enlarge(self.source.rgb, options.upscale)
        if options.background is not None:
            canvas = _background(options.background, self.source.rgb, photograph.size)
        else:
            canvas = photograph.copy() if restored else photograph
        # the largest face last, so that it lies on top
        for work in reversed(restored):
            _paste_back(canvas, work, self.source.rgb, options.upscale)
        if self.source.rgba is None:
            return canvas
        transparent = replace(self.source, rgb=photograph, rgba=_enlarge(self.source.rgba, options.upscale))
        return transparent.with_pixels(canvas)


def _enlarge(image: Image.Image, factor: int) -> Image.Image:
    return image if factor == 1 else image.resize((image.width * factor, image.height * factor), Image.LANCZOS)


def _background(function: Callable[[Image.Image], Any], photograph: Image.Image, size: tuple[int, int]) -> Image.Image:
    """What the caller's function makes of a copy of the photograph, RGB, at `size` (width, height)."""
    image = function(photograph.copy())
    if not isinstance(image, Image.Image):
        raise TypeError(f"`background` has to return a PIL image but returned {type(image).__name__}")
    if abs(math.log(image.width / image.height * size[1] / size[0])) > 0.02:
        raise ValueError(
            f"`background` has to keep the sides' ratio but made {image.width}x{image.height} of"
            f" {photograph.width}x{photograph.height}"
        )
    image = image.convert("RGB") if image.mode != "RGB" else image
    image = image.resize(size, Image.LANCZOS) if image.size != size else image.copy()
    image.info = dict(photograph.info)
    return image


# ---- one face


def _cut_out(photograph: Image.Image, face: Face, resolution: int, leaves_sharp: bool) -> _Work:
    """Align a face, or name the reason why it is left as it is."""
    try:
        if face.landmarks is None:
            raise AlignmentError("it has no landmarks")
        work = _Work(face, align_face(photograph, face.landmarks, resolution))
    except AlignmentError as error:
        box = ", ".join(f"{edge:.0f}" for edge in face.box)
        logger.warning("the face at (%s) is left unchanged: %s", box, error)
        return _Work(face, reason=str(error))
    side = _side(face)
    if leaves_sharp and side > resolution and _finer_detail(photograph, face, resolution) >= SHARP_DETAIL:
        work.reason = f"it is sharper than the model could draw it: {side:.0f} pixels against {resolution}"
    return work


def _side(face: Face) -> float:
    """The side in the photograph's pixels of the square that is cut out around a face."""
    corner, _, _, right = alignment_quad(face.landmarks)
    return float(np.hypot(*(right - corner)))


def _finer_detail(photograph: Image.Image, face: Face, resolution: int) -> float:
    """The `fine_detail` of a face, in the octave above what a crop of `resolution` pixels holds."""
    side, quad = _side(face), alignment_quad(face.landmarks)
    # the middle of the square, 0.7 of its side: the face without what is around it
    low = np.clip(np.floor(quad.mean(0) - 0.35 * side).astype(int), 0, photograph.size)
    high = np.clip(np.ceil(quad.mean(0) + 0.35 * side).astype(int), 0, photograph.size)
    if (high <= low).any():
        return 0.0
    shrink = max(1, int(side / (2 * resolution)))  # what is finer than that octave does not matter
    part = photograph.reduce(shrink, (*low.tolist(), *high.tolist()))
    return fine_detail(np.asarray(part.convert("L"), np.float32), side / shrink / resolution)


def _paste_back(canvas: Image.Image, work: _Work, photograph: Image.Image, upscale: int) -> None:
    """Paste a restored face; one larger than its crop keeps the photograph's detail that is finer than the crop."""
    matrix = work.aligned.matrix
    landmarks = work.face.landmarks @ matrix[:, :2].T + matrix[:, 2]
    mask = face_mask(landmarks, work.after.width)
    before = work.aligned.crop if _side(work.face) > work.after.width else None
    paste_onto(canvas, work.after, enlarged(matrix, upscale), mask, before, photograph)


# ---- one batch


def _restore_batch(
    entries: Sequence[tuple[_Photograph, _Work]],
    restore_crops: Callable[[list[Image.Image]], list[Image.Image]],
    options: PhotographOptions,
) -> None:
    """Restore and judge faces of one or several photographs; what fails ends the photographs that it belongs to."""
    if not entries:
        return
    try:
        _sample_batch(entries, restore_crops, options)
    except Exception as error:
        if is_out_of_memory(error):
            error = _out_of_memory(len(entries), error)
        elif len(entries) > 1:  # only the face that it was about
            for entry in entries:
                _restore_batch([entry] if entry[0].error is None else [], restore_crops, options)
            return
        for photograph, _ in entries:
            photograph.fail(error)


def _out_of_memory(faces: int, error: Exception) -> torch.OutOfMemoryError:
    """The same error with the way out, and the memory of the failed pass free again."""
    traceback.clear_frames(error.__traceback__)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    cause = next(iter(str(error).splitlines()), type(error).__name__)
    return torch.OutOfMemoryError(
        f"out of memory in a batch of {faces} face{'s' * (faces > 1)} ({cause}): use a smaller `batch_size`, or load"
        " the restorer with `quantization='8bit'` or 'nf4'"
    )


def _sample_batch(
    entries: Sequence[tuple[_Photograph, _Work]],
    restore_crops: Callable[[list[Image.Image]], list[Image.Image]],
    options: PhotographOptions,
) -> None:
    works = [work for _, work in entries]
    before = [work.aligned.crop for work in works]
    with _shared_time(entries, "restore"):
        after = restore_crops(before)
    if options.scorer is not None:
        with _shared_time(entries, "score"):
            scores = _scores(options.scorer, [*before, *after])
        for work, old, new in zip(works, scores[: len(works)], scores[len(works) :], strict=True):
            work.score_before, work.score_after = old, new
    if options.identity is not None:
        with _shared_time(entries, "identity"):
            for work, old, new in zip(works, before, after, strict=True):
                work.identity_distance = options.identity.distance(old, new)
    for work, crop in zip(works, after, strict=True):
        work.reason, work.after = _why_left(work, options), crop


def _scores(scorer: Any, crops: list[Image.Image]) -> list[float]:
    scores = [float(score) for score in scorer.score_crops(crops)]
    if len(scores) != len(crops):
        raise ValueError(f"`scorer` has to return a score for each of {len(crops)} crops but returned {len(scores)}")
    return scores


@contextmanager
def _shared_time(entries: Sequence[tuple[_Photograph, _Work]], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    share = (time.perf_counter() - start) / len(entries)
    for photograph, _ in entries:
        photograph.add_time(phase, share)


def _why_left(work: _Work, options: PhotographOptions) -> str:
    """Why a sampled face is not pasted; empty where it is."""
    old, new = work.score_before, work.score_after
    if options.judges_score and not new - old >= options.min_gain:  # so written that NaN is left, too
        if not (math.isfinite(old) and math.isfinite(new)):
            return "whether its Face Score would rise could not be measured"
        if new < old:
            return f"Face Score would fall from {old:.3f} to {new:.3f}"
        return f"Face Score would rise from {old:.3f} to {new:.3f} only, by less than {options.min_gain:g}"
    if options.max_drift is not None:
        if work.identity_distance is None or not math.isfinite(work.identity_distance):
            return "whether it would still be the same person could not be measured"
        if work.identity_distance > options.max_drift:
            return (
                f"it would become another person: the identity distance would be {work.identity_distance:.2f},"
                f" above {options.max_drift:g}"
            )
    return ""
