"""Portraits for the prior: accepted ones with their captions, rejected ones with their reasons."""

from typing import Any

from faceprior.html import EmbeddedImage
from faceprior.report.run import STAGES, Run
from faceprior.report.summary import heading, reasons, spread

FOLDER = STAGES["03_curate_portraits"]
PORTRAITS = 12  # most that are shown of each kind


def describe(run: Run) -> dict[str, Any]:
    accepted = run.rows(f"{FOLDER}/manifest.jsonl", {"id": str, "image": str, "caption": str})
    rejected = run.rows(f"{FOLDER}/rejected.jsonl")
    shown, refused = spread(accepted, PORTRAITS), spread(rejected, PORTRAITS)
    return {
        "counts": {"accepted": len(accepted), "rejected": len(rejected)},
        "reasons": reasons(run, rejected, "photograph"),
        "accepted_heading": heading("Accepted, with their captions", shown, accepted),
        "accepted": [
            (run.image(FOLDER, row["image"], f"portrait {row['id']}", 256), run.plain(row["caption"], 300))
            for row in shown
        ],
        "rejected_heading": heading("Rejected", refused, rejected),
        "rejected": [run.attempt(f"{FOLDER}/rejected.jsonl", _rejected, run, row) for row in refused],
    }


def _rejected(run: Run, row: dict) -> dict[str, Any]:
    name, thumbnail = run.plain(row.get("photograph", row.get("id", "?")), 80), row.get("thumbnail")
    if thumbnail is None:
        image = EmbeddedImage(name, words="no image")
    else:
        image = run.image(FOLDER, thumbnail, f"rejected portrait {name}", 256)
    return {"image": image, "reason": run.plain(row.get("reason") or "no reason given", 160), "name": name}
