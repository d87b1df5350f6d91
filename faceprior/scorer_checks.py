"""
What stage 2 reports on a scorer beside its accuracy: is its margin a probability, and does it look at faces?

Only the bad side of a published pair has been through a VAE, and it is a little softer. A scorer can order pairs by
that alone. The shortcut tests remove this trace, or put it on the good side, and measure whether the order stays.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from diffusers import AutoencoderKL
from PIL import Image

from faceprior.detect import AREA_LIMITS, area_bin
from faceprior.images import cv2, load_image
from faceprior.inpaint import cut_out, put_back, through_vae
from faceprior.metrics import fraction_interval, ranking_calibration
from faceprior.pairs import Change, FacePair

REPORT_FILE = "report.json"
SHORTCUT_PAIRS = 1000  # most pairs that the shortcut tests score, taken evenly from all
HISTOGRAM_BINS = 20
INPUT_SIDE = 224  # pixels of the network's input

Score = Callable[[list[FacePair], Change | None, Change | None], list[list[float]]]


def report_scores(good: list[float], bad: list[float]) -> dict[str, Any]:
    """Return the part of `report.json` that follows from the held-out scores: accuracy, calibration, histograms."""
    margins = np.subtract(good, bad)
    calibration = ranking_calibration(margins)
    edges = np.histogram_bin_edges([*good, *bad], HISTOGRAM_BINS)
    counts = {side: np.histogram(scores, edges)[0].tolist() for side, scores in (("good", good), ("bad", bad))}
    return {
        "pairs": len(margins),
        "accuracy": fraction_interval(margins > 0)._asdict(),
        "calibration": {
            "expected_error": calibration.expected_error,
            "bins": [b._asdict() for b in calibration.bins],
        },
        "histogram": {"edges": edges.tolist(), **counts},
    }


def accuracy_by_area(pairs: list[FacePair], correct: list[bool]) -> list[dict]:
    """Return the number of pairs and the fraction in correct order for each bin of the face-area ratio (Table 8)."""
    bins: list[list[bool]] = [[] for _ in AREA_LIMITS]
    for pair, value in zip(pairs, correct, strict=True):
        bins[area_bin(pair.area_ratio)].append(value)
    return [
        {"up_to": limit, "pairs": len(own), "accuracy": sum(own) / len(own) if own else None}
        for limit, own in zip(AREA_LIMITS, bins, strict=True)
    ]


def measure_shortcuts(score: Score, pairs: list[FacePair], vae: AutoencoderKL | None, vae_name: str) -> list[dict]:
    """Return the fraction of pairs in correct order when a trace that tells the sides apart is removed or on both.

    score: (pairs, change of the good image, change of the bad one) -> both sides' scores. Returns rows {test, share,
    low, high, n, note} with the 95% interval; share is None where it was not measured, and the note says why.
    """
    pairs = pairs[:: math.ceil(len(pairs) / SHORTCUT_PAIRS)]
    tests: list[tuple[str, Change | None, Change | None, str]] = [
        ("both as they are: good above bad", None, None, ""),
        ("good lightly blurred, above bad", light_blur, None, ""),
        ("both blurred alike, order kept", light_blur, light_blur, ""),
    ]
    through = "good through the VAE, above bad"
    if vae is not None:
        again = "; in these pairs it had been through one before" if any(pair.round_trip for pair in pairs) else ""
        tests.insert(1, (through, round_trip(vae), None, f"VAE: {vae_name}{again}"))
    rows = [_measure(score, pairs, *test) for test in tests]
    if vae is None:
        note = "not measured: `--vae` names a VAE, which should be that of the base behind the pairs"
        rows.insert(1, {"test": through, "share": None, "low": None, "high": None, "n": 0, "note": note})
    return rows


def describe(report: dict[str, Any]) -> list[str]:
    """Return the lines that stage 2 prints on a report."""
    lines = [
        f"  faces up to {row['up_to']:.1%} of the image: "
        + (f"{row['accuracy']:.1%} of {row['pairs']}" if row["pairs"] else "none held out")
        for row in report["accuracy_by_area"]
    ]
    lines.append(f"  calibration error of sigmoid(margin): {report['calibration']['expected_error']:.3f}")
    for row in report["shortcuts"]:
        result = row["note"] if row["share"] is None else f"{row['share']:.1%} of {row['n']}"
        lines.append(f"  {row['test']}: {result}")
    return lines


def _measure(
    score: Score, pairs: list[FacePair], test: str, good: Change | None, bad: Change | None, note: str
) -> dict:
    correct = np.greater(*score(pairs, good, bad))
    return {"test": test, **fraction_interval(correct)._asdict(), "n": len(pairs), "note": note}


def light_blur(image: Image.Image, pair: FacePair) -> Image.Image:
    """Blur by a Gaussian of one pixel of the network's input, or half a pixel of the image where that is more."""
    side = min(pair.box[2] - pair.box[0], pair.box[3] - pair.box[1])
    return Image.fromarray(cv2.GaussianBlur(np.asarray(image), (0, 0), max(0.5, side / INPUT_SIDE)))


def round_trip(vae: AutoencoderKL) -> Change:
    """Return the change that stage 1 makes with `round_trip`: the masked face encoded and decoded.

    A face that was inpainted in a crop goes through the VAE at the size that the VAE is trained for.
    """

    def change(image: Image.Image, pair: FacePair) -> Image.Image:
        mask, square = load_image(pair.mask).convert("L"), pair.crop and tuple(pair.crop)
        decoded = through_vae(vae, cut_out([image], [square], vae.config.sample_size))
        return put_back([image], decoded, [square], [mask])[0]

    return change
