"""results.json: a row per method and measure, what the tables have to be read with, and what made them.

results = {"rows": [...], "notes": {protocol: [...]}, "methods": [...], "published": {...}, "settings", "versions"}
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from faceprior.config import METRICS_FILE
from faceprior.evaluation.figures import common_means, figure, not_measured, set_figure
from faceprior.evaluation.measures import Measure
from faceprior.evaluation.measuring import Measuring
from faceprior.evaluation.methods import REFERENCE, Method
from faceprior.evaluation.rows import WEIGHTED
from faceprior.evaluation.tables import csv_text, details, latex_rows, markdown, missing_notes, tables_of
from faceprior.files import atomic_write
from faceprior.jsonl import rewrite_rows
from faceprior.tables import markdown_text

RESULTS, TABLE = "results.json", "table.md"
NAMED = 5  # most items that a note names


# ---- rows


def protocol_rows(measuring: Measuring, methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Return a row for every method and measure; the first method is what the others are compared to.

    The reference has rows where it has a number. Where methods lack different items, their rows say what the mean is
    over the items that all of them have (`common`), and how many those are (`common_n`).
    """
    common = {measure.key: _common(measuring, measure, methods) for measure in measuring.taken()}
    rows = [
        result_row(
            measuring.protocol,
            method.name,
            measure,
            _numbers(measuring, measure, method, methods[0]) | common[measure.key].get(method.name, {}),
        )
        for method in methods
        for measure in measuring.taken()
        if _applies(measure, method)
    ]
    if measuring.rows.of(measuring.protocol, REFERENCE):
        reference = Method(REFERENCE, REFERENCE, "reference")
        own = [
            result_row(measuring.protocol, REFERENCE, measure, _numbers(measuring, measure, reference, methods[0]))
            for measure in measuring.taken()
            if _applies(measure, reference)
        ]
        rows += own if any(row["value"] is not None for row in own) else []
    return rows


def result_row(protocol: str, method: str, measure: Measure, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of results.json: which number it is, in which words, and the number."""
    names = {"protocol": protocol, "method": method, "measure": measure.key}
    words = {name: getattr(measure, name) for name in ("header", "title", "unit", "better", "spec")}
    return names | words | {"value": None, "low": None, "high": None, "median": None, "note": ""} | dict(numbers)


def _applies(measure: Measure, method: Method) -> bool:
    """Tell whether a method has such a number: nobody timed a folder, and a reference is compared to nothing."""
    if method.kind == "reference":
        return measure.of == "image" and measure.load is not None and "reference" not in measure.needs
    return measure.key != "seconds" or method.kind == "model"


def _numbers(measuring: Measuring, measure: Measure, method: Method, first: Method) -> dict[str, Any]:
    if reason := method.missing or measuring.reasons.get(measure.key):
        return not_measured(reason)
    if measure.of == "set":
        measured, base = (
            measuring.sets.get((measuring.protocol, name, measure.key)) for name in (method.name, first.name)
        )
        return set_figure(measured, measuring.reference_name, None if method == first else base)
    values, baseline = (_values(measuring, measure, name) for name in (method.name, first.name))
    return figure(measure, values, None if method == first else baseline)


def _values(measuring: Measuring, measure: Measure, method: str) -> dict[str, float | None]:
    """Return what was measured of a method by item; a count of faces as whether there is one."""
    rows = measuring.samples(measure, method)
    values = {item: row[measure.key] for item, row in rows.items() if measure.key in row}
    if measure.key == "faces":
        return {item: float(number > 0) for item, number in values.items()}
    return {item: None if value is None else float(value) for item, value in values.items()}


def _common(measuring: Measuring, measure: Measure, methods: Sequence[Method]) -> dict[str, dict[str, Any]]:
    """Return for each method its mean over the items that all have; {} where all have the same, or no common ones."""
    if measure.of == "set":
        return {}
    found = {method.name: _values(measuring, measure, method.name) for method in methods if _applies(measure, method)}
    known = {name: {item: x for item, x in own.items() if x is not None} for name, own in found.items()}
    return common_means({name: own for name, own in known.items() if own})


def method_notes(measuring: Measuring, methods: Sequence[Method], wanted: Collection[str]) -> list[str]:
    """Name the items of a set, by their ids, that a method lacks, and say what was resized."""
    notes = []
    for method in methods:
        own = measuring.rows.of(measuring.protocol, method.name)
        lost = [item for item in wanted if item not in own]
        if own and lost and len(lost) < len(wanted):
            more = ", ..." if len(lost) > NAMED else ""
            notes.append(f"{method.name}: {len(lost)} of {len(wanted)} missing: {', '.join(lost[:NAMED])}{more}")
        if sizes := sorted({"x".join(map(str, row["resized_from"])) for row in own.values() if "resized_from" in row}):
            number = sum("resized_from" in row for row in own.values())
            notes.append(
                f"{method.name}: {number} resized to the size of the reference from {', '.join(sizes)} (Lanczos)"
            )
    return notes


def set_notes(measuring: Measuring, methods: Sequence[Method]) -> list[str]:
    """Say which numbers of whole sets, as the FID, are of other images for one method than for another."""
    notes = []
    for measure in measuring.taken():
        keys = {method.name: (measuring.protocol, method.name, measure.key) for method in methods}
        found = {name: measuring.sets[key]["influence"] for name, key in keys.items() if key in measuring.sets}
        if len({frozenset(influence) for influence in found.values()}) > 1:
            sizes = ", ".join(f"{name} {len(influence)}" for name, influence in found.items())
            notes.append(f"{measure.title} is not of the same images ({sizes}): its numbers do not compare")
    return notes


def weights_notes(measuring: Measuring, weights: Mapping[str, str]) -> list[str]:
    """Say by which weights, and which detector, the numbers of the table were measured."""
    taken = {key for row in measuring.rows.of_protocol(measuring.protocol) for key in row} - measuring.reasons.keys()
    titles = {measure.key: measure.title for measure in measuring.measures} | {"faces": "faces"}
    keys = {name: WEIGHTED.get(name, name) for name in weights}
    return [
        f"{titles[key]} by {weights[name]}"
        for name, key in keys.items()
        if key in taken & titles.keys() and weights[name]
    ]


def described(methods: Sequence[Method], protocol: str) -> list[dict[str, Any]]:
    return [{"protocol": protocol, **asdict(method)} for method in methods]


# ---- files


def write_results(output: Path, results: dict[str, Any]) -> str:
    """Write results.json, its tables as Markdown, CSV and LaTeX, and metrics.jsonl; return the short Markdown."""
    with atomic_write(output / RESULTS, "w") as file:
        json.dump(results, file, indent=1, ensure_ascii=False, allow_nan=False)
    text = ""
    for table in tables_of(results):
        text += markdown(table) + "\n"
        for suffix, made in ((".csv", csv_text(table)), (".tex", latex_rows(table))):
            with atomic_write(output / f"{table.protocol}{suffix}", "w") as file:
                file.write(made)
    missing = "".join(f"- {markdown_text(note)}\n" for note in missing_notes(results["rows"]))
    short = text + (f"## Missing\n\n{missing}\n" if missing else "")
    with atomic_write(output / TABLE, "w") as file:
        file.write(f"{short}## Every number\n\n{details(results)}")
    values = {f"{row['protocol']}/{row['method']}/{row['measure']}": row["value"] for row in results["rows"]}
    known = {name: value for name, value in values.items() if value is not None}
    rewrite_rows(output / METRICS_FILE, [{"step": 1, **known}])
    return short
