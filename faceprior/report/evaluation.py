"""Evaluation: the tables of stage 7, each number with its interval or the reason why it was not measured."""

from dataclasses import dataclass
from typing import Any

from faceprior.report.run import STAGES, Run, number
from faceprior.report.summary import format_number
from faceprior.tables import INFINITE, NOT_MEASURED

RESULTS = f"{STAGES['07_eval']}/results.json"


@dataclass(frozen=True)
class Measured:
    """A row of a table of numbers, as texts; value is None for one that was not measured."""

    name: str
    value: str | None
    interval: str | None
    count: str | None
    note: str


def describe(run: Run) -> dict[str, Any]:
    rows = run.read(RESULTS).get("rows")
    tables: dict[str, list[Measured]] = {}
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict):
            part = str(row.get("part", "other")).capitalize()
            tables.setdefault(part, []).append(_measured(run, row))
    return {"tables": tables, "file": RESULTS}


def _measured(run: Run, row: dict[str, Any]) -> Measured:
    value, low, high, count = (number(row, key) for key in ("value", "low", "high", "n"))
    note = run.plain(row.get("note") or "", 300)
    is_infinite = value is None and note.startswith(INFINITE)
    return Measured(
        name=run.plain(row.get("metric", "?"), 120),
        value="infinite" if is_infinite else None if value is None else format_number(value),
        interval=None if low is None or high is None else f"{format_number(low)} to {format_number(high)}",
        count=None if count is None else format_number(count),
        note=note.removeprefix(INFINITE).removeprefix(NOT_MEASURED) if value is None else note,
    )
