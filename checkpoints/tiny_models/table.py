"""What the figures are made of: an estimate with its 95% interval, a row of the table, and the table."""

import math
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from faceprior.metrics import mean_interval, paired_test

Z = 1.959964  # the normal distribution's quantile of 97.5%
HEAD = ("figure", "value (95% interval)", "n", "aim", "met?", "note")


class Missing(Exception):
    """A figure cannot be measured here; the message says what is missing and the command that makes it."""


class Estimate(NamedTuple):
    """A value, its 95% interval (infinite where one value says nothing of it), and of how many items."""

    value: float
    low: float
    high: float
    n: int


def mean_of(values: Sequence[float]) -> Estimate:
    """The mean and its interval by Student's t."""
    mean, half = mean_interval(_required(values, 1))
    return Estimate(mean, mean - half, mean + half, len(values))


def share_of(right: Sequence[bool]) -> Estimate:
    """A share and its interval by Wilson (1927): the shares that are within Z of their own deviation."""
    n = len(_required(right, 1))
    share = float(np.mean(right))
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return Estimate(share, max(middle - half, 0.0), min(middle + half, 1.0), n)


def difference_of(a: Sequence[float], b: Sequence[float]) -> tuple[Estimate, float]:
    """The mean of a - b over the same items, and the two-sided p value of the paired t test."""
    _required(a, 2)
    test = paired_test(a, b)
    mean, half = test.mean_difference, test.half_width
    return Estimate(mean, mean - half, mean + half, test.n), test.p_value


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's correlation, ties sharing their mean rank; 0 where one side is constant and orders nothing."""
    from scipy.stats import rankdata

    ranks = [rankdata(values) for values in (a, b)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def correlation_of(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Spearman's correlation, its interval by Fisher's z with the variance of Bonett and Wright (2000)."""
    n, value = len(_required(a, 5)), rank_correlation(a, b)
    if abs(value) == 1:
        return Estimate(value, value, value, n)
    half = Z * math.sqrt((1 + value**2 / 2) / (n - 3))
    return Estimate(value, math.tanh(math.atanh(value) - half), math.tanh(math.atanh(value) + half), n)


def jackknife(statistic: Callable[[np.ndarray], float], n: int, groups: int = 10) -> Estimate:
    """The statistic of the items 0 .. n - 1, its interval by leaving out one group of them after the other.

    statistic: takes the numbers of the items that count. For values that are no mean, such as a ratio or a FID.
    """
    from scipy import stats

    everything = np.arange(len(_required(range(n), 4)))
    groups = min(groups, n // 2)
    value = statistic(everything)
    left_out = np.array([statistic(everything[everything % groups != group]) for group in range(groups)])
    error = math.sqrt((groups - 1) / groups * ((left_out - left_out.mean()) ** 2).sum())
    half = float(stats.t.ppf(0.975, groups - 1)) * error
    return Estimate(float(value), float(value - half), float(value + half), n)


def _required(values: Sequence, least: int) -> Sequence:
    if len(values) < least:
        raise Missing(f"{len(values)} usable pictures are too few, {least} are needed")
    return values


def cell(
    figure: str,
    measure: Callable[[], Estimate | tuple[Estimate, float]],
    aim: tuple[str, float] | None = None,
    unit: str = "",
    note: str = "",
    p_below: float | None = None,
) -> dict[str, Any]:
    """Return one row of the table.

    measure: gives an estimate, or an estimate and a p value; where it raises Missing, the row says so. aim: ">=", ">",
    "<=" or "<", and the value; p_below: what the p value is to be below, beside the aim. unit: "%" for shares.
    """
    row = {"figure": figure, "unit": unit, "aim": aim_text(aim, unit, p_below), "note": note}
    try:
        found = measure()
    except Missing as missing:
        return not_measured(row, str(missing))
    estimate, p_value = found if isinstance(found[0], Estimate) else (found, None)
    met = None if aim is None else compare(estimate.value, *aim)
    if p_value is not None:
        met = met if p_below is None or met is None else met and p_value < p_below
        row["note"] = "; ".join(filter(None, (note, f"paired t test, p = {p_value:.2g}")))
    numbers = {key: number if math.isfinite(number) else None for key, number in estimate._asdict().items()}
    return {**row, **numbers, "met": met}


def compare(value: float, sign: str, bound: float) -> bool:
    return {">=": value >= bound, ">": value > bound, "<=": value <= bound, "<": value < bound}[sign]


def aim_text(aim: tuple[str, float] | None, unit: str, p_below: float | None) -> str:
    if aim is None:
        return ""
    text = f"{aim[0]} {_number(aim[1], unit)}"
    return text if p_below is None else f"{text}, p < {p_below}"


def not_measured(row: dict[str, Any], reason: str) -> dict[str, Any]:
    """Return the row of a figure that has no value, with the reason in its note."""
    empty = {"value": None, "low": None, "high": None, "n": 0, "met": None}
    note = "; ".join(filter(None, (f"not measured: {reason}", row.get("note"))))
    return {"unit": "", "aim": "", **row, **empty, "note": note}


def markdown(groups: dict[str, dict[str, Any]], command: str) -> str:
    """Return the page: what was measured and where, and one table for each group.

    groups: as figures.py keeps them, {"title", "key", "cells", "seconds"} each.
    """
    lines = [
        "# Figures of the tiny models",
        "",
        "Drawn people only, told and judged by tiny models: these numbers show that the methods do here what they are"
        " for. They compare with each other, and with no published ones. All pictures are from test seeds, which no"
        " training saw.",
        "",
        f"Measured by `{command}` on {machine()}. An aim that is missed stands as it was measured.",
    ]
    for group in groups.values():
        lines += ["", f"## {group['title']}", ""]
        lines += [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
        lines += [f"| {' | '.join(columns(row))} |" for row in group["cells"]]
        settings = ", ".join(f"{name} {value}" for name, value in group["key"]["settings"].items())
        lines += ["", f"Settings: {settings}. Measured in {group['seconds']:.0f} s."]
    return "\n".join(lines) + "\n"


def columns(row: dict[str, Any]) -> tuple[str, ...]:
    """Return a row's texts in the order of HEAD."""
    met = {True: "yes", False: "no", None: ""}[row["met"]]
    note = row["note"].replace("|", "/").replace("\n", " ")
    if row["value"] is None:
        return row["figure"], "-", "-", row["aim"], met, note
    value = _number(row["value"], row["unit"])
    if row["low"] is not None and row["high"] is not None:
        value += f" ({_number(row['low'], row['unit'])} to {_number(row['high'], row['unit'])})"
    return row["figure"], value, str(row["n"]), row["aim"], met, note


def _number(value: float, unit: str) -> str:
    if unit == "%":
        return f"{100 * value:.1f}%"
    text = f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"
    return f"{text} {unit}".rstrip()


def machine() -> str:
    """Return one line about where this was measured: processor, cores in use, graphics card, torch."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = next(iter(names), platform.processor() or platform.machine())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    card = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    used = f"{cores} of {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{processor}, {used}{card}, torch {torch.__version__}"
