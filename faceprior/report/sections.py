"""The sections of the report on pairs, scorer, portraits, tuning and restoration, one function each."""

import re
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from faceprior.images import as_array, find_images
from faceprior.report.parts import (
    Markup,
    Run,
    chips,
    figure,
    format_number,
    histogram,
    line_chart,
    missing,
    not_made,
    number,
    points,
    render,
    slider,
    table,
    tag,
)
from faceprior.report.scorer import scorer_checks

PAIRS, PORTRAITS, SAMPLES, PHOTOGRAPHS, REASONS = 8, 12, 8, 6, 12  # most that are shown of each


NUMBER = (int, float)


SCORES = "photographs/scores.jsonl"


SCORE_COMMAND = f"faceprior score photographs --json > {SCORES}"


RESTORE_COMMAND = "faceprior restore photographs -o restored"


FACTS = {
    "steps": "steps",
    "trained_parameters": "trained parameters",
    "training_pairs": "training pairs",
    "validation_pairs": "validation pairs",
    "pairs": "pairs",
    "portraits": "portraits",
    "faces": "faces",
}  # of done.json


Bins = list[tuple[float, str, float]]  # upper limit of the face-area ratio, text, noise factor


def spread(items: list, count: int) -> list:
    """Return `count` of the items, evenly over the list."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def reason_kind(reason: str) -> str:
    """Return what rejections for the same reason have in common: the words without measured numbers and file names."""
    named = re.search(r"\((\D+?):", reason)
    if named:
        return named.group(1)
    reason = re.sub(r"\S*/\S*|\S+\.(png|jpe?g|webp|tiff?|bmp|gif)\b", "the file", reason)
    return re.sub(r"\d[\d.,]*", "…", reason)[:120]


def _top(intro: Markup, beside: Markup | None = None) -> Markup:
    return tag("div", tag("div", intro), tag("div", beside), class_="grid two")


def _facts(run: Run, folder: str) -> Markup:
    done = run.read(f"{folder}/done.json")
    values = {name: number(done, key) for key, name in FACTS.items()}
    return chips({name: format_number(value) for name, value in values.items() if value is not None})


def _heading(name: str, shown: int, total: int, order: str = "evenly over all") -> Markup:
    return tag("h3", name if shown == total else f"{name}: {shown} of {total:,}, {order}")


def _prompt(run: Run, row: dict) -> Markup | None:
    prompt = run.plain(row.get("prompt") or "", 300)
    return tag("p", tag("span", "prompt ", class_="quiet"), prompt, class_="prompt") if prompt else None


def _reasons(run: Run, title: str, rows: list[dict], key: str) -> Markup | None:
    """Return how often each reason occurs, with one example in full."""
    if not rows:
        return None
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(reason_kind(str(row.get("reason") or "no reason given")), []).append(row)
    largest = sorted(groups.items(), key=lambda item: -len(item[1]))
    examples = [f"{own[0].get(key, '?')}: {own[0].get('reason')}" for _, own in largest[:REASONS]]
    cells = [
        (kind, len(own), run.plain(text, 200)) for (kind, own), text in zip(largest[:REASONS], examples, strict=True)
    ]
    if len(largest) > REASONS:
        cells.append(("other reasons", sum(len(own) for _, own in largest[REASONS:]), None))
    return render(tag("h3", title), table(["reason", "count", "for example"], cells, class_="stack"))


# Pairs


def write_pairs(run: Run, intro: Markup) -> Markup:
    """Rows of good | bad | mask from the smallest face to the largest, and what the filters rejected."""
    folder = "data/pairs"
    keys = {**dict.fromkeys(("id", "good", "bad", "mask"), str), "box": list, "area_ratio": NUMBER, "strength": NUMBER}
    pairs, rejected = run.rows(f"{folder}/manifest.jsonl", keys), run.rows(f"{folder}/rejected.jsonl")
    counts = {"pairs": len(pairs), "rejected": len(rejected)}
    report = f"{folder}/report.json"
    bins = area_bins(run)
    shown = spread(sorted(pairs, key=lambda pair: pair["area_ratio"]), PAIRS)
    cards = [run.attempt(f"{folder}/manifest.jsonl: {pair['id']}", _pair_card, run, pair, bins) for pair in shown]
    return render(
        _top(render(intro, chips(counts)), _bin_table(pairs, bins)),
        _heading("Pairs", len(shown), len(pairs), "from the smallest face to the largest"),
        tag("div", cards, class_="grid two"),
        run.attempt(report, _filter_table, run, run.read(report)),
        _reasons(run, "Why they were rejected", rejected, "id"),
    )


def area_bins(run: Run) -> Bins:
    """Return the bins of the face-area ratio that the pairs were made with; none if their settings do not tell."""
    config = run.read("data/pairs/config.yaml").get("01_make_pairs")
    config = config if isinstance(config, dict) else {}
    limits, factors = config.get("area_limits"), config.get("strengths", config.get("noise_factors"))
    if not (isinstance(limits, list) and isinstance(factors, list) and len(limits) == len(factors)):
        return []
    if not all(isinstance(value, int | float) for value in [*limits, *factors]):
        return []
    lows = [0, *limits[:-1]]
    texts = [f"{100 * low:.3g} to {100 * high:.3g}%" for low, high in zip(lows, limits, strict=True)]
    return list(zip(limits, texts, factors, strict=True))


def _bin_text(bins: Bins, ratio: float) -> str:
    place = bisect_left([limit for limit, _, _ in bins], ratio)
    return bins[place][1] if place < len(bins) else ""


def _bin_table(pairs: list[dict], bins: Bins) -> Markup | None:
    if not bins:
        return None
    own = {text: [p for p in pairs if _bin_text(bins, p["area_ratio"]) == text] for _, text, _ in bins}
    rows = []
    for _, text, factor in bins:  # a face that is worked on in a crop around it has a factor of another table
        used = sorted({pair["strength"] for pair in own[text]}) or [factor]
        rows.append((text, ", ".join(map(format_number, used)), len(own[text])))
    return table(["face / picture area", "noise factor", "pairs"], rows)


def _filter_table(run: Run, report: dict) -> Markup | None:
    """Return the filters in the order in which they run, with how many each of them rejected."""
    rows = [
        (f"{row['in']:,} {run.plain(row['of'])}", run.plain(name).replace("_", " "), f"{count:,}")
        for row in report.get("rounds", [])
        for name, count in row["rejected"].items()
    ]
    return render(tag("h3", "Filters"), table(["of", "filter", "rejected"], rows)) if rows else None


def _pair_card(run: Run, pair: dict, bins: Bins) -> Markup:
    columns = []
    for side in ("good", "bad", "mask"):
        whole = run.picture("data/pairs", pair[side], f"{side} picture of {pair['id']}")
        face = run.picture("data/pairs", pair[side], f"{side} picture of {pair['id']}, face", 256, pair["box"])
        columns.append(figure(render(whole, face), side))
    values = {"face": f"{100 * pair['area_ratio']:.2g}% of the area"}
    if inside := _bin_text(bins, pair["area_ratio"]):
        values["bin"] = inside
    values["noise factor"] = format_number(pair["strength"])
    if (change := number(pair, "difference")) is not None:
        values["mean change"] = f"{change:.0f} of 255"
    return tag("article", tag("div", columns, class_="row pair"), _prompt(run, pair), chips(values), class_="card")


# The scorer


def write_scorer(run: Run, intro: Markup) -> Markup:
    """Accuracy before and after training, curves, the validation scores, their checks and the real photographs."""
    folder = "checkpoints/scorer"
    rows = run.rows(f"{folder}/metrics.jsonl")
    losses = {"training": points(rows, "loss"), "validation": points(rows, "validation_loss")}
    accuracies = {"training": points(rows, "accuracy"), "validation": points(rows, "validation_accuracy")}
    charts = [
        line_chart("Ranking loss", losses, "step", "loss (nats)"),
        line_chart("Accuracy: good above bad", accuracies, "step", "share of pairs"),
    ]
    return render(
        intro,
        _accuracy(run.read(f"{folder}/done.json")),
        _facts(run, folder),
        tag("div", charts, class_="grid two"),
        _validation_scores(run),
        scorer_checks(run),
        scored_photographs(run),
    )


def _accuracy(done: dict) -> Markup | None:
    before, after, count = (number(done, key) for key in ("start_accuracy", "accuracy", "validation_pairs"))
    if before is None or after is None:
        return None
    pairs = "the validation pairs" if count is None else f"{format_number(count)} validation pairs"
    few = " So few pairs tell nothing yet." if count is not None and count < 30 else None
    told = (
        tag("b", f"{before:.0%}"),
        " before training and in ",
        tag("b", f"{after:.0%}"),
        " after it; guessing gives 50%.",
    )
    return tag("p", f"On {pairs} the good face scores above the bad one in ", told, few)


def _validation_scores(run: Run) -> Markup:
    rows = run.rows("checkpoints/scorer/scores.jsonl", {"good": NUMBER, "bad": NUMBER})
    title = tag("h3", "Validation scores")
    if not rows:
        return render(title, not_made("There are none yet", "python stages/02_train_scorer.py"))
    scores = {side: [row[side] for row in rows] for side in ("good", "bad")}
    above = sum(row["good"] > row["bad"] for row in rows)
    good, bad = (format_number(sum(values) / len(values)) for values in scores.values())
    text = f"The good face scores higher in {above:,} of {len(rows):,} pairs; mean scores: {good} (good), {bad} (bad)."
    chart = histogram("Scores of the validation pairs", scores, "score", "faces")
    by_bin = run.attempt("checkpoints/scorer/scores.jsonl", _accuracy_by_bin, rows, area_bins(run))
    return render(title, tag("div", chart, tag("div", tag("p", text), by_bin), class_="grid two"))


def _accuracy_by_bin(rows: list[dict], bins: Bins) -> Markup | None:
    cells = []
    for _, text, _ in bins:
        own = [row["good"] > row["bad"] for row in rows if _bin_text(bins, row["area_ratio"]) == text]
        cells.append((text, len(own), f"{sum(own) / len(own):.0%}" if own else "–"))
    return table(["face / picture area", "pairs", "good above bad"], cells) if cells else None


def scored_photographs(run: Run) -> Markup:
    """The photographs with the box and the score of every face drawn on."""
    title = tag("h3", "Every face in the real photographs")
    rows = run.rows(SCORES, {"file": str})[:PHOTOGRAPHS]
    if not rows:
        return render(title, not_made("No photograph was scored", SCORE_COMMAND))
    cards = [run.attempt(f"{SCORES}: {row['file']}", _scored_photograph, run, row) for row in rows]
    return render(title, tag("div", cards, class_="grid two"))


def _scored_photograph(run: Run, row: dict) -> Markup:
    name = Path(row["file"]).name
    if "error" in row:
        run.note(f"photographs/{name}", row["error"])
        return tag("article", tag("p", tag("b", name), f": {run.plain(row['error'])}"), class_="card")
    faces = _faces(run, row)
    image = run.load("photographs", name)
    marks = [mark for face in faces for mark in _box_marks(face, image.width)]
    overlay = tag("svg", marks, viewBox=f"0 0 {image.width} {image.height}", aria_hidden="true")
    count = "no face found" if not faces else f"{len(faces)} face{'s' if len(faces) > 1 else ''}"
    picture = tag("div", run.embed(image, f"{name}: {count}", 900), overlay, class_="boxes")
    caption = tag("p", tag("b", name), f": {count}", class_="prompt")
    return tag("article", picture, caption, _face_table(faces), class_="card")


def _faces(run: Run, row: dict) -> list[dict]:
    """Return the faces of a photograph whose box is four numbers; any other is noted."""
    faces = []
    for face in row.get("faces") or []:
        try:
            x0, y0, x1, y1 = (round(float(value), 1) for value in face["box"])
            faces.append({**face, "box": (x0, y0, x1, y1)})
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            run.note(f"{SCORES}: {row['file']}", f"a face without a box of four numbers ({error})")
    return faces


def _face_table(faces: list[dict]) -> Markup | None:
    cells = []
    for place, face in enumerate(faces, 1):
        x0, y0, x1, y1 = face["box"]
        values = [number(face, key) for key in ("score", "percentile", "confidence")]
        texts = ["–" if value is None else format_number(value) for value in values]
        cells.append((place, *texts, f"{x1 - x0:.0f}\u202f×\u202f{y1 - y0:.0f}\u202fpx"))
    return table(["face", "score", "percentile", "detector's confidence", "size"], cells) if cells else None


def _box_marks(face: dict, width: int) -> list[Markup]:
    x0, y0, x1, y1 = face["box"]
    size, score = round(width / 20, 1), number(face, "score")
    marks = [tag("rect", x=x0, y=y0, width=round(x1 - x0, 1), height=round(y1 - y0, 1))]
    if score is not None:
        y = y0 - size * 0.35 if y0 > size * 1.4 else y1 + size
        marks.append(tag("text", format_number(score), x=x0, y=round(y, 1), font_size=size))
    return marks


# Portraits


def write_portraits(run: Run, intro: Markup) -> Markup:
    """Accepted portraits with their captions, rejected ones with their reasons."""
    folder = "data/portraits"
    portraits = run.rows(f"{folder}/manifest.jsonl", {"id": str, "image": str, "caption": str})
    rejected = run.rows(f"{folder}/rejected.jsonl")
    intro = render(intro, chips({"accepted": len(portraits), "rejected": len(rejected)}))
    shown, refused = spread(portraits, PORTRAITS), spread(rejected, PORTRAITS)
    thumbs = [
        figure(run.picture(folder, row["image"], f"portrait {row['id']}", 256), run.plain(row["caption"], 300))
        for row in shown
    ]
    parts = [
        _top(intro, _reasons(run, "Why portraits were rejected", rejected, "photograph")),
        _heading("Accepted, with their captions", len(shown), len(portraits)),
        tag("div", thumbs, class_="grid thumbs"),
    ]
    if refused:
        cards = [run.attempt(f"{folder}/rejected.jsonl", _rejected_portrait, run, row) for row in refused]
        parts += [_heading("Rejected", len(refused), len(rejected)), tag("div", cards, class_="grid thumbs")]
    return render(parts)


def _rejected_portrait(run: Run, row: dict) -> Markup:
    name, thumbnail = run.plain(row.get("photograph", row.get("id", "?")), 80), row.get("thumbnail")
    caption = render(tag("b", run.plain(row.get("reason") or "no reason given", 160)), tag("br"), name)
    if thumbnail is None:
        return figure(tag("div", "no picture", class_="lost", role="img", aria_label=f"{name}: no picture"), caption)
    return figure(run.picture("data/portraits", thumbnail, f"rejected portrait {name}", 256), caption)


# Tuning


def write_tuning(folder: str, loss_label: str) -> Callable[[Run, Markup], Markup]:
    """Return the writer of a section on a tuned generator: its loss, and samples before and after."""

    def write(run: Run, intro: Markup) -> Markup:
        samples = run.rows(f"{folder}/samples.jsonl", {"before": str, "after": str})
        shown = samples[:SAMPLES]
        cards = [run.attempt(f"{folder}/samples.jsonl", _sample_card, run, folder, row) for row in shown]
        return render(
            _top(render(intro, _facts(run, folder)), _loss_chart(run, folder, loss_label)),
            _heading("Samples before and after tuning", len(shown), len(samples), "the first"),
            tag("div", cards, class_="grid two") if cards else missing("No samples were drawn."),
        )

    return write


def _loss_chart(run: Run, folder: str, label: str) -> Markup:
    losses = {"training": points(run.rows(f"{folder}/metrics.jsonl"), "loss")}
    return line_chart("Training loss", losses, "step", label)


def _sample_card(run: Run, folder: str, row: dict) -> Markup:
    seed = row.get("seed")
    pictures = [
        figure(run.picture(folder, row[side], f"seed {seed}, {side} tuning", 384), side) for side in ("before", "after")
    ]
    values = {} if seed is None else {"seed": seed}
    if (change := _mean_change(run, folder, row)) is not None:
        values["mean change"] = f"{change:.1f} of 255"
    return tag("article", tag("div", pictures, class_="row"), _prompt(run, row), chips(values), class_="card")


def _mean_change(run: Run, folder: str, row: dict) -> float | None:
    """Return the mean absolute difference of a sample before and after, 0 to 255; None if they cannot be compared."""
    try:
        before, after = (as_array(run.load(folder, row[side])).astype(np.float32) for side in ("before", "after"))
    except (OSError, ValueError):
        return None  # the picture was named when it was embedded
    return float(np.abs(after - before).mean()) if before.shape == after.shape else None


# Restoration


def write_restoration(run: Run, intro: Markup) -> Markup:
    """Samples clean | degraded | restored, and the real photographs before and after."""
    folder = "checkpoints/restorer"
    samples = run.rows(f"{folder}/samples.jsonl", dict.fromkeys(("clean", "degraded", "restored"), str))
    cards = [_restored_sample(run, folder, row, place) for place, row in enumerate(samples[:SAMPLES], 1)]
    return render(
        _top(render(intro, _facts(run, folder)), _loss_chart(run, folder, "noise prediction error (MSE)")),
        _heading("Samples", len(cards), len(samples), "the first"),
        tag("div", cards, class_="grid") if cards else missing("No samples were restored."),
        restored_photographs(run),
    )


def _restored_sample(run: Run, folder: str, row: dict, place: int) -> Markup:
    kinds = ("clean", "degraded", "restored")
    pictures = {kind: run.picture(folder, row[kind], f"sample {place}, {kind}", 384) for kind in kinds}
    both = slider(pictures["degraded"], pictures["restored"], kinds[1:], f"sample {place}")
    figures = [figure(picture, kind) for kind, picture in pictures.items()]
    return tag("article", tag("div", figures, both, class_="sample"), class_="card")


def restored_photographs(run: Run) -> Markup:
    """The real photographs under a slider, original and restored, with their largest face."""
    title, folder = tag("h3", "Real photographs, original and restored"), run.root / "photographs"
    try:
        names = [path.name for path in find_images(folder, recursive=False)]
    except (OSError, ValueError):  # no folder, or no picture in it
        names = []
    if not names:
        return render(title, not_made("There are no photographs", "make demo"))
    rows: dict[str, Any] = {Path(row["file"]).name: row for row in run.rows(SCORES, {"file": str})}
    shown = names[:PHOTOGRAPHS]
    cards = [run.attempt(f"photographs/{name}", _restored_photograph, run, name, rows.get(name, {})) for name in shown]
    return render(title, tag("div", cards, class_="grid two"))


def _restored_photograph(run: Run, name: str, row: dict) -> Markup:
    target = f"{Path(name).stem}.png"
    if not (run.root / "restored" / target).is_file():
        return not_made(f"{name} was not restored", RESTORE_COMMAND)
    sides = {"original": ("photographs", name), "restored": ("restored", target)}
    before, after = (run.picture(*place, f"{name}, {side}", 900) for side, place in sides.items())
    faces = sorted(_faces(run, row), key=lambda face: face["box"][0] - face["box"][2])[:1]
    crops = [
        figure(run.picture(*place, f"largest face in {name}, {side}", 300, face["box"]), f"largest face, {side}")
        for face in faces
        for side, place in sides.items()
    ]
    closer = tag("div", crops, class_="row") if crops else None
    caption = tag("p", tag("b", name), class_="prompt")
    return tag("article", slider(before, after, ("original", "restored"), name), caption, closer, class_="card")
