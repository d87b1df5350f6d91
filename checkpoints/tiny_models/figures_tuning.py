"""Figures of the guidance tuning: against the base, all timesteps and plain fine-tuning, from the same noise."""

import json
from dataclasses import dataclass

import numpy as np
from PIL import Image

from checkpoints.tiny_models.bench import Bench
from checkpoints.tiny_models.faces import FOUND, Proportions, best_face, confidence_of, drawn_proportions
from checkpoints.tiny_models.table import make_row
from faceprior import tiny
from faceprior.bases import load_pipeline
from faceprior.guidance import load_tuned
from faceprior.human_eval.files import SAME, read_preferences
from faceprior.metrics import MetricUnavailable
from faceprior.tables import Estimate, difference_estimate, fraction_estimate, measure

STAGE = "04_guidance_tune"
TUNED = "guided"  # the LoRA that ships
BLIND, WEIGHTS = "blind", "weights.json"  # folder of a blind look's answers, and the file that says what they are of
ABLATIONS = {  # name in the work folder -> what it is, and what is changed
    "guided_all": ("guidance at all timesteps", {"t_end": 1.0}),
    "guided_denoising": ("plain fine-tuning on the good faces", {"objective": "denoising"}),
}


@dataclass(frozen=True)
class Judged:
    """One sample: Face Score, distance from drawn proportions, MTCNN's confidence, the judge's own score, lightness.

    All but the confidence are None without a face, the judge's also without a judge. lightness: mean grey level in the
    face's box, 0 to 255; a scorer that takes light skin for better faces would show there.
    """

    score: float | None
    distance: float | None
    confidence: float
    judged: float | None = None
    lightness: float | None = None


def judge(bench: Bench, images: list[Image.Image], proportions: Proportions) -> list[Judged]:
    """Return the measures of images, each by the face that MTCNN is most confident of."""
    faces = [best_face(image) for image in images]
    sure = [i for i, face in enumerate(faces) if confidence_of(face) >= FOUND]
    found, boxes = [images[i] for i in sure], [faces[i].box for i in sure]
    by_number = dict(zip(sure, bench.score(found, boxes) if sure else [], strict=True))
    has_judge = bench.digest("judge") is not None
    by_judge = dict(zip(sure, bench.judge.score(found, boxes), strict=True)) if sure and has_judge else {}
    return [
        Judged(
            by_number.get(i),
            proportions.distance(face.landmarks) if i in by_number else None,
            confidence_of(face),
            by_judge.get(i),
            float(np.asarray(images[i].convert("L").crop(face.box)).mean()) if i in by_number else None,
        )
        for i, face in enumerate(faces)
    ]


def both(a: list[Judged], b: list[Judged], key: str) -> tuple[list[float], list[float]]:
    """Return the values of the samples that have one on both sides. key: an attribute of Judged."""
    pairs = [(getattr(x, key), getattr(y, key)) for x, y in zip(a, b, strict=True)]
    kept = [pair for pair in pairs if None not in pair]
    return [x for x, _ in kept], [y for _, y in kept]


def compare(a: list[Judged], b: list[Judged], name: str, p_below: dict[str, float] | None = None) -> list[dict]:
    """Return the rows of a - b at the same prompts and seeds. p_below: attribute of Judged -> limit of the p value."""
    found = "samples with a face on both sides"
    measures = (
        ("Face Score", "score", (">", 0), found),
        ("the judge", "judged", (">", 0), found),
        ("MTCNN's confidence", "confidence", (">", 0), "0 where it finds no face"),
        ("distance from drawn proportions", "distance", ("<", 0), found),
        ("lightness of the face, of 255", "lightness", None, found),
    )
    rows = []
    for what, key, aim, note in measures:
        difference = difference_estimate(*both(a, b, key))
        rows.append(make_row(f"{what}, {name}", difference, aim, note=note, p_below=(p_below or {}).get(key)))
    return rows


def measure_tuning(bench: Bench) -> list[dict]:
    """The tuned model against the base."""
    base, tuned = bench.samples("sd15"), tuned_samples(bench, TUNED)
    side_by_side = [image for pair in zip(base, tuned, strict=True) for image in pair]
    bench.sheet("base_and_tuned", side_by_side[:96], 12)
    proportions = drawn_proportions(bench)
    judged = [judge(bench, images, proportions) for images in (tuned, base)]
    return compare(*judged, "tuned - base", {"score": 0.001, "judged": 0.01})


def measure_ablation(bench: Bench, name: str) -> list[dict]:
    """The tuned model against an ablation, which is trained first where it is missing."""
    what, changes = ABLATIONS[name]
    tuned = tuned_samples(bench, TUNED)
    bench.train(STAGE, name, like="guided", **changes)
    other = tuned_samples(bench, name)
    bench.sheet(f"tuned_and_{name}", [image for pair in zip(tuned, other, strict=True) for image in pair][:96], 12)
    proportions = drawn_proportions(bench)
    judged = [judge(bench, images, proportions) for images in (tuned, other)]
    base = judge(bench, bench.samples("sd15"), proportions)
    rows = compare(*judged, f"tuned - {what}")
    return [*rows, make_row(f"Face Score, {what} - base", difference_estimate(*both(judged[1], base, "score")))]


def tuned_samples(bench: Bench, name: str) -> list[Image.Image]:
    """Return the samples of a model that stage 4 tuned: a whole pipeline, or a LoRA on the base."""

    def load():
        folder = bench.folder(name)
        whole = (folder / "model_index.json").is_file()
        return load_pipeline(folder) if whole else load_tuned(folder, str(bench.folder("sd15")))

    return bench.samples(name, load)


def measure_blind(bench: Bench) -> list[dict]:
    """What was preferred in a blind look at samples of the tuned model and of the base (see `blind`)."""
    title = "tuned preferred in a blind look, of the decided"
    return [make_row(title, measure(lambda: preferred(bench)), (">=", 0.6), "%")]


def preferred(bench: Bench) -> Estimate:
    """Return the fraction of the decided answers that prefer the tuned sample, MetricUnavailable without answers."""
    folder, command = tiny.tiny_folder() / BLIND, "`python -m checkpoints.tiny_models.blind` shows what to look at"
    if not (folder / WEIGHTS).is_file():
        raise MetricUnavailable(f"no answers in {folder}: {command}")
    if json.loads((folder / WEIGHTS).read_text()) != blind_weights(bench):
        raise MetricUnavailable(f"the answers in {folder} are about other weights: {command}")
    by_rater = read_preferences(folder)
    answers = [answer for own in by_rater.values() for answer in own]
    decided = [answer.preferred == answer.first for answer in answers if answer.preferred != SAME]
    same = len(answers) - len(decided)
    return fraction_estimate(decided, f"answers of {', '.join(by_rater)}: of {len(answers)} pairs {same} the same")


def blind_weights(bench: Bench) -> dict[str, str | None]:
    """Return the digests of the models whose samples are compared."""
    return {kind: bench.digest(kind) for kind in ("sd15", TUNED)}
