"""Evaluation: the tables of stage 7 beside published rows, samples to compare, distributions, best and worst images."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from faceprior.evaluation.methods import INPUT, REFERENCE
from faceprior.evaluation.tables import COMMON, Line, Table, missing_notes, pairs_text, tables_of
from faceprior.html import EmbeddedImage
from faceprior.report.charts import Chart, box_chart
from faceprior.report.run import REASON, STAGES, Run, number
from faceprior.report.summary import spread
from faceprior.tables import interval_text

FOLDER = STAGES["07_eval"]
SAMPLES, FEW = 6, 6  # items that are compared; images at each end of the order, within the report of a whole run
ENDS = 20  # the same on a page of its own
COMPARED = 5  # methods that are shown side by side, at most
CHARTS = 6
PRIMARY = ("face_score", "lpips", "lpips_tiny", "psnr")  # the first that was measured orders the images
TEXTS = dict.fromkeys(("protocol", "method", "measure", "header", "title", "spec", "better", "note"), str)
NUMBERS = ("value", "low", "high", "median", "n", "difference", "diff_low", "diff_high", "p_value", "pairs", "common")

_SPEC = re.compile(r"\.\d[f%g]")


@dataclass(frozen=True)
class Part:
    """What is shown of one protocol.

    table: without columns that nobody measured; common: means over the images that all methods have, their header
    first, [] where the table's are; missing: why numbers are, a line each.
    """

    title: str
    table: Table
    common: list[list[str]]
    missing: list[str]
    details: list[list[str]]
    charts: list[Chart]
    samples: list["Comparison"]
    ends: list["Ends"]


@dataclass(frozen=True)
class Comparison:
    """One item: images by method, and pairs (names, before, after) for sliders."""

    title: str
    text: str
    images: dict[str, EmbeddedImage]
    pairs: list[tuple[tuple[str, str], EmbeddedImage, EmbeddedImage]]


@dataclass(frozen=True)
class Ends:
    """The worst and the best images of a method: (image, caption) each."""

    method: str
    measure: str
    worst: list[tuple[EmbeddedImage, str]]
    best: list[tuple[EmbeddedImage, str]]


def describe(run: Run, folder: str = FOLDER, ends: int = FEW) -> dict[str, Any]:
    """Return what is shown of the evaluation in a folder of the run; ends: images at each end of the order."""
    file = f"{folder}/results.json"
    results = run.read(file)
    found = _whole_rows(run, file, results.get("rows"))
    known = {"rows": found, "published": run.attempt(file, _published, run, results), "notes": _notes(run, results)}
    images = images_by_method(run, folder)
    parts = [
        run.attempt(f"{file}: {table.protocol}", _part, run, folder, table, found, images, ends)
        for table in tables_of(
            {**known, "published": known["published"] if isinstance(known["published"], dict) else {}}
        )
    ]
    return {"parts": parts, "file": file, "common_heading": COMMON}


def sources(run: Run, results: Mapping[str, Any]) -> list[list[str]]:
    """Return protocol, name, source, kind and mark of the weights of every method."""
    keys = ("protocol", "name", "text", "kind", "weights")
    rows = [row for row in results.get("methods") or [] if isinstance(row, dict)]
    return [[run.plain(row.get(key, ""), 200) for key in keys] for row in rows]


def versions(run: Run, results: Mapping[str, Any]) -> dict[str, str]:
    """Return the versions of the libraries that measured."""
    found = results.get("versions")
    return {run.plain(k, 40): run.plain(v, 60) for k, v in (found.items() if isinstance(found, dict) else [])}


# ---- what the files hold


def _whole_rows(run: Run, file: str, rows: Any) -> list[dict[str, Any]]:
    """Return the rows that can be shown, with plain texts and finite numbers."""
    whole = []
    for place, row in enumerate(rows if isinstance(rows, list) else [], 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in TEXTS):
            run.note(f"{file}: row {place}", "not a row of a method and a measure")
            continue
        texts = {key: run.plain(row[key], REASON) for key in TEXTS}
        texts["spec"] = texts["spec"] if _SPEC.fullmatch(texts["spec"]) else ".4g"
        ends = {
            key: [x for x in row.get(key) or [] if isinstance(x, str)]
            for key in ("worst", "best")
            if _is_list(row, key)
        }
        numbers = {key: number(row, key) for key in NUMBERS}
        whole.append(
            {**texts, **numbers, **ends, "n": int(numbers["n"] or 0), "is_infinite": row.get("is_infinite") is True}
            | ({"common_n": int(common)} if (common := number(row, "common_n")) is not None else {})
        )
    return whole


def _is_list(row: Mapping[str, Any], key: str) -> bool:
    return isinstance(row.get(key), list)


def _published(run: Run, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the published table with finite numbers only; {} without one."""
    table = results.get("published")
    if not isinstance(table, dict):
        return {}
    rows = []
    for row in table["rows"]:
        values = {key: number(row["values"], key) for key in row["values"]}
        rows.append({"method": str(row["method"]), "values": {k: v for k, v in values.items() if v is not None}})
    columns = {str(key): str(text) for key, text in (table.get("columns") or {}).items()}
    words = {key: run.plain(table.get(key) or "", 200) for key in ("source", "title")}
    return {"protocol": table["protocol"], **words, "columns": columns, "rows": rows}


def _notes(run: Run, results: Mapping[str, Any]) -> dict[str, list[str]]:
    notes = results.get("notes")
    found = notes.items() if isinstance(notes, dict) else []
    return {key: [run.plain(note, REASON) for note in own] for key, own in found if isinstance(own, list)}


Images = dict[tuple[str, str], dict[str, dict[str, Any]]]  # (protocol, method) -> item -> row


def images_by_method(run: Run, folder: str = FOLDER) -> Images:
    """Return the rows with an image, without those that only earlier runs were given."""
    items = run.read(f"{folder}/results.json").get("items")
    given = {key: set(ids) for key, ids in items.items() if isinstance(ids, list)} if isinstance(items, dict) else {}
    found: Images = {}
    for row in run.rows(f"{folder}/rows.jsonl", dict.fromkeys(("protocol", "method", "id", "image"), str)):
        if row["id"] in given.get(row["protocol"], {row["id"]}):
            found.setdefault((row["protocol"], row["method"]), {})[row["id"]] = row
    return found


# ---- a protocol


def _part(run: Run, folder: str, table: Table, rows: Sequence[dict], images: Images, ends: int) -> Part:
    own = [row for row in rows if row["protocol"] == table.protocol]
    columns = {key: text for key, text in table.columns.items() if _is_known(table.lines, key)}
    methods = list(dict.fromkeys(row["method"] for row in own))
    rows_of = {method: images.get((table.protocol, method), {}) for method in methods}
    primary = next(
        (key for key in PRIMARY if any(row["measure"] == key and row["worst"] for row in own if "worst" in row)), ""
    )
    return Part(
        table.title,
        replace(table, columns=columns),
        table.common(),
        missing_notes(own),
        [_detail(row) for row in own if row["value"] is not None or row["is_infinite"]],
        _charts(own, rows_of),
        _samples(run, folder, table.protocol, rows_of, images),
        [
            _ends(run, folder, row, rows_of[row["method"]], ends)
            for row in own
            if row["measure"] == primary and row["method"] not in (INPUT, REFERENCE) and row.get("worst")
        ],
    )


def _is_known(lines: Sequence[Line], key: str) -> bool:
    return any(key in line.cells and line.cells[key].text != "-" for line in lines)


def _detail(row: Mapping[str, Any]) -> list[str]:
    """Return a number with all that was computed of it, as texts."""
    spec = row["spec"]
    shown = [
        "infinite" if row["value"] is None else f"{row['value']:{spec}}",
        interval_text(row["low"], row["high"], spec),
    ]
    shown += ["" if row["median"] is None else f"{row['median']:{spec}}", f"{row['n']:,}"]
    if row["difference"] is None:
        return [row["method"], row["title"], *shown, "", row["note"]]
    against = f"{row['difference']:+{spec}} ({interval_text(row['diff_low'], row['diff_high'], spec)})"
    p = "" if row["p_value"] is None else f", p = {row['p_value']:.2g}"
    p += pairs_text(row)
    return [row["method"], row["title"], *shown, against + p, row["note"]]


def _charts(rows: Sequence[dict], rows_of: Mapping[str, Mapping[str, dict]]) -> list[Chart]:
    """Return the distributions of what was measured of images, a line per method."""
    charts = []
    for key, header in {row["measure"]: row["header"] for row in rows if row.get("worst")}.items():
        if key in ("seconds", "faces"):
            continue
        values = {
            method: [value for row in own.values() if (value := number(row, key)) is not None]
            for method, own in rows_of.items()
        }
        charts.append(box_chart(header, {method: own for method, own in values.items() if len(own) > 1}, header))
    return [chart for chart in charts if chart.axes][:CHARTS]


def _samples(run: Run, folder: str, protocol: str, rows_of: Mapping[str, Mapping[str, dict]], images: Images) -> list:
    """Return some items with the images of all methods; the first is compared with each of the others."""
    inputs = images.get((protocol, INPUT), {})
    compared = {method: own for method, own in rows_of.items() if own and method != REFERENCE}
    compared = dict([*([(INPUT, inputs)] if inputs else []), *compared.items()][: COMPARED + 1])
    shared = [item for item in next(iter(compared.values()), {}) if all(item in own for own in compared.values())]
    found = []
    for item in spread(shared, SAMPLES):
        pictures = {
            method: run.image(folder, own[item]["image"], f"{item}, {method}", 384) for method, own in compared.items()
        }
        first, *others = pictures
        pairs = [((first, other), pictures[first], pictures[other]) for other in others]
        reference = rows_of.get(REFERENCE, {}).get(item)
        extra = {REFERENCE: run.image(folder, reference["image"], f"{item}, {REFERENCE}", 384)} if reference else {}
        text = str(next(iter(compared.values()))[item].get("prompt") or "")
        found.append(Comparison(run.plain(item, 80), run.plain(text, 400), extra, pairs))
    return found


def _ends(run: Run, folder: str, row: Mapping[str, Any], own: Mapping[str, dict], number_of: int) -> Ends:
    """Return the images at both ends of a method's order, which do not overlap."""
    most = min(number_of, max(1, row["n"] // 2))

    def shown(items: Sequence[str]) -> list[tuple[EmbeddedImage, str]]:
        found = []
        for item in [item for item in items if item in own][:most]:
            value = number(own[item], row["measure"])
            caption = f"{'?' if value is None else format(value, row['spec'])} · {run.plain(item, 60)}"
            found.append((run.image(folder, own[item]["image"], f"{item}, {row['method']}", 160), caption))
        return found

    return Ends(row["method"], row["title"], shown(row["worst"]), shown(row.get("best", [])))
