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
from faceprior.photography import ANALYSIS_SIZE, ATTRIBUTES, head_turn, measure_photography
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
    scenes = [
        draw_scene(config.first_seed + i, SIZE, area_bin=0).image for i in range(min(SCENES, config.num_portraits))
    ]
    outcomes = {attribute.name: [] for attribute in ATTRIBUTES}  # (truth, tag or None where nothing is measured)
    attributes = {attribute.name: attribute for attribute in ATTRIBUTES}
    without_face = 0
    for index in tqdm(range(config.num_portraits), desc="measuring", unit="portrait"):
        person = sample_person(config.first_seed + index)
        for name, truth, image in photographs(person, scenes[index % len(scenes)]):
            faces = detect_faces(Image.fromarray(image), "mtcnn")
            if not faces or faces[0].landmarks is None:
                without_face += 1
                continue
            crop = align_face(Image.fromarray(image), faces[0].landmarks, ANALYSIS_SIZE).crop
            values = measure_photography(crop, head_turn(faces[0].landmarks))
            for key in (name,) if name else truth:
                value = values[key]
                expected = truth if name else truth[key]
                outcomes[key].append((expected, None if value is None else attributes[key].tag(value)))

    # ---- The table
    results = {"command": command_of(config), "machine": machine(), "drawings": drawing_digest()}
    results |= {"without_face": without_face, "soft": share_of_soft_light(config), "rows": rows_of(outcomes)}
    Path(config.output).mkdir(parents=True, exist_ok=True)
    with atomic_write(Path(config.output) / RESULTS, "w") as file:
        json.dump(results, file, indent=1)
    with atomic_write(Path(config.output) / TABLE, "w") as file:
        file.write(markdown(results))
    print((Path(config.output) / TABLE).read_text())


def share_of_soft_light(config: Config) -> float:
    people = (sample_person(config.first_seed + index) for index in range(config.num_portraits))
    return float(np.mean([person.light_hardness == "soft" for person in people]))


def photographs(person: SimpleNamespace, scene: np.ndarray) -> Iterator[tuple[str, str | dict[str, str], np.ndarray]]:
    """Photograph a person in known ways -> (attribute, its true tag, image (SIZE, SIZE, 3) uint8).

    The first photograph is the drawn one, without an attribute, and with true tags by attribute.
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

    behind = to_linear(scene)
    yield "depth of field", "", taken(person, layer, behind)
    yield "depth of field", "blurred background", taken(person, layer, blur(behind, OUT_OF_FOCUS))

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
        "exposure, a sharp or a blurred background, blur, smoothed skin, no colours. It says "
        "nothing about photographs.",
        "",
        f"Aim: {AIM:.0%} right of every attribute; missed by: {', '.join(['light hardness', *missed])}. The hardness "
        "of the light is not measured: single measures of contrast and of the edges of shadows were right no more "
        f"often than always saying soft, {results['soft']:.0%} for these people. Fractions with 95% intervals "
        "(Wilson), of the photographs where there was something to measure; no face was found in "
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
    return "\n".join(lines) + "\n" + markdown_table(head, cells)


def command_of(config: Config) -> str:
    defaults = Config()
    kept = ("num_portraits", "first_seed")
    words = [f"--{key} {getattr(config, key)}" for key in kept if getattr(config, key) != getattr(defaults, key)]
    return " ".join(["python -m checkpoints.tiny_models.photography", *words])


if __name__ == "__main__":
    run_stage(main, Config)
