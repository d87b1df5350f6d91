"""A tuned generator (stages 4 and 5): its loss, and samples before and after."""

from typing import Any

import numpy as np

from faceprior.images import as_array
from faceprior.report.charts import Chart, line_chart
from faceprior.report.run import Run, points
from faceprior.report.summary import facts, heading

SAMPLES = 8  # most that are shown


def describe(run: Run, folder: str, loss: str) -> dict[str, Any]:
    """folder: of the stage, below the root; loss: the name of what it minimises."""
    samples = run.rows(f"{folder}/samples.jsonl", {"before": str, "after": str})
    shown = samples[:SAMPLES]
    return {
        "facts": facts(run, folder),
        "chart": loss_chart(run, folder, loss),
        "heading": heading("Samples before and after tuning", shown, samples, "the first"),
        "samples": [run.attempt(f"{folder}/samples.jsonl", _sample, run, folder, row) for row in shown],
    }


def loss_chart(run: Run, folder: str, loss: str) -> Chart:
    losses = {"training": points(run.rows(f"{folder}/metrics.jsonl"), "loss")}
    return line_chart("Training loss", losses, "step", loss)


def _sample(run: Run, folder: str, row: dict) -> dict[str, Any]:
    seed = row.get("seed")
    facts = {} if seed is None else {"seed": str(seed)}
    if (change := _mean_change(run, folder, row)) is not None:
        facts["mean change"] = f"{change:.1f} of 255"
    images = {side: run.image(folder, row[side], f"seed {seed}, {side} tuning", 384) for side in ("before", "after")}
    return {"images": images, "prompt": run.plain(row.get("prompt") or "", 300), "facts": facts}


def _mean_change(run: Run, folder: str, row: dict) -> float | None:
    """Return the mean absolute difference of a sample before and after, 0 to 255; None if they cannot be compared."""
    try:
        before, after = (as_array(run.load(folder, row[side])).astype(np.float32) for side in ("before", "after"))
    except (OSError, ValueError):
        return None  # the image is named where it is embedded
    return float(np.abs(after - before).mean()) if before.shape == after.shape else None
