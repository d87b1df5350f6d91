"""
Train and measure the rows of AuthFace's ablations (arXiv 2410.09864, Tables 2 and 4) on the tiny models.

    python -m checkpoints.tiny_models.ablations

Reads   checkpoints/tiny/: the restorer, whose ControlNet every row starts from, its tuned prior, and the base
Writes  `work`/ablations/: faces, priors, and a run of stage 6 for each row; results/tiny/: ablations.md (the table),
        ablations.json (its numbers), restored/ (the faces)

Every row is stage 6 with its preset of stages/presets/rows, for the same few steps, on the same faces, with the same
seed. They are judged by the same test faces, so that rows are compared in pairs. The same command resumes.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from checkpoints.tiny_models.bench import Bench, digest_of, drawing_digest
from checkpoints.tiny_models.figures_restorer import STAGE, draw_face, eyes_and_mouth, landmarks_in, restored
from checkpoints.tiny_models.readme import machine
from checkpoints.tiny_models.stages import ROOT, draw_faces, run
from faceprior import tiny
from faceprior.config import run_stage
from faceprior.files import atomic_write
from faceprior.images import to_pixel_values
from faceprior.metrics import landmark_error, psnr, ssim
from faceprior.models import quiet_libraries
from faceprior.restorer import AuthFaceRestorer
from faceprior.tables import Estimate, difference_estimate, interval_text, markdown_table, mean_estimate, number_text

TABLE, RESULTS = "ablations.md", "ablations.json"
ROWS = ROOT / "stages" / "presets" / "rows"
OURS = "authface_time_aware"  # the paper's row, that the others are compared with
TABLES = {  # table -> its rows by their presets: prior and loss, or m and s
    "Table 2: prior and facial loss": {
        "authface_sdxl_none": "base, none",
        "authface_none": "tuned, none",
        "authface_constant": "tuned, constant",
        OURS: "tuned, time-aware",
    },
    "Table 4: m and s of the weight over time": {
        OURS: "m = -0.5, s = 1",
        "authface_m_0": "m = 0, s = 1",
        "authface_m_0.5": "m = 0.5, s = 1",
        "authface_s_0.5": "m = -0.5, s = 0.5",
    },
}
SETTINGS = ("steps", "learning_rate", "num_train", "num_faces", "restore_steps", "seed", "mixed_precision")
NAMES = tuple(dict.fromkeys(name for rows in TABLES.values() for name in rows))


@dataclass
class Config:
    work: str = "data/tiny"  # folder that make_tiny works in
    models: str = ""  # folder of the shipped models; empty: checkpoints/tiny
    output: str = "results/tiny"  # folder for the table and the restored faces
    num_train: int = 300  # number of aligned faces drawn for the training, [1, 8000]
    steps: int = 200  # training steps of each row, batch 8, [1, inf)
    learning_rate: float = 3e-4  # learning rate of AdamW at its peak, (0, 1)
    num_faces: int = 96  # number of test faces that are degraded and restored, [2, 2000]
    restore_steps: int = 0  # sampling steps of the restorer; 0: its own number, [0, 1000]
    seed: int = 0  # seed of every row's training, [0, inf)
    untrained: bool = False  # start from models that were not trained, to try the measuring out
    mixed_precision: Literal["no", "bf16"] = "bf16"  # precision of the U-Nets; the VAE and all judges run in float32
    device: str = "auto"  # device: auto, cpu, cuda or cuda:N


@dataclass(frozen=True)
class Measure:
    """A column: how it is measured on each test face (NaN where it cannot be), its format, and which way is better."""

    name: str
    values: Callable[[Bench, list[Image.Image]], list[float]]
    spec: str
    better: Literal["higher", "lower"]


def main(config: Config) -> None:
    quiet_libraries()
    logging.getLogger("faceprior").setLevel(logging.WARNING)
    # the runs have a folder of their own in the work folder
    config.work = str(Path(config.work) / "ablations")
    bench = Bench(config)

    # ---- what all rows share: faces, the tuned prior, and the ControlNet that they start from
    faces = TrainingFaces(config.num_train)
    draw_faces(faces, bench.work)
    prior, start = tuned_prior(bench), bench.folder("restorer")

    # ---- each row: trained, and its faces restored
    images = {"degraded": [draw_face(index).degraded for index in range(config.num_faces)]}
    for name in NAMES:
        print(f"{name} ...", flush=True)
        priors = {"prior": str(bench.folder("sdxl"))} if "sdxl" in name else {"prior": str(prior)}
        options = {"images": bench.work / "faces", **priors, "init": start, "seed": config.seed}
        options |= {"steps": config.steps, "batch_size": 8, "learning_rate": config.learning_rate}
        options |= {"schedule": "cosine", "warmup_steps": config.steps // 10, "save_every": 25, "num_samples": 0}
        options |= {"mixed_precision": config.mixed_precision, "device": config.device}
        run(STAGE, bench.work / name, config=ROWS / f"{name}.yaml", **options)
        images[name] = restored(bench, name)

    # ---- measured, and written to one table
    values = {name: {m.name: m.values(bench, own) for m in MEASURES} for name, own in images.items()}
    results = {"command": command_of(config), "machine": machine()}
    results["settings"] = {key: getattr(config, key) for key in SETTINGS}
    results |= {"models": {name: digest_of(bench.work / name) for name in NAMES}, "drawings": drawing_digest()}
    results["rows"] = [row for table in TABLES for row in rows_of(table, values)]
    bench.output.mkdir(parents=True, exist_ok=True)
    with atomic_write(bench.output / RESULTS, "w") as file:
        json.dump(results, file, indent=1)
    with atomic_write(bench.output / TABLE, "w") as file:
        file.write(markdown(results))
    print((bench.output / TABLE).read_text())


@dataclass(frozen=True)
class TrainingFaces:
    """What `draw_faces` has to know."""

    num_faces: int
    resolution: int = tiny.RESOLUTION


def tuned_prior(bench: Bench) -> Path:
    """Write the prior of the shipped restorer, which stages 3 and 5 tuned, as a pipeline of its own."""
    folder = bench.work / "prior"
    if not (folder / "model_index.json").is_file():  # written last
        pipeline = AuthFaceRestorer.from_pretrained(str(bench.folder("restorer"))).pipeline
        names = ("vae", "unet", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        options = {"force_zeros_for_empty_prompt": pipeline.config.force_zeros_for_empty_prompt}
        parts = {name: pipeline.components[name] for name in names}
        StableDiffusionXLPipeline(**parts, **options, add_watermarker=False).save_pretrained(folder)
    return folder


# ---- measures, of the restored faces in the order of the test faces


def against_clean(measure: Callable[[Image.Image, Image.Image], float]) -> Callable:
    def values(bench: Bench, images: list[Image.Image]) -> list[float]:
        return [measure(image, draw_face(index).clean) for index, image in enumerate(images)]

    return values


@torch.no_grad()
def perceptual(bench: Bench, images: list[Image.Image]) -> list[float]:
    def distance(image: Image.Image, clean: Image.Image) -> float:
        a, b = (to_pixel_values(side).to(bench.device) for side in (image, clean))
        return float(bench.features.perceptual_distance(a, b))

    return against_clean(distance)(bench, images)


def face_scores(bench: Bench, images: list[Image.Image]) -> list[float]:
    return bench.scorer.score_crops(images)


def landmark_errors(bench: Bench, images: list[Image.Image]) -> list[float]:
    """MTCNN's landmarks against those that it finds in the clean face; NaN where it misses one of the two."""
    found = [(landmarks_in(image), landmarks_in(draw_face(index).clean)) for index, image in enumerate(images)]
    return [landmark_error(*points) if all(p is not None for p in points) else float("nan") for points in found]


MEASURES = (
    Measure("PSNR (dB)", against_clean(psnr), ".2f", "higher"),
    Measure("SSIM", against_clean(ssim), ".4f", "higher"),
    Measure("perceptual distance", perceptual, ".4f", "lower"),
    Measure("eyes and mouth", eyes_and_mouth, ".4f", "lower"),
    Measure("Face Score", face_scores, ".3f", "higher"),
    Measure("landmark error", landmark_errors, ".4f", "lower"),
)


# ---- the table


def rows_of(table: str, values: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Return a table's rows: the mean of each measure, and its difference from the paper's row on the same faces."""
    rows = []
    for name, label in {"degraded": "degraded, not restored", **TABLES[table]}.items():
        cells = {}
        for measure in MEASURES:
            own, ours = (np.array(values[key][measure.name]) for key in (name, OURS))
            both = np.isfinite(own) & np.isfinite(ours)
            difference = Estimate() if name == OURS else difference_estimate(own[both], ours[both])
            mean = mean_estimate(own[np.isfinite(own)])
            cells[measure.name] = {"mean": mean.to_row(), "against_ours": difference.to_row()}
        rows.append({"table": table, "preset": name, "label": label, "measures": cells})
    return rows


def markdown(results: dict[str, Any]) -> str:
    settings = ", ".join(f"{key} {results['settings'][key]}" for key in ("steps", "num_train", "num_faces", "seed"))
    better = ", ".join(f"{measure.name} ({measure.better} is better)" for measure in MEASURES)
    lines = [
        "# AuthFace's ablations on the tiny models",
        "",
        "Drawn faces, tiny models, a short training: the rows show whether the parts of the method make a difference "
        "here. They compare with each other and with no published number. All rows start from the shipped restorer's "
        "ControlNet, which was trained with the time-aware loss on the tuned prior.",
        "",
        f"Made by `{results['command']}` on {results['machine']}; {settings}.",
        "",
        f"Means with 95% intervals: {better}. The perceptual distance and that of eyes and mouth are the tiny feature "
        "network's, in the place of LPIPS; landmark errors are of the distance between the eyes, of faces that MTCNN "
        "finds. Below each mean: its difference from the paper's row on the same faces; bold where its 95% interval "
        "excludes 0, which by chance alone it does in one comparison of twenty.",
    ]
    for table in TABLES:
        head = ("row", *(measure.name for measure in MEASURES))
        rows = [row for row in results["rows"] if row["table"] == table]
        cells = [(row["label"], *(cell(row["measures"][m.name], m.spec) for m in MEASURES)) for row in rows]
        lines += ["", f"## {table}", "", markdown_table(head, cells).rstrip("\n")]
    return "\n".join(lines) + "\n"


def cell(values: dict[str, Any], spec: str) -> str:
    mean, difference = values["mean"], values["against_ours"]
    text = f"{number_text(mean['value'], spec)} ({interval_text(mean['low'], mean['high'], spec)}), n = {mean['n']}"
    if difference["value"] is None:
        return text
    low, high = difference["low"], difference["high"]
    added = f"{difference['value']:+{spec}} ({interval_text(low, high, spec)})"
    return f"{text}<br>{f'**{added}**' if low > 0 or high < 0 else added}"


def command_of(config: Config) -> str:
    kept = ("steps", "num_train", "num_faces", "restore_steps")
    defaults = Config()
    words = [f"--{key} {getattr(config, key)}" for key in kept if getattr(config, key) != getattr(defaults, key)]
    return " ".join(["python -m checkpoints.tiny_models.ablations", *words])


if __name__ == "__main__":
    run_stage(main, Config)
