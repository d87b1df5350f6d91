"""The scorer: accuracy, curves, validation scores, and the checks of its `report.json`.

Is the margin of two scores a probability (calibration), and does the scorer look at faces (shortcuts)?
"""

from dataclasses import dataclass
from typing import Any

from faceprior.report.charts import Chart, histogram, line_chart
from faceprior.report.pairs import Bins, area_bins, bin_text
from faceprior.report.run import NUMBER, REASON, STAGES, Run, number, points
from faceprior.report.summary import facts, format_number
from faceprior.tables import NOT_MEASURED

FOLDER = STAGES["02_train_scorer"]
FEW = 30  # validation pairs below which an accuracy says little


@dataclass(frozen=True)
class Measured:
    """A row of a table of numbers, as texts; value is None for one that was not measured."""

    name: str
    value: str | None
    interval: str | None
    count: str | None
    note: str


def describe(run: Run) -> dict[str, Any]:
    rows = run.rows(f"{FOLDER}/metrics.jsonl")
    losses = {"training": points(rows, "loss"), "validation": points(rows, "validation_loss")}
    accuracies = {"training": points(rows, "accuracy"), "validation": points(rows, "validation_accuracy")}
    return {
        "accuracy": _accuracy(run.read(f"{FOLDER}/done.json")),
        "facts": facts(run, FOLDER),
        "charts": [
            line_chart("Ranking loss", losses, "step", "loss (nats)"),
            line_chart("Accuracy: good above bad", accuracies, "step", "fraction of pairs"),
        ],
        "validation": _validation(run),
        "checks": _checks(run),
    }


def _accuracy(done: dict) -> dict[str, Any] | None:
    """Return the accuracy before and after training and the number of pairs; None where it was not written."""
    before, after, count = (number(done, key) for key in ("start_accuracy", "accuracy", "validation_pairs"))
    if before is None or after is None:
        return None
    pairs = "the validation pairs" if count is None else f"{format_number(count)} validation pairs"
    return {
        "pairs": pairs,
        "before": f"{before:.0%}",
        "after": f"{after:.0%}",
        "few": count is not None and count < FEW,
    }


def _validation(run: Run) -> dict[str, Any] | None:
    """Return the histogram of the validation scores and how often the good face is above; None without scores."""
    rows = run.rows(f"{FOLDER}/scores.jsonl", {"good": NUMBER, "bad": NUMBER})
    if not rows:
        return None
    scores = {side: [row[side] for row in rows] for side in ("good", "bad")}
    return {
        "chart": histogram("Scores of the validation pairs", scores, "score", "faces"),
        "above": f"{sum(row['good'] > row['bad'] for row in rows):,}",
        "pairs": f"{len(rows):,}",
        "means": {side: format_number(sum(values) / len(values)) for side, values in scores.items()},
        "bins": run.attempt(f"{FOLDER}/scores.jsonl", _accuracy_by_bin, rows, area_bins(run)),
    }


def _accuracy_by_bin(rows: list[dict], bins: Bins) -> list[tuple]:
    found = []
    for _, text, _ in bins:
        own = [row["good"] > row["bad"] for row in rows if bin_text(bins, row["area_ratio"]) == text]
        found.append((text, len(own), f"{sum(own) / len(own):.0%}" if own else "–"))
    return found


def _checks(run: Run) -> dict[str, Any] | None:
    """Return calibration and shortcuts; None where they were not measured yet."""
    place = f"{FOLDER}/report.json"
    checks = run.read(place)
    if not checks:
        return None
    return {
        "calibration": run.attempt(f"{place}: calibration", _calibration, checks),
        "shortcuts": run.attempt(f"{place}: shortcuts", _shortcuts, run, checks),
    }


def _calibration(checks: dict) -> dict[str, Any]:
    rows, error = checks["calibration"]["bins"], number(checks["calibration"], "expected_error")
    if error is None:
        raise ValueError("no number as `expected_error`")
    return {
        "chart": _calibration_chart(rows),
        "error": f"{error:.3f}",
        "bins": [
            (format_number(row["margin"]), f"{row['expected']:.0%}", f"{row['right']:.0%}", str(row["pairs"]))
            for row in rows
        ],
    }


def _calibration_chart(rows: list[dict]) -> Chart:
    series = {
        "fraction in order": [(row["margin"], row["right"]) for row in rows],
        "sigmoid(margin)": [(row["margin"], row["expected"]) for row in rows],
    }
    title = "Fraction in the correct order, by margin"
    return line_chart(title, series, "difference of the two scores", "fraction of pairs")


def _shortcuts(run: Run, checks: dict) -> list[Measured]:
    found = []
    for row in checks["shortcuts"]:
        fraction, low, high, count = (number(row, key) for key in ("share", "low", "high", "n"))
        value = interval = None
        if fraction is not None and low is not None and high is not None:
            value, interval = f"{fraction:.1%}", f"{low:.1%} to {high:.1%}"
        note = run.plain(row.get("note") or "", REASON).removeprefix(NOT_MEASURED)
        found.append(Measured(run.plain(row["test"], 120), value, interval, count and format_number(count), note))
    return found
