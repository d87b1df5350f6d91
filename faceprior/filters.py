"""What makes a photograph, a face or a pair unfit for training, each rule a measured number (Face Score, 4.4 and 8.4).

The paper says that "several rounds of filtering" remove small, blurry and invalid faces, not how. Here every filter has
a name, under which stage 01 counts what it rejects, and a limit in that stage's settings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from faceprior.detect import Face, detect_faces
from faceprior.images import cv2
from faceprior.manifest import KeyedRows, pair_id
from faceprior.sources import Photograph

FILTERS = {  # the rounds, in the order in which they run
    "photographs": ("unreadable", "small_photograph", "no_face", "near_duplicate"),
    "faces": ("too_small", "low_confidence", "blurry"),
    "pairs": ("changed_outside", "indistinguishable", "face_not_found", "face_lost"),
}
SHARPNESS_SIDE = 64  # pixels, to which larger faces are shrunk before their sharpness is measured
SAME_FACE = 0.3  # intersection over union, above which two boxes show the same face


def rejection(identity: str, photograph: str, name: str, reason: str) -> dict[str, str]:
    """Return the row of `rejected.jsonl`; identity: of the photograph or the pair; name: the filter's."""
    return {"id": identity, "photograph": photograph, "filter": name, "reason": reason}


def forget_mended(sources: Iterable[Photograph], photographs: KeyedRows, rejected: KeyedRows) -> None:
    """Take the rows of files away that could not be read and now can: somebody copied them again."""
    unreadable = (item for item in sources if photographs.get(item.name, {}).get("filter") == "unreadable")
    mended = [item.name for item in unreadable if item.is_readable()]
    photographs.remove(mended)
    rejected.remove(mended)


def keep_photographs(
    found: Iterable[dict[str, Any]], photographs: KeyedRows, pairs: KeyedRows, rejected: KeyedRows, max_distance: int
) -> Iterator[dict[str, Any]]:
    """Write down what was found, and yield the photographs that have a good face and are no near-duplicates.

    found: rows of `photographs.jsonl`; max_distance: see `NearDuplicates`.
    """
    duplicates = NearDuplicates(max_distance)
    used = {pair["photograph"] for pair in pairs.values()}  # they stay, even if a photograph came in before them
    for name in sorted(used):
        duplicates.add(name, int(photographs[name]["hash"], 16))
    for row in found:
        photographs.add(row)
        name, faces = row["photograph"], row["faces"]
        if "filter" in row:
            rejected.add(rejection(name, name, row["filter"], row["reason"]))
        has_good_face = any("filter" not in face for face in faces)
        if has_good_face and name not in used:
            if twin := duplicates.find(int(row["hash"], 16)):
                (photographs.path.parent / row["good"]).unlink(missing_ok=True)  # before the row: that one is trusted
                reason = f"{twin[1]} of 64 bits differ from {twin[0]}"
                rejected.add(rejection(name, name, "near_duplicate", reason))
            if name in rejected:  # also in an earlier run, whatever has become of its twin
                continue
        for index, face in enumerate(faces):
            if "filter" in face:
                rejected.add(rejection(pair_id(name, index), name, face["filter"], face["reason"]))
        if has_good_face:
            duplicates.add(name, int(row["hash"], 16))
            yield row


def count_rounds(rejected: list[dict[str, Any]], photographs: int, faces: int, pairs: int) -> list[dict[str, Any]]:
    """Return per round what came in and how many each filter rejected.

    rejected: rows with the key `filter`; photographs, faces: how many there were; pairs: how many were kept.
    """
    counts = Counter(row["filter"] for row in rejected)
    came = {"photographs": photographs, "faces": faces, "pairs": pairs + sum(counts[name] for name in FILTERS["pairs"])}
    return [{"of": of, "in": came[of], "rejected": {n: counts[n] for n in names}} for of, names in FILTERS.items()]


def judge_face(
    picture: Image.Image, face: Face, min_face_size: float, min_confidence: float, min_sharpness: float
) -> dict[str, Any]:
    """Return the face's row: `Face.to_dict`, its sharpness, and if it fails a filter, that one's name and the reason.

    min_face_size: pixels, of the shorter side of its box; min_sharpness: of `sharpness`.
    """
    size, sharp = min(face.width, face.height), round(sharpness(picture, face.box), 4)
    rules = (
        ("too_small", size >= min_face_size, f"face of {size:.0f} pixels is below {min_face_size}"),
        (
            "low_confidence",
            face.confidence >= min_confidence,
            f"confidence {face.confidence:.3f} is below {min_confidence}",
        ),
        ("blurry", sharp >= min_sharpness, f"sharpness {sharp} is below {min_sharpness}"),
    )
    broken = next(({"filter": name, "reason": reason} for name, kept, reason in rules if not kept), {})
    return face.to_dict() | {"sharpness": sharp} | broken


def sharpness(picture: Image.Image, box: Sequence[float]) -> float:
    """Return the variance of the Laplacian over that of the grey levels in a face's box (xyxy): 0 flat, 20 white noise.

    Larger faces are first shrunk to 64 pixels, so that blur is measured relative to the face; the ratio does not depend
    on contrast. A sharp face has 0.15 to 1; one blurred by a Gaussian of 1%, 2%, 3% of its side about 0.15, 0.045 and
    0.025, drawn or photographed.
    """
    x0, y0, x1, y1 = (round(edge) for edge in box)
    gray = np.asarray(picture.convert("L").crop((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1))), np.float32)
    scale = SHARPNESS_SIDE / max(gray.shape)
    if scale < 1:
        gray = cv2.resize(gray, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return float(cv2.Laplacian(gray, cv2.CV_32F).var() / max(gray.var(), 1.0))


def perceptual_hash(picture: Image.Image) -> int:
    """Return 64 bits that stay nearly the same under resizing and compression (pHash).

    They tell which of the 8 x 8 lowest frequencies (DCT of the picture at 32 x 32, grey) lie above their median.
    """
    gray = np.asarray(picture.convert("L").resize((32, 32), Image.BOX), np.float32)
    frequencies = cv2.dct(gray)[:8, :8].ravel()
    bits = frequencies > np.median(frequencies[1:])  # without the mean brightness
    return int("".join("01"[int(bit)] for bit in bits), 2)


class NearDuplicates:
    """Photographs by their perceptual hash; two are near-duplicates when at most `max_distance` of 64 bits differ."""

    def __init__(self, max_distance: int):
        self.max_distance = max_distance  # below 0: there are none
        self._names: list[str] = []
        self._hashes = np.zeros(0, np.uint64)

    def add(self, name: str, value: int) -> None:
        self._names.append(name)
        self._hashes = np.append(self._hashes, np.uint64(value))

    def find(self, value: int) -> tuple[str, int] | None:
        """Return the first photograph added that is a near-duplicate, and the number of different bits."""
        distances = np.bitwise_count(self._hashes ^ np.uint64(value))
        near = np.flatnonzero(distances.astype(int) <= self.max_distance)
        return (self._names[near[0]], int(distances[near[0]])) if len(near) else None


def finds_face(
    picture: Image.Image, box: Sequence[float], detector: str | Callable[[np.ndarray], list[Face]], min_face_size: float
) -> bool:
    """Tell whether the detector finds, at any confidence, a face where `box` (xyxy) says that there is one."""
    return any(overlap(face.box, box) > SAME_FACE for face in detect_faces(picture, detector, 0, min_face_size))


def overlap(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the intersection over union of two boxes (xyxy), in [0, 1]."""
    width, height = (min(first[i + 2], second[i + 2]) - max(first[i], second[i]) for i in (0, 1))
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return width * height / (sum(areas) - width * height)
