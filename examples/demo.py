"""The whole chain on the tiny preset, below results/demo/, and the report: what `make demo` runs."""

import contextlib
import json
import os
import runpy
import sys
import time
from pathlib import Path

import skimage.data
from matplotlib.cbook import get_sample_data

from faceprior.cli import main as faceprior
from faceprior.images import load_image, save_image
from faceprior.report import write_report

ROOT = Path(__file__).resolve().parent.parent
SCORE = ["score", "photographs", "--checkpoint", "checkpoints/scorer", "--json"]
RESTORE = ["restore", "photographs", "-o", "restored", "--checkpoint", "checkpoints/restorer"]


def run(command: list[str], work) -> dict:
    print("$", *command, flush=True)
    start = time.perf_counter()
    work()
    return {"command": command, "seconds": time.perf_counter() - start}


def stage(path: Path) -> None:
    sys.argv = [str(path)]
    runpy.run_path(str(path), run_name="__main__")


def score() -> None:
    with open("photographs/scores.jsonl", "w") as file, contextlib.redirect_stdout(file):
        faceprior(SCORE)


if __name__ == "__main__":
    os.makedirs(ROOT / "results/demo", exist_ok=True)
    os.chdir(ROOT / "results/demo")
    save_image(skimage.data.astronaut(), "photographs/astronaut.png")
    save_image(load_image(get_sample_data("grace_hopper.jpg", asfileobj=False)), "photographs/grace_hopper.png")
    rows = [run(["python", f"stages/{p.name}"], lambda p=p: stage(p)) for p in sorted((ROOT / "stages").glob("0*.py"))]
    rows += [run(["faceprior", *SCORE], score), run(["faceprior", *RESTORE], lambda: faceprior(RESTORE))]
    if not Path("commands.jsonl").exists():  # a second call only resumes: the first one's durations are the chain's
        Path("commands.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print("report:", write_report(Path("."), Path("report.html")).resolve())
