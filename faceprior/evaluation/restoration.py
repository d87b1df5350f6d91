"""The protocol `restoration`: every method restores the same degraded faces (AuthFace, 4.1 and Table 1).

The rows of a run are those of `input` and `reference`, whose images are kept for comparison, and of each method.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from faceprior import tiny
from faceprior.evaluation.items import Face, FaceSet, images_outside, without_images
from faceprior.evaluation.making import Problems, make_images, picture_file
from faceprior.evaluation.methods import (
    INPUT,
    REFERENCE,
    RESTORER_OPTIONS,
    Method,
    marked,
    match_by_stem,
    parse_methods,
)
from faceprior.evaluation.rows import EvaluationRows
from faceprior.files import content_mark
from faceprior.images import load_image, save_image
from faceprior.models import looks_like_path
from faceprior.photos import UNREADABLE

PROTOCOL = "restoration"
RESULTS_FOLDER = "restored_faces"  # where GFPGAN and CodeFormer leave the faces


def restorers_of(texts: Sequence[str]) -> list[Method]:
    """Read the setting `restorers`; see `methods.parse_methods`. What does not exist has the reason as `missing`."""
    methods = []
    for text, method in zip(texts, parse_methods(texts, RESTORER_OPTIONS, "restorers"), strict=True):
        folder = Path(method.source).expanduser()
        if method.kind == "model" and folder.is_dir() and not _is_restorer(folder):
            method = replace(method, kind="images", missing=without_images(folder))
        elif method.kind == "model" and looks_like_path(method.source) and not folder.exists():
            reason = f"no restorer in {method.source}: `python stages/06_train_restorer.py` makes one"
            method = replace(method, missing=reason)
        if method.kind == "images" and method.options:
            raise ValueError(f"`restorers` has options in {text!r}, which is a folder of finished images")
        sampling_of(method)
        methods.append(method)
    return marked(methods, "restorer")


def _is_restorer(folder: Path) -> bool:
    return (folder / "unet").is_dir() or (folder / "controlnet").is_dir()


def sampling_of(method: Method) -> dict[str, Any]:
    """Return the options of a restorer as those of `AuthFaceRestorer.restore_crops`; ValueError for a wrong one."""
    names = {"recipe": ("recipe", str), "fidelity": ("fidelity", float), "steps": ("num_inference_steps", int)}
    sampling = {}
    for key, value in method.options.items():
        name, kind = names[key]
        try:
            sampling[name] = kind(value)
        except ValueError:
            raise ValueError(
                f"`restorers`: the option {key} of {method.name} has to be a number but is {value!r}"
            ) from None
    if method.options:
        from faceprior.restorer.settings import RestorerSettings

        RestorerSettings().override(**sampling)  # raises before any face is restored
    return sampling


def prepare_faces(rows: EvaluationRows, faces: FaceSet, output: Path) -> None:
    """Write the image to restore of every face, and its reference, with a row each."""
    done = rows.of(PROTOCOL, INPUT).keys()
    rows.require_same(PROTOCOL, INPUT, "contents", {face.id: face.contents for face in faces.faces})
    for face in faces.faces:
        if face.id in done:
            continue
        degraded, reference = face.load()
        if reference is not None:
            _save(rows, output, REFERENCE, REFERENCE, face.id, reference)
        size = degraded.size
        if reference is not None and size != reference.size:
            degraded = degraded.resize(reference.size, Image.LANCZOS)
        contents = {"contents": face.contents} if face.contents else {}
        _save(rows, output, INPUT, INPUT, face.id, degraded, size, **contents)


def _save(
    rows: EvaluationRows,
    output: Path,
    method: str,
    folder: str,
    item: str,
    image: Image.Image,
    size: tuple[int, int] | None = None,
    **values,
) -> None:
    file = picture_file(PROTOCOL, folder, item)
    save_image(image, output / file)
    resized = {"resized_from": list(size)} if size and size != image.size else {}
    rows.add(PROTOCOL, method, item, image=file.as_posix(), **resized, **values)


def restore_faces(
    rows: EvaluationRows,
    method: Method,
    faces: Sequence[Face],
    output: Path,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
) -> Problems:
    """Write the result of a method for every face that has none -> (file or face, reason) of what failed."""
    left = [face for face in faces if face.id not in rows.of(PROTOCOL, method.name)]
    if method.missing or not (left or method.kind == "images"):
        return []
    if method.kind == "input":  # under another name
        for item, row in rows.of(PROTOCOL, INPUT).items():
            rows.add(PROTOCOL, method.name, item, source=method.text, image=row["image"])
        return []
    references = {item: row["image"] for item, row in rows.of(PROTOCOL, REFERENCE).items()}

    def save(face: Face, image: Image.Image, seconds: float | None = None, contents: str = "") -> None:
        made = image
        if face.id in references:
            size = load_image(output / references[face.id]).size
            made = image if image.size == size else image.resize(size, Image.LANCZOS)
        known = {"seconds": seconds, "weights": method.weights or None, "contents": contents or None}
        values = {"source": method.text} | {key: value for key, value in known.items() if value is not None}
        _save(rows, output, method.name, method.folder, face.id, made, image.size, **values)

    # ---- finished results of another program
    if method.kind == "images":
        folder = Path(method.source).expanduser()
        folder = folder / RESULTS_FOLDER if (folder / RESULTS_FOLDER).is_dir() else folder
        files = match_by_stem(images_outside(folder, output), [face.stem for face in faces], folder)
        marks = {face.id: content_mark(files[face.stem]) for face in faces if face.stem in files}
        rows.require_same(PROTOCOL, method.name, "contents", marks)
        if not files and not rows.of(PROTOCOL, method.name):
            raise ValueError(
                f"no image in {folder} has the name of a face, such as {left[0].stem}.png or {left[0].stem}_00.png"
            )
        failed: Problems = []
        for face in left:
            if face.stem in files:
                try:
                    save(face, load_image(files[face.stem]), contents=marks[face.id])
                except UNREADABLE as error:
                    failed.append((str(files[face.stem]), str(error)))
        return failed

    # ---- a restorer
    from faceprior.restorer import AuthFaceRestorer

    restorer = AuthFaceRestorer.from_pretrained(tiny.resolve(method.source, "restorer"), dtype).to(device)
    options = sampling_of(method)
    inputs = {item: row["image"] for item, row in rows.of(PROTOCOL, INPUT).items()}

    def restore(batch: list[Face]) -> list[Image.Image]:
        crops = [load_image(output / inputs[face.id]) for face in batch]
        return restorer.restore_crops(crops, batch_size=batch_size, **options)

    return make_images(restore, left, save, device, batch_size, f"restoring with {method.name}")
