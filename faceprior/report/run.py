"""What a report reads: the files of a run below one folder. What cannot be read is noted and never raised."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from PIL import Image

from faceprior.html import EmbeddedImage, Lost, data_uri
from faceprior.images import load_image
from faceprior.jsonl import read_rows, require_keys, resolve_file

STAGES = {
    "01_make_pairs": "data/pairs",
    "02_train_scorer": "checkpoints/scorer",
    "03_curate_portraits": "data/portraits",
    "04_guidance_tune": "checkpoints/guided",
    "05_prior_tune": "checkpoints/prior",
    "06_train_restorer": "checkpoints/restorer",
    "07_eval": "results",
}  # stage -> its folder

NUMBER = (int, float)

REASON = 20_000  # characters of a reason that are kept; a page folds what is long

BAD_INPUT = (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError)  # of what files hold

Made = TypeVar("Made")


@dataclass
class Run:
    """Reads the files of a run.

    scale: of the sides of embedded images; folders: default folder of a stage -> where it wrote, had it another
    `--output`; problems: file -> why it cannot be shown.
    """

    root: Path
    scale: float = 1.0
    folders: Mapping[str, Path] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def path(self, place: str) -> Path:
        """Return where a file is that has the name `place` in a run with the default folders."""
        for default, folder in self.folders.items():
            if place == default or place.startswith(f"{default}/"):
                return folder / place[len(default) + 1 :]
        return self.root / place

    def plain(self, text: object, limit: int = 600) -> str:
        """Return a text with paths relative to the root, and its end cut off when it is very long."""
        text = str(text)
        for folder in {str(self.root.resolve()), str(self.root.absolute()), str(self.root)} - {"."}:
            text = re.sub(rf"(?<![\w./-]){re.escape(folder)}/", "", text)
        return text if len(text) <= limit else text[: limit - 1] + "…"

    def note(self, place: object, reason: object) -> None:
        self.problems[self.plain(self.path(str(place)))] = self.plain(reason, REASON) or type(reason).__name__

    def attempt(self, place: object, make: Callable[..., Made], *args: Any) -> Made | Lost:
        """Return what `make` returns, or, where a file holds something else than expected, `Lost`."""
        try:
            return make(*args)
        except BAD_INPUT as error:
            reason = f"no `{error.args[0]}`" if isinstance(error, KeyError) and error.args else error
            self.note(place, reason)
            return Lost(f"{self.plain(self.path(str(place)))} could not be shown: {self.plain(reason, REASON)}")

    # ---- files

    def read(self, file: str) -> dict[str, Any]:
        """Return a JSON or YAML object, {} where there is no file."""
        try:
            text = self.path(file).read_text(encoding="utf-8")
            value = yaml.safe_load(text) if file.endswith(".yaml") else json.loads(text)
            if not isinstance(value, dict):
                raise ValueError("not an object of keys and values")
            return value
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            self.note(file, error)
            return {}

    def rows(self, file: str, keys: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Return the rows of a file that have `keys`, each of its type; [] where there is no file."""
        try:
            rows, problems = read_rows(self.path(file))
        except FileNotFoundError:
            return []
        except (OSError, RecursionError) as error:
            rows, problems = [], [(file, str(error))]
        for place, reason in problems:
            self.note(place, reason)
        return [row for place, row in enumerate(rows, 1) if self._is_whole(file, place, row, keys or {})]

    def _is_whole(self, file: str, place: int, row: dict[str, Any], keys: Mapping[str, Any]) -> bool:
        try:
            require_keys(row, keys)
            for key in keys:
                if isinstance(row[key], int) and number(row, key) is None:
                    raise ValueError(f"`{key}` is no number that can be drawn")
            return True
        except ValueError as error:
            self.note(f"{file}: {row.get('id', f'row {place}')}", error)
            return False

    # ---- images

    def image(self, folder: str, name: str, alt: str, side: int = 320, box: Any = None) -> EmbeddedImage:
        """Return an image, or its part around a face box (xyxy, pixels), with at most `side` pixels on a side."""
        try:
            image = self.load(folder, name)
            image = image if box is None else image.crop(face_window(box, image.size))
            return self.embed(image, alt, side)
        except BAD_INPUT as error:
            self.note(f"{folder}/{name}", error)
            return EmbeddedImage(alt)

    def load(self, folder: str, name: str) -> Image.Image:
        return load_image(resolve_file(self.path(folder), name))

    def embed(self, image: Image.Image, alt: str, side: int) -> EmbeddedImage:
        uri = data_uri(image, max(48, round(side * self.scale)))
        return EmbeddedImage(self.plain(alt, 200), uri, *image.size)


def stage_folders(folders: Iterable[str | Path]) -> dict[str, Path]:
    """Return {default folder of a stage: folder} of what stages wrote elsewhere, by the settings that they saved there.

    Raises FileNotFoundError for a folder without them, ValueError for two folders of one stage.
    """
    found: dict[str, Path] = {}
    for folder in map(Path, folders):
        default = _default_folder(folder)
        if default is None:
            raise FileNotFoundError(f"no stage wrote {folder}: it has no config.yaml of one")
        if default in found:
            raise ValueError(f"{found[default]} and {folder} are of one stage: give one of them")
        found[default] = folder
    return found


def _default_folder(folder: Path) -> str | None:
    """Return where the stage that wrote to a folder writes by default."""
    settings = Run(folder).read("config.yaml")
    return next((default for stage, default in STAGES.items() if stage in settings), None)


def face_window(box: Any, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the square (xyxy, pixels) around a face box, 1.6 times its longer side, as far as the image reaches."""
    x0, y0, x1, y1 = (float(value) for value in box)
    side = max(8, min(round(1.6 * max(x1 - x0, y1 - y0)), *size))
    left = min(max(round((x0 + x1 - side) / 2), 0), size[0] - side)
    top = min(max(round((y0 + y1 - side) / 2), 0), size[1] - side)
    return left, top, left + side, top + side


def number(row: Mapping[str, Any], key: str) -> float | None:
    """Return a row's number, None where there is none or it is not finite."""
    value = row.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100
    return value if is_number else None


def points(rows: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return the (step, value) pairs of a metric, the last one of each step."""
    measured = [row for row in rows if number(row, "step") is not None and number(row, key) is not None]
    return list({row["step"]: row[key] for row in measured}.items())
