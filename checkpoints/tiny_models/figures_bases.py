"""Figures of the autoencoder and of the two bases: reconstruction, faces in samples, prompts followed."""

from collections import Counter
from functools import cached_property, partial

import numpy as np
from PIL import Image

from checkpoints.tiny_models.bench import FOUND, Bench, best_face, confidence_of
from checkpoints.tiny_models.table import cell, mean_of, share_of
from faceprior.metrics import psnr
from faceprior.procedural import Drawing

HIDES_HAIR = ("bald", "head scarf", "knit cap", "hat", "cap")  # of its colour too little is seen, or nothing
BASES = ("sd15", "sdxl")


def measure_vae(bench: Bench) -> list[dict]:
    """Reconstruction of test portraits."""
    drawn = [Image.fromarray(drawing.image) for drawing in bench.portraits(bench.config.num_portraits)]
    decoded = bench.round_trip(drawn)
    bench.sheet("vae", [image for pair in zip(drawn, decoded, strict=True) for image in pair][:64], 8)
    values = [psnr(after, before) for before, after in zip(drawn, decoded, strict=True)]
    size = f"{drawn[0].width} px"
    return [cell(f"autoencoder: PSNR of reconstructions at {size}", partial(mean_of, values), (">=", 32), "dB")]


def measure_samples(bench: Bench, base: str) -> list[dict]:
    """Samples of a base in which MTCNN finds a face."""
    images = bench.samples(base)
    bench.sheet(f"samples_{base}", images[:96], 12)
    found = [confidence_of(best_face(image)) >= FOUND for image in images]
    options = f"DDPM, {bench.config.sample_steps} steps, CFG {bench.config.guidance_scale:g}"
    title = f"{base}: samples in which MTCNN finds a face at {FOUND}"
    return [cell(title, partial(share_of, found), (">=", 0.95), "%", options)]


class Trait:
    """One of the things that a prompt names, and how it is read from a drawing's tags and from what is told."""

    def __init__(self, name: str, tag: str, is_flag: bool = False):
        self.name, self.tag, self.is_flag = name, tag, is_flag

    def read(self, tags: dict) -> str | bool:
        return tags[self.tag] != "none" if self.is_flag else tags[self.tag]

    def is_named(self, tags: dict) -> bool:
        """Tell whether the caption names it; what it leaves out, such as a beard, counts as named to be absent."""
        return self.tag != "hair_color" or tags["hair_style"] not in HIDES_HAIR


TRAITS = (
    Trait("hair colour", "hair_color"),
    Trait("glasses, yes or no", "glasses", is_flag=True),
    Trait("beard, yes or no", "beard", is_flag=True),
    Trait("side of the light", "light_side"),
)


class Readings:
    """What the feature network tells of the drawings that gave the prompts, and how often it is right there."""

    def __init__(self, bench: Bench):
        self.bench, self.drawings = bench, bench.portraits(bench.config.num_samples)

    @cached_property
    def of_drawings(self) -> list[dict[str, str]]:
        return self.bench.told([Image.fromarray(drawing.image) for drawing in self.drawings])

    def right(self, trait: Trait, told: list[dict]) -> list[bool]:
        pairs = zip(self.drawings, told, strict=True)
        return [trait.read(tags) == trait.read(drawing.tags) for drawing, tags in pairs if trait.is_named(drawing.tags)]

    def commonest(self, trait: Trait) -> float:
        """Return how often the commonest value would be right."""
        return most_common([trait.read(d.tags) for d in self.drawings if trait.is_named(d.tags)])


def most_common(values: list) -> float:
    return max(Counter(values).values()) / len(values) if values else float("nan")


def measure_prompts(bench: Bench, base: str) -> list[dict]:
    """What the prompts ask for, told by the feature network on a base's samples."""
    readings = Readings(bench)
    told = bench.told(bench.samples(base))
    rows = []
    for trait in TRAITS:
        right = readings.right(trait, told)
        seen = np.mean(readings.right(trait, readings.of_drawings) or [float("nan")])
        note = (
            f"of the drawings themselves {100 * seen:.1f}%; always the commonest {100 * readings.commonest(trait):.1f}%"
        )
        rows.append(cell(f"{base}: {trait.name} as the prompt says", partial(share_of, right), (">=", 0.8), "%", note))
        if trait.is_flag:
            rows.append(asked_for(base, trait, readings.drawings, told))
    return rows


def asked_for(base: str, trait: Trait, drawings: list[Drawing], told: list[dict]) -> dict:
    """Return the row of the prompts that do name the trait, which most do not."""
    right = [trait.read(tags) for drawing, tags in zip(drawings, told, strict=True) if trait.read(drawing.tags)]
    return cell(f"{base}: of the prompts with {trait.tag}, those followed", partial(share_of, right), unit="%")
