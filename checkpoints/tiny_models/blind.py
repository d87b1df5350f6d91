"""
A blind look at the tuned model: which of two samples, from the same prompt and noise, has the better face?

    python -m checkpoints.tiny_models.blind                       # the questions, on sheets that do not name the sides
    python -m checkpoints.tiny_models.blind --answers "A=B..."    # what was seen: A left, B right, = no difference

Reads   the samples of `make figures`, which are made where missing
Writes  results/tiny/blind/: the sheets; checkpoints/tiny/blind/: the answers with the sides, as
        `python -m faceprior.human_eval preferences checkpoints/tiny/blind` reads them, and of which weights they are

The sides are those that the page of `human_eval` would show to a rater of that name.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from checkpoints.tiny_models.bench import Bench, image_path
from checkpoints.tiny_models.figures_tuning import BLIND, TUNED, WEIGHTS, blind_weights, tuned_samples
from faceprior import tiny
from faceprior.config import run_stage
from faceprior.files import atomic_write
from faceprior.human_eval.compare import SIDES, Comparing
from faceprior.human_eval.files import SAME, Comparison
from faceprior.images import load_image, save_image

COLUMNS, ROWS, TILE = 2, 4, 256  # questions on a sheet; pixels of an image, which is enlarged twice
KEYS = {"A": SIDES[0], "B": SIDES[1], "=": SAME}


@dataclass
class Config:
    work: str = "data/tiny"  # folder that make_tiny works in
    output: str = "results/tiny"  # folder of the figures
    rater: str = "model"  # name of who looks, which decides the sides; model: a vision language model
    answers: str = ""  # the answers in the order of the sheets, each A, B or =; empty: the sheets are written
    num_pairs: int = 60  # number of pairs of samples, the first ones, [1, 3000]
    device: str = "auto"  # device: auto, cpu, cuda or cuda:N


def main(config: Config) -> None:
    from checkpoints.tiny_models import figures

    require_answers(config.answers, config.num_pairs)
    bench = Bench(figures.Config(work=config.work, output=config.output, device=config.device))
    comparing = make_comparing(bench, config.rater, config.num_pairs)
    if config.answers:
        write_answers(bench, comparing, config.answers)
        print(f"{len(comparing.questions)} answers in {comparing.path}")
    else:
        print("\n".join(map(str, write_sheets(comparing, bench.output / "blind"))))


def make_comparing(bench: Bench, rater: str, count: int) -> Comparing:
    """Return a rater's questions about the first samples of the tuned model and of the base."""
    bench.samples("sd15"), tuned_samples(bench, TUNED)
    names = {"tuned": TUNED, "base": "sd15"}
    images = {
        method: {f"{i:05d}": image_path(bench.output / "samples" / name, i) for i in range(count)}
        for method, name in names.items()
    }
    return Comparing(Comparison(tiny.tiny_folder() / BLIND, tuple(names), images), rater)


def write_sheets(comparing: Comparing, folder: Path) -> list[Path]:
    """Write the questions as PNG, numbered from 1, A on the left of B, and return the files."""
    tiles = [question_tile(comparing, number) for number in range(len(comparing.questions))]
    blank, files = np.full_like(tiles[0], 255), []
    for page, first in enumerate(range(0, len(tiles), COLUMNS * ROWS)):
        own = tiles[first : first + COLUMNS * ROWS]
        own += [blank] * (COLUMNS * ROWS - len(own))
        rows = [np.hstack(own[start : start + COLUMNS]) for start in range(0, len(own), COLUMNS)]
        files.append(folder / f"sheet_{page + 1}.png")
        save_image(np.vstack(rows), files[-1])
    return files


def question_tile(comparing: Comparing, number: int) -> np.ndarray:
    """Return a question's two images side by side, twice as large, with its number, (TILE + 20, 2 TILE + 24, 3)."""
    name = comparing.questions[number].id
    tile = Image.new("RGB", (2 * TILE + 24, TILE + 20), "white")
    ImageDraw.Draw(tile).text((4, 4), str(number + 1), "black")
    for place, method in enumerate(comparing.shown(number)):
        image = load_image(comparing.comparison.images[method][name])
        tile.paste(Image.fromarray(np.asarray(image)).resize((TILE, TILE), Image.BICUBIC), (place * (TILE + 4) + 4, 18))
    return np.asarray(tile)


def require_answers(text: str, count: int) -> None:
    """Raise ValueError for another number of answers than of questions, and for another letter; empty is none yet."""
    letters = "".join(text.split())
    if letters and (len(letters) != count or not set(letters) <= KEYS.keys()):
        raise ValueError(
            f"`answers` has to be {count} letters, each A, B or =, but is {letters!r} ({len(letters)} letters)"
        )


def write_answers(bench: Bench, comparing: Comparing, text: str) -> None:
    """Write a rater's answers, all of them at once, and the digest of the weights that they are of.

    Raises ValueError as `require_answers`.
    """
    require_answers(text, len(comparing.questions))
    comparing.path.unlink(missing_ok=True)
    for number, letter in enumerate("".join(text.split())):
        comparing.answer(number, KEYS[letter])
    with atomic_write(comparing.comparison.folder / WEIGHTS, "w") as file:
        json.dump(blind_weights(bench), file)


if __name__ == "__main__":
    run_stage(main, Config)
