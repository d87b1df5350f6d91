"""Tables of measured numbers: an estimate with its 95% interval, or the reason why there is none; and Markdown.

    estimate = measure(lambda: mean_estimate(scores))       # or fraction_estimate, difference_estimate
    estimate.to_row()                                       # {"value", "low", "high", "n", "note"}, ready for JSON

    cells = (row["metric"], number_text(row["value"]), interval_text(row["low"], row["high"]), str(row["n"]))
    markdown_table(("metric", "mean", "95% interval", "n"), [cells])

A number that cannot be measured on this machine keeps its row. The code that measures it raises `MetricUnavailable`
with the reason and the way out, `measure` makes an estimate without a value of it, and the note of its row reads
"not measured: REASON".
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from faceprior.metrics import MetricUnavailable, fraction_interval, mean_interval, paired_test

NOT_MEASURED = "not measured: "  # begins the note of an estimate without a value
INFINITE = "infinite: "  # begins the note of an infinite one, whose value JSON cannot hold
EMPTY = "-"  # the text of a number that does not exist


@dataclass(frozen=True)
class Estimate:
    """A value, its 95% interval, of how many items (n), and a note; without a value, the reason for that.

    low, high: None, or infinite, where there is no interval (a single item). p_value: of a paired test.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    note: str = ""
    p_value: float | None = None
    reason: str = ""

    def to_row(self) -> dict[str, Any]:
        """Return the JSON keys value, low, high, n and note; a number that is not finite becomes None.

        The note of an infinite value begins with INFINITE.
        """
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        finite = {key: x if x is not None and math.isfinite(x) else None for key, x in numbers.items()}
        reason = NOT_MEASURED + self.reason if self.value is None else ""
        note = INFINITE + self.note if self.value == math.inf else self.note
        test = "" if self.p_value is None else f"paired t test, p = {self.p_value:.3g}"
        return {**finite, "n": self.n, "note": "; ".join(filter(None, (reason, note, test)))}


def measure(function: Callable[[], Estimate]) -> Estimate:
    """Return what a function measures; where it lacks weights, files or a library, an estimate with the reason."""
    try:
        return function()
    except (MetricUnavailable, ImportError) as error:
        return Estimate(reason=str(error))


def mean_estimate(values: Sequence[float], note: str = "", reason: str = "no values") -> Estimate:
    """Return the mean with its interval by Student's t. reason: why there is none, should `values` be empty."""
    if not len(values):
        return Estimate(reason=reason, note=note)
    mean, half = mean_interval(values)
    return Estimate(mean, mean - half, mean + half, len(values), note)


def fraction_estimate(correct: Sequence[bool], note: str = "", reason: str = "no values") -> Estimate:
    """Return the fraction of True, [0, 1], with its interval by Wilson. reason: as for `mean_estimate`."""
    if not len(correct):
        return Estimate(reason=reason, note=note)
    return Estimate(*fraction_interval(correct), len(correct), note)


def difference_estimate(
    a: Sequence[float], b: Sequence[float], note: str = "", reason: str = "fewer than two values"
) -> Estimate:
    """Return the mean of a - b over the same items, with its interval and p value by the paired t test.

    reason: why there is none, should there be fewer than two items.
    """
    if len(a) < 2:
        return Estimate(reason=reason, note=note)
    test = paired_test(a, b)
    mean, half = test.mean_difference, test.half_width
    return Estimate(mean, mean - half, mean + half, test.n, note, test.p_value)


def number_text(value: float | None, spec: str = ".4g", unit: str = "") -> str:
    """Return a number by its format (".1%" shows a fraction as a percentage) with its unit; "-" for None."""
    return EMPTY if value is None else f"{value:{spec}} {unit}".rstrip()


def value_text(value: float | None, note: str, spec: str = ".4g", unit: str = "") -> str:
    """Return the value of a row (see `Estimate.to_row`): as `number_text`, or "infinite" where its note says so."""
    return "infinite" if value is None and note.startswith(INFINITE) else number_text(value, spec, unit)


def interval_text(low: float | None, high: float | None, spec: str = ".4g", unit: str = "") -> str:
    """Return "LOW to HIGH", "-" where one of them is None."""
    if low is None or high is None:
        return EMPTY
    return f"{number_text(low, spec, unit)} to {number_text(high, spec, unit)}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, a line per row, with its texts as `markdown_text` writes them and `|` escaped."""
    lines = [_line(head), "|---" * len(head) + "|", *map(_line, rows)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(markdown_text(cell).replace("|", "\\|") for cell in cells) + " |"


def markdown_text(text: str) -> str:
    """Return a text on one line of Markdown, in which no HTML begins: `<b>` is escaped, `p < 0.01` stays."""
    return re.sub(r"(?<!\\)<(?=[A-Za-z/!?])", r"\\<", " ".join(text.split()))
