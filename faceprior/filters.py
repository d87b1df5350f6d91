"""What makes a photograph, a face or a pair unfit for training, each rule a measured number (Face Score, 4.4 and 8.4).

The paper says that "several rounds of filtering" remove small, blurry and invalid faces, not how. Here every filter has
a name, under which stage 01 counts what it rejects, and a limit in that stage's settings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from PIL import Image

from faceprior.detect import Face
from faceprior.jsonl import KeyedRows
from faceprior.photos import Photograph, pair_id
from faceprior.quality import NearDuplicates, sharpness

FILTERS = {  # the rounds, in the order in which they run
    "photographs": ("unreadable", "small_photograph", "no_face", "near_duplicate"),
    "faces": ("too_small", "low_confidence", "blurry"),
    "pairs": ("changed_outside", "indistinguishable", "face_not_found", "face_lost"),
}


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
