"""What the report shows of the scorer's `report.json`: is its margin a probability, and does it look at faces?"""

from typing import Any

from faceprior.report.parts import Markup, Run, format_number, line_chart, missing, number, render, table, tag

REPORT = "checkpoints/scorer/report.json"


def scorer_checks(run: Run) -> Markup:
    """The calibration of the margin and the shortcut tests; a line if they were not measured yet."""
    report = run.read(REPORT)
    if not report:
        return missing("Calibration and shortcut tests were not measured: stage 2 does so when its training ends.")
    return render(
        run.attempt(f"{REPORT}: calibration", _calibration, report),
        run.attempt(f"{REPORT}: shortcuts", _shortcuts, run, report),
    )


def _calibration(report: dict[str, Any]) -> Markup:
    rows, error = report["calibration"]["bins"], number(report["calibration"], "expected_error")
    if error is None:
        raise ValueError("no number as `expected_error`")
    series = {
        "share in order": [(row["margin"], row["right"]) for row in rows],
        "sigmoid(margin)": [(row["margin"], row["expected"]) for row in rows],
    }
    chart = line_chart("Share in the right order, by margin", series, "distance of the two scores", "share of pairs")
    cells = [
        (format_number(row["margin"]), f"{row['expected']:.0%}", f"{row['right']:.0%}", row["pairs"]) for row in rows
    ]
    text = (
        "Training fits the sigmoid of the margin to the probability that the pair is in the right order. Where the two "
        f"curves meet, a distance of two scores can be read so. They lie {error:.3f} apart in the mean over the pairs "
        "(expected calibration error; 0 is best)."
    )
    head = ["distance of scores, mean", "sigmoid", "in order", "pairs"]
    beside = tag("div", tag("p", text), table(head, cells))
    return render(tag("h3", "Is the margin a probability?"), tag("div", chart, beside, class_="grid two"))


def _shortcuts(run: Run, report: dict[str, Any]) -> Markup:
    cells = []
    for row in report["shortcuts"]:
        share, low, high, count = (number(row, key) for key in ("share", "low", "high", "n"))
        note = run.plain(row.get("note") or "", 300)
        if share is None or low is None or high is None:
            shown, interval, note = (
                tag("span", "not measured", class_="none"),
                None,
                note.removeprefix("not measured: "),
            )
        else:
            shown, interval = f"{share:.1%}", f"{low:.1%} to {high:.1%}"
        cells.append((run.plain(row["test"], 120), shown, interval, count and format_number(count), note or None))
    text = (
        "Only the bad side of a pair has its face from the generator, so it is a little softer and carries traces of "
        "the VAE. A scorer that looks at faces keeps the order when the good side has the same traces."
    )
    head = ["test", "pairs in order", "95% interval", "n", "note"]
    return render(
        tag("h3", "Does it look at faces, or at traces?"), tag("p", text), table(head, cells, class_="numbers stack")
    )
