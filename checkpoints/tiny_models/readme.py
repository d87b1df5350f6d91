"""checkpoints/tiny/README.md: what was trained, from which seeds, for how long, and with which result.

Everything below the line KEEP is written by people and stays as it is: the figures and what they say.
"""

import json
import os
import platform
from collections import defaultdict
from pathlib import Path

import torch

from faceprior import tiny
from faceprior.config import METRICS_FILE
from faceprior.jsonl import append_row, resume_rows

DURATIONS, RECORD = "durations.jsonl", "runs.json"
PARTS = {
    "sd15": "Stable Diffusion 1.5 type pipeline: tokenizer, text encoder, VAE, U-Net",
    "sdxl": "SDXL type pipeline, trained from the U-Net of `sd15/`; it shares the VAE and the text encoder of `sd15/`",
    "reward": "BLIP reward model, pretrained on drawn faces and worse copies, in place of ImageReward",
    "scorer": "the same after stage 2 on inpainted pairs, in place of Face Score",
    "guided": "LoRA of `sd15` after stage 4: guidance on inpainted pairs, and the gradient of `scorer`",
    "restorer": "portrait prior of stage 5 and ControlNet of stage 6",
    "judge": "ConvNeXt that orders faces, for measuring only: no other model is trained with it",
    "features": "vision transformer that predicts tags and landmarks, in place of DINO, Inception and LPIPS",
    "blind": "no model: what was preferred in a blind look at samples of `sd15` and `guided`",
}
HEADER = """# The tiny models

Small models of the real diffusers and transformers classes, trained from scratch by `make tiny` on portraits and scenes
that the project draws. They know drawn people only: they show the methods at work where there is neither a GPU nor a
hub, and are no substitute for the published models. `make figures` measures them.
"""
FOOTER = """
Losses are means over the last 50 steps; hours are by the clock, some beside other work. A run with several rows was
continued from the weights that the row before had shipped; `make tiny` trains it in one run, with as many steps as the
rows have together, `reward` with fewer. The second run of `vae` trained the decoder only: the latents, and all models
trained on them, did not change. `guided` starts from the base in every row; the last one ships. `sd15_fine` was
continued with the plain loss, which brought little and is no longer done. The last run of `sdxl` started over from the
last `sd15`, and the last one of `judge` from nothing. The pairs that `reward` was trained on until its last run come
from an earlier `sd15` and `vae`. The means of runs that rows of `reward` name, a to d, were made by hand. The rows
after them kept a moving average of their own weights, which is what ships, as of the bases; `make tiny` does that from
the start. `guided` was trained with an earlier scorer than the one that ships.

- Data: {data}, from the training seeds in `faceprior/procedural/`; every run has the seed 0, the judge's 1
- Machine: {machines}
- Licence: Apache-2.0, as the code. The images are drawn by it: no photograph of anyone was used

{keep}"""
KEEP = "<!-- make_tiny.py writes what is above this line, and keeps what is below it -->"
RUNS = ("vae", "features", "sd15", "sdxl", "judge", "reward", "scorer", "guided", "prior", "control", "restorer")
COLUMNS = ("run", "steps", "loss", "hours", "result")


def note_duration(work: Path, step: str, seconds: float) -> None:
    """Append the seconds that a step took to the work folder's record."""
    if seconds > 1:  # else the step was complete already
        append_row(work / DURATIONS, {"step": step, "seconds": round(seconds, 1), "machine": machine()})


def machine() -> str:
    """Name the processor or GPU, and torch's version."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = f"{(models or [platform.processor()])[0]}, {os.cpu_count()} cores"
    return f"{name}, torch {torch.__version__.split('+')[0]}"


def write_readme(config, work: Path) -> None:
    """Write the record of the training beside the weights: runs.json, which other work folders add to, and README.md.

    A run that started from the shipped weights of an earlier one has its row below that one's. What the README has
    below KEEP stays.
    """
    # ---- the record of all runs
    record = tiny.tiny_folder() / RECORD
    runs = json.loads(record.read_text()) if record.is_file() else []
    for row in finished_runs(work):
        if row not in runs:
            runs.append(row)
    record.write_text(json.dumps(runs, indent=1) + "\n")

    # ---- the page
    data = f"{config.num_drawn} drawings of {config.resolution} pixels, every fifth a scene"
    lines = [HEADER, "| folder | what it is | MB |", "|---|---|---|"]
    for kind, what in PARTS.items():
        size = sum(f.stat().st_size for f in (tiny.tiny_folder() / kind).rglob("*") if f.is_file()) / 1e6
        lines.append(f"| `{kind}/` | {what} | {size:.1f} |")
    lines += ["", "| run | steps | loss at the end | hours | result |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(str(row[key]) for key in COLUMNS)} |" for row in runs]
    machines = "; ".join(sorted({row["machine"] for row in runs}))
    lines.append(FOOTER.format(data=data, machines=machines, keep=KEEP))

    # ---- with the part that people write
    page = tiny.tiny_folder() / "README.md"
    kept = page.read_text().partition(KEEP)[2] if page.is_file() else ""
    page.write_text("\n".join(lines) + (kept or "\n"))


def finished_runs(work: Path) -> list[dict]:
    """Return a row for every finished run of a work folder, in the order of RUNS."""
    hours, machines, rows = defaultdict(float), {}, []
    for row in resume_rows(work / DURATIONS):
        hours[row["step"]] += row["seconds"] / 3600
        machines[row["step"]] = row["machine"]
    for name in RUNS:
        metrics = resume_rows(work / name / METRICS_FILE)
        if metrics and (work / name / "done.json").is_file():
            tail = [row["loss"] for row in metrics[-50:] if "loss" in row]
            rows.append(
                {
                    "run": name,
                    "steps": metrics[-1]["step"],
                    "loss": f"{sum(tail) / len(tail):.4g}" if tail else "",
                    "hours": f"{hours[name]:.2f}" if name in hours else "",
                    "result": read_summary(work / name),
                    "machine": machines.get(name, machine()),
                }
            )
    return rows


STEPS = ("steps", "samples_per_step")


def read_summary(folder: Path) -> str:
    """Return the summary of a run from done.json, without its steps, as short text."""
    values = json.loads((folder / "done.json").read_text())
    shown = {k: v for k, v in values.items() if isinstance(v, int | float | str) and k not in STEPS}
    return ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in shown.items())


def _short(value: int | float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
