"""The whole chain by the stages' defaults below results/demo/, two photographs, the report: `make demo` runs it."""

import contextlib
import os
import runpy
import sys
import time
from pathlib import Path

import skimage.data
from matplotlib.cbook import get_sample_data

from faceprior import cli, report
from faceprior.images import load_image, save_image
from faceprior.jsonl import rewrite_rows

ROOT = Path(__file__).resolve().parent.parent
SCORE = ["score", "photographs", "--checkpoint", "checkpoints/scorer", "--json"]
RESTORE = ["restore", "photographs", "-o", "restored", "--checkpoint", "checkpoints/restorer"]
STAGES = [["python", f"stages/{path.name}"] for path in sorted((ROOT / "stages").glob("0*.py"))]
rows = []
(ROOT / "results/demo").mkdir(parents=True, exist_ok=True)
os.chdir(ROOT / "results/demo")
save_image(skimage.data.astronaut(), "photographs/astronaut.png")
save_image(load_image(get_sample_data("grace_hopper.jpg", asfileobj=False)), "photographs/grace_hopper.png")
for command in [*STAGES, ["faceprior", *SCORE], ["faceprior", *RESTORE]]:
    print("$", *command, flush=True)
    start = time.perf_counter()
    if command[0] == "python":
        sys.argv = [str(ROOT / command[1])]
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        with contextlib.redirect_stdout(open("photographs/scores.jsonl", "w") if command[1] == "score" else sys.stdout):
            if code := cli.main(command[1:]):
                raise SystemExit(code)
    rows.append({"command": command, "seconds": time.perf_counter() - start})
if not Path("commands.jsonl").exists():  # a second call only resumes: the first one's durations are the chain's
    rewrite_rows("commands.jsonl", rows)
print("report:", report.write_report(Path("."), Path("report.html")).resolve())
