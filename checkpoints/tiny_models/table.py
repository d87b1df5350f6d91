"""What the figures are made of: two more estimates with a 95% interval, a row with its aim, and the page of tables."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import stats

from faceprior.tables import EMPTY, Estimate, markdown_table, number_text

Z = float(stats.norm.ppf(0.975))
HEAD = ("figure", "value (95% interval)", "n", "aim", "met?", "note")
AIMS = {">=": "low", ">": "low", "<=": "high", "<": "high"}  # sign of an aim -> the end of the interval that decides


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's correlation, [-1, 1]; 0 where one side is constant and orders nothing."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(stats.spearmanr(a, b).statistic)


def correlation_estimate(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Return Spearman's correlation, its interval by Fisher's z with the variance of Bonett and Wright (2000)."""
    n = len(a)
    if n < 5:
        return too_few(n, 5)
    value = rank_correlation(a, b)
    if abs(value) == 1:
        return Estimate(value, value, value, n)
    z, half = math.atanh(value), Z * math.sqrt((1 + value**2 / 2) / (n - 3))
    return Estimate(value, math.tanh(z - half), math.tanh(z + half), n)


def jackknife_estimate(statistic: Callable[[np.ndarray], float], n: int, groups: int = 10) -> Estimate:
    """Return the statistic of n items, its interval by leaving out one group of them after the other.

    statistic: takes the numbers of the items that count, of 0 .. n - 1. For values that are no mean, such as a ratio or
    a FID.
    """
    if n < 4:
        return too_few(n, 4)
    items, groups = np.arange(n), min(groups, n // 2)
    value = float(statistic(items))
    without = np.array([statistic(items[items % groups != group]) for group in range(groups)])
    error = math.sqrt((groups - 1) / groups * ((without - without.mean()) ** 2).sum())
    half = float(stats.t.ppf(0.975, groups - 1)) * error
    return Estimate(value, value - half, value + half, n)


def too_few(n: int, least: int) -> Estimate:
    return Estimate(reason=f"{n} usable images are too few, {least} are needed")


def make_row(
    figure: str,
    estimate: Estimate,
    aim: tuple[str, float] | None = None,
    unit: str = "",
    note: str = "",
    p_below: float | None = None,
) -> dict[str, Any]:
    """Return one row of the table.

    aim: ">=", ">", "<=" or "<", and the value; p_below: an upper limit of the p value, beside the aim. unit: "%" for
    fractions. `met` tells whether the whole interval meets the aim, None without an aim or a value.
    """
    estimate = replace(estimate, note="; ".join(filter(None, (note, estimate.note))))
    row = {"figure": figure, "unit": unit, "aim": aim_text(aim, unit, p_below), **estimate.to_row()}
    return {**row, "met": is_met(estimate, aim, p_below)}


def is_met(estimate: Estimate, aim: tuple[str, float] | None, p_below: float | None = None) -> bool | None:
    """Tell whether the whole 95% interval meets the aim, and the p value its limit; None where there is no answer."""
    if aim is None or estimate.value is None:
        return None
    sign, bound = aim
    end = getattr(estimate, AIMS[sign])
    met = {">=": end >= bound, ">": end > bound, "<=": end <= bound, "<": end < bound}[sign]
    return met and (p_below is None or estimate.p_value < p_below)


def aim_text(aim: tuple[str, float] | None, unit: str, p_below: float | None) -> str:
    if aim is None:
        return ""
    text = f"{aim[0]} {_number(aim[1], unit)}"
    return text if p_below is None else f"{text}, p < {p_below}"


def markdown(groups: dict[str, dict[str, Any]], command: str, machine: str) -> str:
    """Return the page: what was measured and where, and one table for each group.

    groups: as figures.py keeps them, {"title", "key", "cells", "seconds"} each.
    """
    lines = [
        "# Figures of the tiny models",
        "",
        "Drawn people only, measured by tiny models: these numbers show that the methods do here what they are meant to"
        " do. They compare with each other, and with no published numbers. All images are from test seeds, which no"
        " training saw.",
        "",
        f"Measured by `{command}` on {machine}. An aim is met only if the whole 95% interval meets it; a missed aim"
        " stays in the table as it was measured.",
    ]
    for group in groups.values():
        lines += ["", f"## {group['title']}", ""]
        lines += [markdown_table(HEAD, map(columns, group["cells"]))]
        settings = ", ".join(f"{name} {value}" for name, value in group["key"]["settings"].items())
        lines += [f"Settings: {settings}. Measured in {group['seconds']:.0f} s."]
    return "\n".join(lines) + "\n"


def columns(row: dict[str, Any]) -> tuple[str, ...]:
    """Return a row's texts in the order of HEAD."""
    value, n = EMPTY, EMPTY
    if row["value"] is not None:
        value, n = _number(row["value"], row["unit"]), str(row["n"])
        if row["low"] is not None and row["high"] is not None:
            value += f" ({_number(row['low'], row['unit'])} to {_number(row['high'], row['unit'])})"
    met = {True: "yes", False: "no", None: ""}[row["met"]]
    return row["figure"], value, n, row["aim"], met, row["note"]


def _number(value: float, unit: str) -> str:
    if unit == "%":
        return number_text(value, ".1%")
    return number_text(value, ".3g" if abs(value) < 100 else ".1f", unit)
