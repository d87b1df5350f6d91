"""
Stage 7: measure what the other stages made, on held-out prompts, seeds and faces.

    python stages/07_eval.py                                           # offline: the results of stages 2, 4 and 6
    python stages/07_eval.py --config stages/presets/sd15.yaml --prompts prompts.txt --images celeba_test/

Reads   checkpoints/scorer, guided and restorer (stages 2, 4, 6); one prompt a line; a folder of clean, aligned faces
Writes  results/: results.json and table.md (every number with its 95% interval), rows.jsonl (one row per image),
        pictures/, metrics.jsonl, config.yaml

Generation (Face Score, 6.1 and Table 5): the base and the tuned model draw the same prompts from the same noise; the
Face Score of an image is that of its representative face, and images without a face are counted. Restoration (AuthFace,
4.1 and Table 1): clean faces are degraded and restored. What the models at hand allow is measured; every other number
is listed with the reason and the command that gets what is missing, and the same command measures it once it is there.
In rows.jsonl a PSNR of null is infinite: the images are identical.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from faceprior import tiny  # first: it silences bitsandbytes, which diffusers loads

# isort: split
import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from faceprior.align import align_face
from faceprior.bases import load_pipeline, require_base
from faceprior.config import DONE_FILE, METRICS_FILE, finish, is_complete, open_output, print_problems, run_stage
from faceprior.degrade import degrade, ranges_of
from faceprior.detect import Face, detect_faces, representative_face
from faceprior.diffusion import make_sampler, report_long_prompts, sample_images
from faceprior.errors import explain, is_disk_full, is_out_of_memory
from faceprior.files import natural_key
from faceprior.guidance import load_tuned
from faceprior.images import as_array, save_image
from faceprior.jsonl import append_row, resume_rows, rewrite_rows
from faceprior.metrics import fid, landmark_error, lpips_distance, psnr, ssim
from faceprior.models import looks_like_path, quiet_libraries, resolve_device, weight_dtype
from faceprior.photos import UNREADABLE, find_photographs, safe_name
from faceprior.procedural import TEST_SEEDS, draw_portrait
from faceprior.prompts import read_prompts
from faceprior.restorer import AuthFaceRestorer
from faceprior.scorer import FaceScorer
from faceprior.tables import (
    Estimate,
    difference_estimate,
    interval_text,
    markdown_table,
    mean_estimate,
    measure,
    value_text,
)
from faceprior.validation import score_face

ROWS, RESULTS, TABLE = "rows.jsonl", "results.json", "table.md"
NO_FACE = "no face found in any image"
MODELS = {
    "scorer": ("scorer", "02_train_scorer"),
    "guided": ("tuned model", "04_guidance_tune"),
    "restorer": ("restorer", "06_train_restorer"),
}  # key of the Config -> what it is, and the stage that makes it


@dataclass
class Config:
    scorer: str = "checkpoints/scorer"  # folder of stage 2, another scorer's folder or hub id, or tiny; empty: none
    base: str = "tiny"  # model that stage 4 tuned: diffusers folder, .safetensors file, hub id, or tiny
    vae: str = ""  # folder or hub id of a VAE in place of the base's own
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"  # prediction of the base; auto: by files
    guided: str = "checkpoints/guided"  # folder of stage 4; empty: no generation
    restorer: str = (
        "checkpoints/restorer"  # folder of stage 6, another restorer's folder or hub id, or tiny; empty: none
    )
    output: str = "results"  # folder for tables and images
    prompts: str = ""  # text file, one prompt a line; empty: the captions of drawn test portraits
    num_prompts: int = 8  # number of images per model, [1, inf)
    images: str = ""  # folder of clean, aligned faces; empty: drawn test portraits
    num_faces: int = 8  # number of faces to degrade and restore, [1, inf)
    generation_resolution: int = 128  # side of the generated images in pixels, [64, 2048]
    restoration_resolution: int = 128  # side of the degraded and restored faces in pixels, [64, 2048]
    degradation: Literal["authface", "gfpgan", "diffbir", "codeformer"] = (
        "authface"  # preset of the ranges below, each of two numbers, for a face of 512 pixels
    )
    scale_degradation: bool = True  # whether blur and downsampling, meant for 512 pixels, shrink with the resolution
    blur_kernel: int | None = None  # side of the blur's kernel in pixels, odd; none: the preset's, [1, 255]
    blur_sigma: tuple[float, ...] = ()  # range of the blur's standard deviation in pixels; 0 0: none, [0, inf)
    isotropic_prob: float | None = None  # probability of a round blur; none: the preset's, [0, 1]
    downsample: tuple[float, ...] = ()  # range of the downsampling factor; 1 1: none, [0.001, inf)
    noise: tuple[float, ...] = ()  # range of the degradation's noise, of 255; 0 0: none, [0, inf)
    jpeg: tuple[int, ...] = ()  # range of the JPEG quality; 0 0: no JPEG, [0, 100]
    jitter_prob: float | None = None  # probability of a colour shift; none: the preset's, [0, 1]
    jitter_shift: float | None = None  # largest shift of a colour channel, of 255; none: the preset's, [0, 255]
    gray_prob: float | None = None  # probability that the degraded face is grey; none: the preset's, [0, 1]
    sample_steps: int = 25  # sampling steps of the generated images (the paper: 50), [1, 1000]
    sampler: Literal["base", "pndm", "ddim", "ddpm", "euler", "dpm++"] = (
        "base"  # sampler of the generated images (the paper: pndm); base: the base's own
    )
    guidance_scale: float = 2.5  # classifier-free guidance scale of the generated images, [1, 30]
    detector: Literal["auto", "retinaface", "mtcnn"] = "auto"  # face detector; auto: without a download
    min_confidence: float = 0.9  # lowest confidence of the detector that counts as a face, [0, 1]
    min_face_size: int = 16  # minimum shorter side of a face box in pixels, [8, 1024]
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"  # dtype of the networks
    seed: int = 0  # seed of the noise and the degradations, [0, inf)
    device: str = "auto"  # device: auto, cpu, cuda or cuda:N
    overwrite: bool = False  # new start in an output folder that holds a run, which is deleted

    RENAMED = {"resolution": ("generation_resolution", "restoration_resolution")}


def main(config: Config) -> None:
    # ---- check the inputs before anything is loaded
    quiet_libraries()
    device = resolve_device(config.device)
    missing = missing_models(config)
    base = tiny.resolve(config.base, "sd15")
    if "guided" not in missing and (config.overwrite or not is_complete(config.output)):
        require_base(base, "tune", config.vae, config.prediction_type)
    prompts, (faces, problems) = choose_prompts(config), clean_faces(config)

    # ---- open the output folder; a complete one only prints its table, unless a model has come since
    output = open_output(config)
    if is_complete(output):
        lacked = json.loads((output / DONE_FILE).read_text(encoding="utf-8")).get("missing", [])
        if set(lacked) <= missing.keys():
            print((output / TABLE).read_text(encoding="utf-8"))
            return
        (output / DONE_FILE).unlink()
    forget_partial(output, missing)

    # ---- measure: one row per image in rows.jsonl, where a run that was stopped resumes
    scorer = (
        None
        if "scorer" in missing
        else FaceScorer.from_pretrained(tiny.resolve(config.scorer, "scorer")).to(device).eval()
    )
    failed = []
    if "guided" not in missing:
        failed += evaluate_generation(config, output, base, scorer, prompts, device)
    if not {"restorer", "scorer"} <= missing.keys():
        failed += evaluate_restoration(config, output, scorer, faces, "restorer" not in missing, device)

    # ---- from rows to tables
    rows = resume_rows(output / ROWS)
    results = [*generation_table(rows, missing), *restoration_table(output, rows, missing)]
    write_results(output, results)
    if not failed:
        finish(output, rows=len(rows), **({"missing": sorted(missing)} if missing else {}))
    print_problems([*problems, *failed], "image")
    print((output / TABLE).read_text(encoding="utf-8"))
    if failed:
        print(f"{len(failed)} could not be measured: the same command tries them again")


def missing_models(config: Config) -> dict[str, str]:
    """Return the models that do not exist or are not wanted, with the reason: key of the Config -> text.

    The folder of an earlier stage may not exist yet; a folder that was named must. A hub id (`owner/name`) is left to
    the loader. Raises FileNotFoundError, also if nothing is left to measure.
    """
    missing = {}
    for key, (what, stage) in MODELS.items():
        name = getattr(config, key)
        if not name:
            missing[key] = f"`{key}` is empty"
        elif looks_like_path(name) and not Path(name).exists():
            missing[key] = f"no {what} in {name}: `python stages/{stage}.py` makes one"
            if name != getattr(Config, key):
                raise FileNotFoundError(missing[key])
    if len(missing) == len(MODELS):
        raise FileNotFoundError(f"there is nothing to measure: {'; '.join(missing.values())}")
    return missing


def forget_partial(output: Path, missing: dict[str, str]) -> None:
    """Remove the rows that were written without a model that exists now, so that their images are measured again."""

    def is_whole(row: dict) -> bool:
        if row["part"] == "generation":
            return "scorer" in missing or row["faces"] == 0 or row["score"] is not None
        wanted = {"score_clean"} if "scorer" not in missing else set()
        return wanted | ({"psnr_restored"} if "restorer" not in missing else set()) <= row.keys()

    rows = resume_rows(output / ROWS)
    if not all(map(is_whole, rows)):
        rewrite_rows(output / ROWS, filter(is_whole, rows))


def choose_prompts(config: Config) -> list[str]:
    """Return the prompts to draw: those of the file, or the captions of portraits that were never trained on."""
    if not config.prompts:
        return [draw_portrait(TEST_SEEDS + i, 64).caption() for i in range(config.num_prompts)]
    return read_prompts(config.prompts)[: config.num_prompts]


def clean_faces(config: Config) -> tuple[list[tuple[str, Callable[[], Image.Image]]], list[tuple[str, str]]]:
    """Return the name of every aligned face and what gives it, and (file, reason) of the images that cannot be read."""
    if not config.images:  # each is drawn when its turn comes: a thousand take minutes
        seeds = range(TEST_SEEDS, TEST_SEEDS + config.num_faces)
        return [(f"drawn_{seed}", partial(drawn_face, seed, config.restoration_resolution)) for seed in seeds], []
    faces = []
    photographs, problems = find_photographs(config.images, [Path(config.output) / "pictures"])
    for photograph in sorted(photographs, key=lambda item: natural_key(item.name))[: config.num_faces]:
        try:
            size = (config.restoration_resolution, config.restoration_resolution)
            faces.append((safe_name(photograph.name), photograph.load().resize(size, Image.LANCZOS).copy))
        except UNREADABLE as error:
            problems.append((photograph.name, str(error)))
    if not faces:
        raise ValueError(f"no image in {config.images} can be read; the first: {problems[0][1]}")
    return faces, problems


def drawn_face(seed: int, resolution: int) -> Image.Image:
    drawing = draw_portrait(seed, 2 * resolution)
    return align_face(drawing.image, drawing.landmarks, resolution).crop


def evaluate_generation(
    config: Config, output: Path, base: str, scorer: FaceScorer | None, prompts: list[str], device
) -> list[tuple[str, str]]:
    """Let both models draw every prompt from the same noise, one row per image; returns (image, reason) of failures."""
    done = {(row["model"], row["id"]) for row in resume_rows(output / ROWS) if row["part"] == "generation"}
    options = (weight_dtype(config.mixed_precision), config.vae, config.prediction_type)
    loaders: dict[str, Callable] = {
        "base": lambda: load_pipeline(base, *options),
        "tuned": lambda: load_tuned(config.guided, base, *options),
    }
    failed = []
    for model, load in loaders.items():
        left = [(i, prompt) for i, prompt in enumerate(prompts) if (model, f"{i:05d}") not in done]
        if not left:
            continue
        pipeline = load().to(device)
        pipeline.scheduler = make_sampler(config.sampler, pipeline.scheduler)
        if model == "base":
            report_long_prompts(pipeline, prompts)

        def draw(i: int, prompt: str, model: str = model, pipeline: DiffusionPipeline = pipeline) -> dict:
            sampling = (config.generation_resolution, config.sample_steps, config.guidance_scale)
            image = sample_images(pipeline, [prompt], [config.seed + i], *sampling)[0]
            file = f"pictures/{model}/{i:05d}.png"
            save_image(image, output / file)
            row = {"part": "generation", "id": f"{i:05d}", "model": model, "prompt": prompt, "picture": file}
            return row | score_face(image, scorer, config.detector, config.min_confidence, config.min_face_size)

        items = {f"{model} {i:05d}": (i, prompt) for i, prompt in left}
        failed += measure_each(output, draw, items, f"drawing with the {model} model", "image")
    return failed


def measure_each(
    output: Path, make_row: Callable[..., dict], items: dict[str, tuple], desc: str, unit: str
) -> list[tuple[str, str]]:
    """Append the row of every item (name -> arguments); returns (name, reason) of those that failed.

    A full disk ends the run, and so does memory that does not suffice for the first one: all have one size.
    """
    failed = []
    for name, arguments in tqdm(items.items(), desc=desc, unit=unit):
        try:
            row = make_row(*arguments)
        except Exception as error:
            reason, none_done = explain(error, Path(__file__).parent), name == next(iter(items))
            if reason is None or is_disk_full(error) or (none_done and is_out_of_memory(error)):
                raise
            failed.append((name, reason))
        else:
            append_row(output / ROWS, row)
    return failed


def evaluate_restoration(
    config: Config, output: Path, scorer: FaceScorer | None, faces: list, has_restorer: bool, device
) -> list[tuple[str, str]]:
    """Degrade and restore every clean face, one row per face; returns (face, reason) of failures.

    What needs a scorer or a restorer is not in the rows without one.
    """
    done = {row["id"] for row in resume_rows(output / ROWS) if row["part"] == "restoration"}
    left = {name: (i, name, load) for i, (name, load) in enumerate(faces) if name not in done}
    if not left:
        return []
    ranges = ranges_of(config, config.restoration_resolution)
    restorer = None
    if has_restorer:
        name = tiny.resolve(config.restorer, "restorer")
        restorer = AuthFaceRestorer.from_pretrained(name, weight_dtype(config.mixed_precision)).to(device)

    def restore(i: int, name: str, load: Callable[[], Image.Image]) -> dict:
        # ---- degrade and restore
        clean = load()
        degraded = Image.fromarray(degrade(as_array(clean), ranges, np.random.default_rng([config.seed, i])))
        images = {"clean": clean, "degraded": degraded}
        if restorer:
            images["restored"] = restorer.restore_crops([degraded])[0].resize(clean.size, Image.LANCZOS)
        for kind, image in images.items():
            save_image(image, output / f"pictures/{kind}/{name}.png")

        # ---- compare with the clean face
        row = {"part": "restoration", "id": name}
        scores = scorer.score_crops(list(images.values())) if scorer else []
        row |= {f"score_{kind}": score for kind, score in zip(images, scores, strict=bool(scorer))}
        for kind in [kind for kind in images if kind != "clean"]:
            decibels = psnr(images[kind], clean)
            row[f"psnr_{kind}"] = decibels if math.isfinite(decibels) else None
            row[f"ssim_{kind}"] = ssim(images[kind], clean)
            row[f"landmarks_{kind}"] = landmark_distance(config, images[kind], clean)
        return row

    return measure_each(output, restore, left, "restoring", "face")


def landmark_distance(config: Config, image: Image.Image, clean: Image.Image) -> float | None:
    """Return the landmark error as a fraction of the inter-ocular distance; None where no face is found."""
    found: list[list[Face]] = [detect_faces(x, config.detector, 0.5, config.min_face_size) for x in (image, clean)]
    face, reference = (representative_face(faces, clean.size) for faces in found)
    if face is None or reference is None or face.landmarks is None or reference.landmarks is None:
        return None
    return landmark_error(face.landmarks, reference.landmarks)


def generation_table(rows: list[dict], missing: dict[str, str]) -> Iterator[dict]:
    """Yield the numbers of Table 5 of Face Score that this stage measures, one row of the table each."""
    drawn = [row for row in rows if row["part"] == "generation"]
    models = {model: [row for row in drawn if row["model"] == model] for model in ("base", "tuned")}
    scores = {model: {row["id"]: row["score"] for row in own} for model, own in models.items()}
    no_images = missing.get("guided", "no image was drawn")
    no_score = missing.get("guided") or missing.get("scorer")

    # ---- each model on its own: how many images have a face, and the Face Score of those that have one
    for model, own in models.items():
        with_face = [float(row["faces"] > 0) for row in own]
        yield table_row("generation", f"pictures with a face, {model}", mean_estimate(with_face, reason=no_images))
        found = [score for score in scores[model].values() if score is not None]
        yield table_row("generation", f"Face Score, {model}", mean_estimate(found, reason=no_score or NO_FACE))

    # ---- both models on the same prompts and noise, where both drew a face
    both = [i for i, score in scores["base"].items() if score is not None and scores["tuned"].get(i) is not None]
    tuned, base = ([scores[model][i] for i in both] for model in ("tuned", "base"))
    reason = no_score or "fewer than two prompts gave a face with both models"
    yield table_row("generation", "Face Score, tuned - base", difference_estimate(tuned, base, reason=reason))


def restoration_table(output: Path, rows: list[dict], missing: dict[str, str]) -> Iterator[dict]:
    """Yield the numbers of Table 1 of AuthFace that this stage measures, for degraded and for restored faces."""
    restored = [row for row in rows if row["part"] == "restoration"]
    absent = {} if restored else {"degraded": "no face was degraded"}
    if "restorer" in missing:
        absent = {"restored": missing["restorer"]} | ({} if restored else {"degraded": missing["restorer"]})

    # ---- against the clean face
    names = {"psnr": "PSNR (dB)", "ssim": "SSIM", "landmarks": "landmark error (share of inter-ocular distance)"}
    for key, name in names.items():
        for kind in ("degraded", "restored"):
            values = [row[f"{key}_{kind}"] for row in restored if f"{key}_{kind}" in row]
            estimate = psnr_estimate if key == "psnr" else finite_estimate
            yield table_row("restoration", f"{name}, {kind}", estimate(values, absent.get(kind, NO_FACE)))

    # ---- without a reference
    for kind in ("clean", "degraded", "restored"):
        scores = [row[f"score_{kind}"] for row in restored if f"score_{kind}" in row]
        reason = missing.get("scorer") or absent.get(kind, NO_FACE)
        yield table_row("restoration", f"Face Score, {kind}", mean_estimate(scores, reason=reason))

    # ---- by networks whose weights may not be on this machine
    folders = {kind: output / "pictures" / kind for kind in ("clean", "degraded", "restored")}
    for kind in ("degraded", "restored"):
        pairs = [(folders[kind] / f"{row['id']}.png", folders["clean"] / f"{row['id']}.png") for row in restored]
        lpips = distance = Estimate(reason=absent.get(kind, ""))
        if kind not in absent:
            lpips = measure(lambda pairs=pairs: mean_estimate([lpips_distance(*pair) for pair in pairs]))
            distance = measure(lambda kind=kind: mean_estimate([fid(folders[kind], folders["clean"])]))
        yield table_row("restoration", f"LPIPS, {kind}", lpips)
        yield table_row("restoration", f"FID to the clean faces, {kind}", distance)


def finite_estimate(values: list[float | None], reason: str) -> Estimate:
    """Return the mean of the values that are known."""
    return mean_estimate([value for value in values if value is not None], reason=reason)


def psnr_estimate(values: list[float | None], reason: str) -> Estimate:
    """Return the mean of the finite values; None stands for an infinite one, of identical images."""
    identical = values.count(None)
    note = f"{identical} of {len(values)} equal the clean ones: infinite, not in the mean" if identical else ""
    if values and identical == len(values):
        return Estimate(math.inf, n=identical, note="all equal the clean ones")
    return mean_estimate([value for value in values if value is not None], note, reason)


def table_row(part: str, metric: str, estimate: Estimate) -> dict:
    return {"part": part, "metric": metric, **estimate.to_row()}


def write_results(output: Path, results: list[dict]) -> None:
    """Write the rows of the table as JSON, as Markdown and as a row of metrics.jsonl."""
    (output / RESULTS).write_text(json.dumps({"rows": results}, indent=1), encoding="utf-8")
    measured = {row["metric"]: row["value"] for row in results if row["value"] is not None}
    rewrite_rows(output / METRICS_FILE, [{"step": 1, **measured}])
    texts = [
        (row["part"], row["metric"], value_text(row["value"], row["note"]), interval_text(row["low"], row["high"]))
        + (str(row["n"]), row["note"])
        for row in results
    ]
    table = markdown_table(("part", "metric", "mean", "95% interval", "n", "note"), texts)
    (output / TABLE).write_text(table, encoding="utf-8")


if __name__ == "__main__":
    run_stage(main, Config)
