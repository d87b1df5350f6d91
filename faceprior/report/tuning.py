"""A tuned generator (stages 4 and 5): its loss, its validations, the verdict, and samples before and after.

Of the tiny base there are the samples of the weights that ship, too.
"""

from typing import Any

import numpy as np

from faceprior.images import as_array
from faceprior.report.charts import Chart, line_chart
from faceprior.report.run import Run, number, points
from faceprior.report.summary import facts, heading, spread

SAMPLES = 8  # most that are shown
PROMPTS, STEPS = 4, 6  # of the validation images, most that are shown


def describe(run: Run, folder: str, loss: str) -> dict[str, Any]:
    """folder: of the stage, below the root; loss: the name of what it minimises."""
    samples = run.rows(f"{folder}/samples.jsonl", {"before": str, "after": str})
    shown = samples[:SAMPLES]
    done = run.read(f"{folder}/done.json")
    return {
        "facts": facts(run, folder),
        "verdict": run.attempt(f"{folder}/done.json", _verdict, run, done),
        "chart": loss_chart(run, folder, loss),
        "validation": run.attempt(f"{folder}/validation.jsonl", _validation, run, folder, number(done, "best_step")),
        "heading": heading("Samples before and after tuning", shown, samples, "the first"),
        "samples": [run.attempt(f"{folder}/samples.jsonl", _sample, run, folder, row) for row in shown],
    }


def loss_chart(run: Run, folder: str, loss: str) -> Chart:
    losses = {"training": points(run.rows(f"{folder}/metrics.jsonl"), "loss")}
    return line_chart("Training loss", losses, "step", loss)


def _verdict(run: Run, done: dict) -> str | None:
    """Return what the stage said of the tuned faces; None of one that does not judge them."""
    verdict = done.get("verdict")
    return None if verdict is None else run.plain(verdict["text"], 300)


def _validation(run: Run, folder: str, best: float | None) -> dict[str, Any] | None:
    """Return the curve of the validation scores, and images of some prompts over the steps; None without validations.

    Images that nobody scored, as stage 5's, have no curve.

    best: the step whose weights were kept, which is marked.
    """
    rows = run.rows(f"{folder}/validation.jsonl", {"step": int, "seed": int, "image": str})
    if not rows:
        return None
    curve = points(run.rows(f"{folder}/metrics.jsonl"), "validation_score")
    kept = [point for point in curve if point[0] == best]
    steps = sorted({row["step"] for row in rows})
    shown = sorted({*spread(steps, STEPS), *(step for step in steps if step == best)})
    seeds = sorted({row["seed"] for row in rows})
    prompts = []
    for seed in seeds[:PROMPTS]:
        own = {row["step"]: row for row in reversed(rows) if row["seed"] == seed}
        images = [_step(run, folder, own[step], step == best) for step in shown if step in own]
        prompts.append({"prompt": run.plain(next(iter(own.values())).get("prompt") or "", 300), "images": images})
    scores = {"all steps": curve, "kept": kept}
    return {
        "chart": line_chart("Face Score of the validation images", scores, "step", "score") if curve else None,
        "heading": heading("Validation images", seeds[:PROMPTS], seeds, "the first"),
        "prompts": prompts,
    }


def _step(run: Run, folder: str, row: dict, is_best: bool) -> tuple[Any, str]:
    """Return a validation image and its caption."""
    caption = f"step {row['step']}" if row["step"] else "untuned"
    caption += ", kept" if is_best else ""
    score = number(row, "score")
    image = run.image(folder, row["image"], f"validation, {caption}", 192)
    return image, caption if score is None else f"{caption}: {score:.2f}"


def _sample(run: Run, folder: str, row: dict) -> dict[str, Any]:
    seed = row.get("seed")
    facts = {} if seed is None else {"seed": str(seed)}
    scores = [number(row, f"score_{side}") for side in ("before", "after")]
    if None not in scores:
        facts["Face Score"] = " → ".join(f"{score:.2f}" for score in scores)
    if (change := _mean_change(run, folder, row)) is not None:
        facts["mean change"] = f"{change:.1f} of 255"
    images = {side: run.image(folder, row[side], f"seed {seed}, {side} tuning", 384) for side in ("before", "after")}
    if isinstance(row.get("shipped"), str):
        images["shipped weights"] = run.image(folder, row["shipped"], f"seed {seed}, shipped weights", 384)
    return {"images": images, "prompt": run.plain(row.get("prompt") or "", 300), "facts": facts}


def _mean_change(run: Run, folder: str, row: dict) -> float | None:
    """Return the mean absolute difference of a sample before and after, 0 to 255; None if they cannot be compared."""
    try:
        before, after = (as_array(run.load(folder, row[side])).astype(np.float32) for side in ("before", "after"))
    except (OSError, ValueError):
        return None  # the image is named where it is embedded
    return float(np.abs(after - before).mean()) if before.shape == after.shape else None
