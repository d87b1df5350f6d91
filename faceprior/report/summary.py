"""Numbers, durations and long lists in few words."""

import re
from typing import Any

from faceprior.report.run import REASON, Run, number

REASONS = 12  # most that are listed

FACTS = {
    "steps": "steps",
    "trained_parameters": "trained parameters",
    "training_pairs": "training pairs",
    "validation_pairs": "validation pairs",
    "pairs": "pairs",
    "portraits": "portraits",
    "faces": "faces",
    "best_step": "kept step",
}  # key of done.json -> its name


def format_number(value: float) -> str:
    """Return a number with four significant digits, whole ones with separators of thousands."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Return a duration as people say it: 7.2 s, 1 min 12 s, 2 h 5 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def spread(items: list, count: int) -> list:
    """Return `count` of the items, evenly over the list."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def heading(name: str, shown: list, total: list, order: str = "evenly over all") -> str:
    """Return the heading of a list of which a part may be shown."""
    return name if len(shown) == len(total) else f"{name}: {len(shown)} of {len(total):,}, {order}"


def reason_kind(reason: str) -> str:
    """Return what rejections for the same reason have in common: the words without measured numbers and file names."""
    named = re.search(r"\((\D+?):", reason)
    if named:
        return named.group(1)
    reason = re.sub(r"\S*/\S*|\S+\.(png|jpe?g|webp|tiff?|bmp|gif)\b", "the file", reason)
    return re.sub(r"\d[\d.,]*", "…", reason)[:120]


def reasons(run: Run, rejected: list[dict[str, Any]], key: str) -> list[tuple]:
    """Return (reason, count, example) from the most frequent reason on. key: of a rejected row's name."""
    groups: dict[str, list[dict]] = {}
    for row in rejected:
        groups.setdefault(reason_kind(str(row.get("reason") or "no reason given")), []).append(row)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    listed, others = ordered[:REASONS], ordered[REASONS:]
    found: list[tuple] = [
        (kind, len(own), run.plain(f"{own[0].get(key, '?')}: {own[0].get('reason')}", REASON)) for kind, own in listed
    ]
    if others:
        found.append(("other reasons", sum(len(own) for _, own in others), None))
    return found


def facts(run: Run, folder: str) -> dict[str, str]:
    """Return what a stage wrote to done.json: name -> number."""
    done = run.read(f"{folder}/done.json")
    values = {name: number(done, key) for key, name in FACTS.items()}
    return {name: format_number(value) for name, value in values.items() if value is not None}
