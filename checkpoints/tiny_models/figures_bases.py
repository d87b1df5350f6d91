"""Figures of the autoencoder and of the two bases: reconstruction, faces in samples, prompts followed."""

from collections import Counter
from functools import cached_property

import numpy as np
from PIL import Image

from checkpoints.tiny_models.bench import Bench
from checkpoints.tiny_models.faces import FOUND, best_face, confidence_of
from checkpoints.tiny_models.features import HIDES_HAIR
from checkpoints.tiny_models.table import make_row
from faceprior.metrics import psnr
from faceprior.procedural import Drawing
from faceprior.tables import fraction_estimate, mean_estimate

BASES = ("sd15", "sdxl")


def measure_vae(bench: Bench) -> list[dict]:
    """Reconstruction of test portraits."""
    drawn = [Image.fromarray(drawing.image) for drawing in bench.portraits(bench.config.num_portraits)]
    decoded = bench.round_trip(drawn)
    bench.sheet("vae", [image for pair in zip(drawn, decoded, strict=True) for image in pair][:64], 8)
    values = [psnr(after, before) for before, after in zip(drawn, decoded, strict=True)]
    title = f"autoencoder: PSNR of reconstructions at {drawn[0].width} px"
    return [make_row(title, mean_estimate(values), (">=", 32), "dB")]


def measure_samples(bench: Bench, base: str) -> list[dict]:
    """Samples of a base in which MTCNN finds a face."""
    images = bench.samples(base)
    bench.sheet(f"samples_{base}", images[:96], 12)
    found = [confidence_of(best_face(image)) >= FOUND for image in images]
    options = f"DDPM, {bench.config.sample_steps} steps, CFG {bench.config.guidance_scale:g}"
    title = f"{base}: samples in which MTCNN finds a face at {FOUND}"
    return [make_row(title, fraction_estimate(found), (">=", 0.95), "%", options)]


class Trait:
    """Something that a prompt names, and how it is read from the tags of a drawing and from predicted ones."""

    def __init__(self, name: str, tag: str, is_flag: bool = False):
        self.name, self.tag, self.is_flag = name, tag, is_flag

    def read(self, tags: dict) -> str | bool:
        return tags[self.tag] != "none" if self.is_flag else tags[self.tag]

    def is_named(self, tags: dict) -> bool:
        """Tell whether the caption names it; a trait without mention, such as a beard, is to be absent."""
        return self.tag != "hair_color" or tags["hair_style"] not in HIDES_HAIR


TRAITS = (
    Trait("hair colour", "hair_color"),
    Trait("glasses, yes or no", "glasses", is_flag=True),
    Trait("beard, yes or no", "beard", is_flag=True),
    Trait("side of the light", "light_side"),
)


class Readings:
    """The tags that the feature network predicts, against those of the drawings that gave the prompts."""

    def __init__(self, bench: Bench):
        self.bench, self.drawings = bench, bench.portraits(bench.config.num_samples)

    @cached_property
    def of_drawings(self) -> list[dict[str, str]]:
        return self.bench.predict_tags([Image.fromarray(drawing.image) for drawing in self.drawings])

    def correct(self, trait: Trait, predicted: list[dict]) -> list[bool]:
        """Tell of each prompt that names the trait whether it is predicted."""
        pairs = zip(self.drawings, predicted, strict=True)
        return [trait.read(tags) == trait.read(drawing.tags) for drawing, tags in pairs if trait.is_named(drawing.tags)]

    def commonest(self, trait: Trait) -> float:
        """Return how often the commonest value would be correct."""
        return most_common([trait.read(d.tags) for d in self.drawings if trait.is_named(d.tags)])


def most_common(values: list) -> float:
    return max(Counter(values).values()) / len(values) if values else float("nan")


def measure_prompts(bench: Bench, base: str) -> list[dict]:
    """What the prompts ask for, as the feature network predicts it on a base's samples."""
    readings = Readings(bench)
    predicted = bench.predict_tags(bench.samples(base))
    rows = []
    for trait in TRAITS:
        correct = fraction_estimate(readings.correct(trait, predicted))
        drawn = np.mean(readings.correct(trait, readings.of_drawings) or [float("nan")])
        note = f"on the drawings themselves {drawn:.1%}; always the commonest {readings.commonest(trait):.1%}"
        rows.append(make_row(f"{base}: {trait.name} as the prompt says", correct, (">=", 0.8), "%", note))
        if trait.is_flag:
            rows.append(asked_for(base, trait, readings.drawings, predicted))
    return rows


def asked_for(base: str, trait: Trait, drawings: list[Drawing], predicted: list[dict]) -> dict:
    """Return the row of the prompts that ask for the trait, which most do not."""
    followed = [trait.read(tags) for drawing, tags in zip(drawings, predicted, strict=True) if trait.read(drawing.tags)]
    title = f"{base}: of the prompts with {trait.tag}, those followed"
    return make_row(title, fraction_estimate(followed), unit="%")
