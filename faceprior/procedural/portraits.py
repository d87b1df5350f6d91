"""One drawn portrait, and what is known about it: landmarks, box, masks, tags, a caption."""

from dataclasses import dataclass

import numpy as np

from faceprior.procedural.anatomy import chin_y, eyelids, lips, mouth_corner_y, mouth_half_width, warp_asymmetry
from faceprior.procedural.complexion import gaze_offset
from faceprior.procedural.people import sample_person
from faceprior.procedural.rendering import Layer, render
from faceprior.procedural.tracing import Camera, Figure

MIN_SIZE, MAX_SIZE = 64, 2048
SEEN_CORNER = 0.95  # fraction of the mouth's half width at which its corner is seen, inside the geometric one
TAGS = (
    "age_group", "sex", "expression", "hair_color", "hair_style", "fringe", "glasses", "ear_rings", "beard",
    "skin_tone", "eye_color", "freckles", "lipstick", "clothes", "light_side", "light_hardness", "color_temperature",
    "background", "yaw", "pitch", "roll",
)  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """A drawn portrait and what is known about it.

    image: (H, W, 3) uint8 RGB. landmarks: (5, 2) float32 pixels: left eye, right eye, nose tip, left and right corner
    of the mouth, where left is the smaller x. box: x0, y0, x1, y1 of the face in pixels. face_mask and
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
    """Draw the person of a seed, at size x size pixels.

    seed: not negative. size: 64 .. 2048. overrides: traits and tags by name (`people.trait_names()`), such as
    hair_style="bob", glasses="round", yaw=20; all others keep the values of the seed.
    Raises ValueError for a bad size, an unknown name or an unknown value.
    """
    check_arguments(seed, size)
    image, layer = render(sample_person(seed, **overrides), size)
    return describe(image, layer, (0, 0))


def check_arguments(seed: int, size: int) -> None:
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"`size` has to be between {MIN_SIZE} and {MAX_SIZE} but is {size}")
    if seed < 0:
        raise ValueError(f"`seed` has to be 0 or greater but is {seed}")


def describe(image: np.ndarray, layer: Layer, corner: tuple[int, int]) -> Drawing:
    """Describe a figure whose layer is in the image with its upper left corner at `corner` (x, y)."""
    person, shift = layer.figure.person, np.array(corner, np.float32)
    x0, y0, x1, y1 = face_box(layer.camera, layer.figure)
    masks = {name: place_patch(mask, image.shape[:2], corner) for name, mask in _masks(layer).items()}
    return Drawing(
        image=image,
        landmarks=_landmarks(layer) + shift,
        box=(x0 + corner[0], y0 + corner[1], x1 + corner[0], y1 + corner[1]),
        face_mask=masks.pop("face"),
        region_masks=masks,
        tags={name: getattr(person, name) for name in TAGS},
    )


def _landmarks(layer: Layer) -> np.ndarray:
    """Return iris centres, nose tip and mouth corners, (5, 2) in pixels of the layer."""
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
    """Return x0, y0, x1, y1 of the face, in the camera's pixels: from hairline to chin and from cheek to cheek."""
    p = figure.person
    outline = [(0, chin_y(p), 0.15), (0.30, chin_y(p) + 0.18, 0.05), (0.50, -0.7, -0.2), (0.66, -0.2, -0.2),
               (0.68, 0.15, -0.2), (0.5, 0.65, -0.05), (0, min(p.hairline_y, 0.78), 0.15)]  # fmt: skip
    points = np.array([(side * x * p.face_width, y, z) for x, y, z in outline for side in (-1, 1)])
    pixels = camera.project(figure.from_head(points.T))
    (x0, y0), (x1, y1) = pixels.min(axis=0), pixels.max(axis=0)
    return float(x0), float(y0), float(x1), float(y1)


def _masks(layer: Layer) -> dict[str, np.ndarray]:
    """Return (size, size) bool masks: face, eyes, mouth, skin, hair."""
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


def place_patch(patch: np.ndarray, shape: tuple[int, int], corner: tuple[int, int]) -> np.ndarray:
    """Return zeros of `shape` with the part of `patch` that falls into them, upper left corner at `corner` (x, y)."""
    (column, row), (height, width) = corner, patch.shape[:2]
    if shape == patch.shape[:2] and corner == (0, 0):
        return patch
    canvas = np.zeros((*shape, *patch.shape[2:]), patch.dtype)
    y0, x0, y1, x1 = max(row, 0), max(column, 0), min(row + height, shape[0]), min(column + width, shape[1])
    canvas[y0:y1, x0:x1] = patch[y0 - row : y1 - row, x0 - column : x1 - column]
    return canvas


def _caption_tags(tags: dict) -> list[str]:
    """Return the tags in the order of a photograph's description."""
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
    return words + light_words(tags)


def light_words(tags: dict) -> list[str]:
    """Return light and background as tags."""
    side = "the front" if tags["light_side"] == "front" else f"the {tags['light_side']}"
    words = [f"{tags['light_hardness']} light from {side}"]
    if tags["color_temperature"] != "neutral":
        words.append(f"{tags['color_temperature']} light")
    backgrounds = {"studio": "studio background", "room": "blurred room background",
             "foliage": "blurred foliage background", "street lights": "street lights bokeh background"}  # fmt: skip
    return [*words, backgrounds[tags["background"]]]


def _hair_words(tags: dict) -> str:
    """Return hair style and colour as one tag, such as "long wavy brown hair"."""
    style, color = tags["hair_style"], tags["hair_color"]
    phrase = {
        "short": "short {} hair", "side part": "side-parted {} hair", "buzz cut": "{} buzz cut",
        "receding": "receding {} hair", "bald": "bald head", "short curly": "short curly {} hair", "afro": "{} afro",
        "bob": "{} bob", "long straight": "long straight {} hair", "long wavy": "long wavy {} hair",
        "long curly": "long curly {} hair", "tied back": "{} hair tied back",
        "head scarf": "head scarf", "knit cap": "knit cap", "hat": "{} hair, hat", "cap": "{} hair, cap",
    }[style]  # fmt: skip
    return phrase.format(color)
