"""Mean, median, 95% interval and paired test of what was measured of a method: a row of results.json each."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from faceprior.evaluation.measures import Measure
from faceprior.metrics import fraction_interval, mean_interval, paired_test
from faceprior.tables import NOT_MEASURED

RESAMPLES = 2000
WORST = 20  # items of each end that a row names
HOW = {  # protocol -> how its intervals and tests are made
    "alignment": [f"intervals: 95%, bootstrap over triplets, {RESAMPLES} resamples; of shares Wilson's"],
    "ab": [
        f"intervals: 95%, bootstrap over people and faces, {RESAMPLES} resamples; Wilson's if all answers are alike"
    ],
}
HOW |= dict.fromkeys(
    ("restoration", "generation"),
    [
        f"intervals: 95%, of a mean by the bootstrap over images (BCa, {RESAMPLES} resamples; too narrow below ten"
        " images), of a fraction by Wilson, of FID and KID by what each image adds to them",
        "p: Student's paired t test against the first method on the items of both, not corrected for several tests",
    ],
)
SMALL_SET = 2048  # images below which FID is biased upwards so much that KID is the better choice


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float] | None:
    """Return the 95% interval of the mean over items by the bias-corrected and accelerated bootstrap (BCa).

    Efron 1987; scipy.stats.bootstrap with RESAMPLES resamples. None for fewer than two values; equal values give both
    ends that value.
    """
    from scipy import stats

    numbers = np.asarray(values, dtype=np.float64)
    if len(numbers) < 2:
        return None
    if np.ptp(numbers) == 0:
        return float(numbers[0]), float(numbers[0])
    found = stats.bootstrap(
        (numbers,), np.mean, n_resamples=RESAMPLES, batch=max(1, 2_000_000 // len(numbers)), vectorized=True,
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    low, high = float(found.low), float(found.high)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def figure(
    measure: Measure, values: Mapping[str, float | None], baseline: Mapping[str, float | None] | None = None
) -> dict[str, Any]:
    """Return the numbers of a method: value (mean), low, high, median, n, and the ends of its order.

    The interval is that of `interval`; of a fraction, whose values are 0 or 1, Wilson's: 8 of 8 are not surely all.
    values: item -> value; None where the image has none. baseline: the values of the first method, to which this one
    is compared on the items that both have: difference (mean of this - first), diff_low, diff_high, p_value, pairs.
    """
    known = {item: value for item, value in values.items() if value is not None}
    row: dict[str, Any] = {"n": len(known)}
    numbers = list(known.values())
    is_fraction = measure.spec.endswith("%")
    notes = []
    without = len(values) - len(known)
    if measure.is_infinite and without:
        notes.append(f"{without} of {len(values)} equal the reference: infinite, not in the mean")
        if not known:
            row |= {"n": len(values), "is_infinite": True}
    elif without:
        notes.append(f"{without} of {len(values)} images without a value, such as those without a face")
    if numbers:
        low, high = (fraction_interval(numbers)[1:] if is_fraction else interval(numbers)) or (None, None)
        row |= {"value": float(np.mean(numbers)), "low": low, "high": high, "median": float(np.median(numbers))}
        order = sorted(known, key=lambda item: (known[item], item), reverse=measure.better == "lower")
        row |= {"worst": order[:WORST], "best": order[::-1][:WORST]}
    row["note"] = "; ".join(notes)
    if baseline is not None:
        row |= _compared(known, baseline)
    return row


def _compared(known: Mapping[str, float], baseline: Mapping[str, float | None]) -> dict[str, Any]:
    """Compare the items that both have, by Student's paired t test and the bootstrap of the differences."""
    pairs = [(value, baseline[item]) for item, value in known.items() if baseline.get(item) is not None]
    if len(pairs) < 2:
        return {}
    own, first = zip(*pairs, strict=True)
    low, high = interval([a - b for a, b in pairs]) or (None, None)
    test = paired_test(own, first)
    return {
        "difference": test.mean_difference, "diff_low": low, "diff_high": high, "p_value": test.p_value,
        "pairs": test.n,
    }  # fmt: skip


def common_means(values: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Return each method's mean over the items that all methods have, {method: {common, common_n}}.

    values: method -> item -> value. {} where all have the same items: then the means are comparable as they are.
    """
    items = [frozenset(own) for own in values.values()]
    shared = frozenset.intersection(*items) if items else frozenset()
    if not shared or set(items) == {shared}:
        return {}
    return {
        name: {"common": float(np.mean([own[item] for item in sorted(shared)])), "common_n": len(shared)}
        for name, own in values.items()
    }


def set_figure(
    measured: Mapping[str, Any] | None, reference: str, baseline: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the number of a set of images, with the interval and the paired test that its images' influences give.

    measured: a row of sets.jsonl. baseline: that of the first method, to which this one is compared if it has the same
    items. No bootstrap: a resampled set has repeated images, and so another bias.
    """
    if measured is None:
        return {"n": 0, "note": NOT_MEASURED + "fewer than two images, or no number came out"}
    few = min(measured["n"], measured["references"])
    note = f"reference: {reference} (n = {measured['references']}), which the interval and the test take as it is"
    note += f"; standard deviation over subsets {measured['std']:.3g}" if "std" in measured else ""
    is_fid = measured["key"].startswith("fid")
    is_biased = few < SMALL_SET and is_fid
    note += f"; fewer than {SMALL_SET} images, which biases FID upwards: compare KID" if is_biased else ""
    influence = measured["influence"]
    low, high = _around(measured["value"], list(influence.values()))
    row = {"n": measured["n"], "value": measured["value"], "low": max(0.0, low) if is_fid else low, "high": high}
    row["note"] = note
    if baseline is not None and baseline["influence"].keys() == influence.keys():
        own = [influence[item] - baseline["influence"][item] for item in influence]
        difference = measured["value"] - baseline["value"]
        low, high = _around(difference, own)
        p_value = _p_value(difference, own)
        row |= {"difference": difference, "diff_low": low, "diff_high": high, "p_value": p_value, "pairs": len(own)}
    return row


def _around(value: float, influence: Sequence[float]) -> tuple[float, float]:
    """Return the 95% interval of a number of a set, by Student's t and the standard error of the mean influence."""
    half_width = mean_interval(influence).half_width
    return value - half_width, value + half_width


def _p_value(difference: float, influence: Sequence[float]) -> float:
    """The two-sided p value of a difference of two sets' numbers, as `metrics.paired_test` of their influences."""
    from scipy import stats

    error = float(np.std(influence, ddof=1)) / math.sqrt(len(influence))
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    return float(2 * stats.t.sf(abs(difference) / error, len(influence) - 1))


def not_measured(reason: str) -> dict[str, Any]:
    return {"n": 0, "note": NOT_MEASURED + reason}
