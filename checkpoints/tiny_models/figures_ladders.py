"""Figures of whatever judges faces: does it order a base's own damage, and does it see blur and degradations?

A judge counts as far as it orders these ladders, whose order is known by how they are made. Face Score is measured in
the same way, with more rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image

from checkpoints.tiny_models.bench import BATCH, Bench, digest_of, drawing_digest, image_path
from checkpoints.tiny_models.faces import best_face, confidence_of, landmark_residuals
from checkpoints.tiny_models.ladders import STRENGTHS, blurred, climb, draw_aligned
from checkpoints.tiny_models.table import jackknife_estimate, make_row, rank_correlation
from faceprior import tiny
from faceprior.bases import load_pipeline
from faceprior.degrade import PRESETS, degrade, scaled
from faceprior.images import load_image, save_image
from faceprior.procedural import TEST_SEEDS, Drawing, draw_portrait
from faceprior.tables import fraction_estimate, mean_estimate

CLIMBER_SEEDS = TEST_SEEDS + 12_000
SAMPLERS = ("ddim", "base")  # of the people in turn
SIGMA = 1.0  # pixels at 128
COPIES, NOISE, SHIFT = 4, 6.0, 3  # of a face for the scatter of its landmarks: how many, and what tells them apart
NEAREST = 5
Values = Callable[[list[Image.Image], list], list[float]]  # (images, boxes) -> higher is better, NaN: no answer


# ---- the ladders


@dataclass(frozen=True)
class Climber:
    """A test person on the strength ladder: the rungs in rising strength, and the box in all of them."""

    rungs: list[Image.Image]
    box: tuple[float, ...]
    sampler: str


def climbers(bench: Bench) -> list[Climber]:
    """Return test people on the ladder of the SD type base, which is climbed once and kept."""
    config = bench.config
    seeds = range(CLIMBER_SEEDS, CLIMBER_SEEDS + config.num_climbers)
    drawings = [draw_portrait(seed, tiny.RESOLUTION) for seed in seeds]
    key = {"base": digest_of(bench.folder("sd15")), "drawings": drawing_digest(), "first_seed": CLIMBER_SEEDS}
    key |= {"mixed_precision": config.mixed_precision}
    folder, steps = bench.fresh("climbers", key), len(STRENGTHS)
    missing = [i for i in range(len(drawings)) if not image_path(folder, (i + 1) * steps - 1).is_file()]
    pipeline = load_pipeline(bench.folder("sd15")).to(bench.device) if missing else None
    for number, sampler in enumerate(SAMPLERS):
        own = [i for i in missing if i % len(SAMPLERS) == number]
        for start in range(0, len(own), BATCH):
            people = own[start : start + BATCH]
            images, captions = zip(*((drawings[i].image, drawings[i].caption()) for i in people), strict=True)
            rungs = climb(
                pipeline, images, list(captions), [seeds[i] for i in people], STRENGTHS, sampler, config.mixed_precision
            )
            for i, person in zip(people, rungs, strict=True):
                for step, rung in enumerate(person):
                    save_image(Image.fromarray(rung), image_path(folder, i * steps + step))
    return [
        Climber(
            [load_image(image_path(folder, i * steps + step)) for step in range(steps)],
            drawing.box,
            SAMPLERS[i % len(SAMPLERS)],
        )
        for i, drawing in enumerate(drawings)
    ]


@dataclass(frozen=True)
class Framed:
    """How a face is shown: its name, the images, the boxes to judge, and the faces' mean width in pixels."""

    name: str
    images: list[Image.Image]
    boxes: list[tuple[float, ...]]
    face_width: float


def framings(drawings: Sequence[Drawing], seeds: Sequence[int]) -> list[Framed]:
    """Return the same people as whole portraits, in the face's box, and as aligned faces."""
    images = [Image.fromarray(drawing.image) for drawing in drawings]
    boxes = [tuple(drawing.box) for drawing in drawings]
    width = float(np.mean([box[2] - box[0] for box in boxes]))
    aligned, aligned_boxes = zip(*map(draw_aligned, seeds), strict=True)
    whole = (0.0, 0.0, float(tiny.RESOLUTION), float(tiny.RESOLUTION))
    aligned_width = float(np.mean([box[2] - box[0] for box in aligned_boxes]))
    return [
        Framed("portraits", images, [whole] * len(images), width),
        Framed("tight boxes", images, boxes, width),
        Framed("aligned faces", list(map(Image.fromarray, aligned)), [whole] * len(aligned), aligned_width),
    ]


def framed_test_people(bench: Bench) -> list[Framed]:
    count = bench.config.num_faces
    return framings(bench.portraits(count), range(TEST_SEEDS, TEST_SEEDS + count))


def soft(image: Image.Image) -> Image.Image:
    return Image.fromarray(blurred(np.asarray(image), SIGMA))


def degraded(images: list[Image.Image], preset: str) -> list[Image.Image]:
    """Degrade images as stage 7 degrades faces of their size."""
    ranges = scaled(PRESETS[preset], tiny.RESOLUTION)
    pixels = [degrade(np.asarray(image), ranges, np.random.default_rng(i)) for i, image in enumerate(images)]
    return list(map(Image.fromarray, pixels))


# ---- rows


def strength_rows(name: str, values: Values, people: list[Climber], aims: tuple | None = None) -> list[dict]:
    """Return Spearman's correlation of strength and judgement, the mean over the people, and over all images."""
    scores = np.array([values(person.rungs, [person.box] * len(person.rungs)) for person in people])  # (N, S)
    own = np.array([correlation_with_strength(row) for row in scores])
    by_sampler = []
    for sampler in SAMPLERS:
        known = [
            value
            for value, person in zip(own, people, strict=True)
            if person.sampler == sampler and not np.isnan(value)
        ]
        if known:
            by_sampler.append(f"{sampler} {np.mean(known):.2f}")
    per_person = mean_estimate(own[~np.isnan(own)].tolist())
    pooled = jackknife_estimate(lambda items: correlation_with_strength(scores[items]), len(people))
    title = f"{name} falls with the base's strength (Spearman)"
    one, all_together = aims or (None, None)
    return [
        make_row(f"{title}, per person", per_person, one, note=f"by sampler: {', '.join(by_sampler) or 'no answer'}"),
        make_row(f"{title}, pooled", pooled, all_together),
    ]


def correlation_with_strength(scores: np.ndarray) -> float:
    """Return Spearman's correlation of STRENGTHS with scores (..., S), over those that exist; NaN for too few."""
    strengths = np.broadcast_to(STRENGTHS, scores.shape)
    known = ~np.isnan(scores)
    return rank_correlation(strengths[known], scores[known]) if known.sum() > 2 else float("nan")


def order_row(title: str, values: Values, framed: Framed, worse: list[Image.Image], aim: tuple | None) -> dict:
    """Return the row of how often a clean face is judged above its worse copy; no answer counts as the lowest."""
    above, below = (np.nan_to_num(values(side, framed.boxes), nan=-np.inf) for side in (framed.images, worse))
    return make_row(title, fraction_estimate((above > below).tolist()), aim, "%")


def blur_note(framed: Framed) -> str:
    return f"sigma {SIGMA:g} px of 128, {SIGMA / framed.face_width:.1%} of the face's width"


def blur_row(name: str, values: Values, framed: Framed, aim: tuple | None = None) -> dict:
    row = order_row(f"{name}: clean above blurred, {framed.name}", values, framed, list(map(soft, framed.images)), aim)
    return {**row, "note": blur_note(framed)}


# ---- the scorer


def measure_ladders(bench: Bench) -> list[dict]:
    """Face Score on the strength ladder of unseen people, and on blurred and degraded faces, at every scale."""
    rows = strength_rows("Face Score", bench.score, climbers(bench), (("<=", -0.85), ("<=", -0.7)))
    for framed in framed_test_people(bench):
        rows.append(blur_row("Face Score", bench.score, framed, (">=", 0.95)))
        for preset in PRESETS:
            title = f"Face Score: clean above degraded ({preset}), {framed.name}"
            rows.append(order_row(title, bench.score, framed, degraded(framed.images, preset), (">=", 0.95)))
    return rows


# ---- the judges


def measure_judges(bench: Bench) -> list[dict]:
    """Every judge of the other figures on the same ladders: what it says below weighs as much as it orders here."""
    people, framed = climbers(bench), framed_test_people(bench)
    judges: dict[str, Values] = {
        "judge": bench.judge.score,
        "MTCNN's confidence": confidences,
        "MTCNN's landmarks hold still": stillness,
        "agreement of landmarks": partial(agreement, bench),
        "nearness to drawn faces in the feature network": nearness(bench),
    }
    rows = []
    for name, values in judges.items():
        is_ours = name == "judge"
        rows += strength_rows(name, values, people, (("<=", -0.6), None) if is_ours else None)
        # the detector and the feature network want to see a whole portrait
        for own in framed if is_ours else framed[:1]:
            rows.append(blur_row(name, values, own, (">=", 0.95) if is_ours else None))
    for own in framed:
        for preset in PRESETS:
            title = f"judge: clean above degraded ({preset}), {own.name}"
            rows.append(order_row(title, bench.judge.score, own, degraded(own.images, preset), None))
    return rows


def confidences(images: list[Image.Image], boxes: list) -> list[float]:
    return [confidence_of(best_face(image)) for image in images]


def stillness(images: list[Image.Image], boxes: list) -> list[float]:
    """Return minus the scatter of MTCNN's landmarks over noisy, shifted copies, in units of the eyes' distance."""
    return [-scatter(np.asarray(image)) for image in images]


def scatter(image: np.ndarray) -> float:
    """Return the standard deviation of MTCNN's landmarks; NaN where it finds a face in fewer than two copies."""
    rng, points = np.random.default_rng(0), []
    for _ in range(COPIES):
        shift = rng.integers(-SHIFT, SHIFT + 1, 2)
        noisy = np.clip(image + rng.normal(0, NOISE, image.shape), 0, 255).astype(np.uint8)
        face = best_face(Image.fromarray(np.roll(noisy, shift[::-1], (0, 1))))
        if face is not None:
            points.append(np.asarray(face.landmarks, float) - shift)
    if len(points) < 2:
        return float("nan")
    points = np.stack(points)  # (copies, 5, 2)
    return float(points.std(axis=0).mean() / np.linalg.norm(points[:, 1] - points[:, 0], axis=-1).mean())


def agreement(bench: Bench, images: list[Image.Image], boxes: list) -> list[float]:
    """Return minus the distance between the feature network's landmarks and MTCNN's; NaN where it finds no face."""
    faces = [best_face(image) for image in images]
    found = [(image, face) for image, face in zip(images, faces, strict=True) if face is not None]
    residuals = iter(landmark_residuals(bench, [image for image, _ in found], [face for _, face in found]))
    return [float("nan") if face is None else -next(residuals) for face in faces]


def nearness(bench: Bench) -> Values:
    """Return the judge by minus the mean distance to the nearest drawn portraits among the network's features."""
    drawn = [Image.fromarray(drawing.image) for drawing in bench.portraits(bench.config.num_portraits)]
    known = bench.image_features(drawn)  # (N, D)

    def values(images: list[Image.Image], boxes: list) -> list[float]:
        distances = torch.cdist(bench.image_features(images), known)  # (B, N)
        # a drawn portrait is not its own neighbour
        distances = distances.where(distances > 1e-3, torch.inf)
        return (-distances.topk(min(NEAREST, len(known) - 1), largest=False).values.mean(dim=1)).tolist()

    return values
