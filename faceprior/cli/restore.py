"""`faceprior restore`: restore the faces of images and videos and paste them back."""

import argparse
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm.auto import tqdm

from faceprior.cli.inputs import Inputs, find_inputs
from faceprior.cli.options import add_detection_options, add_model_options, count, fraction, number, percent, positive
from faceprior.cli.outcomes import Outcome, Summary, counted
from faceprior.cli.outputs import (
    COMPARISON,
    COPY,
    FACE,
    FACE_NAME,
    FORMATS,
    PHOTOGRAPH_NAMES,
    RESULT,
    SAME_FORMAT,
    RestoreRecord,
    own_trees,
    plan_outputs,
    require_no_inputs,
    require_short,
    require_writable,
    result_suffix,
)
from faceprior.cli.restore_report import RestoreReport, check_report, describe_pair, describe_photograph
from faceprior.cli.restoring import Restoring, load_restoring, print_plan
from faceprior.cli.results import reason, say, show
from faceprior.errors import is_disk_full
from faceprior.files import copy_file, is_video, printable, remove_leftovers
from faceprior.html import shrunk
from faceprior.images import (
    JPEG_QUALITY,
    ImageError,
    SourceImage,
    count_frames,
    load_image,
    not_held,
    read_source,
    save_image,
)
from faceprior.models import QUANTIZATIONS, RESTORER_ID
from faceprior.video import container_suffix, restore_video

if TYPE_CHECKING:
    from faceprior.restorer import RestoredImage

HELP = "restore the faces of images and videos and paste them back"
COMPARED = 4096  # most pixels on the longer side of each half of a comparison
SPARE = "`--dtype bfloat16`, `--quantization nf4`"  # options that need less memory


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} IMAGE [IMAGE ...] -o DIR [options]"
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="image, video, folder, glob, or `-` for a list on stdin with one path per line",
    )

    group = parser.add_argument_group("what is written")
    group.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for what is restored, in the same tree; an image or video without a face is copied as it is; what"
        " an earlier run with the same settings restored to DIR is not restored again, and no other file in it is"
        " overwritten",
    )
    group.add_argument(
        "--format",
        choices=(*FORMATS, SAME_FORMAT),
        default="png",
        help="format of the restored images; same is the input's own where it is JPEG, PNG, WebP, TIFF or BMP, else PNG"
        " (default: %(default)s)",
    )
    group.add_argument(
        "--quality",
        type=percent,
        default=JPEG_QUALITY,
        metavar="N",
        help="quality of JPEG and WebP, in [1, 100] (default: %(default)s)",
    )
    group.add_argument(
        "--compare",
        action="store_true",
        help="also write each image before | after, side by side, as DIR/NAME_compare, at most"
        f" {COMPARED} pixels a side",
    )
    group.add_argument(
        "--only-faces",
        action="store_true",
        help="write each restored face, aligned, as DIR/NAME_faceN instead of the photographs, the largest first",
    )
    group.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="HTML file, complete in itself, with a slider for each image and, per face, the crops, Face Score and"
        " identity distance before and after, and why it was left",
    )
    group.add_argument("--overwrite", action="store_true", help="restore again what an earlier run wrote to DIR")

    group = parser.add_argument_group("which faces are restored")
    add_detection_options(group)
    group.add_argument(
        "--keep-sharp",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="leave a face that is larger in the photograph than the model's resolution and really sharper than it"
        " (default: on, also where a scorer decides, which sees the face at that resolution)",
    )
    group.add_argument(
        "--keep-better",
        action=argparse.BooleanOptionalAction,
        help="paste a face only if its Face Score rises (default: on with --scorer); without --scorer by the published"
        " scorer, or the tiny one with `--checkpoint tiny`",
    )
    group.add_argument(
        "--scorer",
        metavar="MODEL",
        help="folder or hub id of the scorer that compares faces before and after, or `tiny` (default: none)",
    )
    group.add_argument(
        "--min-gain",
        type=number,
        metavar="X",
        help="smallest rise of the Face Score of a face that is pasted (default: 0)",
    )
    group.add_argument(
        "--identity",
        action="store_true",
        help="measure the identity distance of every face before and after, for --report; needs"
        " `pip install faceprior[identity]`",
    )
    group.add_argument(
        "--max-drift",
        type=positive,
        metavar="X",
        help="largest identity distance of a face that is pasted, at least 0; different people are usually above 0.6,"
        " and much blur alone gives 0.4 to 0.5; needs what --identity needs (default: no limit)",
    )
    group.add_argument(
        "--aligned",
        action="store_true",
        help="take the images as aligned square faces, and restore each as a whole, as the official code does",
    )

    group = parser.add_argument_group("how a face is restored")
    group.add_argument(
        "--recipe",
        choices=("official", "fast"),
        help="named set of sampling settings: the official inference, or fewer steps (default: the checkpoint's own)",
    )
    group.add_argument(
        "--steps",
        type=count,
        dest="num_inference_steps",
        metavar="N",
        help="number of sampling steps, at least 1 (default: the checkpoint's own)",
    )
    group.add_argument("--seed", type=int, help="seed of the noise of every face (default: the checkpoint's own)")
    group.add_argument(
        "--start",
        choices=("noise", "degraded"),
        help="start of the sampling: pure noise, or the degraded face with noise, whose colours drift less"
        " (default: the checkpoint's own)",
    )
    group.add_argument(
        "--fidelity",
        type=fraction,
        metavar="X",
        help="closeness to the input, from 0 (free) to 1 (close) (default: the checkpoint's own settings)",
    )
    group.add_argument(
        "--color-fix",
        choices=("wavelet", "adain", "none"),
        default="wavelet",
        help="method that gives the restored face the colours of the degraded one; grey and toned faces keep their tone"
        " with each (default: %(default)s)",
    )
    group.add_argument(
        "--upscale",
        type=count,
        metavar="N",
        help="whole factor by which the restored photographs are larger than the input; with --aligned, by which the"
        " input is enlarged first (default: 1)",
    )
    group.add_argument(
        "--process-size",
        type=count,
        metavar="PIXELS",
        help="side of what --aligned writes, in pixels (default: the model's resolution)",
    )

    group = parser.add_argument_group("model, speed and memory")
    add_model_options(group, RESTORER_ID)
    group.add_argument(
        "--quantization",
        default="none",
        choices=QUANTIZATIONS,
        help="quantization of the networks, for less memory; 8bit takes half of 16 bits, nf4 a good quarter"
        " (default: %(default)s)",
    )
    group.add_argument(
        "--batch-size",
        type=count,
        default=4,
        metavar="N",
        help="number of faces per pass through the network, of one photograph or several (default: %(default)s)",
    )
    group.add_argument(
        "--offload",
        choices=("model", "sequential"),
        help="what stays on the GPU: the model that is at work, or only its layer, which is slow (default: everything)",
    )
    group.add_argument("--vae-tiling", action="store_true", help="decode in tiles, for less memory")
    group.add_argument(
        "--compile", action="store_true", help="compile the networks: a minute at the start, then faster batches"
    )
    group.add_argument(
        "--plan",
        nargs="?",
        const="",
        metavar="SIZE",
        help="print the memory that restoring needs, and with a SIZE, such as 8GB, the options with which it fits;"
        " nothing is restored",
    )


def run(options: argparse.Namespace) -> int:
    """Restore every image and video into the output folder; those that fail are named at the end."""
    if options.plan is not None:
        return print_plan(options)
    _check(options)

    # ---- what to restore, files to write
    inputs = find_inputs(options.images, record_folders=[options.output], videos=True)
    record = RestoreRecord(options.output, options.overwrite, options.only_faces)
    videos = [file for file in inputs.files if _is_video(file)]
    names = _plan_names(inputs, videos, record, options)

    # ---- the restorer, and the settings that decide what comes out
    restoring = load_restoring(options)

    # ---- places that can be written to, without what killed runs left there
    require_writable(options.output, "-o")
    if options.report:
        require_writable(options.report.parent, "--report")
    for folder in {(options.output / name).parent for planned in names.values() for name in planned.values()}:
        remove_leftovers(folder)
    report = RestoreReport(options.report, restoring.settings, len(inputs.files)) if options.report else None
    work = _Work(options, inputs, record, names, restoring, report)

    # ---- restore
    summary = Summary(len(inputs.entries))
    for file, error in inputs.entries.items():
        if error:
            summary.add(Outcome(file, "error", error=error))
    try:
        with tqdm(total=len(inputs.files), unit="file", disable=None, file=sys.stderr) as bar:
            for outcome in work.outcomes(videos):
                summary.add(outcome)
                bar.update()
                show(f"{outcome.file}: {outcome.line}")
    finally:
        for file, error in summary.failed.items():
            say(error if file in error else f"{file}: {error}")
        if summary.failed:
            say(f"{len(summary.failed)} of {len(inputs.entries)} images failed")
        say(summary.text)
        if report:
            report.close(summary, inputs.files)
            say(f"report: {options.report}")
    return int(bool(summary.failed))


# ---- options and names


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError for options that cannot work, or not together."""
    if not options.images:
        raise ValueError("nothing to restore: name images, videos or folders, or `-` for a list on stdin")
    if options.output is None:
        raise ValueError("-o DIR is missing: name the folder for what is restored")
    if options.output.exists() and not options.output.is_dir():
        raise ValueError(f"-o {options.output} is a file: give a folder")
    if options.report:
        check_report(options.report)
    if options.aligned and options.only_faces:
        raise ValueError("--aligned and --only-faces do not go together: aligned images are faces, leave one out")
    judged = (options.keep_better, options.scorer, options.identity, options.max_drift, options.min_gain)
    if options.aligned and any(value not in (None, False) for value in judged):
        raise ValueError("--aligned writes every face: leave out --keep-better, --scorer, --identity and their limits")
    if options.process_size and not options.aligned:
        raise ValueError("--process-size is the size of what --aligned writes: leave it out")
    if options.min_gain is not None and not (options.scorer or options.keep_better):
        raise ValueError("--min-gain compares Face Scores: add --keep-better, or name a --scorer")


def _is_video(file: str) -> bool:
    try:
        return is_video(file)
    except OSError:
        return False


def _plan_names(
    inputs: Inputs, videos: Sequence[str], record: RestoreRecord, options: argparse.Namespace
) -> dict[str, dict[str, str]]:
    """{file: {kind: name below the output folder}}; ValueError if one is an input or a file of others."""
    patterns = {FACE: FACE_NAME} if options.only_faces else dict(PHOTOGRAPH_NAMES)
    if not options.compare:
        patterns.pop(COMPARISON, None)
    suffixes = {file: result_suffix(file, options.format) for file in inputs.files}
    suffixes |= {file: container_suffix(file) for file in videos}
    trees = own_trees(inputs.files, inputs.folders)
    names = plan_outputs(trees, patterns, record.bases(inputs.files), record.taken(inputs.files), suffixes)
    for file in videos:
        names[file].pop(COMPARISON, None)
    targets = [name for planned in names.values() for name in planned.values()]
    require_no_inputs((options.output / name for name in targets), inputs.files, f"-o {options.output}")
    if options.report:
        require_no_inputs([options.report], inputs.files, "--report")
    record.require_free(targets)
    return names


# ---- the work


class _Work:
    """Restores files one after the other and writes what came out."""

    def __init__(
        self,
        options: argparse.Namespace,
        inputs: Inputs,
        record: RestoreRecord,
        names: dict[str, dict[str, str]],
        restoring: Restoring,
        report: RestoreReport | None,
    ):
        self.options, self.inputs, self.record, self.names = options, inputs, record, names
        self.restoring, self.report, self.folder = restoring, report, options.output

    def outcomes(self, videos: Sequence[str]) -> Iterator[Outcome]:
        """Restore the photographs, in batches that span them, and then the videos."""
        yield from self._photographs([file for file in self.inputs.files if file not in set(videos)])
        for file in videos:
            yield self._finished(file) or self._attempt(file, self._video)

    # ---- photographs

    def _photographs(self, files: Sequence[str]) -> Iterator[Outcome]:
        waiting: deque[str | Outcome] = deque()  # those that were read, in order, and what the others ended in

        def sources() -> Iterator[SourceImage]:
            for file in files:
                step = [self._finished(file) or self._read(file)]
                waiting.append(file if isinstance(step[0], SourceImage) else step[0])
                if isinstance(step[0], SourceImage):
                    yield step.pop()  # nothing here holds its pixels while the next one is worked on

        for result in self.restoring.photographs(sources()):
            while isinstance(waiting[0], Outcome):
                yield waiting.popleft()
            yield self._attempt(waiting.popleft(), self._photograph, result)
            del result
            while waiting and isinstance(waiting[0], Outcome):
                yield waiting.popleft()
        yield from waiting

    def _read(self, file: str) -> SourceImage | Outcome:
        try:
            require_short(file, self.names[file])
            frames = count_frames(file)
            if frames > 1:
                raise ImageError(
                    f"{file} holds {frames} frames or pages, but a result has one: extract them as images and restore"
                    " those"
                )
            return read_source(file)
        except Exception as error:
            return _failed(file, error)

    def _photograph(self, file: str, result: "RestoredImage | Exception") -> Outcome:
        """Write the outputs of a photograph, the one that counts last."""
        if isinstance(result, Exception):
            raise result
        if self.options.only_faces:
            return self._faces(file, result)
        names = dict(self.names[file])
        is_changed = bool(result.restored) or self.options.aligned or result.image.size != result.source.rgb.size
        del names[COPY if is_changed else RESULT]
        base, targets = self._base(file), {kind: self.folder / name for kind, name in names.items()}
        self.record.claim(file, base, names)
        lost = _write(result, file, targets, self.options.quality)
        text = "restored as an aligned face" if self.options.aligned else _faces_text(result)
        line = text + ("" if is_changed else ", copied as it is")
        line += f", not kept: {', '.join(lost)}" if lost else ""
        outcome = _outcome(file, f"{line} -> {targets.get(RESULT) or targets[COPY]}", result)
        outcome = replace(outcome, restored=1) if self.options.aligned else outcome
        return self._finish(outcome, base, names, result, is_changed)

    def _faces(self, file: str, result: "RestoredImage") -> Outcome:
        """Write the restored faces of a photograph, the largest first."""
        base, suffix = self._base(file), Path(self.names[file][FACE]).suffix
        names = {
            f"face{number}": FACE_NAME.format(base=base, number=number, result=suffix)
            for number in range(1, len(result.restored) + 1)
        }
        require_no_inputs((self.folder / name for name in names.values()), self.inputs.files, f"-o {self.folder}")
        self.record.require_free(names.values(), file)
        self.record.claim(file, base, names)
        for name, face in zip(names.values(), result.restored, strict=True):
            save_image(face.after, self.folder / name, quality=self.options.quality)
        where = f" -> {', '.join(str(self.folder / name) for name in names.values())}" if names else ""
        return self._finish(_outcome(file, f"{_faces_text(result)}{where}", result), base, names, result, False)

    def _finish(
        self, outcome: Outcome, base: str, names: dict[str, str], result: "RestoredImage", is_changed: bool
    ) -> Outcome:
        file = outcome.file
        if self.report:
            card = describe_photograph(file, outcome.line, result, self.report.side, is_changed)
            self.report.add(file, card)
        self.record.finish(file, base, names, self.restoring.settings, outcome.faces)
        return outcome

    # ---- videos

    def _video(self, file: str) -> Outcome:
        options, names = self.options, dict(self.names[file])
        refused = {"--only-faces": options.only_faces, "--aligned": options.aligned, "--upscale": options.upscale}
        if name := next((name for name, value in refused.items() if value), None):
            raise ValueError(f"{file} is a video, which {name} does not take: restore it without {name}")
        require_short(file, names)
        base, target = self._base(file), self.folder / names[RESULT]
        self.record.claim(file, base, names)
        with tqdm(unit="frame", desc=printable(Path(file).name), disable=None, leave=False, file=sys.stderr) as bar:

            def detect(image: Image.Image) -> list:
                bar.update(0.5)  # a frame is looked at twice: to follow the faces, and to restore them
                return self.restoring.find_faces(image)

            def restore(images: Any, faces: list[list]) -> Iterator[Image.Image]:
                bar.total = len(faces)
                for image in self.restoring.frames(images, faces):
                    bar.update(0.5)
                    yield image

            result = restore_video(file, target, detect, restore)
        if result.restored:
            del names[COPY]
            line = f"{counted(result.faces, 'face')} restored in {result.restored} of {counted(result.frames, 'frame')}"
            line += f", not kept: {', '.join(result.lost)}" if result.lost else ""
            judges = {"--scorer": options.scorer or options.keep_better, "--max-drift": options.max_drift is not None}
            given = " and ".join(name for name, is_given in judges.items() if is_given)
            line += f"; {given} left no face, as a video would flicker" if given else ""
        else:
            del names[RESULT]
            target = self.folder / names[COPY]
            copy_file(file, target)
            line = f"no face found in {counted(result.frames, 'frame')}, copied as it is"
        outcome = Outcome(file, f"{line} -> {target}", result.faces)
        if self.report:
            self.report.add(file, describe_pair(file, outcome.line, result.before, result.after, self.report.side))
        self.record.finish(file, base, names, self.restoring.settings, outcome.faces)
        return outcome

    # ---- of all files

    def _attempt(self, file: str, work: Any, *arguments: Any) -> Outcome:
        try:
            return work(file, *arguments)
        except Exception as error:  # whatever fails in one file, the others are restored
            if is_disk_full(error):  # but not for nothing
                raise
            return _failed(file, error)

    def _finished(self, file: str) -> Outcome | None:
        """What an earlier run did with a file, if it is still so."""
        needed = [kind for kind in self.names[file] if kind == COMPARISON]
        try:
            row = self.record.finished(file, self.restoring.settings, needed)
            if row is None:
                return None
            outputs, faces = row["outputs"], row.get("faces", {})
            target = outputs.get(RESULT) or outputs.get(COPY) or outputs.get(FACE)
            line = "finished before" + (f" -> {self.folder / target}" if target else ", no face restored")
            outcome = Outcome(file, line, faces.get("restored", 0), tuple(faces.get("left", ())))
            if self.report and not self.report.has(file):
                self.report.add(file, self._card_of_files(file, line, outputs))
            return outcome
        except Exception as error:
            return _failed(file, error)

    def _card_of_files(self, file: str, line: str, outputs: dict[str, str]) -> dict[str, Any]:
        """The card of what an earlier run without a report restored: its files, without details of the faces."""
        line += "; an earlier run, without a report, restored it"
        if not _is_video(file):
            before = shrunk(load_image(file), self.report.side)
            after = shrunk(load_image(self.folder / outputs[RESULT]), self.report.side) if RESULT in outputs else None
            return describe_pair(file, line, before, after, self.report.side)
        return describe_pair(file, line, None, None, self.report.side)

    def _base(self, file: str) -> str:
        """What the names of a file's outputs begin with."""
        names = self.names[file]
        if FACE in names:
            return names[FACE].removesuffix(FACE_NAME.format(base="", number=1, result=Path(names[FACE]).suffix))
        return names[RESULT].removesuffix(Path(names[RESULT]).suffix)


def _write(result: "RestoredImage", file: str, targets: dict[str, Path], quality: int) -> tuple[str, ...]:
    """Write the outputs of a photograph, the one that counts last; return what they do not hold of it, in words."""
    if COMPARISON in targets:
        save_image(_side_by_side(result.source.rgb, result.image), targets[COMPARISON], quality=quality)
    if COPY in targets:
        copy_file(file, targets[COPY])
        return ()
    source, target = result.source, targets[RESULT]
    image = source.in_own_mode(result.image)
    lost = source.lost + not_held(image, source.metadata, target)
    if source.rgba is not None and "A" not in result.image.getbands():
        lost += ("transparency",)
    if "A" in image.getbands() and target.suffix.lower() in _WITHOUT_ALPHA:
        image = load_image(image)  # over white
        image.info = {"icc_profile": source.icc_profile} if source.icc_profile else {}
    save_image(image, target, source.metadata, quality)
    return lost


_WITHOUT_ALPHA = (".jpg", ".jpeg", ".jpe", ".jfif", ".bmp")


def _failed(file: str, error: Exception) -> Outcome:
    _free_memory()
    return Outcome(file, "error", error=reason(file, error, SPARE))


def _outcome(file: str, line: str, result: "RestoredImage") -> Outcome:
    return Outcome(file, line, len(result.restored), tuple(face.reason for face in result.left))


def _faces_text(result: "RestoredImage") -> str:
    """Say what was done with the faces of an image."""
    restored, left = len(result.restored), len(result.left)
    reasons = "; ".join(dict.fromkeys(face.reason for face in result.left))
    if not restored:
        return f"no face restored ({reasons})" if left else "no face found"
    return f"{counted(restored, 'face')} restored" + (f", {left} left unchanged ({reasons})" if left else "")


def _free_memory() -> None:
    """Give the memory of a failed image back, for the next one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _side_by_side(before: Image.Image, after: Image.Image) -> Image.Image:
    """Both images in one, each shrunk to COMPARED pixels; of one size, also where the second was enlarged."""
    right = load_image(shrunk(after, COMPARED))
    left = before if before.size == right.size else before.resize(right.size, Image.LANCZOS, reducing_gap=3.0)
    sheet = Image.new("RGB", (2 * right.width, right.height))
    sheet.paste(left, (0, 0))
    sheet.paste(right, (right.width, 0))
    return sheet
