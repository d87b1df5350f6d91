"""The images that `faceprior score` writes: drawings of the scores, and copies of the best images."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import ImageDraw, ImageFont

from faceprior.cli.outputs import OUTPUT_MARK
from faceprior.cli.results import ImageScores, best_first, reason, say
from faceprior.files import copy_file
from faceprior.images import load_image, save_image

if TYPE_CHECKING:
    from faceprior.scorer import FaceScore

COLOR, GROUND = (255, 213, 0), (0, 0, 0)
MIN_FONT, MAX_FONT = 9, 64  # pixels


# ---- drawings


def draw_scores(result: ImageScores, target: Path) -> None:
    """Write a copy of an image with a box and the score on every face."""
    image = load_image(result.file).copy()
    canvas = ImageDraw.Draw(image)
    line = max(2, round(min(image.size) / 300))
    for face in reversed(result.faces):  # the best face last, so that it is on top
        x0, y0, x1, y1 = face.box
        canvas.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=GROUND, width=line + 2)
        canvas.rectangle(face.box, outline=COLOR, width=line)
    for face in reversed(result.faces):
        _draw_label(canvas, image.size, face, line)
    save_image(image, target)


def _draw_label(canvas: ImageDraw.ImageDraw, size: tuple[int, int], face: "FaceScore", line: int) -> None:
    """Write the score on a dark ground above the box; without room there, below the box; else inside it."""
    x0, y0, x1, y1 = face.box
    text = f"{face.score:.2f}"
    font = ImageFont.load_default(min(MAX_FONT, max(MIN_FONT, (x1 - x0) / 4, min(size) / 80)))
    left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
    wide, high = right - left + 2 * line + 2, bottom - top + 2 * line + 2
    x = max(0, min(x0, size[0] - wide))
    y = y0 - high if y0 >= high else y1 if y1 + high <= size[1] else y0
    canvas.rectangle((x, y, x + wide, y + high), fill=GROUND)
    canvas.text((x + line + 1 - left, y + line + 1 - top), text, font=font, fill=COLOR)


# ---- copies


def copy_best(results: Iterable[ImageScores], count: int, folder: Path) -> int:
    """Copy the `count` images with the best faces to `folder`/RANK_NAME; fewer if fewer have a face.

    Returns how many could not be copied; they are named.
    """
    ranked = [result for result in best_first(results) if result.faces][:count]
    older = {path for path in folder.iterdir() if path.name != OUTPUT_MARK}
    targets = [folder / f"{i:0{len(str(count))}d}_{Path(result.file).name}" for i, result in enumerate(ranked, 1)]
    failed = 0
    for result, target in zip(ranked, targets, strict=True):
        try:
            copy_file(result.file, target)
        except OSError as error:
            failed += 1
            say(f"{result.file}: scored, but not copied: {reason(result.file, error)}")
    stale, copied = len(older - set(targets)), len(targets) - failed
    left = f"; {stale} older one{'s' * (stale > 1)} left there" if stale else ""
    say(f"{folder}: {copied} image{'s' * (copied != 1)} copied{left}")
    return failed
