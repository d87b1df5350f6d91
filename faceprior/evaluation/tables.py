"""The figures of an evaluation as tables: methods as rows and measures as columns, beside what was published.

results = {"rows": [...], "published": [...], ...}       # as in results.json
for table in tables_of(results):
    markdown(table); csv_text(table); latex_rows(table)
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faceprior.evaluation.methods import INPUT, REFERENCE
from faceprior.tables import EMPTY, NOT_MEASURED, interval_text, markdown_table, markdown_text, number_text

PUBLISHED = "published"
COMMON = "Some methods lack images that others have. Means over the images that all of them have"


@dataclass(frozen=True)
class Cell:
    """A number of a table. text, interval: as the table shows them; common: the mean over what all methods have."""

    text: str = EMPTY
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    note: str = ""
    interval: str = EMPTY
    common: str = EMPTY
    common_n: int | None = None


@dataclass(frozen=True)
class Line:
    """A row of a table; is_published: from a paper, not measured here."""

    method: str
    cells: dict[str, Cell]
    is_published: bool = False


@dataclass(frozen=True)
class Table:
    """columns: key -> header; notes: what the numbers need to be read by; best: (method, key) of the best numbers.

    The input and the reference are no methods to be the best, nor is what was published, on other machines.
    """

    protocol: str
    columns: dict[str, str]
    lines: list[Line]
    notes: list[str]
    best: frozenset[tuple[str, str]] = frozenset()

    @property
    def title(self) -> str:
        return "AB test" if self.protocol == "ab" else self.protocol.capitalize()

    def common(self) -> list[list[str]]:
        """Return the means over the items that all methods have, its header first; [] where those are all items."""
        sizes = {
            key: cell.common_n for line in self.lines for key, cell in line.cells.items() if cell.common_n is not None
        }
        found = [(line, [line.cells.get(key, Cell()).common for key in sizes]) for line in self.lines]
        head = ["method", *(f"{self.columns[key]}, n = {n}" for key, n in sizes.items())]
        return [head, *([line.method, *texts] for line, texts in found if {*texts} - {EMPTY})] if sizes else []


def published_rows(table: str) -> dict[str, Any] | None:
    """Return a published table: {title, protocol, source, columns, rows: [{method, values: {measure key: value}}]}.

    columns: headers of keys that no measure has, where there are any. None for an empty id; ValueError, which names the
    known ones, for an unknown id.
    """
    if not table:
        return None
    known = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    if table not in known:
        raise ValueError(f"`published` has to be one of {', '.join(known)} but is {table!r}")
    return known[table]


def tables_of(results: Mapping[str, Any]) -> list[Table]:
    """Make the tables of results.json, one per protocol."""
    found = []
    for protocol in dict.fromkeys(row["protocol"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["protocol"] == protocol]
        columns = {row["measure"]: row["header"] for row in rows}
        lines = [
            Line(method, {row["measure"]: _cell(row) for row in rows if row["method"] == method})
            for method in dict.fromkeys(row["method"] for row in rows)
        ]
        specs = {row["measure"]: row["spec"] for row in rows}
        published, notes = results.get("published") or {}, list((results.get("notes") or {}).get(protocol, []))
        if published.get("protocol") == protocol:
            headers = published.get("columns", {})
            columns |= {
                key: headers.get(key, key) for row in published["rows"] for key in row["values"] if key not in columns
            }
            lines += [Line(row["method"], _published_cells(row["values"], specs), True) for row in published["rows"]]
            notes.append(_published_note(published))
        found.append(Table(protocol, columns, lines, notes, _best(rows)))
    return found


def _published_note(published: Mapping[str, Any]) -> str:
    """Say where the published rows come from, and when they can be compared with those that were measured."""
    table = ": ".join(published[key] for key in ("source", "title") if published.get(key))
    of = f" of {table}" if table else ""
    return f"{PUBLISHED} rows{of}; comparable where the test set, the weights and the settings are those of the paper"


def _best(rows: Sequence[Mapping[str, Any]]) -> frozenset[tuple[str, str]]:
    found = set()
    for key in {row["measure"] for row in rows}:
        own = [
            row
            for row in rows
            if row["measure"] == key and row["value"] is not None and row["method"] not in (INPUT, REFERENCE)
        ]
        if len(own) > 1 and own[0]["better"]:
            choose = max if own[0]["better"] == "higher" else min
            value = choose(row["value"] for row in own)
            best = [row["method"] for row in own if row["value"] == value]
            found |= {(method, key) for method in best if len(best) < len(own)}  # where all are equal none is
    return frozenset(found)


def _cell(row: Mapping[str, Any]) -> Cell:
    text = "infinite" if row.get("is_infinite") else EMPTY
    if row["value"] is not None:
        text = f"{row['value']:{row['spec']}}"
    interval = interval_text(row["low"], row["high"], row["spec"])
    common = number_text(row.get("common"), row["spec"])
    return Cell(
        text,
        row["value"],
        row["low"],
        row["high"],
        row["n"],
        row.get("note", ""),
        interval,
        common,
        row.get("common_n"),
    )


def _published_cells(values: Mapping[str, float], specs: Mapping[str, str]) -> dict[str, Cell]:
    return {key: Cell(f"{value:{specs.get(key, '.4g')}}", value) for key, value in values.items()}


# ---- formats


def markdown(table: Table) -> str:
    """Return the table as Markdown: the means, then every number with its interval and note."""
    head = ("method", *table.columns.values())
    rows = [
        [f"{line.method} ({PUBLISHED})" if line.is_published else line.method]
        + [line.cells.get(key, Cell()).text for key in table.columns]
        for line in table.lines
    ]
    parts = [f"## {table.title}\n\n{markdown_table(head, rows)}"]
    if common := table.common():
        parts.append(f"{COMMON}:\n\n{markdown_table(common[0], common[1:])}")
    parts += ["\n".join(f"- {markdown_text(note)}" for note in table.notes) + "\n"] if table.notes else []
    return "\n".join(parts)


def details(results: Mapping[str, Any]) -> str:
    """Return every measured number with its interval, its difference to the first method, and its note.

    Those that are missing are not repeated for every method: `missing_notes` names them.
    """
    head = ("protocol", "method", "measure", "mean", "95% interval", "median", "n", "against the first", "p", "note")
    rows = []
    for row in results["rows"]:
        if row["note"].startswith(NOT_MEASURED):
            continue
        spec = row["spec"]
        cell = _cell(row)
        difference = row.get("difference")
        rows.append(
            (row["protocol"], row["method"], row["title"], cell.text)
            + (
                interval_text(row["low"], row["high"], spec),
                f"{row['median']:{spec}}" if row["median"] is not None else EMPTY,
            )
            + (str(row["n"]), EMPTY if difference is None else f"{difference:+{spec}}{pairs_text(row)}")
            + (f"{row['p_value']:.3g}" if row.get("p_value") is not None else EMPTY, row.get("note", ""))
        )
    return markdown_table(head, rows)


def pairs_text(row: Mapping[str, Any]) -> str:
    """Return over how many pairs a difference is, where those are not all of the method's own items."""
    pairs = row.get("pairs")
    return f" ({pairs:,.0f} pairs)" if pairs is not None and pairs != row["n"] else ""


def csv_text(table: Table) -> str:
    """Return the table as CSV: a line per method, for each measure its value, low, high and n."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    parts = ("", "_low", "_high", "_n")
    writer.writerow(["method", "source", *(key + part for key in table.columns for part in parts)])
    for line in table.lines:
        cells = [line.cells.get(key, Cell()) for key in table.columns]
        numbers = [x for cell in cells for x in (cell.value, cell.low, cell.high, cell.n)]
        writer.writerow(
            [line.method, PUBLISHED if line.is_published else "measured"] + ["" if x is None else x for x in numbers]
        )
    return file.getvalue()


def latex_rows(table: Table) -> str:
    """Return the rows of a LaTeX tabular, with the header as the first and the best measured value in bold."""
    head = " & ".join(["Method", *(latex(header) for header in table.columns.values())]) + r" \\"
    lines = [head, r"\midrule"]
    for line in table.lines:
        name = latex(line.method) + (rf" ({PUBLISHED})" if line.is_published else "")
        cells = [latex(line.cells.get(key, Cell()).text) for key in table.columns]
        if not line.is_published:
            is_best = [(line.method, key) in table.best for key in table.columns]
            cells = [rf"\textbf{{{cell}}}" if best else cell for cell, best in zip(cells, is_best, strict=True)]
        lines.append(" & ".join([name, *cells]) + r" \\")
    return "\n".join(lines) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
}  # fmt: skip


def latex(text: str) -> str:
    """Escape what LaTeX reads as commands."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def missing_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return why numbers are missing, once per reason: `LPIPS, FID: REASON`."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["value"] is None and row["note"].startswith(NOT_MEASURED):
            reasons.setdefault(row["note"], {})[row["title"]] = None
    return [f"{', '.join(titles)}: {reason}" for reason, titles in reasons.items()]
