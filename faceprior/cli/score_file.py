"""The CSV file of `faceprior score`: written as the scores come, and resumed by the same command."""

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from faceprior.cli.results import ImageScores
from faceprior.files import atomic_write, printable

EDGES = ("x0", "y0", "x1", "y1")
COLUMNS = ("file", "face", "faces", "score", "percentile", "confidence", *EDGES, "error")


class ScoreFile:
    """A CSV file with one row per face, and one for an image without a face or with an error.

    All rows of an image are written at once, so a killed run leaves at most one incomplete image. `rows` holds the
    images that an earlier run scored, by their `file`. The settings are stored beside it in NAME.csv.json.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], overwrite: bool = False):
        """Open a file that an earlier run with the same settings wrote, or a new one.

        Raises:
            ValueError: it was written with other settings (they are named), or not by `faceprior score`.
        """
        self.path = Path(path)
        self.rows: dict[str, ImageScores] = {}
        self.dropped = 0
        stored = settings_file(self.path)
        if self.path.exists() and not overwrite:
            _require_same_settings(self.path, stored, settings)
            self._resume()
            return
        # settings without rows are an empty start: a run that is killed anywhere here starts over
        Path(os.path.realpath(self.path)).unlink(missing_ok=True)
        with atomic_write(stored, "w") as file:
            file.write(json.dumps(settings, indent=2) + "\n")
        self._write({})

    def get(self, file: str) -> ImageScores | None:
        """Return what an earlier run found in an image, under its present name."""
        found = self.rows.get(printable(file))
        return found and ImageScores(file, found.faces)

    def append(self, result: ImageScores) -> None:
        """Add one image; of one that an earlier run scored, only the earlier rows stay."""
        if self.get(result.file) is not None:
            return
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write(_csv_text(_csv_rows(result)))

    def _resume(self) -> None:
        """Keep complete images; those that failed or are incomplete are dropped, to be scored again."""
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            images = _read_images(self.path, whole.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.path} is not in UTF-8 ({error}): save it as CSV in UTF-8, or start over with --overwrite"
            ) from error
        self.rows = {name: image for name, image in images.items() if image is not None}
        self.dropped = len(images) - len(self.rows)
        if self.dropped or whole != data:
            self._write(self.rows)

    def _write(self, images: Mapping[str, ImageScores]) -> None:
        with atomic_write(self.path, "w") as file:
            file.write(_csv_text([COLUMNS, *(row for image in images.values() for row in _csv_rows(image))]))


def settings_file(path: Path) -> Path:
    """The file with the settings of a CSV file."""
    return path.with_name(f"{path.name}.json")


def _csv_text(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _csv_rows(result: ImageScores) -> list[list[Any]]:
    file, count = printable(result.file), len(result.faces)
    if result.error is not None:
        return [[file, *[""] * (len(COLUMNS) - 2), printable(result.error)]]
    if not count:
        return [[file, "", 0, *[""] * (len(COLUMNS) - 3)]]
    return [
        [file, number, count, face.score, face.percentile, face.confidence, *face.box, ""]
        for number, face in enumerate(result.faces, 1)
    ]


def _read_images(path: Path, text: str) -> dict[str, ImageScores | None]:
    """Each image in a CSV file; None for one that failed or lacks a row."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise ValueError(
            f"{path} has the columns {reader.fieldnames} instead of {', '.join(COLUMNS)}: "
            "give another file, or start over with --overwrite"
        )
    rows: dict[str, list[dict[str, str]]] = {}
    for row in reader:
        rows.setdefault(row["file"], []).append(row)
    try:
        return {file: _from_csv(file, own) for file, own in rows.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} has a row that `faceprior score` did not write ({error}): fix it, or start over with --overwrite"
        ) from error


def _from_csv(file: str, rows: list[dict[str, str]]) -> ImageScores | None:
    from faceprior.scorer import FaceScore

    if rows[0]["error"]:
        return None
    count = int(rows[0]["faces"])
    if len(rows) != max(count, 1):
        return None
    faces = [
        FaceScore(
            score=float(row["score"]),
            box=tuple(float(row[edge]) for edge in EDGES),
            confidence=float(row["confidence"]),
            percentile=float(row["percentile"]) if row["percentile"] else None,
        )
        for row in rows[:count]
    ]
    return ImageScores(file, tuple(faces))


def _require_same_settings(path: Path, file: Path, settings: Mapping[str, Any]) -> None:
    way_out = "give another file, or start over with --overwrite"
    if not file.is_file():
        raise ValueError(f"{path} exists but {file.name}, which holds its settings, does not: {way_out}")
    try:
        stored = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}): {way_out}") from error
    different = [
        f"{key} was {stored.get(key)!r} and is {settings.get(key)!r}"
        for key in dict.fromkeys([*settings, *stored])
        if stored.get(key) != settings.get(key)
    ]
    if different:
        raise ValueError(f"{path} was written with other settings ({'; '.join(different)}): use those, {way_out}")
