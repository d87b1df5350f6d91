"""The chain by the stages' defaults below results/demo/, three photographs, the report: `make demo` runs it."""

import contextlib
import os
import runpy
import sys
import time
from pathlib import Path

import numpy as np
import skimage.data
from matplotlib.cbook import get_sample_data

from faceprior import cli, degrade, images, report
from faceprior.jsonl import rewrite_rows
from faceprior.procedural import draw_scene

ROOT = Path(__file__).resolve().parent.parent
SCORE = ["faceprior", "score", "photographs", "--checkpoint", "checkpoints/scorer", "--json"]
RESTORE = ["faceprior", "restore", "photographs", "-o", "restored", "--checkpoint", "checkpoints/restorer"]
STAGES = [["python", f"stages/{path.name}"] for path in sorted((ROOT / "stages").glob("0*.py"))]
rows, damage = [], degrade.scaled(degrade.PRESETS["gfpgan"], 128)
(ROOT / "results/demo").mkdir(parents=True, exist_ok=True)
os.chdir(ROOT / "results/demo")
old = degrade.degrade(draw_scene(31007, 512, faces=3, area_bin=2).image, damage, np.random.default_rng(4))
hopper = images.load_image(get_sample_data("grace_hopper.jpg", asfileobj=False))
for name, image in (("astronaut", skimage.data.astronaut()), ("drawn_and_degraded", old), ("grace_hopper", hopper)):
    images.save_image(image, f"photographs/{name}.png")
for command in [*STAGES, SCORE, RESTORE]:
    print("$", *command, flush=True)
    start, sys.argv = time.perf_counter(), [str(ROOT / command[1])]
    with contextlib.redirect_stdout(open("photographs/scores.jsonl", "w") if command is SCORE else sys.stdout):
        if command in STAGES:
            runpy.run_path(sys.argv[0], run_name="__main__")
        elif code := cli.main(command[1:]):
            raise SystemExit(code)
    rows.append({"command": command, "seconds": time.perf_counter() - start})
if not Path("commands.jsonl").exists():  # a second call only resumes: the first one's durations are the chain's
    rewrite_rows("commands.jsonl", rows)
print("report:", report.write_report(Path("."), Path("report.html")).resolve())
