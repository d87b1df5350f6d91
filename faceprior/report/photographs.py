"""Photographs below photographs/: the score of every face, and the photograph before and after restoration."""

from pathlib import Path
from typing import Any

from faceprior.files import find_images
from faceprior.report.run import REASON, Run, number
from faceprior.report.summary import format_number

SCORES = "photographs/scores.jsonl"
SCORE_COMMAND = f"faceprior score photographs --json > {SCORES}"
RESTORE_COMMAND = "faceprior restore photographs -o restored"
PHOTOGRAPHS = 6  # most that are shown


# ---- scored


def scored(run: Run) -> dict[str, Any]:
    """Return the photographs with the box and the score of every face."""
    rows = run.rows(SCORES, {"file": str})[:PHOTOGRAPHS]
    cards = [run.attempt(f"{SCORES}: {row['file']}", _scored_photograph, run, row) for row in rows]
    return {"cards": cards, "command": SCORE_COMMAND}


def _scored_photograph(run: Run, row: dict) -> dict[str, Any]:
    name = Path(row["file"]).name
    if "error" in row:
        run.note(f"photographs/{name}", row["error"])
        return {"name": name, "state": run.plain(row["error"], REASON), "image": None, "faces": []}
    faces = _faces(run, row)
    image = run.load("photographs", name)
    count = "no face found" if not faces else f"{len(faces)} face{'s' if len(faces) > 1 else ''}"
    return {
        "name": name,
        "state": count,
        "image": run.embed(image, f"{name}: {count}", 900),
        "boxes": [_box(face, image.width) for face in faces],
        "faces": [_face_row(place, face) for place, face in enumerate(faces, 1)],
    }


def _faces(run: Run, row: dict) -> list[dict]:
    """Return the faces of a photograph whose box is four numbers; any other is noted."""
    faces = []
    for face in row.get("faces") or []:
        try:
            x0, y0, x1, y1 = (round(float(value), 1) for value in face["box"])
            faces.append({**face, "box": (x0, y0, x1, y1)})
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            run.note(f"{SCORES}: {row['file']}", f"a face without a box of four numbers ({error})")
    return faces


def _face_row(place: int, face: dict) -> tuple:
    x0, y0, x1, y1 = face["box"]
    values = [number(face, key) for key in ("score", "percentile", "confidence")]
    texts = ["–" if value is None else format_number(value) for value in values]
    return place, *texts, f"{x1 - x0:.0f}\u202f×\u202f{y1 - y0:.0f}\u202fpx"


def _box(face: dict, width: int) -> dict[str, Any]:
    """Return the rectangle of a face, and its score above it, or below it where the image ends. Pixels."""
    x0, y0, x1, y1 = face["box"]
    size, score = round(width / 20, 1), number(face, "score")
    return {
        "x": x0,
        "y": y0,
        "width": round(x1 - x0, 1),
        "height": round(y1 - y0, 1),
        "score": None if score is None else format_number(score),
        "score_y": round(y0 - size * 0.35 if y0 > size * 1.4 else y1 + size, 1),
        "font_size": size,
    }


# ---- restored


def restored(run: Run) -> dict[str, Any]:
    """Return the photographs, original and restored, with their largest face."""
    try:
        names = [path.name for path in find_images(run.root / "photographs", recursive=False)]
    except (OSError, ValueError):  # no folder, or no image in it
        names = []
    rows: dict[str, Any] = {Path(row["file"]).name: row for row in run.rows(SCORES, {"file": str})} if names else {}
    cards = [
        run.attempt(f"photographs/{name}", _restored_photograph, run, name, rows.get(name, {}))
        for name in names[:PHOTOGRAPHS]
    ]
    return {"cards": cards, "command": RESTORE_COMMAND}


def _restored_photograph(run: Run, name: str, row: dict) -> dict[str, Any]:
    target = f"{Path(name).stem}.png"
    if not (run.root / "restored" / target).is_file():
        return {"name": name, "sides": None}
    sides = {"original": ("photographs", name), "restored": ("restored", target)}
    largest = sorted(_faces(run, row), key=lambda face: face["box"][0] - face["box"][2])[:1]
    return {
        "name": name,
        "sides": {side: run.image(*place, f"{name}, {side}", 900) for side, place in sides.items()},
        "faces": {
            f"largest face, {side}": run.image(*place, f"largest face in {name}, {side}", 300, face["box"])
            for face in largest
            for side, place in sides.items()
        },
    }
