"""The command line: `faceprior score` and `faceprior restore`. Models are imported only when a command runs."""

import argparse
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from faceprior import __version__

SCORER_ID = "OPPOer/FaceScore"
RESTORER_ID = "Ethanliang99/AuthFace"
DTYPES = ("float32", "float16", "bfloat16")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 1 when any input failed, 2 when nothing could be done."""
    options = make_parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("faceprior").setLevel(logging.INFO)  # which detector, which weights
    try:
        return options.run(options)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"faceprior: error: {error}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "faceprior", description="Score and restore faces in pictures.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"faceprior {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    score = commands.add_parser("score", help="print the Face Score of every face", allow_abbrev=False)
    _add_common(score, SCORER_ID)
    score.add_argument("--json", action="store_true", help="one JSON object per picture and line")
    score.set_defaults(run=run_score)

    restore = commands.add_parser("restore", help="restore the faces and paste them back", allow_abbrev=False)
    _add_common(restore, RESTORER_ID)
    restore.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the pictures")
    restore.add_argument("--compare", action="store_true", help="also write before | after as DIR/NAME_compare.png")
    restore.add_argument("--steps", type=int, help="sampling steps (default: the checkpoint's own)")
    restore.add_argument("--seed", type=int, help="of every face's noise (default: the checkpoint's own)")
    restore.add_argument("--color-fix", choices=("wavelet", "adain", "none"), default="wavelet")
    restore.set_defaults(run=run_restore)
    return parser


def _add_common(parser: argparse.ArgumentParser, checkpoint: str) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture, folder or glob")
    parser.add_argument(
        "--checkpoint",
        default=checkpoint,
        help="folder, hub id, or `tiny` for the small embedded model (default: %(default)s)",
    )
    parser.add_argument(
        "--detector", default="auto", choices=("auto", "retinaface", "mtcnn"), help="auto never downloads"
    )
    parser.add_argument(
        "--min-confidence", type=float, default=0.9, help="of the detector, [0, 1] (default: %(default)s)"
    )
    parser.add_argument("--min-face-size", type=int, default=20, help="pixels (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)


def run_score(options: argparse.Namespace) -> int:
    """Score every picture, printing results as they come."""
    paths = _find(options)
    from faceprior import FaceScorer

    scorer = FaceScorer.from_pretrained(_checkpoint(options, "scorer"), **_dtype(options)).to(_device(options)).eval()

    def score(path: Path) -> dict:
        from faceprior.images import load_image

        detection = {"min_confidence": options.min_confidence, "min_face_size": options.min_face_size}
        found = scorer.score(load_image(path), detector=options.detector, **detection)
        return {"faces": [{key: face.to_dict()[key] for key in ("score", "box", "confidence")} for face in found]}

    failed = []
    for path, result in _each(paths, score, failed):
        print(json.dumps({"file": str(path), **result}) if options.json else _describe(path, result), flush=True)
    return _summary(failed, len(paths))


def _describe(path: Path, result: dict) -> str:
    if "error" in result:
        return f"{path}: error"
    lines = [
        f"{path}: {face['score']:.4f}  box {' '.join(f'{v:.0f}' for v in face['box'])}" for face in result["faces"]
    ]
    return "\n".join(lines) or f"{path}: no face"


def run_restore(options: argparse.Namespace) -> int:
    """Restore every picture into the output folder; pictures that are there already are left alone."""
    paths = _find(options)
    targets = _targets(options, paths)
    from faceprior import AuthFaceRestorer

    restorer = AuthFaceRestorer.from_pretrained(_checkpoint(options, "restorer"), **_dtype(options)).to(
        _device(options)
    )
    sampling = {key: getattr(options, key) for key in ("steps", "seed") if getattr(options, key) is not None}

    def restore(path: Path) -> str:
        from faceprior.images import load_image, save_image

        photograph = load_image(path)
        result = restorer.restore(
            photograph,
            options.detector,
            options.min_confidence,
            options.min_face_size,
            color_fix=options.color_fix,
            **sampling,
        )
        if options.compare:
            save_image(
                _side_by_side(photograph, result.image), targets[path].with_name(f"{targets[path].stem}_compare.png")
            )
        save_image(result.image, targets[path])
        count = len(result.faces)
        return f"{count} face{'s' if count > 1 else ''} restored" if count else "no face found, copied as it is"

    failed = []
    for path, result in _each(paths, restore, failed):
        print(f"{path}: {'error' if isinstance(result, dict) else f'{result} -> {targets[path]}'}", flush=True)
    return _summary(failed, len(paths))


def _targets(options: argparse.Namespace, paths: list[Path]) -> dict[Path, Path]:
    """Map each picture to DIR/<stem>.png, folders below a given folder kept; equal stems keep their suffix as well."""
    from faceprior.images import relative_stem

    stems = {path: relative_stem(path, *options.images) for path in paths}
    counts = Counter(stems.values())
    names = {p: f"{stem.name}.png" if counts[stem] == 1 else f"{p.name}.png" for p, stem in stems.items()}
    return {path: options.output / stem.parent / names[path] for path, stem in stems.items()}


def _side_by_side(before, after):
    from PIL import Image

    sheet = Image.new("RGB", (before.width + after.width, before.height))
    sheet.paste(before, (0, 0))
    sheet.paste(after, (before.width, 0))
    return sheet


def _find(options: argparse.Namespace) -> list[Path]:
    from faceprior.images import find_images

    return find_images(*options.images)


def _checkpoint(options: argparse.Namespace, kind: str) -> str:
    """Return the checkpoint's folder or id, after saying so if it is a tiny one."""
    from faceprior import tiny
    from faceprior.training import quiet_libraries

    quiet_libraries()
    folder = tiny.resolve(options.checkpoint, kind)
    about = tiny.info(folder)
    if about is not None:
        state = "trained" if about["trained"] else "UNTRAINED: its results mean nothing"
        print(f"{folder}: {tiny.NOTICE} ({state})", file=sys.stderr)
    return folder


def _dtype(options: argparse.Namespace) -> dict:
    import torch

    return {"dtype": getattr(torch, options.dtype)}


def _device(options: argparse.Namespace):
    from faceprior.training import resolve_device

    return resolve_device(options.device)


def _each(paths: list[Path], work: Callable, failed: list[tuple[Path, str]]) -> Iterator[tuple[Path, object]]:
    """Yield (path, result) for every picture; one that fails gives {"error": reason} and the rest goes on."""
    from tqdm.auto import tqdm

    for path in tqdm(paths, unit="picture", disable=None, file=sys.stderr):
        try:
            yield path, work(path)
        except (ValueError, OSError) as error:
            failed.append((path, str(error)))
            yield path, {"error": str(error)}


def _summary(failed: list[tuple[Path, str]], total: int) -> int:
    for path, reason in failed:
        print(f"{path}: {reason}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {total} pictures failed", file=sys.stderr)
    return 1 if failed else 0
