"""`faceprior score`: print the Face Score of every face in images, folders and globs."""

import argparse
import hashlib
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm.auto import tqdm

import faceprior
from faceprior.cli.drawing import copy_best, draw_scores, drawing_paths, open_output_folder, without_outputs
from faceprior.cli.options import add_common_options, checkpoint_of, count, device_of, dtype_of, number
from faceprior.cli.results import ImageScores, Listing, print_summary, say
from faceprior.cli.score_file import ScoreFile
from faceprior.images import find_images
from faceprior.models import DEFAULT_PROMPT, SCORER_ID

if TYPE_CHECKING:
    from faceprior.scorer import FaceScorer, ScoreSettings

HELP = "print the Face Score of every face"
SINGLE_IMAGES = "(single images)"  # in the summary, those that were not given by their folder


def add_options(parser: argparse.ArgumentParser) -> None:
    add_common_options(parser, SCORER_ID, "image, folder, glob, or `-` for a list on stdin with one path per line")
    parser.add_argument(
        "--batch-size", type=count, default=32, help="number of faces per forward pass (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt", default=DEFAULT_PROMPT, help="prompt for the text encoder of the scorer (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per image and line")
    parser.add_argument("--sort", action="store_true", help="print the best score first, when all images are scored")
    parser.add_argument(
        "--min-score",
        type=number,
        metavar="X",
        help="lowest score of a face to print or copy; an image without such a face is shown as `below` in the table"
        " and with no faces in JSON; CSV file, drawings and summary contain all faces",
    )
    parser.add_argument(
        "--csv",
        type=Path,
        metavar="FILE",
        help="CSV file with one row per face, and for an image without a face or with an error; images that an earlier"
        " run with the same settings scored in FILE are not scored again, failed ones are tried again",
    )
    parser.add_argument("--overwrite", action="store_true", help="start over with a new --csv FILE and new drawings")
    parser.add_argument(
        "--draw",
        type=Path,
        metavar="DIR",
        help="folder for copies of the images with boxes and scores, PNG in the same tree; it is skipped when a folder"
        " above it is scored",
    )
    parser.add_argument(
        "--copy-best",
        nargs=2,
        action=_CopyBest,
        metavar=("N", "DIR"),
        help="number of images with the best faces to copy to DIR/RANK_NAME, and the folder; DIR is skipped like that"
        " of --draw",
    )


class _CopyBest(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        try:
            setattr(namespace, self.dest, (count(values[0]), Path(values[1])))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, f"N {error}") from error


def run(options: argparse.Namespace) -> int:
    """Score every image, printing results as they come; what cannot be read is named at the end."""
    # ---- images to score, folders to write to
    folders = {"--draw": options.draw, "--copy-best": options.copy_best and options.copy_best[1]}
    folders = {option: folder for option, folder in folders.items() if folder}
    inputs = _find_inputs(options.images, list(folders.values()))
    if not inputs.files:
        raise ValueError("\n".join(error for error in inputs.entries.values() if error) or "no paths on stdin")
    for option, folder in folders.items():
        open_output_folder(folder, inputs.files, option)
    drawings = drawing_paths(inputs.files, inputs.roots, options.draw) if options.draw else {}

    # ---- the scorer, and what an earlier run scored
    scorer, settings = _load_scorer(options)
    record, known = None, {}
    if options.csv:
        record = ScoreFile(options.csv, _run_settings(options, inputs, scorer, settings), options.overwrite)
        known = _scored_before(record, inputs.files)

    # ---- score
    listing, results = Listing(options.json, options.min_score, options.sort), {}
    try:
        for result in _score(inputs, known, scorer, settings):
            if record and result.file not in known:
                record.append(result)
            if result.file in drawings and not (result.file in known and drawings[result.file].exists()):
                result = _draw(result, drawings[result.file])
            results[result.file] = result
            listing.add(result)
    finally:
        listing.close()
        print_summary(inputs.groups, results, len(inputs.entries))

    if options.copy_best:
        copy_best([result.above(options.min_score) for result in results.values()], *options.copy_best)
    return int(any(result.error is not None for result in results.values()))


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
        single = [Path(name).parent for name in self.groups.get(SINGLE_IMAGES, ())]
        return [Path(name).expanduser() for name in self.groups if name != SINGLE_IMAGES] + single


def _find_inputs(images: list[str], output_folders: list[Path]) -> _Inputs:
    """Find the images; one that does not exist does not stop the others."""
    entries, groups, first_names = {}, {}, {}
    for argument in _arguments(images):
        try:
            found = without_outputs(argument, find_images(argument), output_folders)
        except (ValueError, OSError) as error:
            entries[str(Path(os.path.expanduser(argument)))] = str(error)  # the same name as where it is found
            continue
        names = [first_names.setdefault(os.path.realpath(path), str(path)) for path in found]
        entries.update(dict.fromkeys(names))
        group = argument if Path(argument).expanduser().is_dir() else SINGLE_IMAGES
        groups.setdefault(group, {}).update(dict.fromkeys(names))
    return _Inputs(entries, groups)


def _arguments(images: list[str]) -> Iterator[str]:
    """The arguments, with `-` replaced by the lines of stdin (read as bytes: a file name may not be valid text)."""
    for argument in images:
        if argument == "-":
            lines = (line.rstrip(b"\r") for line in sys.stdin.buffer.read().split(b"\n"))
            yield from (os.fsdecode(line) for line in lines if line)
        else:
            yield argument


def _load_scorer(options: argparse.Namespace) -> "tuple[FaceScorer, ScoreSettings]":
    """Load scorer and detector; options that cannot work fail here, before the first image."""
    from faceprior.detect import resolve_detector
    from faceprior.scorer import ScoreSettings

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # load_image has its own limit
    checkpoint, device = checkpoint_of(options, "scorer"), device_of(options)
    scorer = faceprior.FaceScorer.from_pretrained(checkpoint, dtype=dtype_of(options)).to(device)
    scorer.score_crops([], options.batch_size, options.prompt)
    detector = resolve_detector(options.detector)
    limits = options.min_confidence, options.min_face_size
    return scorer, ScoreSettings(detector, *limits, options.batch_size, options.prompt)


def _run_settings(
    options: argparse.Namespace, inputs: _Inputs, scorer: "FaceScorer", settings: "ScoreSettings"
) -> dict[str, Any]:
    """The settings that all rows of a CSV file share: scores under different ones cannot be compared.

    directory: the one that relative names of images are relative to; None if all are absolute.
    """
    reference = scorer.reference and f"{scorer.reference.name} (n = {scorer.reference.n})"
    return {
        "checkpoint": options.checkpoint,
        "dtype": options.dtype,
        "prompt": settings.prompt,
        "min_confidence": settings.min_confidence,
        "min_face_size": settings.min_face_size,
        "detector": settings.detector.name,
        "weights": _fingerprint(scorer),
        "reference": reference,
        "directory": None if all(map(os.path.isabs, inputs.entries)) else os.getcwd(),
    }


def _fingerprint(scorer: "FaceScorer") -> str:
    """Hash the first numbers of every tensor: a folder may hold other weights than last time."""
    digest = hashlib.sha256()
    for name, tensor in sorted(scorer.state_dict().items()):
        # through bfloat16, so that the same weights give the same hash in every dtype
        digest.update(name.encode() + tensor.flatten()[:4096].bfloat16().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _scored_before(record: ScoreFile, files: list[str]) -> dict[str, ImageScores]:
    known = {file: found for file in files if (found := record.get(file))}
    if known or record.dropped:
        again = f", {record.dropped} that failed or are incomplete are tried again" if record.dropped else ""
        say(f"{record.path}: {len(known)} of {len(files)} images were scored before{again}")
    return known


def _score(
    inputs: _Inputs, known: dict[str, ImageScores], scorer: "FaceScorer", settings: "ScoreSettings"
) -> Iterator[ImageScores]:
    """Yield the scores of every input, in order; those in `known` are not computed again."""
    unknown = [file for file in inputs.files if file not in known]
    scored = scorer.score_each(unknown, **vars(settings))
    with tqdm(total=len(inputs.entries), initial=len(known), unit="image", disable=None, file=sys.stderr) as bar:
        for file, error in inputs.entries.items():
            if file in known:
                yield known[file]
                continue
            faces = () if error else next(scored)
            if isinstance(faces, Exception):
                error, faces = _reason(file, faces), ()
            bar.update()
            yield ImageScores(file, tuple(faces), error)


def _reason(file: str, error: Exception) -> str:
    if isinstance(error, (ValueError, OSError)):
        return str(error) or type(error).__name__
    return f"{file}: {type(error).__name__}: {error}"  # a library's failure on one image of thousands


def _draw(result: ImageScores, target: Path) -> ImageScores:
    """Draw the scores of an image; return them, or an error if the image was damaged after it was scored."""
    if result.error is not None:
        return result
    try:
        draw_scores(result, target)
    except (ValueError, OSError) as error:
        return ImageScores(result.file, error=f"scored, but not drawn: {error}")
    return result
