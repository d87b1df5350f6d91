"""`faceprior restore`: restore the faces of images and paste them back."""

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm.auto import tqdm

import faceprior
from faceprior.cli.inputs import find_inputs
from faceprior.cli.options import (
    add_common_options,
    checkpoint_of,
    device_of,
    dtype_of,
    fingerprint,
    load_checkpoint,
)
from faceprior.cli.outputs import (
    COMPARISON,
    COPY,
    RESTORED,
    RESULT,
    RestoreRecord,
    own_trees,
    plan_outputs,
    require_no_inputs,
    require_short,
)
from faceprior.cli.results import reason, say, show
from faceprior.files import copy_file
from faceprior.images import ImageError, SourceImage, count_frames, load_image, read_source, save_image
from faceprior.models import QUANTIZATIONS, RESTORER_ID

if TYPE_CHECKING:
    from faceprior.restorer import AuthFaceRestorer, RestoredImage

HELP = "restore the faces and paste them back"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_common_options(parser, RESTORER_ID, "image, folder, glob, or `-` for a list on stdin with one path per line")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for restored images, PNG in the same tree; an image without a face is copied as it is; images that"
        " an earlier run with the same settings restored to DIR are not restored again, and no other file in it is"
        " overwritten",
    )
    parser.add_argument(
        "--quantization",
        default="none",
        choices=QUANTIZATIONS,
        help="quantization of the networks, for less memory; 8bit takes half of 16 bits, nf4 a good quarter"
        " (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="restore again what an earlier run wrote to DIR")
    parser.add_argument("--compare", action="store_true", help="also write before | after as DIR/NAME_compare.png")
    parser.add_argument(
        "--steps", type=int, dest="num_inference_steps", help="number of sampling steps (default: the checkpoint's own)"
    )
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
        help="method that gives the restored face the colours of the degraded one; grey and toned faces keep their tone"
        " with each (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Restore every image into the output folder; those that fail are named at the end."""
    # ---- images to restore, files to write
    folder = options.output
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"-o {folder} is a file: give a folder")
    inputs = find_inputs(options.images, record_folders=[folder])
    record = RestoreRecord(folder, options.overwrite)
    patterns = RESTORED if options.compare else {kind: RESTORED[kind] for kind in (RESULT, COPY)}
    bases = record.bases(inputs.files)
    taken = record.taken(inputs.files)
    names = plan_outputs(own_trees(inputs.files, inputs.folders), patterns, bases, taken)
    targets = [name for planned in names.values() for name in planned.values()]
    require_no_inputs((folder / name for name in targets), inputs.files, f"-o {folder}")
    record.require_free(targets)

    # ---- the restorer, and the settings that decide what comes out
    checkpoint = checkpoint_of(options, "restorer")
    dtype, quantization = dtype_of(options), options.quantization
    restorer = load_checkpoint(faceprior.AuthFaceRestorer, checkpoint, dtype, quantization=quantization)
    restorer.to(device_of(options))
    detector, sampling = _detector_of(options), _sampling_of(options)
    settings = _digest(options, restorer, detector.name, sampling)

    def restore(file: str) -> "RestoredImage":
        limits = {key: getattr(options, key) for key in ("min_confidence", "min_face_size")}
        return restorer.restore(_read(file), detector=detector, **limits, color_fix=options.color_fix, **sampling)

    # ---- restore
    failed = {file: error for file, error in inputs.entries.items() if error}
    try:
        for file in tqdm(inputs.files, unit="image", disable=None, file=sys.stderr):
            try:
                line = _restored(file, names[file], record, settings, restore)
            except Exception as error:  # whatever fails in one image, the others are restored
                failed[file], line = reason(file, error, "`--dtype bfloat16`, `--quantization nf4`"), "error"
            if file in failed:
                _free_memory()
            show(f"{file}: {line}")
    finally:
        for file, error in failed.items():
            say(error if file in error else f"{file}: {error}")
        if failed:
            say(f"{len(failed)} of {len(inputs.entries)} images failed")
    return int(bool(failed))


def _detector_of(options: argparse.Namespace) -> Any:
    from faceprior.detect import resolve_detector

    return resolve_detector(options.detector)


def _sampling_of(options: argparse.Namespace) -> dict[str, Any]:
    given = {key: getattr(options, key) for key in ("num_inference_steps", "seed", "start")}
    return {key: value for key, value in given.items() if value is not None}


def _digest(options: argparse.Namespace, restorer: "AuthFaceRestorer", detector: str, sampling: dict[str, Any]) -> str:
    """Hash all that decides how an image is restored."""
    pipeline = restorer.pipeline
    parts = (pipeline.unet, pipeline.controlnet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    settings = {
        **dataclasses.asdict(dataclasses.replace(restorer.settings, **sampling)),
        "version": faceprior.__version__,
        "weights": fingerprint(*parts),
        "detector": detector,
        **{key: getattr(options, key) for key in ("dtype", "min_confidence", "min_face_size", "color_fix")},
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _restored(
    file: str,
    names: dict[str, str],
    record: RestoreRecord,
    settings: str,
    restore: Callable[[str], "RestoredImage"],
) -> str:
    """Restore an image and write its outputs, unless an earlier run did; say what was done."""
    needed = [kind for kind in names if kind == COMPARISON]
    if done := record.finished(file, settings, needed):
        return f"finished before -> {record.folder / _main_output(done)}"
    require_short(file, names)
    result = restore(file)
    names = {kind: name for kind, name in names.items() if kind != (COPY if result.restored else RESULT)}
    record.claim(file, names)
    _write(result, file, {kind: record.folder / name for kind, name in names.items()})
    record.finish(file, names, settings)
    return f"{_done(result)} -> {record.folder / _main_output(names)}"


def _read(file: str) -> SourceImage:
    frames = count_frames(file)
    if frames > 1:
        raise ImageError(
            f"{file} holds {frames} frames or pages, but a result has one: extract them as images and restore those"
        )
    return read_source(file)


def _write(result: "RestoredImage", file: str, targets: dict[str, Path]) -> None:
    """Write the outputs of an image, the one that counts last."""
    if COMPARISON in targets:
        save_image(_side_by_side(result.source.rgb, load_image(result.image)), targets[COMPARISON])
    if COPY in targets:
        copy_file(file, targets[COPY])
    else:
        save_image(result.source.in_own_mode(result.image), targets[RESULT], result.source.metadata)


def _main_output(names: dict[str, str]) -> str:
    return names.get(RESULT) or names[COPY]


def _done(result: "RestoredImage") -> str:
    """Say what was done with the faces of an image, and what its result does not hold."""
    restored, left = len(result.restored), len(result.left)
    reasons = "; ".join(dict.fromkeys(face.reason for face in result.left))
    if not restored:
        return f"{f'no face restored ({reasons})' if left else 'no face found'}, copied as it is"
    done = f"{_count(restored, 'face')} restored"
    if left:
        done += f", {left} left unchanged ({reasons})"
    if result.source.lost:
        done += f", not kept: {', '.join(result.source.lost)}"
    return done


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _free_memory() -> None:
    """Give the memory of a failed image back, for the next one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _side_by_side(before: Image.Image, after: Image.Image) -> Image.Image:
    sheet = Image.new("RGB", (before.width + after.width, before.height))
    sheet.paste(before, (0, 0))
    sheet.paste(after, (before.width, 0))
    return sheet
