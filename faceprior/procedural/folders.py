"""Drawings in files: folders of images with captions."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from faceprior.images import save_image
from faceprior.procedural.portraits import Drawing, draw_portrait
from faceprior.procedural.scenes import draw_scene


def draw_folder(
    folder: str | Path,
    seeds: Iterable[int],
    size: int = 256,
    change: Callable[[Drawing, int], tuple[np.ndarray, str]] | None = None,
) -> list[Path]:
    """Draw one portrait per seed into `folder`, each a PNG with its caption in a .txt beside it; return their paths.

    change: alters a portrait, (drawing, seed) -> (image, a word for the file's name), as `Spoil` does. Images that
    exist already are kept, so that the same call resumes after an interruption.
    """
    folder, paths = Path(folder), []
    for seed in tqdm(list(seeds), desc="drawing", unit="portrait"):
        ready = sorted(folder.glob(f"portrait_{seed:05d}*.png"))
        paths += ready or [_draw_file(folder, seed, size, change)]
    return paths


def _draw_file(folder: Path, seed: int, size: int, change: Callable | None) -> Path:
    drawing = draw_portrait(seed, size)
    image, word = change(drawing, seed) if change else (drawing.image, "")
    path = folder / f"portrait_{seed:05d}{'_' * bool(word)}{word}.png"
    return save_captioned(image, drawing.caption(), path)


def draw_scenes(
    folder: str | Path, seeds: Iterable[int], size: int = 512, area_bins: Sequence[int] = (0, 1, 2)
) -> list[Path]:
    """Draw one scene per seed into `folder`, each a PNG with its caption in a .txt beside it; return their paths.

    area_bins: bins of Table 8 (see `draw_scene`); seed number i of the list gets area_bins[i % len(area_bins)]. Images
    that exist already are kept, so that the same call resumes after an interruption.
    """
    folder, paths = Path(folder), []
    for i, seed in enumerate(tqdm(list(seeds), desc="drawing", unit="scene")):
        path = folder / f"scene_{seed:05d}.png"
        if not path.exists():
            scene = draw_scene(seed, size, area_bin=area_bins[i % len(area_bins)])
            save_captioned(scene.image, scene.caption(), path)
        paths.append(path)
    return paths


def save_captioned(image: np.ndarray, caption: str, path: Path) -> Path:
    """Write an image and, before it, its caption, so that no image is without one; return the image's path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".txt").write_text(caption + "\n")
    return save_image(image, path)
