"""
Count how often the measured photographic tags are right, on drawn portraits whose photography is known.

    python -m checkpoints.tiny_models.photography

Reads   nothing: it draws test portraits, which no limit was set on
Writes  results/tiny/: photography.md (the table), photography.json (its numbers)

The people of `faceprior.procedural` know side and colour of their light. The rest is made, in a known way: another
exposure, a sharp or a blurred background behind the same person, blur of the whole picture, skin that is smoothed, no
colours. As in stage 3, MTCNN finds the face. So the table says that a tag means what it says; how often it is right on
photographs, whose light nobody has written down, it does not say.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from checkpoints.tiny_models.bench import drawing_digest
from checkpoints.tiny_models.readme import machine
from faceprior.align import align_face
from faceprior.config import run_stage
from faceprior.detect import detect_faces
from faceprior.files import atomic_write
from faceprior.images import as_array
from faceprior.photography import ANALYSIS_SIZE, ATTRIBUTES, LUMINANCE, head_turn, measure_photography
from faceprior.procedural import TEST_SEEDS, draw_scene
from faceprior.procedural.backdrop import draw_backdrop
from faceprior.procedural.people import sample_person
from faceprior.procedural.portraits import describe
from faceprior.procedural.rendering import Layer, develop, make_lights, render_figure
from faceprior.procedural.tracing import Camera
from faceprior.tables import fraction_estimate, interval_text, markdown_table, number_text

TABLE, RESULTS = "photography.md", "photography.json"
AIM = 0.85  # fraction of right tags of every attribute
SIZE = 320  # side of the drawn photographs in pixels
SCENES = 24  # number of scenes whose pictures stand behind the people
STOPS = {"dark tones": -2.5, "": 0.0, "light tones": 2.0}  # exposure, in powers of two
OUT_OF_FOCUS, UNSHARP = 0.02, 0.00625  # standard deviations of the blur, of the side of the photograph
SMOOTHING = (9, 40, 5)  # bilateral filter of the skin, twice: diameter, grey levels, pixels


@dataclass
class Config:
    output: str = "results/tiny"  # folder for the table
    num_portraits: int = 300  # number of test portraits, [1, 3000]
    first_seed: int = TEST_SEEDS + 12_000  # seed of the first one, [0, inf)


def main(config: Config) -> None:
    # ---- Every portrait, photographed in known ways, and what is measured on it
    scenes = [draw_behind(config.first_seed + i) for i in range(min(SCENES, config.num_portraits))]
    outcomes = {attribute.name: [] for attribute in ATTRIBUTES}  # (truth, tag or None where nothing is measured)
    attributes = {attribute.name: attribute for attribute in ATTRIBUTES}
    without_face, hardness = 0, []  # hardness: (whether the light is hard, what was tried to tell it)
    for index in tqdm(range(config.num_portraits), desc="measuring", unit="portrait"):
        person = sample_person(config.first_seed + index)
        for name, truth, image in photographs(person, scenes[index % len(scenes)]):
            faces = detect_faces(Image.fromarray(image), "mtcnn")
            if not faces or faces[0].landmarks is None:
                without_face += 1
                continue
            crop = align_face(Image.fromarray(image), faces[0].landmarks, ANALYSIS_SIZE).crop
            values = measure_photography(crop, head_turn(faces[0].landmarks))
            if not name:
                hardness.append((person.light_hardness == "hard", tried_on_hardness(crop)))
            for key in (name,) if name else truth:
                value = values[key]
                expected = truth if name else truth[key]
                outcomes[key].append((expected, None if value is None else attributes[key].tag(value)))

    # ---- The table
    results = {"command": command_of(config), "machine": machine(), "drawings": drawing_digest()}
    results |= {"without_face": without_face, "hardness": hardness_rows(hardness), "rows": rows_of(outcomes)}
    Path(config.output).mkdir(parents=True, exist_ok=True)
    with atomic_write(Path(config.output) / RESULTS, "w") as file:
        json.dump(results, file, indent=1)
    with atomic_write(Path(config.output) / TABLE, "w") as file:
        file.write(markdown(results))
    print((Path(config.output) / TABLE).read_text())


def draw_behind(seed: int) -> np.ndarray:
    """Draw a scene to stand behind a person, in linear light; at twice the size, to be as sharp as the person."""
    scene = to_linear(draw_scene(seed, 2 * SIZE, area_bin=0).image)
    return cv2.resize(scene, (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def photographs(person: SimpleNamespace, behind: np.ndarray) -> Iterator[tuple[str, str | dict[str, str], np.ndarray]]:
    """Photograph a person in known ways -> (attribute, its true tag, image (SIZE, SIZE, 3) uint8).

    behind: a scene (SIZE, SIZE, 3), in linear light. The first photograph is the drawn one, without an attribute, and
    with true tags by attribute.
    """
    camera = Camera.for_portrait(person, SIZE)
    layer = render_figure(person, camera)
    own = draw_backdrop(
        person.background, SIZE, np.random.default_rng([person.seed, 11]), 0.85 * make_lights(person).key_color
    )
    image = taken(person, layer, own)
    side = "front light" if person.light_side == "front" else f"light from the {person.light_side}"
    yield "", {"light side": side, "colour temperature": f"{person.color_temperature} light"}, image

    for tag, stops in STOPS.items():
        yield "key", tag, taken(person, layer, own, 2.0**stops)

    sharp, blurred = taken(person, layer, behind), taken(person, layer, blur(behind, OUT_OF_FOCUS))
    if is_seen(sharp, blurred, layer, describe(image, layer, (0, 0)).landmarks):
        yield "depth of field", "", sharp
        yield "depth of field", "blurred background", blurred

    if person.background != "studio":  # drawn out of focus; a studio's wall is plain
        yield "depth of field", "blurred background", image

    yield "sharpness", "sharp details", image
    yield "sharpness", "soft focus", blur(image, UNSHARP)

    smooth = cv2.bilateralFilter(cv2.bilateralFilter(image, *SMOOTHING), *SMOOTHING)
    skin = blur(describe(image, layer, (0, 0)).region_masks["skin"].astype(np.float32), 0.005)[..., None]
    yield "skin", "textured skin", image
    yield "skin", "smooth skin", (image + skin * (smooth.astype(np.float32) - image)).round().astype(np.uint8)

    yield "colours", "", image
    yield "colours", "black and white", as_array(Image.fromarray(image).convert("L").convert("RGB"))


def is_seen(sharp: np.ndarray, blurred: np.ndarray, layer: Layer, landmarks: np.ndarray) -> bool:
    """Whether blur changes a twentieth of the background by 8 grey levels, in the aligned crop and below its grain.

    Where a wall or a body fills it, nobody can tell whether it is in focus.
    """
    coverage = np.repeat((255 * layer.coverage).astype(np.uint8), 3, axis=2)
    crops = [
        as_array(align_face(Image.fromarray(image), landmarks, ANALYSIS_SIZE).crop.convert("L")).astype(np.float32)
        for image in (sharp, blurred, coverage)
    ]
    first, second, figure = (cv2.GaussianBlur(crop, (0, 0), 1.0) for crop in crops)
    background = figure < 8
    return bool(background.any() and (np.abs(first - second)[background] > 8).mean() > 0.05)


def taken(person: SimpleNamespace, layer: Layer, behind: np.ndarray, exposure: float = 1.0) -> np.ndarray:
    """Develop the photograph of a person before a background in linear light."""
    image = behind + layer.coverage * (layer.radiance - behind)
    return develop(image, person.exposure * exposure, person.melanin, seed=person.seed)


def to_linear(image: np.ndarray) -> np.ndarray:
    """sRGB, uint8 -> linear light, 0 to 1 (IEC 61966-2-1)."""
    x = image.astype(np.float32) / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4).astype(np.float32)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur by a Gaussian whose standard deviation is a fraction of the side."""
    return cv2.GaussianBlur(image, (0, 0), sigma * image.shape[0])


# ---- The hardness of the light: what was tried

_NOSE, _NECK, _MIDDLE = np.s_[120:172, 92:164], np.s_[216:254, 88:168], np.s_[88:215, 72:184]  # in crops of 256


def tried_on_hardness(crop: Image.Image) -> dict[str, float]:
    """Measure what hard light is known by: deep, steep shadows, two-sided faces, small highlights.

    All on the logarithm of luminance, blurred by 1 pixel. A steepness is the 98th percentile of the gradient over the
    range of the shades: the inverse width of the penumbra.
    """
    light = np.log(to_linear(as_array(crop)) @ LUMINANCE + 4e-3)
    light = cv2.GaussianBlur(light.astype(np.float32), (0, 0), 1.0)
    gradient = np.hypot(cv2.Sobel(light, cv2.CV_32F, 1, 0), cv2.Sobel(light, cv2.CV_32F, 0, 1)) / 8
    middle = light[_MIDDLE]
    left, right = np.split(middle, 2, axis=1)
    standard = (middle - middle.mean()) / middle.std()
    return {
        "light over shade": abs(float(np.median(left) - np.median(right))),
        "depth of shadows": float(np.quantile(middle, 0.5) - np.quantile(middle, 0.02)),
        "steepness beside the nose": _steepness(gradient[_NOSE], light[_NOSE]),
        "steepness on the neck": _steepness(gradient[_NECK], light[_NECK]),
        "two peaks": float(((standard**3).mean() ** 2 + 1) / (standard**4).mean()),  # Sarle's coefficient of bimodality
        "highlights": float(np.quantile(middle, 0.99) - np.quantile(middle, 0.5)),
    }


def _steepness(gradient: np.ndarray, light: np.ndarray) -> float:
    return float(np.quantile(gradient, 0.98) / (np.ptp(np.quantile(light, (0.02, 0.98))) + 0.1))


def hardness_rows(tried: list[tuple[bool, dict[str, float]]]) -> list[dict]:
    """Return how often each measure is right at the limit, on the side, that are best on these very photographs, and so
    is the linear combination of all by least squares: no limit chosen elsewhere does better."""
    hard = np.array([truth for truth, _ in tried])
    columns = {name: np.array([values[name] for _, values in tried]) for name in tried[0][1]}
    design = np.stack([*columns.values(), np.ones(len(hard))], axis=1)
    columns["all, combined"] = design @ np.linalg.lstsq(design, hard.astype(float), rcond=None)[0]
    rows = [{"measure": "always soft", **fraction_estimate(list(~hard)).to_row()}]
    for name, values in columns.items():
        answers = [side * values > side * limit for limit in np.unique(values) for side in (1, -1)]
        best = max(answers, key=lambda answer: (answer == hard).sum())
        rows.append({"measure": name, **fraction_estimate(list(best == hard)).to_row()})
    return rows


# ---- The table


def rows_of(outcomes: dict[str, list[tuple[str, str | None]]]) -> list[dict]:
    """Return a row for every attribute and for each of its true tags."""
    rows = []
    for name, pairs in outcomes.items():
        for truth in ("all", *sorted({truth for truth, _ in pairs})):
            own = [(expected, tag) for expected, tag in pairs if truth in ("all", expected)]
            correct = [expected == tag for expected, tag in own if tag is not None]
            row = fraction_estimate(correct, reason="nowhere to be seen").to_row()
            rows.append({"attribute": name, "truth": truth, "photographs": len(own), **row})
    return rows


def markdown(results: dict) -> str:
    totals = [row for row in results["rows"] if row["truth"] == "all"]
    missed = [row["attribute"] for row in totals if row["value"] is None or row["value"] < AIM]
    lines = [
        "# Measured photographic tags on drawn portraits",
        "",
        f"Made by `{results['command']}` on {results['machine']}.",
        "",
        "Side and colour of the light are what the drawn people are lit with. The rest is made on the same people: "
        "exposure, a sharp or a blurred background (where the blur changes a twentieth of it at least), blur, smoothed "
        "skin, no colours. It says nothing about photographs.",
        "",
        f"Aim: {AIM:.0%} right of every attribute; missed by: {', '.join(['light hardness', *missed])}. Fractions with "
        "95% intervals (Wilson), of the photographs where there was something to measure; no face was found in "
        f"{results['without_face']}.",
        "",
    ]
    head = ("attribute", "true tag", "right", "95% interval", "measured", "photographs")
    cells = [
        (
            row["attribute"] if row["truth"] == "all" else "",
            row["truth"] or "none",
            number_text(row["value"], ".1%"),
            interval_text(row["low"], row["high"], ".1%"),
            str(row["n"]),
            str(row["photographs"]),
        )
        for row in results["rows"]
    ]
    tried = [
        (row["measure"], number_text(row["value"], ".1%"), interval_text(row["low"], row["high"], ".1%"))
        for row in results["hardness"]
    ]
    return "\n".join(
        [
            *lines,
            markdown_table(head, cells),
            "The hardness of the light is no tag. Tried were these measures, each with the limit that is best on these "
            "very photographs, of hard and of soft light:",
            "",
            markdown_table(("light hardness", "right", "95% interval"), tried),
        ]
    )


def command_of(config: Config) -> str:
    defaults = Config()
    kept = ("num_portraits", "first_seed")
    words = [f"--{key} {getattr(config, key)}" for key in kept if getattr(config, key) != getattr(defaults, key)]
    return " ".join(["python -m checkpoints.tiny_models.photography", *words])


if __name__ == "__main__":
    run_stage(main, Config)
