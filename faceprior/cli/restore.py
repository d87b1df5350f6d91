"""`faceprior restore`: restore the faces of images and paste them back."""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

import faceprior
from faceprior.cli.options import add_common_options, checkpoint_of, device_of, dtype_of
from faceprior.images import common_folder, find_images, load_image, relative_stem, save_image
from faceprior.models import RESTORER_ID

HELP = "restore the faces and paste them back"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_common_options(parser, RESTORER_ID, "image, folder or glob")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for restored images")
    parser.add_argument("--compare", action="store_true", help="also write before | after as DIR/NAME_compare.png")
    parser.add_argument("--steps", type=int, help="number of sampling steps (default: the checkpoint's own)")
    parser.add_argument("--seed", type=int, help="seed of the noise of every face (default: the checkpoint's own)")
    parser.add_argument(
        "--start",
        choices=("noise", "degraded"),
        help="start of the sampling: pure noise, or the degraded face with noise, whose colours drift less"
        " (default: the checkpoint's own)",
    )
    parser.add_argument(
        "--color-fix",
        choices=("wavelet", "adain", "none"),
        default="wavelet",
        help="method that gives the restored face the colours of the degraded one (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Restore every image into the output folder; those that fail are named at the end."""
    paths = find_images(*options.images)
    targets = _targets(paths, options.images, options.output)

    checkpoint = checkpoint_of(options, "restorer")
    restorer = faceprior.AuthFaceRestorer.from_pretrained(checkpoint, dtype=dtype_of(options)).to(device_of(options))
    sampling = {key: getattr(options, key) for key in ("steps", "seed", "start") if getattr(options, key) is not None}
    sampling["color_fix"] = options.color_fix

    failed = {}
    for path in tqdm(paths, unit="image", disable=None, file=sys.stderr):
        try:
            photograph = load_image(path)
            result = restorer.restore(
                photograph, options.detector, options.min_confidence, options.min_face_size, **sampling
            )
            if options.compare:
                compared = targets[path].with_name(f"{targets[path].stem}_compare.png")
                save_image(_side_by_side(photograph, result.image), compared)
            save_image(result.image, targets[path])
        except (ValueError, OSError) as error:
            failed[path] = error
            print(f"{path}: error", flush=True)
            continue
        count = len(result.faces)
        done = f"{count} face{'s' * (count > 1)} restored" if count else "no face found, copied as it is"
        print(f"{path}: {done} -> {targets[path]}", flush=True)

    for path, error in failed.items():
        print(f"{path}: {error}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(paths)} images failed", file=sys.stderr)
    return int(bool(failed))


def _targets(paths: list[Path], given: list[str], output: Path) -> dict[Path, Path]:
    """Map each image to `output`/<stem>.png, keeping the tree below a given folder.

    Images that differ in their suffix only keep it: `a.jpg.png`. If two given folders contain images of the same name,
    the tree below the folder that contains both is kept.
    """
    stems = {path: relative_stem(path, *given) for path in paths}
    if len({(stem, path.suffix) for path, stem in stems.items()}) < len(paths):
        resolved = {path: Path(os.path.realpath(path)) for path in paths}
        root = common_folder(list(resolved.values()))
        stems = {path: whole.relative_to(root).with_suffix("") for path, whole in resolved.items()}
    counts = Counter(stems.values())
    names = {path: stem.name if counts[stem] == 1 else path.name for path, stem in stems.items()}
    return {path: output / stem.parent / f"{names[path]}.png" for path, stem in stems.items()}


def _side_by_side(before: Image.Image, after: Image.Image) -> Image.Image:
    sheet = Image.new("RGB", (before.width + after.width, before.height))
    sheet.paste(before, (0, 0))
    sheet.paste(after, (before.width, 0))
    return sheet
