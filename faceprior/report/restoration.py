"""Restoration: the restorer's loss, the facial loss over time and its discriminators, and samples."""

import math
from typing import Any

from faceprior.report.charts import Chart, Points, band_chart, line_chart
from faceprior.report.run import STAGES, Run, number, points
from faceprior.report.summary import facts, heading
from faceprior.report.tuning import SAMPLES, loss_chart

FOLDER = STAGES["06_train_restorer"]
KINDS = ("clean", "degraded", "restored")
REGIONS = ("eyes", "mouth")
POINTS = 50  # of the weight's curve


def describe(run: Run) -> dict[str, Any]:
    samples = run.rows(f"{FOLDER}/samples.jsonl", dict.fromkeys(KINDS, str))
    shown = samples[:SAMPLES]
    return {
        "facts": facts(run, FOLDER),
        "chart": loss_chart(run, FOLDER, "noise prediction error (MSE)"),
        "facial": run.attempt(f"{FOLDER}/config.yaml", _facial, run),
        "confidence": run.attempt(f"{FOLDER}/confidence.json", _confidence, run),
        "heading": heading("Samples", shown, samples, "the first"),
        "samples": [
            {kind: run.image(FOLDER, row[kind], f"sample {place}, {kind}", 384) for kind in KINDS}
            for place, row in enumerate(shown, 1)
        ],
    }


def _facial(run: Run) -> list[Chart]:
    """Return the discriminators' accuracy for each region, and the weight over time; [] without the facial loss."""
    rows = run.rows(f"{FOLDER}/metrics.jsonl")
    charts = []
    for region in REGIONS:
        curves = {side: points(rows, f"{region}_{side}") for side in ("real", "fake")}
        if any(curves.values()):
            charts.append(line_chart(f"Accuracy of the discriminator, {region}", curves, "step", "fraction correct"))
    weight = _weight(run)
    return [*charts, line_chart(*weight, "t", "w(t)")] if charts and weight else charts


def _weight(run: Run) -> tuple[str, dict[str, Points]] | None:
    """Return a title and the weight of the facial loss over time (AuthFace, Eq. 3), None where it is not known."""
    settings, done = run.read(f"{FOLDER}/config.yaml").get("06_train_restorer") or {}, run.read(f"{FOLDER}/done.json")
    m = next((m for m in (number(settings, "time_m"), number(done, "time_m"), _measured(run)) if m is not None), None)
    s = number(settings, "time_s")
    if m is None or not s:
        return None
    t = [(place + 0.5) / POINTS for place in range(POINTS)]
    w = [math.exp(-((math.log(x / (1 - x)) - m) ** 2) / (2 * s**2)) / (s * math.sqrt(2 * math.pi)) for x in t]
    if settings.get("facial_loss") == "constant":
        w = [sum(w) / POINTS] * POINTS
    return f"Weight of the facial loss, m = {m:.2f}, s = {s:g}", {"w(t)": list(zip(t, w, strict=True))}


def _measured(run: Run) -> float | None:
    return number(run.read(f"{FOLDER}/confidence.json"), "m")


def _confidence(run: Run) -> Chart | None:
    """Return the curve that m was measured by, None where it was not."""
    curve = run.read(f"{FOLDER}/confidence.json")
    if not curve:
        return None
    middle, low, high = (list(zip(curve["t"], curve[key], strict=True)) for key in ("mean", "low", "high"))
    half = {"0.5": [(0.0, 0.5), (1.0, 0.5)]}
    return band_chart(
        f"Confidence of a face under noise, n = {curve['n']}",
        "mean, 95% interval",
        middle,
        low,
        high,
        half,
        "t",
        "confidence",
    )
