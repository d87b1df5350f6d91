"""The README's images, cut from the sheets of the figures and the demo: python -m checkpoints.tiny_models.strips

They show the first images of every sheet, not the best ones.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from faceprior.images import contact_sheet, load_image
from faceprior.procedural import TEST_SEEDS, draw_portrait

ROOT = Path(__file__).resolve().parents[2]
SHEETS, DEMO, OUTPUT = ROOT / "results/tiny/sheets", ROOT / "results/demo", ROOT / "examples/pictures"
TILE = 128


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition(":")[0]).parse_args()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    save(contact_sheet([draw_portrait(TEST_SEEDS + i, 160).image for i in range(14)], 7), "portraits")
    save(np.vstack([row(SHEETS / f"pairs_bin{number}.png", 8) for number in (0, 2, 3)]), "pairs")
    save(np.vstack([row(SHEETS / "base_and_tuned.png", 8, number) for number in range(2)]), "tuned")
    save(np.vstack([row(SHEETS / "restored.png", 9, number) for number in range(2)]), "restored")
    photographs = [np.asarray(beside(name)) for name in ("astronaut", "grace_hopper")]
    save(np.hstack(photographs), "photographs")


def row(sheet: Path, tiles: int, number: int = 0) -> np.ndarray:
    """Return one row of a contact sheet, (TILE, tiles * TILE, 3)."""
    return np.asarray(load_image(sheet))[number * TILE : (number + 1) * TILE, : tiles * TILE]


def beside(name: str, height: int = 320) -> Image.Image:
    """Return a photograph and its restoration beside it."""
    images = [load_image(DEMO / folder / f"{name}.png") for folder in ("photographs", "restored")]
    images = [image.resize((round(image.width * height / image.height), height)) for image in images]
    return Image.fromarray(np.hstack([np.asarray(image) for image in images]))


def save(image: np.ndarray, name: str) -> None:
    Image.fromarray(image).save(OUTPUT / f"{name}.jpg", quality=88, optimize=True)


if __name__ == "__main__":
    main()
