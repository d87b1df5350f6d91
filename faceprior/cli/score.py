"""`faceprior score`: print the Face Score of every face in images, folders and globs."""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

import faceprior
from faceprior.cli.drawing import copy_best, draw_scores
from faceprior.cli.inputs import Inputs, find_inputs
from faceprior.cli.options import (
    add_detection_options,
    add_model_options,
    checkpoint_of,
    count,
    device_of,
    dtype_of,
    fingerprint,
    load_checkpoint,
    number,
)
from faceprior.cli.outputs import common_tree, open_output_folder, plan_outputs, require_apart, require_no_inputs
from faceprior.cli.results import ImageScores, Listing, print_summary, reason, say
from faceprior.cli.score_file import ScoreFile, settings_file
from faceprior.images import count_frames
from faceprior.models import DEFAULT_PROMPT, SCORER_ID

if TYPE_CHECKING:
    from faceprior.scorer import FaceScorer, ScoreSettings

HELP = "print the Face Score of every face"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image, folder, glob, or `-` for a list on stdin with one path per line",
    )
    add_model_options(parser, SCORER_ID)
    add_detection_options(parser)
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
    # ---- images to score, files to write
    folders = {"--draw": options.draw, "--copy-best": options.copy_best and options.copy_best[1]}
    folders = {option: folder for option, folder in folders.items() if folder}
    inputs = find_inputs(options.images, list(folders.values()))
    drawings = _plan_drawings(inputs, options)
    for option, folder in folders.items():
        open_output_folder(folder, inputs.files, option)

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

    failed = sum(result.error is not None for result in results.values())
    if options.copy_best:
        failed += copy_best([result.above(options.min_score) for result in results.values()], *options.copy_best)
    return int(failed > 0)


def _plan_drawings(inputs: Inputs, options: argparse.Namespace) -> dict[str, Path]:
    """{image: its drawing}; ValueError if a file to write is an input, or has the name of another."""
    drawings = {}
    if options.draw:
        planned = plan_outputs(common_tree(inputs.files, inputs.roots), {"drawing": "{base}.png"})
        drawings = {image: options.draw / names["drawing"] for image, names in planned.items()}
    if options.copy_best:
        require_apart(drawings.values(), inputs.files, options.copy_best[1])
    if options.csv:
        require_no_inputs((options.csv, settings_file(options.csv)), inputs.files, "--csv")
    return drawings


def _load_scorer(options: argparse.Namespace) -> "tuple[FaceScorer, ScoreSettings]":
    """Load scorer and detector; options that cannot work fail here, before the first image."""
    from faceprior.detect import resolve_detector
    from faceprior.scorer import ScoreSettings

    checkpoint, device = checkpoint_of(options.checkpoint, "scorer"), device_of(options)
    scorer = load_checkpoint(faceprior.FaceScorer, checkpoint, dtype_of(options)).to(device)
    scorer.score_crops([], options.batch_size, options.prompt)
    detector = resolve_detector(options.detector)
    limits = options.min_confidence, options.min_face_size
    return scorer, ScoreSettings(detector, *limits, options.batch_size, options.prompt)


def _run_settings(
    options: argparse.Namespace, inputs: Inputs, scorer: "FaceScorer", settings: "ScoreSettings"
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
        "weights": fingerprint(scorer),
        "reference": reference,
        "directory": None if all(map(os.path.isabs, inputs.entries)) else os.getcwd(),
    }


def _scored_before(record: ScoreFile, files: list[str]) -> dict[str, ImageScores]:
    known = {file: found for file in files if (found := record.get(file))}
    if known or record.dropped:
        again = f", {record.dropped} that failed or are incomplete are tried again" if record.dropped else ""
        say(f"{record.path}: {len(known)} of {len(files)} images were scored before{again}")
    return known


def _score(
    inputs: Inputs, known: dict[str, ImageScores], scorer: "FaceScorer", settings: "ScoreSettings"
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
                error, faces = reason(file, faces), ()
            bar.update()
            _say_frames(file, error)
            yield ImageScores(file, tuple(faces), error)


def _say_frames(file: str, error: str | None) -> None:
    frames = 1 if error else count_frames(file)
    if frames > 1:
        say(f"{file}: only the first of {frames} frames or pages is scored; extract the others to score them")


def _draw(result: ImageScores, target: Path) -> ImageScores:
    """Draw the scores of an image; return them, or an error if the image was damaged after it was scored."""
    if result.error is not None:
        return result
    try:
        draw_scores(result, target)
    except Exception as error:
        return ImageScores(result.file, error=f"scored, but not drawn: {reason(result.file, error)}")
    return result
