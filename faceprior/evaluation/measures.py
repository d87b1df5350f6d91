"""What is measured of an image or of a set of images: each `Measure` has its words for a table, and loads a function.

    settings = MeasureSettings(scorer="checkpoints/scorer")
    psnr = find_measure("psnr", "restoration").load(settings)
    psnr(Sample(image, reference=clean))                       # 25.6

A measure whose weights or library are missing raises `MetricUnavailable` in `load`, with the reason and the way out;
nothing is downloaded.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from faceprior import tiny
from faceprior.detect import Face
from faceprior.metrics import MetricUnavailable, fid, landmark_error, lpips_distance, psnr, ssim
from faceprior.models import looks_like_path

RESTORATION, GENERATION = "restoration", "generation"
Need = Literal["reference", "prompt", "face"]


@dataclass(frozen=True)
class Sample:
    """An image and what it is measured against.

    reference: the image that it should be, of the same size. face, reference_face: the representative face of each,
    found where a measure needs it; None where there is none.
    """

    image: Image.Image
    reference: Image.Image | None = None
    prompt: str | None = None
    face: Face | None = None
    reference_face: Face | None = None


@dataclass(frozen=True)
class MeasureSettings:
    """What measures are loaded with.

    scorer: folder or hub id of a FaceScorer, `tiny`, or empty for none. are_tiny: whether all models that are measured
    are tiny ones, for which the small feature network stands in where real weights are missing. weights: files or
    folders of other networks, {name: path}, in place of where they are looked for.
    """

    scorer: str = ""
    device: str = "cpu"
    detector: str = "auto"
    are_tiny: bool = False
    weights: Mapping[str, str] = field(default_factory=dict)


OfImage = Callable[[Sample], float | None]  # None: this image has no value, such as one without a face
OfSet = Callable[[Sequence[Path], Sequence[Path]], float]  # (image files, reference files) -> value


@dataclass(frozen=True)
class Measure:
    """A column of a table.

    key: in rows.jsonl and results.json. title, unit, spec: words for the table and the format of its numbers. load:
    settings -> the function of an image (`Sample`), or, with `of` = set, of two lists of files; raises
    MetricUnavailable; None where the key is in the row from the start. needs: what of a Sample has to be there.
    prompt_set: where a run has general prompts and prompts of people, those it is measured on. stands_in_for: key of
    the measure in whose place it is measured where that one's weights are missing and the models are tiny. is_infinite:
    None in a row stands for infinity, which JSON lacks.
    """

    key: str
    title: str
    load: Callable[[MeasureSettings], Any] | None
    better: Literal["higher", "lower"] = "higher"
    unit: str = ""
    spec: str = ".3f"
    of: Literal["image", "set"] = "image"
    needs: tuple[Need, ...] = ()
    protocols: tuple[str, ...] = (RESTORATION, GENERATION)
    prompt_set: Literal["", "general", "people"] = ""
    stands_in_for: str = ""
    is_infinite: bool = False

    @property
    def header(self) -> str:
        """The title with the unit and an arrow towards the better side."""
        return f"{self.title}{f' ({self.unit})' if self.unit else ''} {'↑' if self.better == 'higher' else '↓'}"


# ---- against the reference


def _load_psnr(settings: MeasureSettings) -> OfImage:
    def measure(sample: Sample) -> float | None:
        decibels = psnr(sample.image, sample.reference)
        return decibels if math.isfinite(decibels) else None

    return measure


def _load_ssim(settings: MeasureSettings) -> OfImage:
    return lambda sample: ssim(sample.image, sample.reference)


def _load_lpips(settings: MeasureSettings) -> OfImage:
    lpips_distance(*[Image.new("RGB", (64, 64))] * 2)  # raises without the weights
    return lambda sample: lpips_distance(sample.image, sample.reference)


def _load_tiny_lpips(settings: MeasureSettings) -> OfImage:
    import torch

    from faceprior.images import to_pixel_values

    network = _features(settings.device)

    def measure(sample: Sample) -> float:
        images = (to_pixel_values(image).to(network.device) for image in (sample.image, sample.reference))
        with torch.no_grad():
            return float(network.perceptual_distance(*images))

    return measure


def _load_landmarks(settings: MeasureSettings) -> OfImage:
    """The distance as a fraction of that between the eyes of the reference."""

    def measure(sample: Sample) -> float | None:
        face, reference = sample.face, sample.reference_face
        if face is None or reference is None or face.landmarks is None or reference.landmarks is None:
            return None
        return landmark_error(face.landmarks, reference.landmarks)

    return measure


def _load_identity(settings: MeasureSettings) -> OfImage:
    from faceprior.identity import IdentityModel

    try:
        model = IdentityModel(settings.detector)
    except ImportError as error:
        raise MetricUnavailable(str(error)) from error

    def measure(sample: Sample) -> float | None:
        sides = ((sample.image, sample.face), (sample.reference, sample.reference_face))
        if any(face is None or face.landmarks is None for _, face in sides):
            return None
        vectors = [model.embedding(image, face.landmarks) for image, face in sides]
        return None if any(vector is None for vector in vectors) else float(np.linalg.norm(vectors[0] - vectors[1]))

    return measure


# ---- of one image


def _load_aligned_score(settings: MeasureSettings) -> OfImage:
    """Of the whole image, which is an aligned face."""
    scorer = _scorer(settings.scorer, str(settings.device))
    return lambda sample: scorer.score_crops([sample.image])[0]


def _load_face_score(settings: MeasureSettings) -> OfImage:
    """Of the representative face."""
    scorer = _scorer(settings.scorer, str(settings.device))

    def measure(sample: Sample) -> float | None:
        return None if sample.face is None else scorer.score(sample.image, faces=[sample.face])[0].score

    return measure


# ---- of sets


def _load_fid(settings: MeasureSettings) -> OfSet:
    from faceprior.metrics import _inception

    _inception(str(settings.device))  # raises without the weights
    return lambda images, references: fid(images, references, device=str(settings.device))


def _load_tiny_fid(settings: MeasureSettings) -> OfSet:
    from faceprior.features import tiny_fid_extractor

    extractor = tiny_fid_extractor(_features(settings.device))
    return lambda images, references: fid(images, references, extractor, device=str(settings.device))


# ---- networks


def _scorer(name: str, device: str) -> Any:
    from faceprior.scorer import FaceScorer

    if not name:
        raise MetricUnavailable("`scorer` is empty: give a folder or hub id of a scorer, or tiny")
    if looks_like_path(name) and not Path(name).exists():
        raise MetricUnavailable(f"no scorer in {name}: `python stages/02_train_scorer.py` makes one")
    return FaceScorer.from_pretrained(tiny.resolve(name, "scorer")).to(device).eval()


@functools.lru_cache(maxsize=1)
def _features(device: str) -> Any:
    from faceprior.features import FeatureNetwork

    folder = tiny.tiny_folder() / "features"
    if not folder.is_dir():
        raise MetricUnavailable(
            f"no feature network in {folder}: `python -m checkpoints.tiny_models.make_tiny --only features` trains one"
        )
    return FeatureNetwork.from_pretrained(folder).to(device)


TINY_NOTE = "by the small feature network of drawn portraits: not comparable with published numbers"

MEASURES = (
    Measure(
        "psnr", "PSNR", _load_psnr, unit="dB", spec=".2f", needs=("reference",), protocols=(RESTORATION,),
        is_infinite=True,
    ),
    Measure("ssim", "SSIM", _load_ssim, spec=".4f", needs=("reference",), protocols=(RESTORATION,)),
    Measure("lpips", "LPIPS", _load_lpips, "lower", spec=".4f", needs=("reference",), protocols=(RESTORATION,)),
    Measure(
        "lpips_tiny", "tiny LPIPS", _load_tiny_lpips, "lower", spec=".4f", needs=("reference",),
        protocols=(RESTORATION,), stands_in_for="lpips",
    ),
    Measure("fid", "FID", _load_fid, "lower", spec=".2f", of="set"),
    Measure("fid_tiny", "tiny FID", _load_tiny_fid, "lower", spec=".2f", of="set", stands_in_for="fid"),
    Measure("face_score", "Face Score", _load_aligned_score, protocols=(RESTORATION,)),
    Measure(
        "face_score", "Face Score", _load_face_score, needs=("face",), protocols=(GENERATION,), prompt_set="people"
    ),
    Measure("faces", "images with a face", None, spec=".1%", protocols=(GENERATION,), prompt_set="people"),
    Measure(
        "identity", "identity distance", _load_identity, "lower", needs=("reference", "face"), protocols=(RESTORATION,)
    ),
    Measure(
        "landmarks", "landmark distance", _load_landmarks, "lower", "between the eyes", ".4f",
        needs=("reference", "face"), protocols=(RESTORATION,),
    ),
    Measure("seconds", "time", None, "lower", "s per image"),
)  # fmt: skip


def measures_of(protocol: str) -> list[Measure]:
    """Return the measures of a protocol, in the order of the table's columns."""
    return [measure for measure in MEASURES if protocol in measure.protocols]


def find_measure(key: str, protocol: str) -> Measure:
    """Return one measure; KeyError without it."""
    for measure in measures_of(protocol):
        if measure.key == key:
            return measure
    raise KeyError(key)
