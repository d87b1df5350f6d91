"""Portraits for the prior: accepted ones with their captions, rejected ones with their reasons, gates, balance."""

from typing import Any

from faceprior.gates import GATES, Gate
from faceprior.html import EmbeddedImage
from faceprior.report.charts import Chart, histogram
from faceprior.report.run import REASON, STAGES, Run, number
from faceprior.report.summary import format_number, heading, reasons, spread

STAGE = "03_curate_portraits"
FOLDER = STAGES[STAGE]
PORTRAITS = 12  # most that are shown of each kind
TAGS = 40  # most that are counted


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
        "gates": run.attempt(f"{FOLDER}/rejected.jsonl", _gates, run, accepted, rejected),
        "balance": run.attempt(f"{FOLDER}/balance.json", _balance, run, run.read(f"{FOLDER}/balance.json")),
    }


def _rejected(run: Run, row: dict) -> dict[str, Any]:
    name, thumbnail = run.plain(row.get("photograph", row.get("id", "?")), 80), row.get("thumbnail")
    if thumbnail is None:
        image = EmbeddedImage(name, words="no image")
    else:
        image = run.image(FOLDER, thumbnail, f"rejected portrait {name}", 256)
    return {"image": image, "reason": run.plain(row.get("reason") or "no reason given", REASON), "name": name}


def _gates(run: Run, accepted: list[dict], rejected: list[dict]) -> dict[str, Any]:
    """Return a row for each gate that judged something, (fault, number, limit, photographs, those with no other fault),
    and the histogram of its number with its limit."""
    limits = run.read(f"{FOLDER}/config.yaml").get(STAGE)
    limits = limits if isinstance(limits, dict) else {}
    rows, charts = [], []
    for gate in GATES:
        kept, lost = _values(accepted, gate), _values(rejected, gate)
        limit = number(limits, gate.limit)
        if limit is None or not kept + lost:
            continue
        faults = [row["faults"] for row in rejected if gate.fault in row.get("faults", [])]
        alone = sum(len(own) == 1 for own in faults)
        rule = f"{gate.keeps} {format_number(limit)}"
        rows.append((gate.fault, f"{gate.measure}: {gate.meaning}", rule, len(faults), alone))
        charts.append(_chart(gate, kept, lost, limit, rule))
    return {"rows": rows, "charts": charts}


def _values(rows: list[dict], gate: Gate) -> list[float]:
    """Return the sizes of a gate's number in all rows that have it: the sign of an angle does not count."""
    found = [number(row.get("quality") or {}, gate.measure) for row in rows]
    return [abs(value) for value in found if value is not None]


def _chart(gate: Gate, kept: list[float], lost: list[float], limit: float, rule: str) -> Chart:
    title, note = f"{gate.measure} ({gate.fault})", f"line: limit; kept: {rule}"
    return histogram(title, {"accepted": kept, "rejected": lost}, gate.meaning, "photographs", limit, note)


def _balance(run: Run, balance: dict[str, Any]) -> dict[str, Any]:
    if not balance:
        return {}
    tags = list(balance["tags"].items())
    return {
        "groups": {"skin tone": balance["skin_tones"], "age": balance["ages"]},
        "heading": heading("Tags", tags[:TAGS], tags, "the most frequent ones"),
        "tags": {run.plain(tag, 60): count for tag, count in tags[:TAGS]},
        "missing": [run.plain(sentence, 300) for sentence in balance["missing"]],
    }
