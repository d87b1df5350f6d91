"""What `faceprior score` leaves: table rows, a CSV file that can be gone on with, drawings, copies, a summary."""

import csv
import functools
import glob
import hashlib
import io
import json
import os
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faceprior.images import atomic_write, load_image, save_image

# in a folder of drawings or copies; who scores a folder above passes it over
OUTPUT_MARK = ".faceprior-output"


OUTPUT_TEXT = "`faceprior score` wrote the pictures here; it passes them over when a folder above is scored.\n"


COLUMNS = ("file", "face", "faces", "score", "percentile", "confidence", "x0", "y0", "x1", "y1", "error")


TABLE_HEAD = f"{'score':>9}  {'percentile':>10}  {'confidence':>10}  {'x0':>5} {'y0':>5} {'x1':>5} {'y1':>5}  file"


COLOR, GROUND = (255, 213, 0), (0, 0, 0)


MIN_FONT, MAX_FONT = 9, 64  # pixels


@dataclass(frozen=True)
class PictureScores:
    """What was found in one picture: faces, none, or the reason why it could not be read.

    faces: best first, each {"score": no unit, "percentile": among the good faces of the scorer's reference set, [0,
    100], None without one, "box": [x0, y0, x1, y1] in pixels, "confidence": [0, 1]}.
    """

    file: str
    faces: tuple[dict[str, Any], ...] = ()
    error: str | None = None

    @property
    def best(self) -> float:
        """The score of the best face; -infinity without a face."""
        return self.faces[0]["score"] if self.faces else -float("inf")

    def to_dict(self) -> dict[str, Any]:
        """{"file", "faces"} or {"file", "error"}, for JSON."""
        return {"file": self.file} | ({"faces": list(self.faces)} if self.error is None else {"error": self.error})

    def above(self, min_score: float | None) -> "PictureScores":
        """The same with only the faces that score `min_score` or more."""
        if min_score is None:
            return self
        return PictureScores(self.file, tuple(face for face in self.faces if face["score"] >= min_score), self.error)


def printable(text: str, encoding: str | None = "utf-8") -> str:
    """`text` in one line that any terminal and UTF-8 file takes: what cannot be shown is written as an escape.

    File names may hold line breaks, control codes, and bytes that are no text at all.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")


def say(text: str) -> None:
    """Print a line on stderr, beside the bar."""
    print(printable(text, sys.stderr.encoding), file=sys.stderr, flush=True)


class Listing:
    """The results on stdout, as they come, or sorted at the end: a table with one row per face, or JSON lines.

    min_score: faces below are not listed. A picture without a face that is good enough then stands in the table
    as `below`, in JSON with an empty list.
    """

    def __init__(self, as_json: bool = False, min_score: float | None = None, sort: bool = False):
        self.as_json, self.min_score, self.sort = as_json, min_score, sort
        self._kept: list[PictureScores] = []
        self._headed = as_json

    def add(self, result: PictureScores) -> None:
        """Print a picture's result, or keep it for `close`."""
        if self.sort:
            self._kept.append(result)
        else:
            self._print(result)

    def close(self) -> None:
        """Print what was kept: JSON by the pictures' best faces, the table by face."""
        for result in best_first(self._kept if self.as_json else one_face_each(self._kept)):
            self._print(result)

    def _print(self, result: PictureScores) -> None:
        from tqdm.auto import tqdm

        lines = [] if self._headed else [TABLE_HEAD]
        self._headed = True
        if self.as_json:
            lines.append(json.dumps(result.above(self.min_score).to_dict(), allow_nan=False))
        else:
            lines += table_rows(result, self.min_score)
        for line in lines:
            tqdm.write(printable(line, sys.stdout.encoding), file=sys.stdout)  # over the bar
        sys.stdout.flush()


def table_rows(result: PictureScores, min_score: float | None = None) -> list[str]:
    """One line per face under TABLE_HEAD, or one that says why there is none."""
    kept = result.above(min_score)
    if not kept.faces:
        reason = "error" if result.error is not None else "below" if result.faces else "no face"
        return [f"{reason:>9}  {'':10}  {'':10}  {'':23}  {result.file}"]
    return [
        f"{face['score']:9.4f}  {_percentile_text(face):>10}  {face['confidence']:10.3f}  "
        f"{' '.join(f'{edge:5.0f}' for edge in face['box'])}  {result.file}"
        for face in kept.faces
    ]


def _percentile_text(face: Mapping[str, Any]) -> str:
    return "-" if face["percentile"] is None else f"{face['percentile']:.1f}"


def best_first(results: Iterable[PictureScores]) -> list[PictureScores]:
    """Pictures by their best face; then those without a face, then those that failed."""
    return sorted(results, key=lambda result: (result.error is not None, -result.best))


def one_face_each(results: Iterable[PictureScores]) -> list[PictureScores]:
    """The same faces with each as a picture of its own, for a table that is sorted by face."""
    return [
        single
        for result in results
        for single in ([PictureScores(result.file, (face,)) for face in result.faces] or [result])
    ]


def fingerprint(model: Any) -> str:
    """Hash the first numbers of every tensor of a torch module: a folder may hold other weights than last time."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        # through bfloat16, so that the same weights give the same hash whatever they were loaded as
        digest.update(name.encode() + tensor.flatten()[:4096].bfloat16().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class ScoreFile:
    """The CSV file: one row per face, one for a picture without a face or with an error.

    A picture's rows are written at once, so a killed run leaves at most one incomplete picture. `rows` holds
    the pictures that an earlier run scored, by their `file`. The settings stand beside it in NAME.csv.json.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], overwrite: bool = False):
        """Open the file, made by the same settings before, or new.

        Raises:
            ValueError: it was made with other settings (they are named), or is not a file of ours.
        """
        self.path = Path(path)
        self.rows: dict[str, PictureScores] = {}
        self.dropped = 0
        settings_file = self.path.with_name(f"{self.path.name}.json")
        if self.path.exists() and not overwrite:
            _require_same_settings(self.path, settings_file, settings)
            self._resume()
            return
        # settings alone are an empty start: wherever a run is killed here, the next one begins anew
        Path(os.path.realpath(self.path)).unlink(missing_ok=True)
        with atomic_write(settings_file, "w") as file:
            file.write(json.dumps(settings, indent=2) + "\n")
        self._write({})

    def get(self, file: str) -> PictureScores | None:
        """Return what an earlier run found in a picture, under the name as it is given now."""
        found = self.rows.get(printable(file))
        return found and PictureScores(file, found.faces)

    def append(self, result: PictureScores) -> None:
        """Add one picture; of one that an earlier run scored, those rows stay alone."""
        if self.get(result.file) is not None:
            return
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write(_csv_text(_csv_rows(result)))

    def _resume(self) -> None:
        """Keep what is whole; pictures that failed or are cut off are left out, to be scored again."""
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        try:
            pictures = _read_pictures(self.path, whole.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.path} is not in UTF-8 ({error}): save it as CSV in UTF-8, or start anew with --overwrite"
            ) from error
        self.rows = {name: picture for name, picture in pictures.items() if picture is not None}
        self.dropped = len(pictures) - len(self.rows)
        if self.dropped or whole != text:
            self._write(self.rows)

    def _write(self, pictures: Mapping[str, PictureScores]) -> None:
        with atomic_write(self.path, "w") as file:
            file.write(_csv_text([COLUMNS, *(row for picture in pictures.values() for row in _csv_rows(picture))]))


def _csv_text(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _csv_rows(result: PictureScores) -> list[list[Any]]:
    file, count = printable(result.file), len(result.faces)
    if result.error is not None:
        return [[file, *[""] * (len(COLUMNS) - 2), printable(result.error)]]
    if not count:
        return [[file, "", 0, *[""] * (len(COLUMNS) - 3)]]
    return [
        [file, number, count, face["score"], face["percentile"], face["confidence"], *face["box"], ""]
        for number, face in enumerate(result.faces, 1)
    ]


def _read_pictures(path: Path, text: str) -> dict[str, PictureScores | None]:
    """Each picture that a CSV file names; None for one that failed or has not all its rows."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise ValueError(
            f"{path} has the columns {reader.fieldnames} instead of {', '.join(COLUMNS)}: "
            "give another file, or start anew with --overwrite"
        )
    rows: dict[str, list[dict[str, str]]] = {}
    for row in reader:
        rows.setdefault(row["file"], []).append(row)
    try:
        return {file: _from_csv(file, own) for file, own in rows.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} has a row that `faceprior score` did not write ({error}): mend it, or start anew with --overwrite"
        ) from error


def _from_csv(file: str, rows: list[dict[str, str]]) -> PictureScores | None:
    if rows[0]["error"]:
        return None
    count = int(rows[0]["faces"])
    if len(rows) != max(count, 1):
        return None
    faces = [
        {
            "score": float(row["score"]),
            "percentile": float(row["percentile"]) if row["percentile"] else None,
            "box": [float(row[edge]) for edge in ("x0", "y0", "x1", "y1")],
            "confidence": float(row["confidence"]),
        }
        for row in rows[:count]
    ]
    return PictureScores(file, tuple(faces))


def _require_same_settings(path: Path, settings_file: Path, settings: Mapping[str, Any]) -> None:
    way_out = "give another file, or start anew with --overwrite"
    if not settings_file.is_file():
        raise ValueError(f"{path} is there but {settings_file.name}, which says how it was made, is not: {way_out}")
    try:
        stored = dict(json.loads(settings_file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{settings_file} is damaged ({error}): {way_out}") from error
    different = [
        f"{key} was {stored.get(key)!r} and is {settings.get(key)!r}"
        for key in dict.fromkeys([*settings, *stored])
        if stored.get(key) != settings.get(key)
    ]
    if different:
        raise ValueError(f"{path} was made with other settings ({'; '.join(different)}): use those, {way_out}")


def without_outputs(argument: str, found: Sequence[Path], folders: Iterable[Path] = ()) -> list[Path]:
    """Leave out the drawings and copies that lie below a folder or glob to score.

    These are the pictures in `folders`, and in folders with OUTPUT_MARK. A file named outright is kept, and so is
    all in a folder that is itself what was given. ValueError if nothing is left.
    """
    root = Path(argument).expanduser()
    if root.is_file():
        return list(found)
    while glob.has_magic(str(root)) and not root.is_dir():
        root = root.parent
    own = {folder.resolve() for folder in folders}

    @functools.cache
    def is_output(folder: Path) -> bool:
        if folder in (root, folder.parent):
            return False
        return folder.resolve() in own or (folder / OUTPUT_MARK).is_file() or is_output(folder.parent)

    kept = [path for path in found if not is_output(path.parent)]
    if not kept:
        raise ValueError(f"no images in {argument} besides those that `faceprior score` itself wrote")
    if len(kept) < len(found):
        say(f"{argument}: {len(found) - len(kept)} pictures passed over, which `faceprior score` itself wrote")
    return kept


def open_output_folder(folder: Path, pictures: Iterable[str], option: str) -> None:
    """Make the folder for drawings or copies and mark it as such.

    Raises:
        ValueError: it holds pictures that are to be scored, or something else that no earlier run put there.
    """
    own = folder.resolve()
    inside = next((name for name in pictures if Path(os.path.realpath(name)).is_relative_to(own)), None)
    if inside is not None:
        raise ValueError(f"{option} {folder} holds a picture to score ({inside}): give a folder of its own")
    if folder.exists() and not (folder / OUTPUT_MARK).is_file() and any(folder.iterdir()):
        raise ValueError(f"{option} {folder} has to be new, empty, or from an earlier run: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OUTPUT_MARK).write_text(OUTPUT_TEXT, encoding="utf-8")


def drawing_paths(pictures: Iterable[str], roots: Iterable[str | Path], folder: Path) -> dict[str, Path]:
    """Map each picture to a PNG below `folder`, in the tree below the deepest folder that holds all `roots`.

    roots: the folders given, and those of pictures given by themselves. Pictures that differ in their suffix
    only keep it: `a.jpg.png`.
    """
    base = os.path.commonpath([os.path.abspath(root) for root in roots])
    inner = {name: Path(os.path.relpath(os.path.abspath(name), base)) for name in pictures}
    stems = Counter(path.with_suffix("") for path in inner.values())
    return {
        name: folder / path.with_name(f"{path.stem if stems[path.with_suffix('')] == 1 else path.name}.png")
        for name, path in inner.items()
    }


def draw_scores(source: str | Path, result: PictureScores, target: Path) -> None:
    """Write a copy of a picture with a box and the score on every face."""
    from PIL import ImageDraw

    picture = load_image(source)
    canvas = ImageDraw.Draw(picture)
    line = max(2, round(min(picture.size) / 300))
    for face in reversed(result.faces):  # the best last, so that it lies on top
        x0, y0, x1, y1 = face["box"]
        canvas.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=GROUND, width=line + 2)
        canvas.rectangle((x0, y0, x1, y1), outline=COLOR, width=line)
    for face in reversed(result.faces):
        _draw_label(canvas, picture.size, face, line)
    save_image(picture, target)


def _draw_label(canvas: Any, size: tuple[int, int], face: Mapping[str, Any], line: int) -> None:
    """The score on a dark ground above the box; where there is no room below it, or else inside."""
    from PIL import ImageFont

    x0, y0, x1, y1 = face["box"]
    text = f"{face['score']:.2f}"
    font = ImageFont.load_default(min(MAX_FONT, max(MIN_FONT, (x1 - x0) / 4, min(size) / 80)))
    left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
    wide, high = right - left + 2 * line + 2, bottom - top + 2 * line + 2
    x = max(0, min(x0, size[0] - wide))
    y = y0 - high if y0 >= high else y1 if y1 + high <= size[1] else y0
    canvas.rectangle((x, y, x + wide, y + high), fill=GROUND)
    canvas.text((x + line + 1 - left, y + line + 1 - top), text, font=font, fill=COLOR)


def copy_best(results: Iterable[PictureScores], count: int, folder: Path) -> list[Path]:
    """Copy the `count` best pictures by their best face to `folder`/RANK_NAME; fewer if fewer have a face."""
    ranked = [result for result in best_first(results) if result.faces][:count]
    older = {path for path in folder.iterdir() if path.name != OUTPUT_MARK}
    targets = [folder / f"{i:0{len(str(count))}d}_{Path(result.file).name}" for i, result in enumerate(ranked, 1)]
    for result, target in zip(ranked, targets, strict=True):
        with open(result.file, "rb") as source, atomic_write(target) as file:
            shutil.copyfileobj(source, file)
    stale = len(older - set(targets))
    left = f"; {stale} older one{'s' * (stale > 1)} left there" if stale else ""
    say(f"{folder}: {len(targets)} picture{'s' * (len(targets) != 1)} copied{left}")
    return targets


def say_summary(groups: Mapping[str, Iterable[str]], results: Mapping[str, PictureScores], total: int) -> None:
    """Print on stderr what was found per folder, and how many of `total` pictures failed, each with its reason."""
    read = [
        (name, [results[file] for file in group if file in results and results[file].error is None])
        for name, group in groups.items()
    ]
    if any(found for _, found in read):
        for line in summary_rows({name: found for name, found in read if found}):
            say(line)
    failed = [result for result in results.values() if result.error is not None]
    for result in failed:
        say(result.error if result.file in result.error else f"{result.file}: {result.error}")
    if len(results) < total:
        say(f"{len(results)} of {total} pictures done")
    if failed:
        say(f"{len(failed)} of {total} pictures failed")


def summary_rows(groups: Mapping[str, Iterable[PictureScores]]) -> list[str]:
    """A small table: per folder its pictures, the share of them without a face, its faces, their mean and median.

    groups: {folder: what was found in its pictures}, none of them empty and no failed picture among them.
    """
    cells = [["folder", "pictures", "no face", "faces", "mean", "median"]]
    cells += [[printable(name), *_statistics(list(group))] for name, group in groups.items()]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]


def _statistics(results: list[PictureScores]) -> list[str]:
    scores = [face["score"] for result in results for face in result.faces]
    without = sum(not result.faces for result in results)
    middle = [f"{of(scores):.4f}" if scores else "-" for of in (statistics.fmean, statistics.median)]
    return [str(len(results)), f"{without / len(results):.1%}", str(len(scores)), *middle]
