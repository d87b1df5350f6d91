"""Figures of the restorer: against its degraded input, and with other facial losses (AuthFace, Table 2)."""

from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from checkpoints.tiny_models.bench import BATCH, Bench, digest_of, drawing_digest, image_path
from checkpoints.tiny_models.faces import best_face
from checkpoints.tiny_models.table import jackknife_estimate, make_row
from faceprior import tiny
from faceprior.align import align_face
from faceprior.degrade import PRESETS, degrade, scaled
from faceprior.images import cv2, load_image, save_image, to_pixel_values
from faceprior.metrics import MetricUnavailable, frechet_distance, landmark_error, psnr
from faceprior.procedural import TEST_SEEDS, draw_portrait
from faceprior.restorer import AuthFaceRestorer
from faceprior.tables import Estimate, difference_estimate, mean_estimate, measure

STAGE = "06_train_restorer"
SEEDS = TEST_SEEDS + 8000
ABLATIONS = {
    "restorer_constant": ("constant", "the same weight at all timesteps"),
    "restorer_none": ("none", "no facial loss"),
}


@dataclass(frozen=True)
class FaceToRestore:
    """An aligned drawn face: clean and degraded, its true landmarks (5, 2) and the mask (H, W) of eyes and mouth."""

    clean: Image.Image
    degraded: Image.Image
    landmarks: np.ndarray
    mask: np.ndarray


@cache
def draw_face(index: int) -> FaceToRestore:
    """Draw a test portrait, as large as in stage 3, align it by its true landmarks, and degrade it as stage 6 does."""
    drawing = draw_portrait(SEEDS + index, 4 * tiny.RESOLUTION)
    aligned = align_face(drawing.image, drawing.landmarks, tiny.RESOLUTION)
    ranges = scaled(PRESETS["authface"], tiny.RESOLUTION)
    degraded = degrade(np.asarray(aligned.crop), ranges, np.random.default_rng([1, index]))
    corners = np.c_[drawing.landmarks, np.ones(5)]
    mask = drawing.region_masks["eyes"] | drawing.region_masks["mouth"]
    return FaceToRestore(
        aligned.crop, Image.fromarray(degraded), corners @ aligned.matrix.T, map_mask(mask, aligned.matrix)
    )


def map_mask(mask: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Map a portrait's mask (H, W) bool to the aligned crop: (R, R) float32 in [0, 1]."""
    size = (tiny.RESOLUTION, tiny.RESOLUTION)
    return cv2.warpAffine(mask.astype(np.float32), matrix, size, flags=cv2.INTER_LINEAR)


def restored(bench: Bench, name: str) -> list[Image.Image]:
    """Return the test faces restored; they are kept, and made where missing."""
    source, config = bench.folder(name), bench.config
    key = {"model": digest_of(source), "mixed_precision": config.mixed_precision, "drawings": drawing_digest()}
    folder = bench.fresh(f"restored/{name}", {**key, "steps": config.restore_steps})
    missing = [index for index in range(config.num_faces) if not image_path(folder, index).is_file()]
    if missing:
        restorer = AuthFaceRestorer.from_pretrained(str(source)).to(bench.device)
        options = {"num_inference_steps": config.restore_steps} if config.restore_steps else {}
        with bench.half_precision(restorer.pipeline.unet, restorer.pipeline.controlnet):
            for start in tqdm(range(0, len(missing), BATCH), desc=f"restoring, {name}", unit="batch"):
                batch = missing[start : start + BATCH]
                degraded = [draw_face(index).degraded for index in batch]
                images = restorer.restore_crops(degraded, batch_size=BATCH, **options)
                for index, image in zip(batch, images, strict=True):
                    save_image(image, image_path(folder, index))
    return [load_image(image_path(folder, index)) for index in range(config.num_faces)]


def measure_restorer(bench: Bench) -> list[dict]:
    """The restored faces against their degraded inputs."""
    after, faces = restored(bench, "restorer"), [draw_face(index) for index in range(bench.config.num_faces)]
    before, clean = [face.degraded for face in faces], [face.clean for face in faces]
    bench.sheet("restored", [image for row in zip(before, after, clean, strict=True) for image in row][:96], 12)
    values = [[psnr(a, b) for a, b in zip(images, clean, strict=True)] for images in (after, before)]
    means = f"restored {np.mean(values[0]):.2f} dB, degraded {np.mean(values[1]):.2f} dB"
    gain = make_row("PSNR, restored - degraded", difference_estimate(*values), (">=", 1), "dB", means)
    return [
        gain,
        *landmark_rows(faces, after),
        fid_row(bench, before, after, clean),
        *score_rows(bench, before, after, clean),
    ]


def score_rows(
    bench: Bench, before: list[Image.Image], after: list[Image.Image], clean: list[Image.Image]
) -> list[dict]:
    """Return by how much the scorer prefers the restored faces to the degraded ones, and the clean faces to these."""
    whole = [(0.0, 0.0, float(tiny.RESOLUTION), float(tiny.RESOLUTION))] * len(clean)
    degraded, restored, best = (bench.score(images, whole) for images in (before, after, clean))
    means = f"degraded {np.mean(degraded):.2f}, restored {np.mean(restored):.2f}, clean {np.mean(best):.2f}"
    sides = (("restored - degraded", restored, degraded), ("clean - restored", best, restored))
    return [
        make_row(f"Face Score, {name}", difference_estimate(a, b), (">", 0), note=means, p_below=0.01)
        for name, a, b in sides
    ]


def landmark_rows(faces: list[FaceToRestore], after: list[Image.Image]) -> list[dict]:
    """Return the restored faces' landmark error over the degraded ones', by MTCNN in both.

    Once against its landmarks in the clean faces, as stage 7 and the literature measure it (LMD), and once against the
    true ones, where MTCNN's own error remains in both and hides what restoring improves.
    """
    kinds = {"clean": [face.clean for face in faces], "degraded": [face.degraded for face in faces], "restored": after}
    found = [[landmarks_in(image) for image in images] for images in kinds.values()]
    missed = ", ".join(f"{sum(p is None for p in points)} {kind}" for kind, points in zip(kinds, found, strict=True))
    seen = [i for i in range(len(faces)) if all(points[i] is not None for points in found)]
    references = (
        ("MTCNN's in the clean face", found[0], ("<=", 0.7)),
        ("the true ones", [f.landmarks for f in faces], None),
    )
    rows = []
    for what, reference, aim in references:
        errors = np.array([[landmark_error(points[i], reference[i]) for points in found] for i in seen])
        note = f"no face found in {missed}"
        if seen:
            means = ", ".join(f"{kind} {mean:.3f}" for kind, mean in zip(kinds, errors.mean(axis=0), strict=True))
            note = f"{means} of the distance between the eyes; {note}"
        ratio = jackknife_estimate(partial(error_ratio, errors), len(seen))
        rows.append(make_row(f"landmark error against {what}, restored / degraded", ratio, aim, note=note))
    return rows


def error_ratio(errors: np.ndarray, items: np.ndarray) -> float:
    """Return the restored faces' mean error over the degraded ones'. errors: (N, 3), clean, degraded, restored."""
    _, degraded, restored = errors[items].mean(axis=0)
    return float(restored / degraded)


def landmarks_in(image: Image.Image) -> np.ndarray | None:
    """Return MTCNN's landmarks (5, 2), None where it finds no face."""
    found = best_face(image)
    return None if found is None else found.landmarks


def fid_row(bench: Bench, before: list[Image.Image], after: list[Image.Image], clean: list[Image.Image]) -> dict:
    """Return the tiny FID of the restored faces over the degraded ones'; the reference are the clean faces."""

    def ratio() -> Estimate:
        features = [features_of(bench, images) for images in (before, after, bench.round_trip(clean), clean)]

        def distances(items):
            return [frechet_distance(values[items], features[-1][items]) for values in features[:-1]]

        found = distances(np.arange(len(clean)))
        note = "degraded {:.3g}, restored {:.3g}; clean faces through the autoencoder {:.3g}".format(*found)
        estimate = jackknife_estimate(lambda items: np.divide(*distances(items)[1::-1]), len(clean))
        return replace(estimate, note=note)

    return make_row("tiny FID to the clean faces, restored / degraded", measure(ratio), ("<=", 0.5))


@torch.no_grad()
def features_of(bench: Bench, images: list[Image.Image]) -> np.ndarray:
    """Return the feature network's features of images of one size, (B, D)."""
    batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
    return torch.cat([bench.features.features(to_pixel_values(b).to(bench.device)).cpu() for b in batches]).numpy()


@torch.no_grad()
def eyes_and_mouth(bench: Bench, images: list[Image.Image]) -> list[float]:
    """Return the feature network's distance between restored and clean faces in eyes and mouth."""
    distances = []
    for index, image in enumerate(images):
        face = draw_face(index)
        pixels, clean = (to_pixel_values(source).to(bench.device) for source in (image, face.clean))
        mask = torch.from_numpy(face.mask)[None, None].to(bench.device)
        distances.append(float(bench.features.perceptual_distance(pixels, clean, mask)))
    return distances


def measure_facial_loss(bench: Bench) -> list[dict]:
    """The time-aware facial loss against a constant one and none (Table 2), which are trained first where missing."""
    shipped = restored(bench, "restorer")
    own, rows = eyes_and_mouth(bench, shipped), []
    title = "distance to the clean eyes and mouths"
    rows.append(make_row(f"{title}, time-aware", mean_estimate(own)))
    columns = [[draw_face(index).degraded for index in range(len(shipped))]]
    for name, (kind, what) in ABLATIONS.items():
        try:
            bench.train(STAGE, name, like="restorer", facial_loss=kind)
            images = restored(bench, name)
        except MetricUnavailable as error:
            missing = Estimate(reason=str(error))
            rows.append(make_row(f"{title}, time-aware - {kind}", missing, ("<", 0), note=what))
            continue
        columns.append(images)
        values = eyes_and_mouth(bench, images)
        rows.append(make_row(f"{title}, {kind}", mean_estimate(values), note=what))
        rows.append(make_row(f"{title}, time-aware - {kind}", difference_estimate(own, values), ("<", 0)))
    columns += [shipped, [draw_face(index).clean for index in range(len(shipped))]]
    bench.sheet(
        "facial_losses",
        [image for row in zip(*columns, strict=True) for image in row][: 16 * len(columns)],
        2 * len(columns),
    )
    return rows
