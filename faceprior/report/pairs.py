"""Pairs: good, bad and mask from the smallest face to the largest, and what the filters rejected."""

from bisect import bisect_left
from typing import Any

from faceprior.report.run import NUMBER, STAGES, Run, number
from faceprior.report.summary import format_number, heading, reasons, spread

FOLDER = STAGES["01_make_pairs"]
PAIRS = 8  # most that are shown
SIDES = ("good", "bad", "mask")

Bins = list[tuple[float, str, float]]  # upper limit of the face-area ratio, text, strength


def describe(run: Run) -> dict[str, Any]:
    keys = {**dict.fromkeys(("id", *SIDES), str), "box": list, "area_ratio": NUMBER, "strength": NUMBER}
    pairs, rejected = run.rows(f"{FOLDER}/manifest.jsonl", keys), run.rows(f"{FOLDER}/rejected.jsonl")
    bins = area_bins(run)
    shown = spread(sorted(pairs, key=lambda pair: pair["area_ratio"]), PAIRS)
    report = f"{FOLDER}/report.json"
    return {
        "counts": {"pairs": len(pairs), "rejected": len(rejected)},
        "bins": _bin_rows(pairs, bins),
        "heading": heading("Pairs", shown, pairs, "from the smallest face to the largest"),
        "pairs": [run.attempt(f"{FOLDER}/manifest.jsonl: {pair['id']}", _pair, run, pair, bins) for pair in shown],
        "filters": run.attempt(report, _filter_rows, run, run.read(report)),
        "reasons": reasons(run, rejected, "id"),
    }


def area_bins(run: Run) -> Bins:
    """Return the bins of the face-area ratio that the pairs were made with; none if their settings lack them."""
    config = run.read(f"{FOLDER}/config.yaml").get("01_make_pairs")
    config = config if isinstance(config, dict) else {}
    limits, strengths = config.get("area_limits"), config.get("strengths", config.get("noise_factors"))
    if not (isinstance(limits, list) and isinstance(strengths, list) and len(limits) == len(strengths)):
        return []
    if not all(isinstance(value, int | float) for value in [*limits, *strengths]):
        return []
    lows = [0, *limits[:-1]]
    texts = [f"{100 * low:.3g} to {100 * high:.3g}%" for low, high in zip(lows, limits, strict=True)]
    return list(zip(limits, texts, strengths, strict=True))


def bin_text(bins: Bins, ratio: float) -> str:
    place = bisect_left([limit for limit, _, _ in bins], ratio)
    return bins[place][1] if place < len(bins) else ""


def _bin_rows(pairs: list[dict], bins: Bins) -> list[tuple]:
    rows = []
    for _, text, _ in bins:
        own = [pair for pair in pairs if bin_text(bins, pair["area_ratio"]) == text]
        # those used: a face that is inpainted in a crop around it has a strength of another table
        used = sorted({pair["strength"] for pair in own})
        rows.append((text, ", ".join(map(format_number, used)) or "–", len(own)))
    return rows


def _filter_rows(run: Run, report: dict) -> list[tuple]:
    """Return the filters in the order in which they run, with how many each of them rejected."""
    return [
        (f"{row['in']:,} {run.plain(row['of'])}", run.plain(name).replace("_", " "), f"{count:,}")
        for row in report.get("rounds", [])
        for name, count in row["rejected"].items()
    ]


def _pair(run: Run, pair: dict, bins: Bins) -> dict[str, Any]:
    images = {}
    for side in SIDES:
        alt = f"{side} image of {pair['id']}"
        whole = run.image(FOLDER, pair[side], alt)
        images[side] = whole, run.image(FOLDER, pair[side], f"{alt}, face", 256, pair["box"])
    facts = {"face": f"{100 * pair['area_ratio']:.2g}% of the area"}
    if inside := bin_text(bins, pair["area_ratio"]):
        facts["bin"] = inside
    facts["strength"] = format_number(pair["strength"])
    if (change := number(pair, "difference")) is not None:
        facts["mean change"] = f"{change:.0f} of 255"
    return {"images": images, "prompt": run.plain(pair.get("prompt") or "", 300), "facts": facts}
