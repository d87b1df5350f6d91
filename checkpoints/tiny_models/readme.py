"""checkpoints/tiny/README.md: what was trained, from which seeds, for how long, and how far it came."""

import json
import os
import platform
from collections import defaultdict
from pathlib import Path

import torch

from faceprior import tiny
from faceprior.jsonl import append_row, resume_rows
from faceprior.training import METRICS_FILE

DURATIONS, RECORD = "durations.jsonl", "runs.json"
PARTS = {
    "sd15": "Stable Diffusion 1.5 type pipeline: tokenizer, text encoder, VAE, U-Net",
    "sdxl": "SDXL type pipeline, begun from the other U-Net; its VAE and first text encoder are the same",
    "reward": "BLIP reward model, pretrained on drawn faces and spoiled twins: ImageReward's part",
    "scorer": "the same after stage 2 on inpainted pairs: Face Score's part",
    "restorer": "portrait prior of stage 5 and ControlNet of stage 6",
    "features": "vision transformer that tells tags and landmarks: DINO's, Inception's and LPIPS's part",
}
HEADER = """# The tiny models

Small models of the real diffusers and transformers classes, trained from nothing by `make tiny` on portraits and
scenes that the project draws. They know drawn people only: they show the methods at work where there is neither GPU
nor hub, and are no substitute for the published models. `make figures` measures them.
"""
FOOTER = """
Losses are means over the last 50 steps; hours are by the clock, some beside other work. A run that stands more than
once went on from the weights that the one before had shipped; `make tiny` trains it at once, in as many steps as they
have together. The second run of `vae` trained the decoder alone: the latents, and all that was trained on them, stayed.
`sd15_fine` went on by the plain loss, which brought little and is not done any more. The last run of `sdxl` began anew,
from the last `sd15`; pairs that `reward` has seen come from an earlier `sd15` and `vae`.

- Data: {data}, from the training seeds in `faceprior/procedural.py`; every run has the seed 0
- Machine: {machines}
- Licence: Apache-2.0, as the code. The pictures are drawn by it: no photograph of anyone was used
"""
RUNS = ("vae", "features", "sd15", "sdxl", "reward", "scorer", "guided", "prior", "control", "restorer")
COLUMNS = ("run", "steps", "loss", "hours", "result")


def note_duration(work: Path, step: str, seconds: float) -> None:
    if seconds > 1:  # not a step that was complete
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

    A run that goes on from shipped weights of an earlier one keeps that one's row, and has its own below it.
    """
    record = tiny.tiny_folder() / RECORD
    runs = json.loads(record.read_text()) if record.is_file() else []
    for row in finished_runs(work):
        if row not in runs:
            runs.append(row)
    record.write_text(json.dumps(runs, indent=1) + "\n")
    data = f"{config.num_drawn} drawings of {config.resolution} pixels, every fifth a scene"
    lines = [HEADER, "| folder | what it is | MB |", "|---|---|---|"]
    for kind, what in PARTS.items():
        size = sum(f.stat().st_size for f in (tiny.tiny_folder() / kind).rglob("*") if f.is_file()) / 1e6
        lines.append(f"| `{kind}/` | {what} | {size:.1f} |")
    lines += ["", "| run | steps | loss at the end | hours | result |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(str(row[key]) for key in COLUMNS)} |" for row in runs]
    machines = "; ".join(sorted({row["machine"] for row in runs}))
    lines.append(FOOTER.format(data=data, machines=machines))
    (tiny.tiny_folder() / "README.md").write_text("\n".join(lines))


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


def read_summary(folder: Path) -> str:
    """Return what a run says of itself in done.json, but its steps, as short text."""
    values = json.loads((folder / "done.json").read_text())
    shown = {k: v for k, v in values.items() if isinstance(v, int | float | str) and k != "steps"}
    return ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in shown.items())


def _short(value: int | float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
