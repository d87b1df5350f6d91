"""
Stage 7: measure what the other stages made, on held-out prompts, seeds and faces.

    python stages/07_eval.py                                           # offline: the results of stages 2, 4 and 6
    python stages/07_eval.py --config stages/presets/sd15.yaml --prompts prompts.txt --images celeba_test/

Reads   checkpoints/scorer, guided and restorer (stages 2, 4, 6); one prompt a line; a folder of clean, aligned faces
Writes  results/: results.json and table.md (every number with its 95% interval), rows.jsonl (one row per image),
        pictures/, metrics.jsonl, config.yaml

Generation (Face Score, 6.1 and Table 5): the base and the tuned model draw the same prompts from the same noise; the
Face Score of an image is that of its best face, and images without a face are counted. Restoration (AuthFace, 4.1 and
Table 1): clean faces are degraded and restored. A number that cannot be measured on this machine is listed with the
reason and the command that gets what is missing.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from faceprior import tiny
from faceprior.align import align_face
from faceprior.config import is_complete, open_output, print_problems, run_stage
from faceprior.degrade import PRESETS, degrade, scaled
from faceprior.detect import Face, detect_faces
from faceprior.diffusion import load_pipeline, sample_images
from faceprior.guidance import load_tuned
from faceprior.images import as_array, natural_key, save_image
from faceprior.jsonl import append_row, resume_rows, rewrite_rows
from faceprior.metrics import fid, landmark_error, lpips_distance, psnr, ssim
from faceprior.models import looks_like_path, quiet_libraries, resolve_device, weight_dtype
from faceprior.photos import UNREADABLE, find_photographs, safe_name
from faceprior.procedural import TEST_SEEDS, draw_portrait
from faceprior.restorer import AuthFaceRestorer
from faceprior.scorer import FaceScorer
from faceprior.tables import (
    Estimate,
    difference_estimate,
    interval_text,
    markdown_table,
    mean_estimate,
    measure,
    number_text,
)
from faceprior.training import METRICS_FILE, finish

ROWS, RESULTS, TABLE = "rows.jsonl", "results.json", "table.md"
NO_FACE = "no face found in any image"


@dataclass
class Config:
    scorer: str = "checkpoints/scorer"  # folder of stage 2, or another scorer's folder or hub id
    base: str = "tiny"  # model that stage 4 tuned: diffusers folder, .safetensors file, hub id, or tiny
    vae: str = ""  # folder or hub id of a VAE in place of the base's own
    guided: str = "checkpoints/guided"  # folder of stage 4
    restorer: str = "checkpoints/restorer"  # folder of stage 6, or another restorer's folder or hub id
    output: str = "results"  # folder for tables and images
    prompts: str = ""  # text file, one prompt a line; empty: the captions of drawn test portraits
    num_prompts: int = 8  # number of images per model, [1, inf)
    images: str = ""  # folder of clean, aligned faces; empty: drawn test portraits
    num_faces: int = 8  # number of faces to degrade and restore, [1, inf)
    resolution: int = 128  # side of all images in pixels, [64, 2048]
    degradation: Literal["authface", "gfpgan", "diffbir", "codeformer"] = (
        "authface"  # preset of the ranges of blur, noise and JPEG
    )
    scale_degradation: bool = True  # whether blur and downsampling, meant for 512 pixels, shrink with the resolution
    sample_steps: int = 25  # sampling steps of the generated images (the paper: 50), [1, 1000]
    guidance_scale: float = 2.5  # classifier-free guidance scale of the generated images, [1, 30]
    detector: Literal["auto", "retinaface", "mtcnn"] = "auto"  # face detector; auto never downloads
    min_confidence: float = 0.9  # lowest confidence of the detector that counts as a face, [0, 1]
    min_face_size: int = 16  # minimum shorter side of a face box in pixels, [8, 1024]
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"  # dtype of the networks
    seed: int = 0  # seed of the noise and the degradations, [0, inf)
    device: str = "auto"  # device: auto, cpu, cuda or cuda:N
    overwrite: bool = False  # whether to start over in an output folder that holds a run


def main(config: Config) -> None:
    # ---- check the inputs before anything is loaded
    quiet_libraries()
    device = resolve_device(config.device)
    for folder, stage in ((config.scorer, "02_train_scorer"), (config.guided, "04_guidance_tune")):
        require(folder, stage)
    require(config.restorer, "06_train_restorer")
    prompts, (faces, problems) = read_prompts(config), clean_faces(config)

    # ---- open the output folder; a complete one only prints its table
    output = open_output(config)
    if is_complete(output):
        print((output / TABLE).read_text())
        return

    # ---- measure: one row per image in rows.jsonl, where a run that was stopped resumes
    scorer = FaceScorer.from_pretrained(config.scorer).to(device).eval()
    evaluate_generation(config, output, scorer, prompts, device)
    evaluate_restoration(config, output, scorer, faces, device)

    # ---- from rows to tables
    rows = resume_rows(output / ROWS)
    results = [*generation_table(rows), *restoration_table(output, rows)]
    write_results(output, results)
    finish(output, rows=len(rows))
    print_problems(problems, "image")
    print((output / TABLE).read_text())


def require(name: str, stage: str) -> None:
    """Check that the folder of an earlier stage exists; a hub id (`owner/name`) is left to the loader."""
    if looks_like_path(name) and not Path(name).exists():
        raise FileNotFoundError(f"no {name}: `python stages/{stage}.py` makes it")


def read_prompts(config: Config) -> list[str]:
    """Return the prompts to draw: those of the file, or the captions of portraits that were never trained on."""
    if not config.prompts:
        return [draw_portrait(TEST_SEEDS + i, 64).caption() for i in range(config.num_prompts)]
    if not Path(config.prompts).is_file():
        raise FileNotFoundError(f"no prompt file {config.prompts}: it holds one prompt a line")
    prompts = [line.strip() for line in Path(config.prompts).read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{config.prompts} holds no prompt")
    return prompts[: config.num_prompts]


def clean_faces(config: Config) -> tuple[list[tuple[str, Image.Image]], list[tuple[str, str]]]:
    """Return (name, aligned face) pairs, and (file, reason) of the images that cannot be read."""
    if not config.images:
        return [drawn_face(TEST_SEEDS + i, config.resolution) for i in range(config.num_faces)], []
    faces = []
    photographs, problems = find_photographs(config.images, [Path(config.output) / "pictures"])
    for photograph in sorted(photographs, key=lambda item: natural_key(item.name))[: config.num_faces]:
        try:
            size = (config.resolution, config.resolution)
            faces.append((safe_name(photograph.name), photograph.load().resize(size, Image.LANCZOS)))
        except UNREADABLE as error:
            problems.append((photograph.name, str(error)))
    if not faces:
        raise ValueError(f"no image in {config.images} can be read; the first: {problems[0][1]}")
    return faces, problems


def drawn_face(seed: int, resolution: int) -> tuple[str, Image.Image]:
    drawing = draw_portrait(seed, 2 * resolution)
    return f"drawn_{seed}", align_face(drawing.image, drawing.landmarks, resolution).crop


def evaluate_generation(config: Config, output: Path, scorer: FaceScorer, prompts: list[str], device) -> None:
    """Let both models draw every prompt from the same noise; one row per image."""
    done = {(row["model"], row["id"]) for row in resume_rows(output / ROWS) if row["part"] == "generation"}
    dtype = weight_dtype(config.mixed_precision)
    loaders: dict[str, Callable] = {
        "base": lambda: load_pipeline(tiny.resolve(config.base, "sd15"), dtype, config.vae),
        "tuned": lambda: load_tuned(config.guided, tiny.resolve(config.base, "sd15"), dtype, config.vae),
    }
    for model, load in loaders.items():
        left = [(i, prompt) for i, prompt in enumerate(prompts) if (model, f"{i:05d}") not in done]
        if not left:
            continue
        pipeline = load().to(device)
        for i, prompt in tqdm(left, desc=f"drawing with the {model} model", unit="image"):
            options = (config.resolution, config.sample_steps, config.guidance_scale)
            image = sample_images(pipeline, [prompt], [config.seed + i], *options)[0]
            file = f"pictures/{model}/{i:05d}.png"
            save_image(image, output / file)
            row = {"part": "generation", "id": f"{i:05d}", "model": model, "prompt": prompt, "picture": file}
            append_row(output / ROWS, row | score_best_face(config, scorer, image))


def score_best_face(config: Config, scorer: FaceScorer, image: Image.Image) -> dict:
    """Return how many faces an image has, the best one's Face Score and the detector's highest confidence."""
    faces = detect_faces(image, config.detector, config.min_confidence, config.min_face_size)
    if not faces:
        return {"faces": 0, "score": None, "confidence": None}
    best = scorer.score(image, faces=faces)[0]
    return {"faces": len(faces), "score": best.score, "confidence": max(face.confidence for face in faces)}


def evaluate_restoration(config: Config, output: Path, scorer: FaceScorer, faces: list, device) -> None:
    """Degrade and restore every clean face; one row per face."""
    done = {row["id"] for row in resume_rows(output / ROWS) if row["part"] == "restoration"}
    left = [(i, *face) for i, face in enumerate(faces) if face[0] not in done]
    if not left:
        return
    ranges = PRESETS[config.degradation]
    ranges = scaled(ranges, config.resolution) if config.scale_degradation else ranges
    restorer = AuthFaceRestorer.from_pretrained(config.restorer, weight_dtype(config.mixed_precision)).to(device)
    for i, name, clean in tqdm(left, desc="restoring", unit="face"):
        # ---- degrade and restore
        degraded = Image.fromarray(degrade(as_array(clean), ranges, np.random.default_rng([config.seed, i])))
        restored = restorer.restore_crops([degraded])[0].resize(clean.size, Image.LANCZOS)
        images = {"clean": clean, "degraded": degraded, "restored": restored}
        for kind, image in images.items():
            save_image(image, output / f"pictures/{kind}/{name}.png")

        # ---- compare with the clean face
        row = {"part": "restoration", "id": name}
        scores = scorer.score_crops(list(images.values()))
        row |= {f"score_{kind}": score for kind, score in zip(images, scores, strict=True)}
        for kind in ("degraded", "restored"):
            row[f"psnr_{kind}"], row[f"ssim_{kind}"] = psnr(images[kind], clean), ssim(images[kind], clean)
            row[f"landmarks_{kind}"] = landmark_distance(config, images[kind], clean)
        append_row(output / ROWS, row)


def landmark_distance(config: Config, image: Image.Image, clean: Image.Image) -> float | None:
    """Return the landmark error as a fraction of the inter-ocular distance; None where no face is found."""
    found: list[list[Face]] = [detect_faces(x, config.detector, 0.5, config.min_face_size) for x in (image, clean)]
    if not all(faces and faces[0].landmarks is not None for faces in found):
        return None
    return landmark_error(found[0][0].landmarks, found[1][0].landmarks)


def generation_table(rows: list[dict]) -> Iterator[dict]:
    """Yield the numbers of Table 5 of Face Score that this stage measures, one row of the table each."""
    drawn = [row for row in rows if row["part"] == "generation"]
    models = {model: [row for row in drawn if row["model"] == model] for model in ("base", "tuned")}
    scores = {model: {row["id"]: row["score"] for row in own} for model, own in models.items()}

    # ---- each model on its own: how many images have a face, and the Face Score of those that have one
    for model, own in models.items():
        with_face = [float(row["faces"] > 0) for row in own]
        yield table_row("generation", f"pictures with a face, {model}", mean_estimate(with_face))
        found = [score for score in scores[model].values() if score is not None]
        yield table_row("generation", f"Face Score, {model}", mean_estimate(found, reason=NO_FACE))

    # ---- both models on the same prompts and noise, where both drew a face
    both = [i for i, score in scores["base"].items() if score is not None and scores["tuned"].get(i) is not None]
    tuned, base = ([scores[model][i] for i in both] for model in ("tuned", "base"))
    reason = "fewer than two prompts gave a face with both models"
    yield table_row("generation", "Face Score, tuned - base", difference_estimate(tuned, base, reason=reason))


def restoration_table(output: Path, rows: list[dict]) -> Iterator[dict]:
    """Yield the numbers of Table 1 of AuthFace that this stage measures, for degraded and for restored faces."""
    restored = [row for row in rows if row["part"] == "restoration"]

    # ---- against the clean face
    names = {"psnr": "PSNR (dB)", "ssim": "SSIM", "landmarks": "landmark error (share of inter-ocular distance)"}
    for key, name in names.items():
        for kind in ("degraded", "restored"):
            values = [row[f"{key}_{kind}"] for row in restored if row[f"{key}_{kind}"] is not None]
            finite = [value for value in values if math.isfinite(value)]
            yield table_row("restoration", f"{name}, {kind}", mean_estimate(finite, reason=NO_FACE))

    # ---- without a reference
    for kind in ("clean", "degraded", "restored"):
        yield table_row("restoration", f"Face Score, {kind}", mean_estimate([row[f"score_{kind}"] for row in restored]))

    # ---- by networks whose weights may not be on this machine
    folders = {kind: output / "pictures" / kind for kind in ("clean", "degraded", "restored")}
    for kind in ("degraded", "restored"):
        pairs = [(folders[kind] / f"{row['id']}.png", folders["clean"] / f"{row['id']}.png") for row in restored]
        lpips = measure(lambda pairs=pairs: mean_estimate([lpips_distance(*pair) for pair in pairs]))
        yield table_row("restoration", f"LPIPS, {kind}", lpips)
        distance = measure(lambda kind=kind: mean_estimate([fid(folders[kind], folders["clean"])]))
        yield table_row("restoration", f"FID to the clean faces, {kind}", distance)


def table_row(part: str, metric: str, estimate: Estimate) -> dict:
    return {"part": part, "metric": metric, **estimate.to_row()}


def write_results(output: Path, results: list[dict]) -> None:
    """Write the rows of the table as JSON, as Markdown and as a row of metrics.jsonl."""
    (output / RESULTS).write_text(json.dumps({"rows": results}, indent=1))
    measured = {row["metric"]: row["value"] for row in results if row["value"] is not None}
    rewrite_rows(output / METRICS_FILE, [{"step": 1, **measured}])
    texts = [
        (row["part"], row["metric"], number_text(row["value"]), interval_text(row["low"], row["high"]))
        + (str(row["n"]), row["note"])
        for row in results
    ]
    (output / TABLE).write_text(markdown_table(("part", "metric", "mean", "95% interval", "n", "note"), texts))


if __name__ == "__main__":
    run_stage(main, Config)
