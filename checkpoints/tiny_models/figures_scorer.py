"""Figures of the scorer: unseen pairs, strength of damage, sharpness, and the order of a base's samples."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from checkpoints.tiny_models.bench import Bench, digest_of, drawing_digest
from checkpoints.tiny_models.damage import DAMAGES, LEVELS, UNSEEN
from checkpoints.tiny_models.faces import best_face, landmark_residuals
from checkpoints.tiny_models.stages import run
from checkpoints.tiny_models.table import correlation_estimate, make_row, rank_correlation
from faceprior import tiny
from faceprior.detect import AREA_LIMITS, area_bin, face_square
from faceprior.images import cv2, load_image
from faceprior.metrics import MetricUnavailable
from faceprior.pairs import gather_pairs
from faceprior.procedural import TEST_SEEDS, draw_folder, draw_scenes
from faceprior.tables import Estimate, fraction_estimate, mean_estimate, measure

PORTRAIT_SEEDS, SCENE_SEEDS = TEST_SEEDS + 3000, TEST_SEEDS + 6000  # other people than those of the samples' prompts
SCENE_BINS = (0, 1, 2, 2)  # bins of Table 8, in turn; the third has fewer faces in an image
MULTIPLE = 16  # the sides of an image for the autoencoder are multiples of it


@dataclass(frozen=True)
class PairFace:
    """A pair's face and its surroundings: both sides, the face's box in them, and its bin of Table 8."""

    good: Image.Image
    bad: Image.Image
    box: tuple[float, ...]
    bin: int


def pair_faces(bench: Bench) -> list[PairFace]:
    """Return the pairs that stage 1 makes of drawings from test seeds; made once and kept."""
    config = bench.config

    # ---- the drawings
    key = {"num_portraits": config.pair_portraits, "num_scenes": config.pair_scenes, "drawings": drawing_digest()}
    drawn = bench.fresh("pairs_drawn", key)
    draw_folder(drawn, range(PORTRAIT_SEEDS, PORTRAIT_SEEDS + config.pair_portraits), tiny.RESOLUTION)
    if config.pair_scenes:
        seeds = range(SCENE_SEEDS, SCENE_SEEDS + config.pair_scenes)
        draw_scenes(drawn, seeds, 4 * tiny.RESOLUTION, SCENE_BINS)

    # ---- their pairs
    base = bench.folder("sd15")
    options = {"mixed_precision": config.mixed_precision, "steps": config.pair_steps, "device": config.device}
    folder = bench.fresh("pairs", {**key, **options, "base": digest_of(base)})
    if not (folder / "done.json").is_file():
        run("01_make_pairs", folder, images=drawn, base=base, **options)
    pairs, _ = gather_pairs(str(folder))
    return [pair_face(pair) for pair in pairs]


def pair_face(pair) -> PairFace:
    good, bad = load_image(pair.good), load_image(pair.bad)
    x0, y0, x1, y1 = face_square(good.size, pair.box, tiny.RESOLUTION)
    side = (x1 - x0) // MULTIPLE * MULTIPLE
    square = (x0, y0, x0 + side, y0 + side)
    box = tuple(np.clip(np.array(pair.box) - (x0, y0, x0, y0), 0, side).tolist())
    return PairFace(good.crop(square), bad.crop(square), box, area_bin(pair.area_ratio))


def measure_pairs(bench: Bench) -> list[dict]:
    """The order of pairs that no training saw, in each bin of Table 8."""
    faces = pair_faces(bench)
    for number in range(len(AREA_LIMITS)):
        own = [face for face in faces if face.bin == number][:32]
        sides = [side.resize((128, 128)) for face in own for side in (face.good, face.bad)]
        bench.sheet(f"pairs_bin{number}", sides, 8)
    kept = order_kept(bench, faces)
    rows = []
    for name, own in zip(bin_names(), by_bin(kept, faces), strict=True):
        title = f"pairs in order, face of {name} of the image"
        rows.append(make_row(title, fraction_estimate(own, reason="there are no pairs"), (">=", 0.95), "%"))
    return [*rows, make_row("pairs in order, all", fraction_estimate(kept), unit="%")]


def by_bin(kept: list[bool], faces: list[PairFace]) -> list[list[bool]]:
    """Return `kept` in parts, one for each bin of Table 8."""
    return [
        [value for value, face in zip(kept, faces, strict=True) if face.bin == number]
        for number in range(len(AREA_LIMITS))
    ]


def bin_names() -> list[str]:
    edges = (0, *AREA_LIMITS)
    return [f"{low:.1%} to {high:.1%}" for low, high in zip(edges, edges[1:], strict=False)]


def order_kept(
    bench: Bench,
    faces: list[PairFace],
    change_good: Callable[[Image.Image], Image.Image] | None = None,
    change_bad: Callable[[Image.Image], Image.Image] | None = None,
) -> list[bool]:
    """Tell of each pair whether its good side, changed or not, scores above its bad side, changed or not.

    Raises MetricUnavailable without any pairs.
    """
    if not faces:
        raise MetricUnavailable("there are no pairs")
    boxes = [face.box for face in faces]
    good = [change_good(face.good) if change_good else face.good for face in faces]
    bad = [change_bad(face.bad) if change_bad else face.bad for face in faces]
    return [a > b for a, b in zip(bench.score(good, boxes), bench.score(bad, boxes), strict=True)]


def light_blur(image: Image.Image) -> Image.Image:
    return Image.fromarray(cv2.blur(np.asarray(image), (3, 3)))


def measure_sharpness(bench: Bench) -> list[dict]:
    """Whether the scorer only measures how sharp a face is, or whether a face went through the autoencoder."""
    faces = pair_faces(bench)
    twice = "both sides of a pair went through it once, the good one now twice"

    def trip(image):
        return bench.round_trip([image])[0]

    checks = (
        ("good face once more through the autoencoder, above the bad face", (trip, None), twice),
        ("good face under a 3 x 3 box blur, above the bad face", (light_blur, None), ""),
        ("both faces under the same blur, order kept", (light_blur, light_blur), ""),
    )
    rows = []
    for name, changes, note in checks:
        kept = order_kept(bench, faces, *changes)
        means = [f"{np.mean(own):.0%}" if own else "-" for own in by_bin(kept, faces)]
        note = "; ".join(filter(None, (note, f"by bin {', '.join(means)}")))
        rows.append(make_row(name, fraction_estimate(kept), (">=", 0.9), "%", note))
    return rows


def damage_ladder(score: Callable, drawing, kind: str, seed: int) -> float:
    """Return how well scores fall with the strength of a damage: -Spearman of level 0 .. 5 and score, 1 at best.

    score: (images, boxes) -> scores. The damage differs in its strength only.
    """
    images = [drawing.image]
    for strength in LEVELS:
        images.append(DAMAGES[kind](drawing.image, drawing.landmarks, strength, np.random.default_rng(seed)))
    scores = score([Image.fromarray(image) for image in images], [drawing.box] * len(images))
    return -rank_correlation(range(len(images)), scores)


def measure_damage(bench: Bench) -> list[dict]:
    """Strength of damage against score: twelve kinds in five strengths."""
    drawings = bench.portraits(bench.config.num_damaged)
    falls = {
        kind: [damage_ladder(bench.score, drawing, kind, seed) for seed, drawing in enumerate(drawings)]
        for kind in DAMAGES
    }
    seen = [kind for kind in DAMAGES if kind not in UNSEEN]
    rows = []
    for name, kinds in (("eight kinds seen in training", seen), ("four kinds never seen", UNSEEN)):
        means = np.mean([falls[kind] for kind in kinds], axis=0).tolist()  # faces are independent, kinds are not
        rows.append(make_row(f"score falls with damage, {name} (-Spearman)", mean_estimate(means), (">=", 0.9)))
    for kind in (*seen, *UNSEEN):
        note = "never seen in training, though other moved features were" if kind in UNSEEN else ""
        rows.append(make_row(f"score falls with {kind.replace('_', ' ')}", mean_estimate(falls[kind]), note=note))
    return rows


def measure_ranking(bench: Bench) -> list[dict]:
    """The base's samples in the scorer's order, against judges that the scorer does not know."""
    images = bench.samples("sd15")
    found = [(image, face) for image in images if (face := best_face(image)) is not None]
    images, faces = [image for image, _ in found], [face for _, face in found]
    scores = bench.score(images, [face.box for face in faces]) if found else []
    order = np.argsort(scores)[::-1]
    ends = [*order[:10], *order[-10:]] if len(order) >= 20 else list(order)
    bench.sheet("samples_best_and_worst", [images[i] for i in ends], 10)

    def agreement() -> Estimate:
        return correlation_estimate(scores, [-distance for distance in landmark_residuals(bench, images, faces)])

    confidence = correlation_estimate(scores, [face.confidence for face in faces])

    def judged() -> Estimate:
        return correlation_estimate(scores, bench.judge.score(images, [face.box for face in faces]))

    found_in = "samples in which MTCNN finds a face"
    minus = "agreement: minus the mean distance between the feature network's landmarks and MTCNN's"
    title = "samples' Face Score and {} (Spearman)"
    return [
        make_row(title.format("the judge"), measure(judged), (">", 0.3), note=found_in),
        make_row(title.format("MTCNN's confidence"), confidence, (">", 0.3), note=found_in),
        make_row(title.format("agreement of landmarks"), measure(agreement), (">", 0.3), note=minus),
    ]
