"""
Portraits drawn from a seed, with everything known about them: landmarks, masks, tags.

    python -m faceprior.procedural --sheet portraits.png --seeds 0:48

A person is sampled (`people`), built as a solid (`anatomy`, `hair`, `wardrobe`), traced (`tracing`), coloured
(`complexion`) and lit before a background (`rendering`, `backdrop`). No data, no network, no global state: a seed gives
the same bytes on every call, and the same person at every size.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm.auto import tqdm

from faceprior.images import save_image
from faceprior.procedural.anatomy import chin_y, eyelids, lips, mouth_corner_y, mouth_half_width, warp_asymmetry
from faceprior.procedural.backdrop import draw_backdrop, lay_ground
from faceprior.procedural.complexion import gaze_offset
from faceprior.procedural.people import sample_person
from faceprior.procedural.rendering import Layer, develop, make_lights, render, render_figure
from faceprior.procedural.shapes import bump
from faceprior.procedural.tracing import Camera, Figure

TRAIN_SEEDS = 0  # where the seeds of training, validation and test portraits start: never mix them


VALIDATION_SEEDS = 10_000


TEST_SEEDS = 20_000


MIN_SIZE, MAX_SIZE = 64, 2048


SEEN_CORNER = 0.95  # of the mouth's half width: where an eye sees the corner, just inside the geometric one


TAGS = (
    "age_group", "sex", "expression", "hair_color", "hair_style", "fringe", "glasses", "ear_rings", "beard",
    "skin_tone", "eye_color", "freckles", "lipstick", "clothes", "light_side", "light_hardness", "color_temperature",
    "background", "yaw", "pitch", "roll",
)  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """A drawn portrait and what is known about it.

    image: (H, W, 3) uint8 RGB. landmarks: (5, 2) float32 pixels: left eye, right eye, nose tip, left and right corner
    of the mouth, in the picture's sides (left = smaller x). box: x0, y0, x1, y1 of the face in pixels. face_mask and
    the region_masks "eyes", "mouth", "skin", "hair": (H, W) bool. tags: the traits that a caption or a test can name.
    """

    image: np.ndarray
    landmarks: np.ndarray
    box: tuple[float, float, float, float]
    face_mask: np.ndarray
    region_masks: dict[str, np.ndarray]
    tags: dict

    def caption(self) -> str:
        """The portrait in words, as comma separated tags."""
        return ", ".join(_caption_tags(self.tags))


def draw_portrait(seed: int, size: int = 256, **overrides) -> Drawing:
    """Draw the person that `seed` stands for, at size x size pixels.

    seed: not negative. size: 64 .. 2048. overrides: traits and tags by name (`people.trait_names()`), such as
    hair_style="bob", glasses="round", yaw=20; all others stay as the seed has them.
    Raises ValueError for a bad size, an unknown name or an unknown value.
    """
    _check(seed, size)
    image, layer = render(sample_person(seed, **overrides), size)
    return _describe(image, layer, (0, 0))


def _check(seed: int, size: int) -> None:
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"`size` has to be between {MIN_SIZE} and {MAX_SIZE} but is {size}")
    if seed < 0:
        raise ValueError(f"`seed` has to be 0 or greater but is {seed}")


def _describe(image: np.ndarray, layer: Layer, corner: tuple[int, int]) -> Drawing:
    """What is known of a figure whose layer lies in the image with its upper left corner at `corner` (x, y)."""
    person, shift = layer.figure.person, np.array(corner, np.float32)
    x0, y0, x1, y1 = face_box(layer.camera, layer.figure)
    masks = {name: _place(mask, image.shape[:2], corner) for name, mask in _masks(layer).items()}
    return Drawing(
        image=image,
        landmarks=_landmarks(layer) + shift,
        box=(x0 + corner[0], y0 + corner[1], x1 + corner[0], y1 + corner[1]),
        face_mask=masks.pop("face"),
        region_masks=masks,
        tags={name: getattr(person, name) for name in TAGS},
    )


def _landmarks(layer: Layer) -> np.ndarray:
    """(5, 2) pixels: iris centres, nose tip, mouth corners."""
    p, head = layer.figure.person, layer.figure.head
    gaze_x, gaze_y = gaze_offset(p)
    half = SEEN_CORNER * mouth_half_width(p)
    corner = float(lips(p, np.array([half]))[1][0])
    eyes = [(-p.eye_x + gaze_x, gaze_y), (p.eye_x + gaze_x, gaze_y)]
    frontal = [*eyes, (0.0, p.nose_y), (-half, corner), (half, corner)]
    points = []
    for x, y in frontal:
        y_skin = y + (y - float(warp_asymmetry(p, np.float32(x), np.float32(y))))
        points.append((x, y_skin, head.front_z(x, y_skin)))
    return layer.camera.project(layer.figure.from_head(np.array(points).T)).astype(np.float32)


def face_box(camera: Camera, figure: Figure) -> tuple[float, float, float, float]:
    """The face from hairline to chin and from cheek to cheek: x0, y0, x1, y1 in the camera's pixels."""
    p = figure.person
    outline = [(0, chin_y(p), 0.15), (0.30, chin_y(p) + 0.18, 0.05), (0.50, -0.7, -0.2), (0.66, -0.2, -0.2),
               (0.68, 0.15, -0.2), (0.5, 0.65, -0.05), (0, min(p.hairline_y, 0.78), 0.15)]  # fmt: skip
    points = np.array([(side * x * p.face_width, y, z) for x, y, z in outline for side in (-1, 1)])
    pixels = camera.project(figure.from_head(points.T))
    (x0, y0), (x1, y1) = pixels.min(axis=0), pixels.max(axis=0)
    return float(x0), float(y0), float(x1), float(y1)


def _masks(layer: Layer) -> dict[str, np.ndarray]:
    """(size, size) bool masks: face, eyes, mouth, skin, hair."""
    p, (x, y, z), size = layer.figure.person, layer.head_points, layer.camera.size
    skin = layer.skin > 0.5
    y_face = warp_asymmetry(p, x, y)
    face = skin & layer.on_head & (z > -0.5) & (y_face > chin_y(p) - 0.02)
    dx = np.abs(x) - p.eye_x
    upper, lower = eyelids(p, dx)
    width, margin = 1.12 * p.eye_half_width, 0.025
    eyes = (np.abs(dx) < width) & (y_face < upper + margin) & (y_face > lower - margin) & (z > -0.4) & face
    corners = np.hypot(np.abs(x) - mouth_half_width(p), y_face - mouth_corner_y(p)) < 0.035
    mouth = ((layer.face.lip > 0.3) | (layer.face.mouth > 0.3) | corners & (z > -0.4)) & face
    parts = {
        "face": face,
        "eyes": eyes,
        "mouth": mouth,
        "skin": skin & ~eyes & ~mouth,
        "hair": layer.hair > 0.5,
    }
    masks = {}
    for name, inside in parts.items():
        mask = np.zeros(size * size, bool)
        mask[layer.index[inside]] = True
        masks[name] = mask.reshape(size, size)
    return masks


def _place(patch: np.ndarray, shape: tuple[int, int], corner: tuple[int, int]) -> np.ndarray:
    """A blank array of `shape` with the part of `patch` that falls into it, upper left corner at `corner` (x, y)."""
    (column, row), (height, width) = corner, patch.shape[:2]
    if shape == patch.shape[:2] and corner == (0, 0):
        return patch
    canvas = np.zeros((*shape, *patch.shape[2:]), patch.dtype)
    y0, x0, y1, x1 = max(row, 0), max(column, 0), min(row + height, shape[0]), min(column + width, shape[1])
    canvas[y0:y1, x0:x1] = patch[y0 - row : y1 - row, x0 - column : x1 - column]
    return canvas


# Face Score, Table 8: the share of the picture that a face's box takes; and for each bin
AREA_BINS = ((0.0, 0.005), (0.005, 0.01), (0.01, 0.10), (0.10, 1.0))


BIN_RANGES = ((0.0030, 0.0046), (0.0055, 0.0090), (0.014, 0.06), (0.12, 0.28))  # what is drawn: nothing borderline


MAX_FACES = (6, 5, 3, 1)  # that fit side by side


HORIZONS = ((0.16, 0.32), (0.14, 0.24), (0.26, 0.45), (0.36, 0.46))  # the eyes' height from the picture's top


TOP_Y, FIGURE_HEIGHT = 1.7, 18.4  # a standing person: from above the hair down to the ground, in units


SHOULDER_SPAN = 5.2  # the least that a person's layer covers, in units


SOLE_Y = -16.2  # height of the ground below the eyes


SCENE_DISTANCE = 40.0  # from the camera to the people


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
        """The picture in words, as comma separated tags."""
        count = ("one person", "two people", "three people", "four people", "five people", "six people")
        people = [f"{face.tags['age_group']} {face.tags['sex']}" for face in self.faces]
        return ", ".join([f"photo of {count[len(self.faces) - 1]}", *people, *_light_words(self.tags)])


def draw_scene(seed: int, size: int = 512, faces: int | None = None, area_bin: int | None = None) -> Scene:
    """Draw people before a background, with faces whose boxes take a wanted share of the picture.

    seed: not negative. size: 64 .. 2048 pixels. faces: how many people, at most MAX_FACES of the bin; drawn if None.
    area_bin: index into AREA_BINS (Face Score, Table 8); drawn if None. Raises ValueError outside these ranges.
    """
    _check(seed, size)
    rng = np.random.default_rng([seed, 2])
    area_bin = int(rng.integers(len(AREA_BINS))) if area_bin is None else area_bin
    if not 0 <= area_bin < len(AREA_BINS):
        raise ValueError(f"`area_bin` has to be 0 .. {len(AREA_BINS) - 1} but is {area_bin}")
    faces = int(rng.integers(1, MAX_FACES[area_bin] + 1)) if faces is None else faces
    if not 1 <= faces <= MAX_FACES[area_bin]:
        raise ValueError(f"`faces` has to be 1 .. {MAX_FACES[area_bin]} in area bin {area_bin} but is {faces}")
    leader = sample_person(seed)
    share = float(np.exp(rng.uniform(*np.log(BIN_RANGES[area_bin])))) * (0.75 if faces > 1 and area_bin == 2 else 1)
    places = rng.permutation(np.arange(faces) + 0.5 + rng.uniform(-0.10, 0.10, faces)) / faces
    picture = draw_backdrop(leader.background, size, rng, 0.85 * make_lights(leader).key_color)
    horizon = size * rng.uniform(*HORIZONS[area_bin])
    if area_bin < 2:
        lay_ground(picture, leader.background, horizon / size, rng)
    placed = []
    for i, own_share in enumerate(np.sort(share * rng.uniform(0.9, 1.1, faces))):  # the farthest first
        person = _companion(seed, i, leader) if faces > 1 else leader
        stature = size * np.sqrt(own_share) * rng.uniform(-0.15, 0.15)
        layer, corner = _layer_at(person, size, own_share, places[i], horizon + stature)
        if area_bin < 2:
            _cast_on_ground(picture, layer, corner)
        cover = _place(layer.coverage, picture.shape[:2], corner)
        picture += cover * (_place(layer.radiance, picture.shape[:2], corner) - picture)
        placed.append((layer, corner, cover[..., 0] > 0.5))
    melanin = float(np.mean([layer.figure.person.melanin for layer, _, _ in placed]))
    image = develop(picture, leader.exposure, melanin, seed)
    tags = {"faces": faces, "area_bin": area_bin, **{name: getattr(leader, name) for name in SHARED_LIGHT}}
    return Scene(image, _describe_all(image, placed), tags)


def _cast_on_ground(picture: np.ndarray, layer: Layer, corner: tuple[int, int]) -> None:
    """Darken the ground below a person's feet, in place."""
    x, y = layer.camera.project(np.array([[0.0], [SOLE_Y], [-0.2]]))[0] + corner
    rows, columns = np.mgrid[: picture.shape[0], : picture.shape[1]].astype(np.float32)
    unit = 1 / layer.camera.pixel
    picture *= 1 - 0.55 * bump(columns, rows, float(x), float(y), 1.3 * unit, 0.22 * unit)[..., None]


def _describe_all(image: np.ndarray, placed: list[tuple[Layer, tuple[int, int], np.ndarray]]) -> list[Drawing]:
    """Drawings of the people, largest face first; placed: layer, corner and cover of each, the farthest first."""
    in_front = np.zeros(image.shape[:2], bool)
    drawings = []
    for layer, corner, cover in reversed(placed):
        drawing = _describe(image, layer, corner)
        masks = {name: mask & ~in_front for name, mask in drawing.region_masks.items()}
        drawings.append(replace(drawing, face_mask=drawing.face_mask & ~in_front, region_masks=masks))
        in_front |= cover
    return sorted(drawings, key=lambda d: (d.box[0] - d.box[2]) * (d.box[3] - d.box[1]))


def _companion(seed: int, number: int, leader: SimpleNamespace) -> SimpleNamespace:
    """One of several people in the light of the leader's portrait."""
    shared = (*SHARED_LIGHT, "light_azimuth", "light_elevation", "fill")
    return sample_person([seed, number], **{name: getattr(leader, name) for name in shared})


def _layer_at(person, size: int, share: float, place: float, horizon: float) -> tuple[Layer, tuple[int, int]]:
    """A person's layer, and its corner in the picture.

    share: of the picture's area that the face's box takes; place: the head's x, 0 .. 1; horizon: the row at the eyes.
    """
    trial = Camera(256, FIGURE_HEIGHT, (0.0, TOP_Y - 0.5 * FIGURE_HEIGHT), SCENE_DISTANCE)
    x0, y0, x1, y1 = face_box(trial, Figure(person, trial.pixel))
    scale = size * np.sqrt(share / ((x1 - x0) * (y1 - y0))) / trial.pixel  # pixels of one unit
    height = float(np.clip(TOP_Y + (size - horizon) / scale, SHOULDER_SPAN, FIGURE_HEIGHT))
    camera = Camera(max(32, round(scale * height)), height, (0.0, TOP_Y - 0.5 * height), SCENE_DISTANCE)
    layer = render_figure(person, camera)
    x0, y0, x1, y1 = face_box(layer.camera, layer.figure)
    column = round(np.clip(place * size - 0.5 * (x0 + x1), 2 - x0, size - 2 - x1))
    row = round(np.clip(horizon - TOP_Y * scale, 2 - y0, size - 2 - y1))
    return layer, (column, row)


def _caption_tags(tags: dict) -> list[str]:
    """Tags in the order of a photograph's description."""
    words = ["portrait photo", f"{tags['age_group']} {tags['sex']}"]
    if tags["expression"] != "neutral":
        words.append({"serious": "serious look"}.get(tags["expression"], tags["expression"]))
    words.append(_hair_words(tags))
    if tags["beard"] != "none":
        words.append(tags["beard"])
    if tags["glasses"] != "none":
        words.append("glasses" if tags["glasses"] != "aviator" else "aviator glasses")
    if tags["ear_rings"] != "none":
        words.append("ear rings")
    if tags["freckles"]:
        words.append("freckles")
    return words + _light_words(tags)


def _light_words(tags: dict) -> list[str]:
    """Light and background as tags."""
    side = "the front" if tags["light_side"] == "front" else f"the {tags['light_side']}"
    words = [f"{tags['light_hardness']} light from {side}"]
    if tags["color_temperature"] != "neutral":
        words.append(f"{tags['color_temperature']} light")
    place = {"studio": "studio background", "room": "blurred room background",
             "foliage": "blurred foliage background", "street lights": "street lights bokeh background"}  # fmt: skip
    return [*words, place[tags["background"]]]


def _hair_words(tags: dict) -> str:
    """Hair style and colour as one tag, such as "long wavy brown hair"."""
    style, color = tags["hair_style"], tags["hair_color"]
    phrase = {
        "short": "short {} hair", "side part": "side-parted {} hair", "buzz cut": "{} buzz cut",
        "receding": "receding {} hair", "bald": "bald head", "short curly": "short curly {} hair", "afro": "{} afro",
        "bob": "{} bob", "long straight": "long straight {} hair", "long wavy": "long wavy {} hair",
        "long curly": "long curly {} hair", "tied back": "{} hair tied back",
        "head scarf": "head scarf", "knit cap": "knit cap", "hat": "{} hair, hat", "cap": "{} hair, cap",
    }[style]  # fmt: skip
    return phrase.format(color)


def draw_folder(
    folder: str | Path,
    seeds: Iterable[int],
    size: int = 256,
    change: Callable[[np.ndarray, int], tuple[np.ndarray, str]] | None = None,
) -> list[Path]:
    """Draw one portrait per seed into `folder`, each a PNG with its caption in a .txt beside it; return the pictures.

    change: may alter a picture, (image, seed) -> (image, a word for the file's name). Pictures that are there already
    are kept, so that an interrupted call goes on where it was.
    """
    folder, paths = Path(folder), []
    for seed in tqdm(list(seeds), desc="drawing", unit="portrait"):
        ready = sorted(folder.glob(f"portrait_{seed:05d}*.png"))
        paths += ready or [_draw_file(folder, seed, size, change)]
    return paths


def _draw_file(folder: Path, seed: int, size: int, change: Callable | None) -> Path:
    drawing = draw_portrait(seed, size)
    image, word = change(drawing.image, seed) if change else (drawing.image, "")
    path = folder / f"portrait_{seed:05d}{'_' * bool(word)}{word}.png"
    return save_captioned(image, drawing.caption(), path)


def draw_scenes(
    folder: str | Path, seeds: Iterable[int], size: int = 512, area_bins: Sequence[int] = (0, 1, 2)
) -> list[Path]:
    """Draw one scene per seed into `folder`, each a PNG with its caption in a .txt beside it; return the pictures.

    area_bins: indices into AREA_BINS; seed number i of the list gets area_bins[i % len(area_bins)]. Pictures that are
    there already are kept, so that an interrupted call goes on where it was.
    """
    folder, paths = Path(folder), []
    for i, seed in enumerate(tqdm(list(seeds), desc="drawing", unit="scene")):
        path = folder / f"scene_{seed:05d}.png"
        if not path.exists():
            scene = draw_scene(seed, size, area_bin=area_bins[i % len(area_bins)])
            save_captioned(scene.image, scene.caption(), path)
        paths.append(path)
    return paths


def save_captioned(image: np.ndarray, caption: str, path: Path) -> Path:
    """Write the picture and, before it, its caption: where a picture is, its caption is too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".txt").write_text(caption + "\n")
    return save_image(image, path)


def contact_sheet(drawings: list[np.ndarray], columns: int = 8) -> np.ndarray:
    """Pictures of one size, (H, W, 3) each, side by side in rows of `columns`; the last row is filled with grey."""
    blank = np.full_like(drawings[0], 128)
    rows = -(-len(drawings) // columns)
    padded = drawings + [blank] * (rows * columns - len(drawings))
    return np.vstack([np.hstack(padded[r * columns : (r + 1) * columns]) for r in range(rows)])


def _parse_seeds(text: str) -> range:
    """ "3:7" -> range(3, 7); "5" -> range(5, 6)."""
    first, _, last = text.partition(":")
    return range(int(first), int(last) if last else int(first) + 1)


def main(arguments: list[str] | None = None) -> None:
    """Draw a contact sheet."""
    parser = argparse.ArgumentParser(
        prog="python -m faceprior.procedural", description=main.__doc__, allow_abbrev=False
    )
    parser.add_argument("--sheet", type=Path, required=True, help="picture file to write")
    parser.add_argument("--seeds", type=_parse_seeds, default=range(48), help="first:last, the last left out")
    parser.add_argument("--size", type=int, default=256, help="pixels of one portrait")
    parser.add_argument("--columns", type=int, default=8, help="portraits in a row")
    options = parser.parse_args(arguments)
    images = [draw_portrait(seed, options.size).image for seed in options.seeds]
    save_image(contact_sheet(images, options.columns), options.sheet)
    print(f"{len(images)} portraits -> {options.sheet}")
