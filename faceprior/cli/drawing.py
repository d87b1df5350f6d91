"""Folders that `faceprior score` writes images to: drawings of the scores, and copies of the best images."""

import functools
import glob
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import ImageDraw, ImageFont

from faceprior.cli.results import ImageScores, best_first, say
from faceprior.images import atomic_write, load_image, save_image

if TYPE_CHECKING:
    from faceprior.scorer import FaceScore

# marks a folder of drawings or copies, so that it is skipped when a folder above it is scored
OUTPUT_MARK = ".faceprior-output"
OUTPUT_TEXT = "`faceprior score` wrote the images here; it skips them when a folder above is scored.\n"

COLOR, GROUND = (255, 213, 0), (0, 0, 0)
MIN_FONT, MAX_FONT = 9, 64  # pixels


# ---- output folders


def open_output_folder(folder: Path, images: Iterable[str], option: str) -> None:
    """Create the folder for drawings or copies and mark it as such.

    Raises:
        ValueError: it contains images to score, or files that no earlier run wrote.
    """
    own = folder.resolve()
    inside = next((name for name in images if Path(os.path.realpath(name)).is_relative_to(own)), None)
    if inside is not None:
        raise ValueError(f"{option} {folder} contains an image to score ({inside}): give a separate folder")
    if folder.exists() and not (folder / OUTPUT_MARK).is_file() and any(folder.iterdir()):
        raise ValueError(f"{option} {folder} has to be new, empty, or from an earlier run: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OUTPUT_MARK).write_text(OUTPUT_TEXT, encoding="utf-8")


def without_outputs(argument: str, found: Sequence[Path], folders: Iterable[Path] = ()) -> list[Path]:
    """Leave out the drawings and copies below a folder or glob to score.

    These are the images in `folders`, and in folders with OUTPUT_MARK. A file that is named itself is kept, and so are
    all images of a folder that is `argument` itself. ValueError if nothing is left.
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
        say(f"{argument}: {len(found) - len(kept)} images skipped, which `faceprior score` itself wrote")
    return kept


# ---- drawings


def drawing_paths(images: Iterable[str], roots: Iterable[str | Path], folder: Path) -> dict[str, Path]:
    """Map each image to a PNG below `folder`, in the tree below the deepest folder that contains all `roots`.

    roots: the folders given, and those of images given by themselves. Images that differ in their suffix only keep it:
    `a.jpg.png`.
    """
    base = os.path.commonpath([os.path.abspath(root) for root in roots])
    inner = {name: Path(os.path.relpath(os.path.abspath(name), base)) for name in images}
    stems = Counter(path.with_suffix("") for path in inner.values())
    return {
        name: folder / path.with_name(f"{path.stem if stems[path.with_suffix('')] == 1 else path.name}.png")
        for name, path in inner.items()
    }


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


def copy_best(results: Iterable[ImageScores], count: int, folder: Path) -> None:
    """Copy the `count` images with the best faces to `folder`/RANK_NAME; fewer if fewer have a face."""
    ranked = [result for result in best_first(results) if result.faces][:count]
    older = {path for path in folder.iterdir() if path.name != OUTPUT_MARK}
    targets = [folder / f"{i:0{len(str(count))}d}_{Path(result.file).name}" for i, result in enumerate(ranked, 1)]
    for result, target in zip(ranked, targets, strict=True):
        with open(result.file, "rb") as source, atomic_write(target) as file:
            shutil.copyfileobj(source, file)
    stale = len(older - set(targets))
    left = f"; {stale} older one{'s' * (stale > 1)} left there" if stale else ""
    say(f"{folder}: {len(targets)} image{'s' * (len(targets) != 1)} copied{left}")
