"""The command line: `faceprior score` and `faceprior restore`. Models are imported only when a command runs."""

import argparse
import logging
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from faceprior import __version__
from faceprior.models import DEFAULT_PROMPT, RESTORER_ID, SCORER_ID

DTYPES = ("float32", "float16", "bfloat16")


LOOSE = "(single pictures)"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code.

    0, or 1 when any input failed, 2 when nothing (more) could be done, 130 after Ctrl-C, 141 when nobody reads stdout.
    """
    options = make_parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("faceprior").setLevel(logging.INFO)  # which detector, which weights
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("faceprior: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush would fail as well
        return 141
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
    _add_common(score, SCORER_ID, "picture, folder, glob, or `-` for a list on stdin, one a line")
    _add_score(score)
    score.set_defaults(run=run_score)

    restore = commands.add_parser("restore", help="restore the faces and paste them back", allow_abbrev=False)
    _add_common(restore, RESTORER_ID)
    restore.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the pictures")
    restore.add_argument("--compare", action="store_true", help="also write before | after as DIR/NAME_compare.png")
    restore.add_argument("--steps", type=int, help="sampling steps (default: the checkpoint's own)")
    restore.add_argument("--seed", type=int, help="of every face's noise (default: the checkpoint's own)")
    restore.add_argument(
        "--start",
        choices=("noise", "degraded"),
        help="sample from pure noise or from the noised face, whose colours drift less (default: the checkpoint's own)",
    )
    restore.add_argument("--color-fix", choices=("wavelet", "adain", "none"), default="wavelet")
    restore.set_defaults(run=run_restore)
    return parser


def _add_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=_count, default=32, help="faces per pass (default: %(default)s)")
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help="what the network reads (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object per picture and line")
    parser.add_argument("--sort", action="store_true", help="best score first; nothing is listed before the end")
    parser.add_argument(
        "--min-score",
        type=_number,
        metavar="X",
        help="list and copy only faces at least so good; a picture without any stands in the table as `below`, in"
        " JSON with no faces; file, drawings and summary hold all faces",
    )
    parser.add_argument(
        "--csv",
        type=Path,
        metavar="FILE",
        help="write one row per face, and for a picture without a face or with an error; what an earlier run of the"
        " same settings scored in FILE is not scored again, what failed is tried again",
    )
    parser.add_argument("--overwrite", action="store_true", help="start the --csv FILE and the drawings anew")
    parser.add_argument(
        "--draw",
        type=Path,
        metavar="DIR",
        help="write copies with boxes and scores as PNG in the same tree below DIR, which is passed over when a"
        " folder above it is scored",
    )
    parser.add_argument(
        "--copy-best",
        nargs=2,
        action=_CopyBest,
        metavar=("N", "DIR"),
        help="copy the N pictures with the best faces to DIR/RANK_NAME; DIR is passed over like that of --draw",
    )


def _bounded(kind: type, rule: str, holds: Callable) -> Callable:
    """An argparse type whose error names the rule."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"has to be {rule} but is {text!r}")
        return value

    return parse


_number = _bounded(float, "a finite number", math.isfinite)


_fraction = _bounded(float, "a number in [0, 1]", lambda value: 0 <= value <= 1)


_count = _bounded(int, "a whole number, at least 1", lambda value: value >= 1)


class _CopyBest(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        try:
            setattr(namespace, self.dest, (_count(values[0]), Path(values[1])))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, f"N {error}") from error


def _add_common(parser: argparse.ArgumentParser, checkpoint: str, images: str = "picture, folder or glob") -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help=images)
    parser.add_argument(
        "--checkpoint",
        default=checkpoint,
        help="folder, hub id, or `tiny` for the small embedded model (default: %(default)s)",
    )
    parser.add_argument(
        "--detector", default="auto", choices=("auto", "retinaface", "mtcnn"), help="auto never downloads"
    )
    parser.add_argument(
        "--min-confidence", type=_fraction, default=0.9, help="of the detector, [0, 1] (default: %(default)s)"
    )
    parser.add_argument("--min-face-size", type=_count, default=20, help="pixels (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)


@dataclass(frozen=True)
class _Inputs:
    """entries: {file: None, or why it cannot be found}, in order; groups: {folder given: its files}."""

    entries: dict[str, str | None]
    groups: dict[str, dict[str, None]]

    @property
    def files(self) -> list[str]:
        return [name for name, error in self.entries.items() if error is None]

    @property
    def roots(self) -> list[Path]:
        loose = [Path(name).parent for name in self.groups.get(LOOSE, ())]
        return [Path(name).expanduser() for name in self.groups if name != LOOSE] + loose


def run_score(options: argparse.Namespace) -> int:
    """Score every picture, printing results as they come; what cannot be read is named at the end."""
    from faceprior.cli import score_output

    inputs = _gather(options)
    if not inputs.files:
        raise ValueError("\n".join(error for error in inputs.entries.values() if error) or "no paths on stdin")
    for option, folder in _output_folders(options).items():
        score_output.open_output_folder(folder, inputs.files, option)
    scorer, detector = _load_scorer(options)
    record = None
    if options.csv:
        settings = _settings(options, inputs, scorer, detector)
        record = score_output.ScoreFile(options.csv, settings, options.overwrite)
    listing = score_output.Listing(options.json, options.min_score, options.sort)
    results = {}
    try:
        for result in _results(options, inputs, scorer, detector, record):
            results[result.file] = result
            listing.add(result)
    finally:
        listing.close()
        score_output.say_summary(inputs.groups, results, len(inputs.entries))
    if options.copy_best:
        good = [result.above(options.min_score) for result in results.values()]
        score_output.copy_best(good, *options.copy_best)
    return int(any(result.error is not None for result in results.values()))


def _gather(options: argparse.Namespace) -> _Inputs:
    """Find the pictures; what is not there does not stop the others."""
    from faceprior.cli.score_output import without_outputs
    from faceprior.images import find_images

    entries, groups, first_names = {}, {}, {}
    folders = list(_output_folders(options).values())
    for argument in _arguments(options.images):
        try:
            found = without_outputs(argument, find_images(argument), folders)
        except (ValueError, OSError) as error:
            entries[str(Path(os.path.expanduser(argument)))] = str(error)  # as it is called where it is found
            continue
        names = [first_names.setdefault(os.path.realpath(path), str(path)) for path in found]
        entries.update(dict.fromkeys(names))
        groups.setdefault(argument if Path(argument).expanduser().is_dir() else LOOSE, {}).update(dict.fromkeys(names))
    return _Inputs(entries, groups)


def _arguments(images: list[str]) -> Iterator[str]:
    """The arguments, with `-` replaced by the lines of stdin (read as bytes: a file name may be no text)."""
    for argument in images:
        if argument == "-":
            lines = (line.rstrip(b"\r") for line in sys.stdin.buffer.read().split(b"\n"))
            yield from (os.fsdecode(line) for line in lines if line)
        else:
            yield argument


def _output_folders(options: argparse.Namespace) -> dict[str, Path]:
    folders = {"--draw": options.draw, "--copy-best": options.copy_best and options.copy_best[1]}
    return {option: folder for option, folder in folders.items() if folder}


def _load_scorer(options: argparse.Namespace) -> tuple:
    """Return the scorer and the detector, after trying what may be wrong with the options."""
    from PIL import Image

    from faceprior import FaceScorer
    from faceprior.detect import resolve_detector

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # load_image has its own limit
    folder, device = _checkpoint(options, "scorer"), _device(options)
    scorer = FaceScorer.from_pretrained(folder, **_dtype(options)).to(device).eval()
    scorer.score_crops([], options.batch_size, options.prompt)
    return scorer, resolve_detector(options.detector)


def _settings(options: argparse.Namespace, inputs: _Inputs, scorer, detector) -> dict:
    """What all rows of a CSV file have in common: a change of any would make them incomparable.

    directory: the one that relative names of pictures are relative to; None where all are absolute.
    """
    from faceprior.cli.score_output import fingerprint

    names = ("checkpoint", "dtype", "prompt", "min_confidence", "min_face_size")
    settings = {name: getattr(options, name) for name in names}
    reference = scorer.reference and f"{scorer.reference.name} (n = {scorer.reference.n})"
    settings |= {"detector": detector.name, "weights": fingerprint(scorer), "reference": reference}
    return {**settings, "directory": None if all(map(os.path.isabs, inputs.entries)) else os.getcwd()}


def _results(options: argparse.Namespace, inputs: _Inputs, scorer, detector, record) -> Iterator:
    """Yield a PictureScores per input, in order, drawn and on record; what is on record is not scored again."""
    from tqdm.auto import tqdm

    from faceprior.cli.score_output import PictureScores, drawing_paths, say

    known = {name: found for name in inputs.files if record and (found := record.get(name))}
    if record and (known or record.dropped):
        again = f", {record.dropped} that failed or are incomplete are tried again" if record.dropped else ""
        say(f"{options.csv}: {len(known)} of {len(inputs.files)} pictures were scored before{again}")
    targets = drawing_paths(inputs.files, inputs.roots, options.draw) if options.draw else {}
    fresh = _score_pictures(options, scorer, detector, [name for name in inputs.files if name not in known])
    total = len(inputs.entries)
    with tqdm(total=total, initial=len(known), unit="picture", disable=None, file=sys.stderr) as bar:
        for name, error in inputs.entries.items():
            result = PictureScores(name, error=error) if error else known.get(name) or next(fresh)
            drawn = name in known and targets and targets[name].exists()
            told = result
            if options.draw and result.error is None and not drawn:
                told = _draw(result, targets[name])
            if name not in known:
                bar.update()
                if record:
                    record.append(result)
            yield told


def _draw(result, target: Path):
    """Draw a picture's scores; the result, or an error where the picture was spoilt since it was scored."""
    from faceprior.cli.score_output import PictureScores, draw_scores

    try:
        draw_scores(result.file, result, target)
    except (ValueError, OSError) as error:
        return PictureScores(result.file, error=f"scored, but not drawn: {error}")
    return result


def _score_pictures(options: argparse.Namespace, scorer, detector, names: list[str]) -> Iterator:
    """Yield a PictureScores per picture, in order."""
    from faceprior.cli.score_output import PictureScores

    limits = options.min_confidence, options.min_face_size
    found = scorer.score_each(names, None, detector, *limits, options.batch_size, options.prompt)
    for name, faces in zip(names, found, strict=True):
        if isinstance(faces, Exception):
            yield PictureScores(name, error=_reason(name, faces))
            continue
        scored = [
            {
                "score": face.score,
                "percentile": face.percentile,
                "box": list(face.box),
                "confidence": face.confidence,
            }
            for face in faces
        ]
        yield PictureScores(name, tuple(scored))


def _reason(name: str, error: Exception) -> str:
    if isinstance(error, (ValueError, OSError)):
        return str(error) or type(error).__name__
    return f"{name}: {type(error).__name__}: {error}"  # a library's failure on one picture of thousands


def run_restore(options: argparse.Namespace) -> int:
    """Restore every picture into the output folder; pictures that are there already are left alone."""
    paths = _find(options)
    targets = _targets(options, paths)
    from faceprior import AuthFaceRestorer

    restorer = AuthFaceRestorer.from_pretrained(_checkpoint(options, "restorer"), **_dtype(options)).to(
        _device(options)
    )
    sampling = {key: getattr(options, key) for key in ("steps", "seed", "start") if getattr(options, key) is not None}

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
    """Map each picture to DIR/<stem>.png, folders below a given folder kept; equal stems keep their suffix as well.

    Where two given folders hold pictures of one name, the tree below the folder that holds both is kept.
    """
    from faceprior.images import common_folder, relative_stem

    stems = {path: relative_stem(path, *options.images) for path in paths}
    if len({(stem, path.suffix) for path, stem in stems.items()}) < len(paths):
        resolved = {path: Path(os.path.realpath(path)) for path in paths}
        root = common_folder(list(resolved.values()))
        stems = {path: whole.relative_to(root).with_suffix("") for path, whole in resolved.items()}
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
    from faceprior.models import quiet_libraries

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
    from faceprior.models import resolve_device

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
