"""What is measured of an image or of a set of images: each `Measure` has its words for a table, and loads a function.

    settings = MeasureSettings(scorer="checkpoints/scorer")
    psnr = find_measure("psnr", "restoration").load(settings)
    psnr(Sample(image, reference=clean))                       # 25.6

A measure whose weights or library are missing raises `MetricUnavailable` in `load`, with the reason and the way out;
nothing is downloaded. `faceprior eval-metrics` lists all of them, with what is missing here and the licences.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from faceprior import tiny
from faceprior.detect import Face, resolve_detector
from faceprior.evaluation import judges
from faceprior.files import content_mark, stamp
from faceprior.metrics import (
    MetricUnavailable,
    folder_features,
    frechet_influence,
    kernel_distance,
    kernel_influence,
    landmark_error,
    lpips_distance,
    psnr,
    require_inception,
    require_lpips,
    ssim,
)
from faceprior.models import REWARD_ID, SCORER_ID, looks_like_path

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
    folders of other networks, {name: path}, in place of where they are looked for; the names are WEIGHTS.
    """

    scorer: str = ""
    device: str = "cpu"
    detector: str = "auto"
    are_tiny: bool = False
    weights: Mapping[str, str] = field(default_factory=dict)


class SetValue(NamedTuple):
    """A number of a set of images. influence: how much each image adds to it (N,); std: over subsets, if it has any."""

    value: float
    influence: np.ndarray
    std: float | None = None


OfImage = Callable[[Sample], float | None]  # None: this image has no value, such as one without a face
# (image files, reference files, partners=place of each image's own reference among them, or -1) -> value
OfSet = Callable[..., SetValue]
WEIGHTS = {
    "image_reward": "folder or hub id of ImageReward",
    "hps": "checkpoint of HPS v1, the classifier hpc.pt of https://github.com/tgxs002/align_sd",
    "hps_v2": "checkpoint of HPS v2, in place of that in the hub's cache",
    "clip": "folder or hub id of a transformers CLIP for CLIP-Score",
    "arcface": "ONNX file of an ArcFace network, in place of insightface's",
}


def read_weights(texts: Sequence[str]) -> dict[str, str]:
    """Read `NAME=PATH` texts of networks' weights; ValueError for a name that is not in WEIGHTS."""
    found = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not path or name not in WEIGHTS:
            raise ValueError(f"`weights` has to hold NAME=PATH, the names being {', '.join(WEIGHTS)}, but has {text!r}")
        found[name] = path
    return found


def named_weights(scorer: str, weights: Mapping[str, str], detector: str) -> dict[str, str]:
    """Return what the measures of a run are taken with, in words with the mark of each; see `rows.require_weights`.

    Empty for the scorer and the paths of `weights` where there is nothing; a hub id stands as it is.
    """
    found = dict.fromkeys(WEIGHTS, "those of the cache") | {"detector": resolve_detector(detector).name}
    for name, path in {**weights, "scorer": scorer}.items():
        mark = content_mark(tiny.resolve(path, "scorer")) if path else ""
        found[name] = f"{path} ({mark})" if mark else "" if looks_like_path(path) else path
    return found


@dataclass(frozen=True)
class Measure:
    """A column of a table.

    key: in rows.jsonl and results.json. title, unit, spec: words for the table and the format of its numbers. better:
    the better side, empty where there is none, as of a share of answers. load:
    settings -> the function of an image (`Sample`), or, with `of` = set, of two lists of files; raises
    MetricUnavailable; None where the key is in the row from the start. needs: what of a Sample has to be there.
    prompt_set: where a run has general prompts and prompts of people, those it is measured on. stands_in_for: key of
    the measure in whose place it is measured where that one's weights are missing and the models are tiny. is_infinite:
    None in a row stands for infinity, which JSON lacks. licence: of weights and code, as their authors state it.
    check: raises as `load` does, without loading what takes long.
    """

    key: str
    title: str
    load: Callable[[MeasureSettings], Any] | None
    better: Literal["higher", "lower", ""] = "higher"
    unit: str = ""
    spec: str = ".3f"
    of: Literal["image", "set"] = "image"
    needs: tuple[Need, ...] = ()
    protocols: tuple[str, ...] = (RESTORATION, GENERATION)
    prompt_set: Literal["", "general", "people"] = ""
    stands_in_for: str = ""
    is_infinite: bool = False
    licence: str = "Apache-2.0 (faceprior)"
    check: Callable[[MeasureSettings], Any] | None = None

    def reason(self, settings: MeasureSettings) -> str:
        """Return why it cannot be measured here, and the way out; empty if it can."""
        try:
            if made := self.check or self.load:
                made(settings)
        except (MetricUnavailable, ImportError, FileNotFoundError) as error:
            return str(error)
        return ""

    @property
    def header(self) -> str:
        """The title with the unit and an arrow towards the better side, if there is one."""
        arrow = {"higher": " ↑", "lower": " ↓", "": ""}[self.better]
        return f"{self.title}{f' ({self.unit})' if self.unit else ''}{arrow}"


# ---- against the reference


def _load_psnr(settings: MeasureSettings) -> OfImage:
    def measure(sample: Sample) -> float | None:
        decibels = psnr(sample.image, sample.reference)
        return decibels if math.isfinite(decibels) else None

    return measure


def _load_ssim(settings: MeasureSettings) -> OfImage:
    return lambda sample: ssim(sample.image, sample.reference)


def _load_lpips(settings: MeasureSettings) -> OfImage:
    require_lpips()
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


def _load_arcface(settings: MeasureSettings) -> OfImage:
    """The cosine of the two embeddings."""
    embed = judges.arcface_network(settings.weights.get("arcface", ""))

    def measure(sample: Sample) -> float | None:
        sides = ((sample.image, sample.face), (sample.reference, sample.reference_face))
        if any(face is None or face.landmarks is None for _, face in sides):
            return None
        first, second = (embed(image, face) for image, face in sides)
        return float(first @ second)

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


def _judged(key: str, title: str, make: Callable[[MeasureSettings], judges.Metric], **options: Any) -> Measure:
    """Return the measure of a network of `judges`; make: checks whether it can be had, and describes it."""

    def load(settings: MeasureSettings) -> OfImage:
        score = make(settings).load()

        def measure(sample: Sample) -> float | None:
            needs_face = "face" in options.get("needs", ())
            return None if needs_face and sample.face is None else score(sample.image, sample.prompt or "", sample.face)

        return measure

    return Measure(key, title, load, check=make, **options)


def _image_reward(settings: MeasureSettings) -> judges.Metric:
    from faceprior.scorer import FaceScorer

    source = settings.weights.get("image_reward", REWARD_ID)
    way_out = f"`hf download {REWARD_ID}`, or `--weights image_reward=FOLDER`"
    return judges.reward_metric(
        "IR", source, way_out, lambda folder: FaceScorer.from_pretrained(folder).to(settings.device).eval()
    )


def _hps(settings: MeasureSettings) -> judges.Metric:
    file = settings.weights.get("hps")
    way_out = "`--weights hps=FILE`, the classifier hpc.pt of https://github.com/tgxs002/align_sd"
    return judges.clip_metric("HPS", Path(file) if file else None, way_out, judges.HPS_V1, settings.device)


def _hps_v2(settings: MeasureSettings) -> judges.Metric:
    given = settings.weights.get("hps_v2")
    file = Path(given) if given else judges.in_hub_cache(judges.HPS_V2_ID, judges.HPS_V2_FILE)
    way_out = f"`hf download {judges.HPS_V2_ID} {judges.HPS_V2_FILE}`, or `--weights hps_v2=FILE`"
    return judges.clip_metric("HPSv2", file, way_out, judges.HPS_V2, settings.device)


def _clip_score(settings: MeasureSettings) -> judges.Metric:
    return judges.clip_score_metric(settings.weights.get("clip", judges.CLIP_ID), settings.device)


def _aesthetic(settings: MeasureSettings) -> judges.Metric:
    return judges.aesthetic_metric(settings.device)


def _face_quality(settings: MeasureSettings) -> judges.Metric:
    return judges.face_quality_metric(settings.device, resolve_detector(settings.detector))


def _quality(name: Any) -> Callable[[MeasureSettings], judges.Metric]:
    return lambda settings: judges.quality_metric(name, settings.device)


# ---- of sets


def _load_fid(settings: MeasureSettings) -> OfSet:
    require_inception()
    return lambda *sets, partners: _fid(*_features_of("inception", settings.device, *sets))


def _load_kid(settings: MeasureSettings) -> OfSet:
    require_inception()
    return lambda *sets, partners: _kid(*_features_of("inception", settings.device, *sets), partners, 1000)


def _load_tiny_fid(settings: MeasureSettings) -> OfSet:
    _features(settings.device)
    return lambda *sets, partners: _fid(*_features_of("tiny", settings.device, *sets))


def _load_tiny_kid(settings: MeasureSettings) -> OfSet:
    _features(settings.device)
    return lambda *sets, partners: _kid(*_features_of("tiny", settings.device, *sets), partners)


def _fid(features: np.ndarray, references: np.ndarray) -> SetValue:
    return SetValue(*frechet_influence(features, references))


def _kid(features: np.ndarray, references: np.ndarray, partners: Sequence[int], factor: float = 1) -> SetValue:
    measured = kernel_distance(features, references, partners=partners)
    std = None if measured.std is None else factor * measured.std
    return SetValue(factor * measured.mean, factor * kernel_influence(features, references, partners), std)


def _features_of(network: str, device: str, *sets: Sequence[Path]) -> list[np.ndarray]:
    """Return the features of the images and of the references, which FID and KID of all methods share."""
    return [_features_of_files(network, str(device), tuple((file, *stamp(file)) for file in files)) for files in sets]


@functools.lru_cache(maxsize=16)
def _features_of_files(network: str, device: str, files: tuple[tuple[Path, int, int], ...]) -> np.ndarray:
    from faceprior.features import tiny_fid_extractor

    extractor = tiny_fid_extractor(_features(device)) if network == "tiny" else None
    return folder_features([file for file, *_ in files], extractor, device)


def _check_scorer(settings: MeasureSettings) -> None:
    """Look for a scorer without loading it, or asking the hub."""
    if settings.scorer != tiny.NAME and not (Path(settings.scorer) / "config.json").is_file():
        judges.scorer_folder(settings.scorer or "empty", f"`hf download {SCORER_ID}`, or `--scorer FOLDER`")


# ---- networks


def _scorer(name: str, device: str) -> Any:
    from faceprior.scorer import FaceScorer

    if not name:
        raise MetricUnavailable("`scorer` is empty: give a folder or hub id of a scorer, or tiny")
    if looks_like_path(name) and not Path(name).exists():
        raise MetricUnavailable(
            f"no scorer in {name}: `python stages/02_train_scorer.py` makes one; `--scorer tiny` takes the small one"
        )
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


_WITH_REFERENCE = {"needs": ("reference",), "protocols": (RESTORATION,)}
_OF_FACES = {"needs": ("reference", "face"), "protocols": (RESTORATION,)}
_OF_PROMPT = {"needs": ("prompt",), "protocols": (GENERATION,), "prompt_set": "general"}
_INCEPTION = {"licence": "Inception V3 of NVIDIA's StyleGAN2-ADA: TensorFlow's, Apache-2.0", "of": "set"}
_SCORER = "of the scorer that is given; OPPOer/FaceScore: as its repository states"
_PYIQA = "code of pyiqa: PolyForm Noncommercial 1.0.0; "
_PYIQA_WEIGHTS = _PYIQA + "its weights: CC BY-NC-SA 4.0; "

MEASURES = (
    # ---- against the reference
    Measure("psnr", "PSNR", _load_psnr, unit="dB", spec=".2f", is_infinite=True, **_WITH_REFERENCE),
    Measure("ssim", "SSIM", _load_ssim, spec=".4f", **_WITH_REFERENCE),
    Measure(
        "lpips", "LPIPS", _load_lpips, "lower", spec=".4f", **_WITH_REFERENCE,
        licence="LPIPS: BSD-2-Clause; AlexNet of torchvision: BSD-3-Clause, trained on ImageNet",
        check=lambda settings: require_lpips(),
    ),
    Measure(
        "lpips_tiny", "tiny LPIPS", _load_tiny_lpips, "lower", spec=".4f", **_WITH_REFERENCE, stands_in_for="lpips"
    ),
    Measure(
        "identity", "identity distance", _load_identity, "lower", **_OF_FACES,
        licence="dlib's ResNet: CC0 1.0",
    ),
    Measure(
        "arcface", "ArcFace similarity", _load_arcface, **_OF_FACES,
        licence="insightface's models: non-commercial research only",
        check=lambda settings: judges.arcface_file(settings.weights.get("arcface", "")),
    ),
    Measure("landmarks", "landmark distance", _load_landmarks, "lower", "of the eyes' distance", ".4f", **_OF_FACES),
    # ---- of sets
    Measure("fid", "FID", _load_fid, "lower", spec=".2f", **_INCEPTION, check=lambda settings: require_inception()),
    Measure("fid_tiny", "tiny FID", _load_tiny_fid, "lower", spec=".2f", of="set", stands_in_for="fid"),
    Measure(
        "kid", "KID", _load_kid, "lower", "x 1000", ".2f", **_INCEPTION, check=lambda settings: require_inception()
    ),
    Measure("kid_tiny", "tiny KID", _load_tiny_kid, "lower", of="set", stands_in_for="kid"),
    # ---- of an image
    _judged("maniqa", "MANIQA", _quality("maniqa"), spec=".4f", licence=_PYIQA_WEIGHTS + "MANIQA's code: Apache-2.0"),
    _judged("musiq", "MUSIQ", _quality("musiq"), spec=".2f", licence=_PYIQA_WEIGHTS + "MUSIQ's code: Apache-2.0"),
    _judged("clipiqa", "CLIPIQA", _quality("clipiqa"), spec=".4f", licence=_PYIQA + "CLIP: MIT"),
    # ---- of an image and its prompt
    _judged("clip_score", "CLIP-Score (ViT-B/16)", _clip_score, spec=".4f", **_OF_PROMPT, licence="CLIP: MIT"),
    _judged("ir", "IR", _image_reward, spec=".2f", **_OF_PROMPT, licence="ImageReward: Apache-2.0"),
    _judged("hps", "HPS", _hps, spec=".4f", **_OF_PROMPT, licence="HPS: as its repository states"),
    _judged("hpsv2", "HPSv2", _hps_v2, spec=".4f", **_OF_PROMPT, licence="HPS v2: Apache-2.0"),
    _judged(
        "asp", "ASP", _aesthetic, spec=".2f", protocols=(GENERATION,), prompt_set="general",
        licence=_PYIQA_WEIGHTS + "predictor: Apache-2.0; CLIP: MIT",
    ),
    # ---- of faces
    Measure(
        "face_score", "Face Score", _load_aligned_score, protocols=(RESTORATION,), licence=_SCORER,
        check=_check_scorer,
    ),
    Measure(
        "face_score", "Face Score", _load_face_score, needs=("face",), protocols=(GENERATION,), prompt_set="people",
        licence=_SCORER, check=_check_scorer,
    ),
    _judged(
        "topiq_face", "topiq_nr-face", _face_quality, spec=".4f", needs=("face",), prompt_set="people",
        licence=_PYIQA_WEIGHTS + "facexlib's detector and parser: MIT",
    ),
    Measure("faces", "images with a face", None, spec=".1%", protocols=(GENERATION,), prompt_set="people"),
    Measure("seconds", "time", None, "lower", "s per image"),
)  # fmt: skip


def measures_of(protocol: str, keys: Sequence[str] = ()) -> list[Measure]:
    """Return the measures of a protocol, in the order of the table's columns.

    keys: those wanted, with what stands in for them; empty: all. ValueError for one that no protocol has.
    """
    known = {measure.key: measure.title for measure in MEASURES if not measure.stands_in_for}
    if unknown := [key for key in keys if key not in known]:
        raise ValueError(f"`measures` has to hold some of {', '.join(known)} but has {unknown[0]!r}")
    return [
        measure
        for measure in MEASURES
        if protocol in measure.protocols and (not keys or measure.key in keys or measure.stands_in_for in keys)
    ]


def find_measure(key: str, protocol: str) -> Measure:
    """Return one measure; KeyError without it."""
    for measure in measures_of(protocol):
        if measure.key == key:
            return measure
    raise KeyError(key)
