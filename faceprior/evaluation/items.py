"""What every method of an evaluation gets: a face to restore, with or without its reference, or a prompt and a seed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath

import numpy as np
from PIL import Image

from faceprior.align import align_face
from faceprior.degrade import DegradationConfig, degrade
from faceprior.evaluation.methods import match_by_stem, stems_of
from faceprior.files import content_mark, find_images, natural_key
from faceprior.images import as_array, load_image
from faceprior.photos import UNREADABLE, Photograph, find_photographs, safe_name
from faceprior.procedural import TEST_SEEDS, draw_portrait
from faceprior.prompts import read_prompts

Problems = list[tuple[str, str]]  # (file, reason)
Load = Callable[[], Image.Image]
INPUT_FOLDERS, REFERENCE_FOLDERS = ("lq", "input", "inputs", "degraded"), ("gt", "hq", "reference", "clean")


@dataclass(frozen=True)
class Face:
    """A degraded face. id: unique in its set. stem: by which finished results are found, see `stems_of`.

    load: () -> (image to restore, what it should be, or None). contents: mark of its files, empty for a drawn one.
    """

    id: str
    stem: str
    load: Callable[[], tuple[Image.Image, Image.Image | None]]
    contents: str = ""


@dataclass(frozen=True)
class Prompt:
    """A prompt and the seed of its noise. prompt_set: `general` or `people`, empty where a run has one set only."""

    id: str
    text: str
    seed: int
    prompt_set: str = ""


@dataclass(frozen=True)
class FaceSet:
    """The faces of a restoration. about: where they are from, in words."""

    faces: list[Face]
    problems: Problems
    about: str
    has_reference: bool


# ---- faces


def degraded_faces(
    images: str, number: int, resolution: int, ranges: DegradationConfig, seed: int, exclude: Sequence[Path] = ()
) -> FaceSet:
    """Degrade clean, aligned faces: those of a folder, or, if `images` is empty, drawn ones that nobody trained on.

    number: of faces at most; 0: all of the folder.
    """
    problems: Problems = []
    if not images and not number:
        raise ValueError("`num_faces` is 0, which stands for all faces of a folder, but no folder is given as `images`")
    if images:
        photographs, problems = find_photographs(images, exclude)
        found = sorted(photographs, key=lambda item: natural_key(item.name))[: number or None]
        stems = dict(zip((item.name for item in found), stems_of([PurePath(item.name) for item in found]), strict=True))
        found, broken = readable(found)
        problems = [*problems, *broken]
        sources: list[tuple[str, str, Load, str]] = [
            (
                _face_id(PurePath(item.name), stems[item.name]),
                stems[item.name],
                partial(_resized, item, resolution),
                content_mark(item.path) if item.image is None else "",
            )
            for item in found
        ]
    else:
        seeds = range(TEST_SEEDS, TEST_SEEDS + number)
        sources = [(f"drawn_{i}", f"drawn_{i}", partial(_drawn_face, i, resolution), "") for i in seeds]

    def load(place: int, clean: Load) -> tuple[Image.Image, Image.Image]:
        image = clean()
        return Image.fromarray(degrade(as_array(image), ranges, np.random.default_rng([seed, place]))), image

    faces = [
        Face(name, stem, partial(load, place, clean), mark) for place, (name, stem, clean, mark) in enumerate(sources)
    ]
    about = f"{images or 'drawn portraits'}, degraded"
    return FaceSet(faces, problems, about, True)


def readable(photographs: Sequence[Photograph]) -> tuple[list[Photograph], Problems]:
    """Part photographs into those that can be read, and (name, reason) of the others."""
    found, problems = [], []
    for photograph in photographs:
        try:
            photograph.load()
            found.append(photograph)
        except UNREADABLE as error:
            problems.append((photograph.name, str(error)))
    if not found:
        raise ValueError(f"no image can be read; the first: {': '.join(problems[0])}")
    return found, problems


def _face_id(name: PurePath, stem: str) -> str:
    """Return the stem of a file where it is found by that alone, else a name that is unique."""
    return stem if stem == name.stem else safe_name(name.as_posix())


def _resized(photograph: Photograph, resolution: int) -> Image.Image:
    return photograph.load().resize((resolution, resolution), Image.LANCZOS)


def _drawn_face(seed: int, resolution: int) -> Image.Image:
    drawing = draw_portrait(seed, 2 * resolution)  # drawn when its turn comes: a thousand take minutes
    return align_face(drawing.image, drawing.landmarks, resolution).crop


def test_set_folders(images: str) -> tuple[str, str]:
    """Return the folders (to restore, reference) of a test set: its sub-folders lq/ and gt/, or `images` and none."""
    own = {path.name.lower(): path for path in Path(images).iterdir() if path.is_dir()} if Path(images).is_dir() else {}
    inputs = next((str(own[name]) for name in INPUT_FOLDERS if name in own), "")
    references = next((str(own[name]) for name in REFERENCE_FOLDERS if name in own), "")
    return (inputs, references) if inputs else (images, "")


def faces_of_test_set(inputs: str, references: str, number: int, output: str | Path = "") -> FaceSet:
    """Take the faces of a folder as they are, with their references by name where there are any.

    inputs, references: folders, as of CelebA-Test; without references as of LFW-Test. An image without its reference is
    a problem, and left out, if others have one. output: folder whose images are not looked at, should it lie in them.
    """
    files = sorted(images_outside(inputs, output), key=lambda file: natural_key(file.relative_to(inputs)))
    files = files[: number or None]
    problems: Problems = []
    stems = stems_of([file.relative_to(inputs) for file in files])
    wanted = match_by_stem(images_outside(references, output), stems, references) if references else {}
    if references and not wanted:
        raise ValueError(f"no image in {references} has the name of one in {inputs}: both need the same names")
    faces = []
    for file, stem in zip(files, stems, strict=True):
        if references and stem not in wanted:
            problems.append((str(file), f"no image of this name in {references}"))
            continue
        load = partial(_pair, file, wanted.get(stem))
        try:
            load()
        except UNREADABLE as error:
            problems.append((str(file), str(error)))
            continue
        contents = "".join(content_mark(path) for path in (file, wanted.get(stem)) if path)
        faces.append(Face(_face_id(file.relative_to(inputs), stem), stem, load, contents))
    if not faces:
        raise ValueError(f"no image in {inputs} can be used; the first: {': '.join(problems[0])}")
    about = f"{inputs}, {f'reference {references}' if references else 'no reference'}"
    return FaceSet(faces, problems, about, bool(references))


def images_outside(folder: str | Path, output: str | Path) -> list[Path]:
    """Return the images of a folder but for those of the output folder, which may lie in it."""
    made = Path(output).resolve() if output else None
    return [file for file in find_images(folder) if not (made and file.resolve().is_relative_to(made))]


def without_images(folder: str | Path) -> str:
    """Return why a folder of finished images has nothing to measure, as one whose program did not run yet; else ""."""
    try:
        find_images(folder)
    except ValueError as error:
        return str(error)
    return ""


def _pair(file: Path, reference: Path | None) -> tuple[Image.Image, Image.Image | None]:
    return load_image(file), None if reference is None else load_image(reference)


# ---- prompts


def prompts_of(
    general: str, people: str, numbers: tuple[int, int], seed: int, images_per_prompt: int = 1
) -> list[Prompt]:
    """Read prompts, as many as `numbers` say of the general ones and of those of people, with seeds of their own.

    general, people: lists or files of prompts, as of `read_prompt_rows`. With both, measures of the whole image are
    taken on the general ones and Face Score on those of people (Face Score, 6.1); with one, all are taken on it;
    without any it is the captions of drawn portraits that nobody trained on.
    """
    first, second = numbers
    if general and people:
        sets = {"general": read_prompts(general, first, seed), "people": read_prompts(people, second, seed)}
    elif general:
        sets = {"": read_prompts(general, first, seed)}
    elif people:
        sets = {"": read_prompts(people, second, seed)}
    else:
        sets = {"": [draw_portrait(TEST_SEEDS + i, 64).caption() for i in range(first)]}
    prompts = []
    for prompt_set, texts in sets.items():
        for i, text in enumerate(texts):
            for copy in range(images_per_prompt):
                name = "_".join([*([prompt_set] if prompt_set else []), f"{i:05d}"])
                name += f"_{copy}" if images_per_prompt > 1 else ""
                prompts.append(Prompt(name, text, seed + i * images_per_prompt + copy, prompt_set))
    return prompts
