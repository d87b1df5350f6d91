"""
Light on a traced figure: key, fill and rim light on skin, hair and cloth, glasses in front, the background behind, and
what a camera does to the result. All colours are linear RGB until `develop`.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from faceprior.images import cv2
from faceprior.procedural.anatomy import ear_lobe
from faceprior.procedural.backdrop import draw_backdrop
from faceprior.procedural.complexion import Face, mix
from faceprior.procedural.headwear import METALS, paint_ear_ring
from faceprior.procedural.pigments import hair_color
from faceprior.procedural.shapes import smoothstep
from faceprior.procedural.textures import sample_noise
from faceprior.procedural.tracing import Camera, Figure, Hits, normals_of, occlusion, soft_shadow, trace
from faceprior.procedural.wardrobe import FRAME_COLORS, LENS_Z, TEMPLE_X, frame_distance, lens_distance, temple_distance

LIGHT_GRID = 128  # occlusion and shadow are computed on about this many points across, at every image size
TEMPERATURES = {"warm": (1.14, 0.98, 0.78), "neutral": (1.03, 1.0, 0.96), "cool": (0.92, 0.99, 1.12)}
SCATTER = (0.030, 0.014, 0.008)  # how far light spreads below the skin, in units, red to blue
VIEW = np.array([0, 0, 1], np.float32)


@dataclass
class Lights:
    """Directions are unit vectors towards the light; colours are linear RGB."""

    key: np.ndarray
    key_color: np.ndarray
    fill: np.ndarray
    fill_color: np.ndarray
    ambient: np.ndarray
    sharpness: float  # of the key light's shadow
    rim: float


def make_lights(person: SimpleNamespace) -> Lights:
    """The lights that the person's traits ask for."""
    azimuth, elevation = np.radians([person.light_azimuth, person.light_elevation])
    key = np.array([np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)])
    fill = np.array([-0.7 * np.sign(key[0] + 1e-3), 0.15, 0.7])
    color = np.array(TEMPERATURES[person.color_temperature], np.float32)
    hard = person.light_hardness == "hard"
    strength = 1.55 if hard else 1.35
    return Lights(
        key=key.astype(np.float32),
        key_color=strength * color,
        fill=(fill / np.linalg.norm(fill)).astype(np.float32),
        fill_color=(0.7 if hard else 1.15) * person.fill * color ** np.float32(-0.35),
        ambient=np.float32(0.20 if hard else 0.26) * color ** np.float32(-0.2),
        sharpness=9.0 if hard else 3.2,
        rim=person.rim,
    )


@dataclass
class Layer:
    """A lit figure without background, and what is where in it."""

    radiance: np.ndarray  # (size, size, 3) linear RGB
    coverage: np.ndarray  # (size, size, 1), 0 .. 1
    head_points: np.ndarray  # (3, N) points of the figure, head frame
    index: np.ndarray  # (N,) their flat indices in the image
    face: Face
    skin: np.ndarray  # (N,) fraction of skin at each point
    hair: np.ndarray  # (N,) fraction of hair
    on_head: np.ndarray  # (N,) bool: head rather than ears, neck or cloth
    camera: Camera
    figure: Figure


def render(person: SimpleNamespace, size: int) -> tuple[np.ndarray, Layer]:
    """Draw the person before its background: a developed image (size, size, 3) uint8, and the figure in it."""
    camera = Camera.for_portrait(person, size)
    layer = render_figure(person, camera)
    rng = np.random.default_rng([person.seed, 11])
    image = draw_backdrop(person.background, size, rng, 0.85 * make_lights(person).key_color)
    image += layer.coverage * (layer.radiance - image)
    return develop(image, person.exposure, person.melanin, seed=person.seed), layer


def render_figure(person: SimpleNamespace, camera: Camera) -> Layer:
    """Trace, colour and light one person."""
    figure, lights, size = Figure(person, camera.pixel), make_lights(person), camera.size
    hits = trace(figure, camera)
    normals = normals_of(hits, size)
    parts = figure.parts(hits.points)
    head = figure.to_head(hits.points)
    face = Face(person, *head, camera.pixel)
    bare = np.minimum(np.minimum(parts["head"], parts["ears"]), parts["neck"])
    cloth = parts["cloth"] < np.minimum(bare, parts["hair"])
    hat = parts["hat"] < np.minimum(np.minimum(bare, parts["hair"]), parts["cloth"])
    off_ears = parts["ears"] > np.minimum(parts["head"], parts["hair"])
    hair = _hair_fraction(figure, head, parts["hair"], bare) * ~cloth * ~hat * off_ears
    open_light, key_light = _visibility(figure, hits, normals, lights, size)

    radiance = _shade_skin(face, figure, normals, lights, open_light, key_light, hits, size)
    i = np.flatnonzero(hair > 0)
    shade = _shade_headwear if figure.hair.style.cloth else _shade_hair
    strands = shade(figure, head[:, i], normals[:, i], lights, open_light[i], key_light[i])
    radiance[:, i] = mix(radiance[:, i], strands, hair[i])
    i = np.flatnonzero(cloth)
    radiance[:, i] = _shade_cloth(figure, hits.points[:, i], normals[:, i], lights, open_light[i], key_light[i])

    i = np.flatnonzero(hat)
    radiance[:, i] = _shade_hat(figure, head[:, i], normals[:, i], lights, open_light[i], key_light[i])

    image, coverage = _spread_to_edges(radiance, hits)
    kind = np.zeros(size * size, np.uint8)
    kind[hits.index] = 1 + (hair > 0.5) + 2 * cloth + 3 * hat
    _soften_edges(image, kind.reshape(size, size), hits.depth)
    if person.glasses != "none":
        _add_glasses(image, coverage, figure, camera, hits.depth, lights)
    if person.ear_rings != "none":
        _add_ear_rings(image, coverage, figure, camera, hits.depth, lights)
    on_head = (parts["head"] < np.minimum(parts["ears"], parts["neck"])) & ~cloth & ~hat
    skin = (1 - hair) * ~cloth * ~hat
    hair = hair * (not figure.hair.style.cloth)
    return Layer(image, coverage, head, hits.index, face, skin, hair, on_head, camera, figure)


def _spread_to_edges(radiance: np.ndarray, hits: Hits) -> tuple[np.ndarray, np.ndarray]:
    """Colours (3, N) as an image with its coverage; pixels at the edge take their neighbours' colour."""
    grid = np.zeros((*hits.depth.shape, 4), np.float32)
    grid.reshape(-1, 4)[hits.index, :3] = radiance.T
    grid.reshape(-1, 4)[hits.index, 3] = 1
    around = cv2.blur(grid, (3, 3))
    edge = grid[..., 3] == 0
    grid[edge, :3] = around[edge, :3] / (around[edge, 3:] + 1e-4)
    closed = cv2.morphologyEx(grid[..., 3], cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))  # no pinholes at folds
    coverage = cv2.GaussianBlur(np.maximum(hits.coverage, closed), (3, 3), 0.7) * (around[..., 3] > 0)
    return np.ascontiguousarray(grid[..., :3]), coverage[..., None].astype(np.float32)


def _soften_edges(image: np.ndarray, kind: np.ndarray, depth: np.ndarray) -> None:
    """Blur by less than a pixel where one thing hides another: rays hit the one or the other, film sees both."""
    around = np.ones((3, 3), np.uint8)
    edge = cv2.morphologyEx(kind, cv2.MORPH_GRADIENT, around) > 0
    edge |= cv2.morphologyEx(depth, cv2.MORPH_GRADIENT, around) > 0.12
    image[edge] = cv2.GaussianBlur(image, (3, 3), 0.85)[edge]


def _hair_fraction(figure: Figure, head, hair_distance, skin_distance):
    """Fraction (N,) of hair at each point: all of it on the hair's solid, thinning out at the hairline."""
    reach = figure.hair.reach(*head)
    across, along = figure.hair.strands(*head)
    ragged = 0.030 * (not figure.hair.style.cloth)
    jitter = ragged * sample_noise("strands", across * 0.35, along * 0.2)
    jitter = jitter - 0.6 * ragged * np.abs(sample_noise("grain", across * 0.5, along * 0.3))
    line = smoothstep(-0.04, 0.09, reach + jitter) * (np.abs(hair_distance) < 0.09)
    thick = np.maximum(smoothstep(0.02, 0.055, skin_distance), smoothstep(0.05, -0.15, head[1]))
    solid = (hair_distance < skin_distance) * thick
    return np.maximum(line * (hair_distance < skin_distance + 0.05), solid)


def _visibility(figure: Figure, hits: Hits, normals, lights: Lights, size: int):
    """Occlusion and shadow (N,) each, computed on a coarse grid and spread to all points."""
    stride = max(1, size // LIGHT_GRID)
    row, column = np.divmod(hits.index, size)
    chosen = np.flatnonzero((row % stride == stride // 2) & (column % stride == stride // 2))
    points, n = hits.points[:, chosen], normals[:, chosen]
    values = np.stack([
        occlusion(figure, points, n),
        soft_shadow(figure, points, n, lights.key, lights.sharpness),
        np.ones(chosen.size, np.float32),
    ])  # fmt: skip
    side = -(-size // stride)
    grid = np.zeros((side, side, 3), np.float32)
    grid[row[chosen] // stride, column[chosen] // stride] = values.T
    grid = cv2.GaussianBlur(grid, (0, 0), 0.8)
    grid = cv2.resize(grid, (side * stride, side * stride), interpolation=cv2.INTER_LINEAR)[:size, :size]
    at_hits = grid.reshape(-1, 3)[hits.index] + 1e-4
    return at_hits[:, 0] / at_hits[:, 2], at_hits[:, 1] / at_hits[:, 2]


def _irradiance(normals, lights: Lights, open_light, key_light, wrap) -> np.ndarray:
    """Diffuse light (3, N); wrap (3,): how far each channel creeps round into the shade."""
    wrap = np.asarray(wrap, np.float32)[:, None]
    key = np.clip((lights.key @ normals + wrap) / (1 + wrap), 0, 1) * key_light
    fill = (0.5 + 0.5 * lights.fill @ normals) * open_light
    sky = (0.75 + 0.25 * normals[1]) * open_light
    return lights.key_color[:, None] * key + lights.fill_color[:, None] * fill + lights.ambient[:, None] * sky


def _highlight(normals, lights: Lights, exponent: float) -> np.ndarray:
    """Blinn's specular lobe (N,) of the key light."""
    half = lights.key + VIEW
    half = half / np.linalg.norm(half)
    return np.clip(half @ normals, 0, 1) ** exponent


def _rim(normals, lights: Lights) -> np.ndarray:
    """Light from behind, on the side away from the key light (N,)."""
    edge = np.clip(1 - normals[2], 0, 1) ** 2.5
    return lights.rim * edge * np.clip(-np.sign(lights.key[0]) * normals[0], 0, 1)


def _shade_skin(face: Face, figure: Figure, normals, lights: Lights, open_light, key_light, hits: Hits, size: int):
    eyes = face.eye > 0.05
    eyeballs = figure.head_turn @ face.eye_direction[:, eyes]
    n = normals.copy()
    n[:, eyes] = normals[:, eyes] * (1 - face.eye[eyes]) + eyeballs * face.eye[eyes]
    teeth = face.mouth > 0.05
    n[:, teeth] = n[:, teeth] * (1 - face.mouth[teeth]) + _tooth_normals(face, figure, teeth) * face.mouth[teeth]
    key_light = key_light + face.mouth * 0.6 * (1 - key_light)
    open_light = open_light + face.mouth * 0.5 * (1 - open_light)
    light = _irradiance(n, lights, open_light, key_light, (0.30, 0.16, 0.10))
    around = _irradiance(normals[:, eyes], lights, open_light[eyes], key_light[eyes], (0.30, 0.16, 0.10))
    light[:, eyes] += 0.6 * face.eye[eyes] * (np.minimum(around, light[:, eyes]) - light[:, eyes])  # in their sockets
    light = _scatter(light, hits, size, face.pixel)
    fresnel = 0.045 + 0.10 * np.clip(1 - n[2], 0, 1) ** 3
    shine = 1.9 * _highlight(n, lights, 14) + 3.2 * _highlight(n, lights, 50)
    shine = shine * key_light * (fresnel * face.gloss * 0.55)
    radiance = (
        face.albedo * light * open_light**0.25 + (shine + 0.25 * _rim(n, lights))[None] * lights.key_color[:, None]
    )
    sparkle = 7.0 * np.clip(_catchlight(lights) @ n, 0, 1) ** 900 + 0.6 * np.clip(lights.fill @ n, 0, 1) ** 300
    sparkle = sparkle * (0.3 + 0.7 * key_light)
    return radiance + (face.eye * sparkle)[None] * lights.key_color[:, None]


def _catchlight(lights: Lights) -> np.ndarray:
    """Where an eyeball mirrors the key light: photographers keep it beside and above the pupil."""
    side = np.sign(lights.key[0]) * np.clip(abs(lights.key[0]), 0.42, 0.6)
    direction = np.array([side, np.clip(lights.key[1], 0.45, 0.6), 1.0], np.float32) + np.array([0, 0, 0.9], np.float32)
    return direction / np.linalg.norm(direction)


def _tooth_normals(face: Face, figure: Figure, chosen) -> np.ndarray:
    """Normals (3, K) of the arch of teeth, world frame."""
    across = 1.6 * face.x[chosen]
    arch = np.stack([across, 0 * across, np.sqrt(np.clip(1 - across * across, 0.1, 1))])
    return figure.head_turn @ arch


def _scatter(light: np.ndarray, hits: Hits, size: int, pixel: float) -> np.ndarray:
    """Blur light (3, N) over the image as far as each colour travels below the skin."""
    grid = np.zeros((size * size, 4), np.float32)
    grid[hits.index, :3] = light.T
    grid[hits.index, 3] = 1
    grid = grid.reshape(size, size, 4)
    out = light.copy()
    for channel, reach in enumerate(SCATTER):
        if reach / pixel > 0.3:
            blurred = cv2.GaussianBlur(grid[..., [channel, 3]], (0, 0), reach / pixel).reshape(-1, 2)[hits.index]
            out[channel] = blurred[:, 0] / (blurred[:, 1] + 1e-4)
    return out


def _shade_hair(figure: Figure, head, normals, lights: Lights, open_light, key_light) -> np.ndarray:
    """Kajiya and Kay's hair: dull across, shining along a band at right angles to the strands."""
    person = figure.person
    across, along = figure.hair.strands(*head)
    spread = figure.hair.spread(head[0], head[2])
    fine = sample_noise("strands", across * 0.42, along * 0.16) * spread
    locks = sample_noise("locks", across * 0.5, along * 0.12) * spread
    if figure.hair.style.curl:
        fine = 0.45 * sample_noise("grain", head[0] + 0.37 * head[2], head[1] - 0.5 * head[2])
        locks = 1.5 * (figure.hair.curls(*head) - 0.05)
    tangent = figure.head_turn @ figure.hair.tangents(head, figure.head_turn.T @ normals)
    tangent = tangent + 0.10 * (0.6 * fine + locks) * normals
    tangent = tangent / np.linalg.norm(tangent, axis=0)
    color = hair_color(person)[:, None] * np.clip(1 + 0.26 * fine + 0.17 * locks, 0.25, 2.0)
    diffuse = np.sqrt(np.clip(1 - np.square(lights.key @ tangent), 0, 1)) * np.clip(
        0.35 + 0.75 * lights.key @ normals, 0, 1
    )
    light = lights.key_color[:, None] * (diffuse * key_light)
    light = light + (lights.fill_color[:, None] * 0.8 + lights.ambient[:, None]) * open_light**1.3
    half = lights.key + VIEW
    along_half = (half / np.linalg.norm(half)) @ tangent
    band = np.clip(1 - np.square(along_half), 0, 1)
    shine = (0.045 * band**40 + 0.03 * band**9) * np.clip(1 + 0.5 * fine, 0.2, 2) * key_light
    shine = shine * np.clip(0.3 + lights.key @ normals, 0, 1) * open_light
    rim = 0.35 * _rim(normals, lights) * (0.1 + 2 * color)
    return color * light * (0.35 + 0.65 * open_light) + lights.key_color[:, None] * (shine * (0.35 + 2.0 * color) + rim)


def _shade_headwear(figure: Figure, head, normals, lights: Lights, open_light, key_light) -> np.ndarray:
    """Scarves and caps: knitted or woven cloth in the garment's second colour."""
    x, y, z = head
    color = 0.25 * figure.garment.color + 0.75 * figure.garment.accent
    if figure.hair.style.length is None:  # ribs of a knit
        pattern = 0.75 + 0.35 * np.sin(110 * np.arctan2(x, z + 0.5)) * float(
            np.clip(1.5 - figure.head.cell / 0.02, 0, 1)
        )
        band = 1 - 0.35 * np.exp(-np.square((figure.hair.reach(x, y, z) - 0.24) / 0.02))
        pattern = pattern * band
    else:
        pattern = 1 + 0.06 * figure.hair.folds(x, y)
    light = _irradiance(normals, lights, open_light, key_light, (0.1, 0.1, 0.1))
    return color[:, None] * pattern * light + 0.10 * _rim(normals, lights)[None] * lights.key_color[:, None]


def _shade_hat(figure: Figure, head, normals, lights: Lights, open_light, key_light) -> np.ndarray:
    color = 0.15 * figure.garment.color + 0.85 * figure.garment.accent
    color = figure.hat.colors(*head, color, 0.25 * figure.garment.color)
    light = _irradiance(normals, lights, open_light, key_light, (0.1, 0.1, 0.1))
    return color * light + 0.10 * _rim(normals, lights)[None] * lights.key_color[:, None]


def _shade_cloth(figure: Figure, points, normals, lights: Lights, open_light, key_light) -> np.ndarray:
    color = figure.garment.colors(*figure.to_body(points))
    light = _irradiance(normals, lights, open_light, key_light, (0.1, 0.1, 0.1))
    return color * light + 0.10 * _rim(normals, lights)[None] * lights.key_color[:, None]


def _add_glasses(image, coverage, figure: Figure, camera: Camera, depth, lights: Lights) -> None:
    """Paint frames, lenses and arms over the image, in place, where they lie before the figure."""
    person = figure.person
    rays = camera.directions(camera.size)
    origin = figure.to_head(camera.position[:, None])[:, 0]
    direction = figure.head_turn.T @ rays
    flat, cover, near = image.reshape(-1, 3), coverage.reshape(-1, 1), depth.ravel()
    color = np.array(FRAME_COLORS[person.glasses_color], np.float32)
    soft = 0.6 * camera.pixel

    def lay(where, amount, paint):
        fraction = amount / np.maximum(amount + cover[where] * (1 - amount), 1e-4)
        flat[where] += fraction * (paint - flat[where])
        cover[where] = np.maximum(cover[where], amount)

    for side in (-1, 1):
        t = (side * TEMPLE_X * 0.99 - origin[0]) / np.where(np.abs(direction[0]) < 1e-4, 1e-4, direction[0])
        i = np.flatnonzero((t > 0) & (t < near + 0.02))
        y, z = (origin[k] + t[i] * direction[k, i] for k in (1, 2))
        lay(i, smoothstep(soft, -soft, temple_distance(y, z))[:, None], 0.8 * color)
    t = (LENS_Z - origin[2]) / direction[2]
    x, y = origin[0] + t * direction[0], origin[1] + t * direction[1]
    i = np.flatnonzero((np.abs(x) < 0.75) & (np.abs(y) < 0.35) & (t < near + 0.12))
    x, y = x[i], y[i]
    lens = smoothstep(soft, -soft, lens_distance(person, x, y))[:, None]
    glare = smoothstep(0.05, 0.12, y - 0.6 * (np.abs(x) - person.eye_x) * np.sign(lights.key[0]))[:, None]
    flat[i] = flat[i] * (1 - 0.06 * lens) + lens * (0.006 + 0.02 * glare) * lights.key_color
    frame = smoothstep(soft, -soft, frame_distance(person, x, y))[:, None]
    gleam = 0.25 * smoothstep(0.0, 0.012, y - 0.06)[:, None] * (person.glasses_color == "metal") + 0.03
    lay(i, frame, color * (0.8 + lights.ambient + gleam))


def _add_ear_rings(image, coverage, figure: Figure, camera: Camera, depth, lights: Lights) -> None:
    """Paint ear rings over the image, in place, at the lobes that the camera sees."""
    person, size = figure.person, camera.size
    metal = np.array(METALS[person.metal], np.float32)[:, None]
    flat, cover = image.reshape(-1, 3), coverage.reshape(-1, 1)
    for side in (-1, 1):
        x, y, z = ear_lobe(person)
        lobe = figure.from_head(np.array([[side * x], [y], [z]]))
        column, row = camera.project(lobe)[0]
        reach = 0.25 / camera.pixel
        rows, columns = (np.arange(max(int(v - reach), 0), min(int(v + reach) + 2, size)) for v in (row, column))
        if not rows.size or not columns.size:
            continue
        distance = float(np.linalg.norm(lobe[:, 0] - camera.position))
        i = (rows[:, None] * size + columns).ravel()
        dx, dy = (columns[None] + 0.5 - column) * camera.pixel, (row - rows[:, None] - 0.5) * camera.pixel
        dx, dy = (np.broadcast_to(v, (rows.size, columns.size)).ravel() for v in (dx, dy))
        turn = abs(float(np.sin(np.radians(person.yaw + 40 * side))))
        amount, normals = paint_ear_ring(person.ear_rings, dx, dy, turn, 0.6 * camera.pixel)
        amount = (amount * (depth.ravel()[i] > distance - 0.12))[:, None]
        light = _irradiance(normals, lights, np.float32(0.8), np.float32(0.7), (0.1, 0.1, 0.1))
        paint = (metal * (0.25 + light) + 1.6 * metal * _highlight(normals, lights, 12)).T
        fraction = amount / np.maximum(amount + cover[i] * (1 - amount), 1e-4)
        flat[i] += fraction * (paint - flat[i])
        cover[i] = np.maximum(cover[i], amount)


def develop(image: np.ndarray, exposure: float, melanin: float, seed: int) -> np.ndarray:
    """Linear light -> 8-bit sRGB: lens blur, exposure, a soft shoulder for highlights, grain.

    melanin: of the people in it; cameras open up for dark faces.
    """
    size = image.shape[0]
    image = cv2.GaussianBlur(image, (0, 0), 0.45 + 0.0006 * size)
    x = image * np.float32(0.88 * exposure * (1 + 0.55 * melanin))
    x = np.where(x > 0.6, 0.6 + 0.4 * (1 - np.exp(-(x - 0.6) / 0.4)), x)
    x = np.where(x < 0.0031308, 12.92 * x, 1.055 * np.power(np.maximum(x, 1e-6), 1 / 2.4) - 0.055)
    grain = np.random.default_rng([seed, 13, size]).standard_normal((size, size, 1), np.float32)
    return (np.clip(x + 0.006 * grain, 0, 1) * 255 + 0.5).astype(np.uint8)
