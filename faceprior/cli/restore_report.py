"""The HTML file of `faceprior restore --report`: a card for each photograph, in one file that needs nothing else.

A card is written when its photograph is finished, to a file beside the page (`.NAME.part`), and not kept in memory. At
the end, and after Ctrl-C, the cards are joined to the page; a later run takes the cards of finished photographs from
there.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment
from PIL import Image

from faceprior.cli.outcomes import Summary
from faceprior.cli.outputs import MAX_NAME_BYTES
from faceprior.files import atomic_write, printable
from faceprior.html import EmbeddedImage, data_uri, environment, shrunk
from faceprior.images import load_image

SUFFIXES = (".html", ".htm")
MARK = '<meta name="generator" content="faceprior restore">'
FEW, LARGE, SMALL = 60, 960, 640  # up to FEW files images of LARGE pixels on the longer side are shown, else of SMALL
CROP, CROPS = 192, 24  # pixels on a side of a face's crop; most faces of a photograph that are shown

_OPEN, _CLOSE, _CARDS = b"<!--card ", b"<!--/card-->\n", "<!--cards-->\n"


class RestoreReport:
    """The report of a run. path: of the page; settings: of the run, other ones' cards are not taken."""

    def __init__(self, path: Path, settings: str, files: int):
        """Raise ValueError if `path` is no HTML file, or one of others."""
        self.path, self.settings = path, settings
        self.part = _part_of(path)
        self.side = LARGE if files <= FEW else SMALL
        self._keys: dict[str, str] = {}  # {file: key of its card}
        self._places = {**_cards(path), **_cards(self.part)}  # {key: (file, start, length)}
        if self.part.is_file():  # of a killed run: without a torn card
            end = max((start + length + len(_CLOSE) for _, start, length in _cards(self.part).values()), default=0)
            os.truncate(self.part, end)

    def has(self, file: str) -> bool:
        """Whether the card of a file as it is was written before; then the page shows it."""
        key = self._key(file)
        if key in self._places:
            self._keys[file] = key
        return key in self._places

    def add(self, file: str, card: dict[str, Any]) -> None:
        """Write the card of a finished file."""
        key = self._key(file)
        body = _environment().get_template("restored_card.html").render(card).encode("utf-8", "replace") + b"\n"
        self.part.parent.mkdir(parents=True, exist_ok=True)
        with open(self.part, "ab") as part:
            part.write(_OPEN + key.encode() + b"-->\n")
            start = part.tell()
            part.write(body + _CLOSE)
        self._places[key], self._keys[file] = (self.part, start, len(body)), key

    def close(self, summary: Summary, order: Iterable[str]) -> None:
        """Join the cards to the page, in the order of the files."""
        page = (
            _environment()
            .get_template("restored_page.html")
            .render(
                mark=MARK,
                text=summary.text,
                facts={
                    "files": summary.total,
                    "faces restored": summary.restored,
                    "faces left": summary.reasons.total(),
                    "files without a face": summary.without,
                    "failed": len(summary.failed),
                },
                reasons=[(reason, number) for reason, number in summary.reasons.most_common()],
                failed=[(printable(file), printable(error)) for file, error in summary.failed.items()],
                date=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
            )
        )
        head, _, tail = page.partition(_CARDS)
        with atomic_write(self.path) as file:
            file.write(head.encode("utf-8", "replace"))
            for name in order:
                if key := self._keys.get(name):
                    place, start, length = self._places[key]
                    file.write(_OPEN + key.encode() + b"-->\n")
                    with open(place, "rb") as cards:
                        cards.seek(start)
                        file.write(cards.read(length))
                    file.write(_CLOSE)
            file.write(tail.encode("utf-8", "replace"))
        self.part.unlink(missing_ok=True)

    def _key(self, file: str) -> str:
        state = os.stat(file)
        name = os.path.relpath(file, self.path.parent)
        text = json.dumps([name, self.settings, state.st_size, state.st_mtime_ns])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def check_report(path: Path) -> None:
    """Raise ValueError if `path` is not a name for the page, or names a file that no earlier run wrote."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--report {path} has to end in .html")
    if path.is_dir():
        raise ValueError(f"--report {path} is a folder: give a file in it")
    part = _part_of(path)
    if len(os.fsencode(part.name)) > MAX_NAME_BYTES:
        raise ValueError(f"--report {path}: the name is too long for the file {part.name} beside it: shorten it")
    if os.path.lexists(part) and not (part.is_file() and _begins_with(part, _OPEN)):
        raise ValueError(f"{part}, where --report keeps its cards, is no file of an earlier run: move it away")
    if path.exists():
        with open(path, "rb") as file:
            if MARK.encode() not in file.read(2000):
                raise ValueError(
                    f"--report {path} exists, and no run of `faceprior restore` wrote it: give another file"
                )


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _begins_with(path: Path, start: bytes) -> bool:
    """Whether a file begins so, as far as it goes."""
    with open(path, "rb") as file:
        return start.startswith(file.read(len(start)))


def _cards(path: Path) -> dict[str, tuple[Path, int, int]]:
    """{key: (path, start, length)} of the whole cards in a page or its part."""
    found: dict[str, tuple[Path, int, int]] = {}
    if not path.is_file():
        return found
    key, start, offset = None, 0, 0
    with open(path, "rb") as file:
        for line in file:
            if line.startswith(_OPEN):
                key, start = line[len(_OPEN) :].partition(b"-->")[0].decode("ascii", "replace"), offset + len(line)
            elif line == _CLOSE and key:
                found[key], key = (path, start, offset - start), None
            offset += len(line)
    return found


@functools.cache
def _environment() -> Environment:
    return environment(Path(__file__).with_name("templates"))


# ---- a card


def describe_photograph(file: str, line: str, result: Any, side: int, is_changed: bool) -> dict[str, Any]:
    """A card with the photograph before and after, or as it is, and every face."""
    name = printable(file)
    before = _embed(result.source.rgb, f"{name}, original", side)
    after = _embed(result.image, f"{name}, restored", side) if is_changed else None
    return {
        "name": name,
        "line": printable(line),
        "before": before,
        "after": after,
        "faces": [_describe_face(number, face) for number, face in enumerate(result.faces[:CROPS], 1)],
        "more": max(0, len(result.faces) - CROPS),
        "timings": {phase: f"{seconds:.2f} s" for phase, seconds in result.timings.items()},
    }


def describe_pair(file: str, line: str, before: Image.Image | None, after: Image.Image | None, side: int) -> dict:
    """A card without details of the faces: of a frame of a video, or of what an earlier run restored."""
    name = printable(file)
    images = {"before": (before, "original"), "after": (after, "restored")}
    shown = {key: image and _embed(image, f"{name}, {what}", side) for key, (image, what) in images.items()}
    return {"name": name, "line": printable(line), **shown, "faces": [], "more": 0, "timings": {}}


def _describe_face(number: int, face: Any) -> dict[str, Any]:
    x0, y0, x1, y1 = face.face.box
    scores = [None if score is None else f"{score:.3f}" for score in (face.score_before, face.score_after)]
    facts = {
        "Face Score": " → ".join(score or "not made" for score in scores) if any(scores) else None,
        "identity distance": None if face.identity_distance is None else f"{face.identity_distance:.2f}",
        "size": f"{x1 - x0:.0f}\u202f×\u202f{y1 - y0:.0f}\u202fpx",
        "detector's confidence": f"{face.face.confidence:.3f}",
    }
    crops = {"before": face.before, "after": face.after}
    return {
        "title": f"face {number}: {face.action}",
        "reason": printable(face.reason),
        "crops": {
            side: _embed(crop, f"face {number}, {side}", CROP) for side, crop in crops.items() if crop is not None
        },
        "facts": {key: value for key, value in facts.items() if value is not None},
    }


def _embed(image: Image.Image, alt: str, side: int) -> EmbeddedImage:
    small = load_image(shrunk(image, side))  # transparency over white
    return EmbeddedImage(alt, data_uri(small, side, "WEBP"), *small.size)
