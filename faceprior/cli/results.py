"""What `faceprior score` prints: the scores of each image as a table or JSON lines, and a summary."""

import json
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from faceprior.files import printable
from faceprior.models import first_line

if TYPE_CHECKING:
    from faceprior.scorer import FaceScore

TABLE_HEAD = f"{'score':>9}  {'percentile':>10}  {'confidence':>10}  {'x0':>5} {'y0':>5} {'x1':>5} {'y1':>5}  file"


@dataclass(frozen=True)
class ImageScores:
    """The faces of one image, best first; no face; or the reason why the image could not be read."""

    file: str
    faces: "tuple[FaceScore, ...]" = ()
    error: str | None = None

    @property
    def best(self) -> float:
        """The score of the best face; -infinity without a face."""
        return self.faces[0].score if self.faces else -float("inf")

    def to_dict(self) -> dict[str, Any]:
        """{"file", "faces"} or {"file", "error"}, for JSON."""
        if self.error is not None:
            return {"file": self.file, "error": self.error}
        keys = ("score", "percentile", "box", "confidence")
        return {"file": self.file, "faces": [{key: getattr(face, key) for key in keys} for face in self.faces]}

    def above(self, min_score: float | None) -> "ImageScores":
        """The same with only the faces that score `min_score` or more."""
        if min_score is None:
            return self
        return ImageScores(self.file, tuple(face for face in self.faces if face.score >= min_score), self.error)


def best_first(results: Iterable[ImageScores]) -> list[ImageScores]:
    """Images by their best face; then those without a face, then those that failed."""
    return sorted(results, key=lambda result: (result.error is not None, -result.best))


def reason(file: str, error: Exception, spare: str = "`--dtype bfloat16`") -> str:
    """Say in one line why an image failed: the error of an image by its text, that of a library with its file.

    spare: the command's options that need less memory.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"{file}: out of memory: use {spare}, `--device cpu`, or a smaller image"
    if isinstance(error, (ValueError, OSError)):
        return str(error) or type(error).__name__
    return f"{file}: {type(error).__name__}: {first_line(error)}"


# ---- text that any terminal takes


def say(text: str) -> None:
    """Print a line on stderr, beside the progress bar."""
    print(printable(text, sys.stderr.encoding), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print a line on stdout, above the progress bar."""
    tqdm.write(printable(text, sys.stdout.encoding), file=sys.stdout)
    sys.stdout.flush()


# ---- the listing on stdout


class Listing:
    """The results on stdout, as they come or sorted at the end: a table with one row per face, or JSON lines.

    min_score: faces below are not printed. An image without a face above it is then shown as `below` in the table, and
    with an empty list in JSON.
    """

    def __init__(self, as_json: bool = False, min_score: float | None = None, sort: bool = False):
        self.as_json, self.min_score, self.sort = as_json, min_score, sort
        self._kept: list[ImageScores] = []
        self._needs_head = not as_json

    def add(self, result: ImageScores) -> None:
        """Print the scores of an image, or keep them for `close`."""
        if self.sort:
            self._kept.append(result)
        else:
            self._print(result)

    def close(self) -> None:
        """Print what was kept: JSON sorted by the best faces of the images, the table by face."""
        for result in best_first(self._kept if self.as_json else _one_face_each(self._kept)):
            self._print(result)

    def _print(self, result: ImageScores) -> None:
        lines = [TABLE_HEAD] if self._needs_head else []
        self._needs_head = False
        if self.as_json:
            lines.append(json.dumps(result.above(self.min_score).to_dict(), allow_nan=False))
        else:
            lines += _table_rows(result, self.min_score)
        for line in lines:
            show(line)


def _one_face_each(results: Iterable[ImageScores]) -> list[ImageScores]:
    """Split images with several faces, for a table that is sorted by face."""
    return [
        single
        for result in results
        for single in ([ImageScores(result.file, (face,)) for face in result.faces] or [result])
    ]


def _table_rows(result: ImageScores, min_score: float | None = None) -> list[str]:
    """One line per face under TABLE_HEAD, or one that says why there is none."""
    kept = result.above(min_score)
    if not kept.faces:
        reason = "error" if result.error is not None else "below" if result.faces else "no face"
        return [f"{reason:>9}  {'':10}  {'':10}  {'':23}  {result.file}"]
    return [
        f"{face.score:9.4f}  {_percentile_text(face):>10}  {face.confidence:10.3f}  "
        f"{' '.join(f'{edge:5.0f}' for edge in face.box)}  {result.file}"
        for face in kept.faces
    ]


def _percentile_text(face: "FaceScore") -> str:
    return "-" if face.percentile is None else f"{face.percentile:.1f}"


# ---- the summary on stderr


def print_summary(groups: Mapping[str, Iterable[str]], results: Mapping[str, ImageScores], total: int) -> None:
    """Print what was found per folder, and how many of `total` images failed, each with its reason."""
    read = {
        name: [results[file] for file in group if file in results and results[file].error is None]
        for name, group in groups.items()
    }
    if any(read.values()):
        for line in _summary_rows({name: found for name, found in read.items() if found}):
            say(line)
    failed = [result for result in results.values() if result.error is not None]
    for result in failed:
        say(result.error if result.file in result.error else f"{result.file}: {result.error}")
    if len(results) < total:
        say(f"{len(results)} of {total} images done")
    if failed:
        say(f"{len(failed)} of {total} images failed")


def _summary_rows(groups: Mapping[str, list[ImageScores]]) -> list[str]:
    """A table: per folder its images, the fraction without a face, its faces, the mean and median of their scores.

    groups: {folder: the scores of its images}, none of them empty and no failed image among them.
    """
    cells = [["folder", "images", "no face", "faces", "mean", "median"]]
    cells += [[printable(name), *_statistics(group)] for name, group in groups.items()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]


def _statistics(results: list[ImageScores]) -> list[str]:
    scores = [face.score for result in results for face in result.faces]
    without = sum(not result.faces for result in results)
    averages = [f"{average(scores):.4f}" if scores else "-" for average in (statistics.fmean, statistics.median)]
    return [str(len(results)), f"{without / len(results):.1%}", str(len(scores)), *averages]
