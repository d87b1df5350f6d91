"""Restoration: the restorer's loss, and samples clean, degraded and restored."""

from typing import Any

from faceprior.report.run import STAGES, Run
from faceprior.report.summary import facts, heading
from faceprior.report.tuning import SAMPLES, loss_chart

FOLDER = STAGES["06_train_restorer"]
KINDS = ("clean", "degraded", "restored")


def describe(run: Run) -> dict[str, Any]:
    samples = run.rows(f"{FOLDER}/samples.jsonl", dict.fromkeys(KINDS, str))
    shown = samples[:SAMPLES]
    return {
        "facts": facts(run, FOLDER),
        "chart": loss_chart(run, FOLDER, "noise prediction error (MSE)"),
        "heading": heading("Samples", shown, samples, "the first"),
        "samples": [
            {kind: run.image(FOLDER, row[kind], f"sample {place}, {kind}", 384) for kind in KINDS}
            for place, row in enumerate(shown, 1)
        ],
    }
