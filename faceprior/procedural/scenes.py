"""Drawn scenes: one to several people before a background, with faces of a wanted size."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np

from faceprior.procedural.backdrop import draw_backdrop, lay_ground
from faceprior.procedural.people import sample_person
from faceprior.procedural.portraits import Drawing, check_arguments, describe, face_box, light_words, place_patch
from faceprior.procedural.rendering import Layer, develop, make_lights, render_figure
from faceprior.procedural.shapes import bump
from faceprior.procedural.tracing import Camera, Figure

# For each bin of Table 8 (Face Score), by the fraction of the image that a face's box takes:
# (0, 0.5%], (0.5%, 1%], (1%, 10%], (10%, 100%]
BIN_RANGES = ((0.0030, 0.0046), (0.0055, 0.0090), (0.014, 0.06), (0.12, 0.28))  # fractions drawn, none near a limit
MAX_FACES = (6, 5, 3, 1)  # number of faces that fit side by side
HORIZONS = ((0.16, 0.32), (0.14, 0.24), (0.26, 0.45), (0.36, 0.46))  # range of the eyes' distance from the top

# Lengths in units, decimetres in the head's frame
TOP_Y, FIGURE_HEIGHT = 1.7, 18.4  # a standing person: from above the hair down to the ground
SHOULDER_SPAN = 5.2  # the least height that a person's layer covers
SOLE_Y = -16.2  # height of the ground below the eyes
SCENE_DISTANCE = 40.0  # distance from the camera to the people

SHARED_LIGHT = ("light_side", "light_hardness", "color_temperature", "background")


@dataclass(frozen=True)
class Scene:
    """A photograph of one to several people.

    image: (H, W, 3) uint8 RGB. faces: one Drawing per person, largest face first, in the pixels of this image.
    tags: number of faces, index of the area bin, background, light.
    """

    image: np.ndarray
    faces: list[Drawing]
    tags: dict

    def caption(self) -> str:
        """The scene in words, as comma separated tags."""
        count = ("one person", "two people", "three people", "four people", "five people", "six people")
        people = [f"{face.tags['age_group']} {face.tags['sex']}" for face in self.faces]
        return ", ".join([f"photo of {count[len(self.faces) - 1]}", *people, *light_words(self.tags)])


def draw_scene(seed: int, size: int = 512, faces: int | None = None, area_bin: int | None = None) -> Scene:
    """Draw people before a background, with faces whose boxes take a wanted fraction of the image.

    seed: not negative. size: 64 .. 2048 pixels. faces: how many people, at most MAX_FACES of the bin; drawn if None.
    area_bin: index into BIN_RANGES (Face Score, Table 8); drawn if None. Raises ValueError outside these ranges.
    """
    check_arguments(seed, size)
    rng = np.random.default_rng([seed, 2])
    area_bin = int(rng.integers(len(BIN_RANGES))) if area_bin is None else area_bin
    if not 0 <= area_bin < len(BIN_RANGES):
        raise ValueError(f"`area_bin` has to be 0 .. {len(BIN_RANGES) - 1} but is {area_bin}")
    faces = int(rng.integers(1, MAX_FACES[area_bin] + 1)) if faces is None else faces
    if not 1 <= faces <= MAX_FACES[area_bin]:
        raise ValueError(f"`faces` has to be 1 .. {MAX_FACES[area_bin]} in area bin {area_bin} but is {faces}")

    # ---- who is where, and how large
    leader = sample_person(seed)
    area_ratio = float(np.exp(rng.uniform(*np.log(BIN_RANGES[area_bin]))))
    if faces > 1 and area_bin == 2:
        area_ratio *= 0.75  # so that they fit side by side
    places = rng.permutation(np.arange(faces) + 0.5 + rng.uniform(-0.10, 0.10, faces)) / faces

    # ---- the background, in linear light; small faces belong to people who stand on some ground
    canvas = draw_backdrop(leader.background, size, rng, 0.85 * make_lights(leader).key_color)
    horizon = size * rng.uniform(*HORIZONS[area_bin])
    if area_bin < 2:
        lay_ground(canvas, leader.background, horizon / size, rng)

    # ---- the people, the farthest first, in the light of the leader's portrait
    placed = []
    for i, own_ratio in enumerate(np.sort(area_ratio * rng.uniform(0.9, 1.1, faces))):
        person = _companion(seed, i, leader) if faces > 1 else leader
        stature = size * np.sqrt(own_ratio) * rng.uniform(-0.15, 0.15)
        layer, corner = _layer_at(person, size, own_ratio, places[i], horizon + stature)
        if area_bin < 2:
            _cast_on_ground(canvas, layer, corner)
        cover = place_patch(layer.coverage, canvas.shape[:2], corner)
        canvas += cover * (place_patch(layer.radiance, canvas.shape[:2], corner) - canvas)
        placed.append((layer, corner, cover[..., 0] > 0.5))

    # ---- the photograph, and what is known about it
    melanin = float(np.mean([layer.figure.person.melanin for layer, _, _ in placed]))
    image = develop(canvas, leader.exposure, melanin, seed)
    tags = {"faces": faces, "area_bin": area_bin, **{name: getattr(leader, name) for name in SHARED_LIGHT}}
    return Scene(image, _describe_all(image, placed), tags)


def _cast_on_ground(canvas: np.ndarray, layer: Layer, corner: tuple[int, int]) -> None:
    """Darken the ground below a person's feet, in place."""
    x, y = layer.camera.project(np.array([[0.0], [SOLE_Y], [-0.2]]))[0] + corner
    rows, columns = np.mgrid[: canvas.shape[0], : canvas.shape[1]].astype(np.float32)
    unit = 1 / layer.camera.pixel
    canvas *= 1 - 0.55 * bump(columns, rows, float(x), float(y), 1.3 * unit, 0.22 * unit)[..., None]


def _describe_all(image: np.ndarray, placed: list[tuple[Layer, tuple[int, int], np.ndarray]]) -> list[Drawing]:
    """Return drawings of the people, largest face first.

    placed: layer, corner and cover of each person, the farthest first; nearer people hide the masks of farther ones.
    """
    in_front = np.zeros(image.shape[:2], bool)
    drawings = []
    for layer, corner, cover in reversed(placed):
        drawing = describe(image, layer, corner)
        masks = {name: mask & ~in_front for name, mask in drawing.region_masks.items()}
        drawings.append(replace(drawing, face_mask=drawing.face_mask & ~in_front, region_masks=masks))
        in_front |= cover
    return sorted(drawings, key=lambda d: (d.box[0] - d.box[2]) * (d.box[3] - d.box[1]))


def _companion(seed: int, number: int, leader: SimpleNamespace) -> SimpleNamespace:
    """Return one of several people, in the light of the leader's portrait."""
    shared = (*SHARED_LIGHT, "light_azimuth", "light_elevation", "fill")
    return sample_person([seed, number], **{name: getattr(leader, name) for name in shared})


def _layer_at(person, size: int, area_ratio: float, place: float, horizon: float) -> tuple[Layer, tuple[int, int]]:
    """Return a person's layer and its corner in the image.

    area_ratio: fraction of the image that the face's box takes; place: the head's x, 0 .. 1; horizon: row of the eyes.
    """
    trial = Camera(256, FIGURE_HEIGHT, (0.0, TOP_Y - 0.5 * FIGURE_HEIGHT), SCENE_DISTANCE)
    x0, y0, x1, y1 = face_box(trial, Figure(person, trial.pixel))
    scale = size * np.sqrt(area_ratio / ((x1 - x0) * (y1 - y0))) / trial.pixel  # pixels of one unit
    height = float(np.clip(TOP_Y + (size - horizon) / scale, SHOULDER_SPAN, FIGURE_HEIGHT))
    camera = Camera(max(32, round(scale * height)), height, (0.0, TOP_Y - 0.5 * height), SCENE_DISTANCE)
    layer = render_figure(person, camera)
    x0, y0, x1, y1 = face_box(layer.camera, layer.figure)
    column = round(np.clip(place * size - 0.5 * (x0 + x1), 2 - x0, size - 2 - x1))
    row = round(np.clip(horizon - TOP_Y * scale, 2 - y0, size - 2 - y1))
    return layer, (column, row)
