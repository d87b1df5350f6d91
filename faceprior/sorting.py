"""The portraits of stage 3 move between the manifest and the rejected: by other limits, by a person's review, and back.

A row of rejected.jsonl is a row of the manifest, or as much of it as was measured, with `reason`, and `faults` where
gates rejected it. A portrait moves by renaming its files, then adding the row that names them, then removing the other
row: a run that was killed in between is completed by the next one. Images and numbers of portraits are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from faceprior.gates import NO_DUPLICATE, Fault, find_faults
from faceprior.images import load_image, save_image
from faceprior.jsonl import KeyedRows
from faceprior.quality import NearDuplicates

REJECTED = "rejected.jsonl"  # beside the manifest
BY_HAND = "rejected by hand"
THUMBNAIL = 192  # pixels, longer side

Row = dict[str, Any]


# ---- By other limits than those of an earlier run, applied to the numbers that it stored


def words_of(faults: Sequence[Fault], row: Row) -> Row:
    """Return what a row of rejected.jsonl says of the gates that its photograph did not pass.

    row: its `nearest` is the portrait most like it when it was judged, of which it is a copy by this run's limit.
    """
    words = {"faults": [fault.gate.fault for fault in faults], "reason": "; ".join(map(str, faults))}
    is_copy = "nearest" in row and any(fault.gate.measure == "duplicate" for fault in faults)
    return {**words, "duplicate_of": row["nearest"]} if is_copy else words


def judged_otherwise(accepted: KeyedRows, rejected: KeyedRows, limits: Any) -> bool:
    """Whether the limits reject what is accepted, accept what is rejected, or reject it for other reasons.

    limits: an object with the gates' limits as attributes, as stage 3's Config.
    """
    return any(find_faults(row["quality"], limits) for row in accepted.values()) or any(
        words_of(find_faults(row["quality"], limits), row)["reason"] != row["reason"]
        for row in rejected.values()
        if "faults" in row
    )


def judge_again(output: Path, accepted: KeyedRows, rejected: KeyedRows, limits: Any) -> None:
    """Apply the limits to the rows of an earlier run; what is to be decoded again loses its row."""
    # ---- Accepted, and no longer: image and caption are kept
    found = {identity: find_faults(row["quality"], limits) for identity, row in accepted.items()}
    fallen = [identity for identity, faults in found.items() if faults]
    for identity in fallen:
        _reject(output, accepted[identity], rejected, words_of(found[identity], accepted[identity]))
    accepted.remove(fallen)

    # ---- A portrait in whose place a copy had come is none's copy where that one is no portrait now
    lone = [
        {**row, "quality": {**row["quality"], "duplicate": NO_DUPLICATE}}
        for identity, row in rejected.items()
        if "image" in row and "faults" in row and row.get("duplicate_of", identity) not in {identity, *accepted}
    ]
    if lone:
        rejected.replace(_without(row, "duplicate_of", "nearest") for row in lone)

    # ---- Rejected, and no longer: one that was a portrait keeps its image, unless a copy took its place
    passed = [i for i, row in rejected.items() if "faults" in row and not find_faults(row["quality"], limits)]
    portraits = NearDuplicates(limits.max_hash_distance)
    for row in accepted.values():
        _add_hash(portraits, row)
    for identity in [identity for identity in passed if "image" in rejected[identity]]:
        row = rejected[identity]
        copy_of, distance = ("hash" in row and portraits.find(int(row["hash"], 16))) or ("", NO_DUPLICATE)
        if copy_of and identity not in accepted:
            row = {**row, "quality": {**row["quality"], "duplicate": distance}, "nearest": copy_of}
            rejected.replace([{**row, **words_of(find_faults(row["quality"], limits), row)}])
        else:
            accept_again(output, accepted, rejected, [identity])
            _add_hash(portraits, row)

    # ---- What was never a portrait is decoded again, as are copies of what is none now, by its numbers
    lost = {identity for identity, row in rejected.items() if "image" in row and "faults" in row}
    copies = [identity for identity, row in rejected.items() if row.get("duplicate_of") in lost]
    again = [i for i in dict.fromkeys([*passed, *copies]) if i in rejected and "image" not in rejected[i]]
    for identity in again:
        (output / "rejected" / f"{identity}.jpg").unlink(missing_ok=True)
    rejected.remove(again)

    # ---- Still rejected, for other reasons
    words = {i: words_of(find_faults(row["quality"], limits), row) for i, row in rejected.items() if "faults" in row}
    changed = [identity for identity in words if words[identity]["reason"] != rejected[identity]["reason"]]
    if changed:
        rejected.replace({**_without(rejected[i], "duplicate_of"), **words[i]} for i in changed)


def _without(row: Row, *keys: str) -> Row:
    return {key: value for key, value in row.items() if key not in keys}


def _add_hash(portraits: NearDuplicates, row: Row) -> None:
    if "hash" in row:  # rows of older versions have none
        portraits.add(row["id"], int(row["hash"], 16))


# ---- By hand


def hand_reason(reason: str) -> str:
    """Return the `reason` of a row in rejected.jsonl for the reason, maybe empty, that a person gave."""
    return f"{BY_HAND}: {reason}" if reason else BY_HAND


def is_by_hand(row: Row) -> bool:
    """Whether a row of rejected.jsonl is of a portrait that a person rejected."""
    return row["reason"] == BY_HAND or row["reason"].startswith(f"{BY_HAND}: ")


def is_new(review: dict[str, str], accepted: KeyedRows, rejected: KeyedRows) -> bool:
    """Tell whether a review differs from what is done. review: the portraits that it rejects, id -> reason."""
    return bool(accepted.keys() & review or forgiven(rejected, review) or _restated(rejected, review))


def reject_by_hand(output: Path, accepted: KeyedRows, rejected: KeyedRows, review: dict[str, str]) -> None:
    """Move the portraits that a person rejected out of the manifest."""
    if changed := _restated(rejected, review):
        rejected.replace({**rejected[identity], "reason": hand_reason(review[identity])} for identity in changed)
    identities = [identity for identity in accepted if identity in review]
    for identity in identities:
        _reject(output, accepted[identity], rejected, {"reason": hand_reason(review[identity])})
    accepted.remove(identities)


def forgiven(rejected: KeyedRows, review: dict[str, str]) -> list[str]:
    """Return the ids of portraits that were rejected by hand and are no longer in the review."""
    return [identity for identity, row in rejected.items() if is_by_hand(row) and identity not in review]


def _restated(rejected: KeyedRows, review: dict[str, str]) -> list[str]:
    """Return the ids of portraits that were rejected by hand for another reason than that of the review."""
    by_hand = (identity for identity in review if identity in rejected and is_by_hand(rejected[identity]))
    return [identity for identity in by_hand if rejected[identity]["reason"] != hand_reason(review[identity])]


# ---- There and back


def complete_moves(output: Path, accepted: KeyedRows, rejected: KeyedRows) -> None:
    """Put the images where their rows say: a run with other limits or another review was killed while it moved them."""
    for row in {**rejected, **accepted}.values():
        image = Path(row.get("image", ""))
        if "image" not in row or (output / image).exists():
            continue
        elsewhere = "rejected" if image.parent.name == "images" else "images"
        move_portrait(output, f"{elsewhere}/{image.name}", image.parent.name)


def _reject(output: Path, row: Row, rejected: KeyedRows, words: Row) -> None:
    image = move_portrait(output, row["image"], "rejected")
    thumbnail = save_thumbnail(load_image(output / image), output, row["id"])
    rejected.add({**row, "image": image, **thumbnail, **words})


def accept_again(output: Path, accepted: KeyedRows, rejected: KeyedRows, identities: Sequence[str]) -> None:
    """Move portraits that are rejected no longer back into the manifest."""
    for identity in identities:
        row = _without(rejected[identity], "reason", "thumbnail", "faults", "duplicate_of")
        accepted.add({**row, "image": move_portrait(output, row["image"], "images")})
        (output / rejected[identity]["thumbnail"]).unlink(missing_ok=True)
    rejected.remove(identities)


def move_portrait(output: Path, image: str, folder: str) -> str:
    """Move an image and its caption, unless a killed run has done so; return the new path, relative to `output`."""
    target = f"{folder}/{Path(image).name}"
    for suffix in (".txt", ".png"):
        source = (output / image).with_suffix(suffix)
        if source.exists():
            (output / target).parent.mkdir(exist_ok=True)
            source.replace((output / target).with_suffix(suffix))
    return target


def remove_files(output: Path, identity: str) -> None:
    """Remove what earlier runs wrote about a photograph that no row tells of."""
    for file in ("images/{}.png", "images/{}.txt", "rejected/{}.png", "rejected/{}.txt", "rejected/{}.jpg"):
        (output / file.format(identity)).unlink(missing_ok=True)


def save_thumbnail(photograph: Image.Image, output: Path, identity: str) -> dict[str, str]:
    """Write the thumbnail of a rejected photograph and return its entry in the row."""
    scale = min(1, THUMBNAIL / max(photograph.size))  # resized, not copied first: a photograph can be large
    small = photograph.resize([max(1, round(scale * side)) for side in photograph.size], reducing_gap=2.0)
    file = f"rejected/{identity}.jpg"
    save_image(small, output / file)
    return {"thumbnail": file}
