"""The scores of a benchmark folder by the metrics that can be measured on this machine: rows of scores/METRIC.jsonl.

In an image of several people the most frontal and representative face counts: `detect.representative_face`.
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faceprior.detect import Detector, Face, detect_faces, representative_face
from faceprior.evaluation.judges import Metric, Score, Weights, available_metrics
from faceprior.human_eval.files import Benchmark, BenchmarkError
from faceprior.images import ImageError, load_image
from faceprior.jsonl import append_row, read_rows, resume_rows

logger = logging.getLogger(__name__)


def measure_missing(benchmark: Benchmark, weights: Weights, detector: str, device: str) -> dict[str, str]:
    """Measure what has no file in scores/ and can be measured here; returns metric -> why the others cannot."""
    reasons = {"FQA": "it is not measured here, but by the package modelscope (`pip install modelscope`)"}
    find_face = face_finder(detector)
    for name, make_metric in available_metrics(weights, detector, device).items():
        try:
            measure(benchmark, make_metric(), find_face)
        except BenchmarkError:
            raise
        except Exception as error:  # whatever fails in one metric's library, the others have their rows
            reasons[name] = str(error) or type(error).__name__
    return reasons


def measure(benchmark: Benchmark, metric: Metric, find_face: Callable[[Path], Face | None]) -> None:
    """Score every image of a benchmark into scores/NAME.jsonl; after a stop, the same call resumes.

    Rows are {"id", "model", "score", "by"}; the score is None without a face, or where the image cannot be read. They
    are collected in scores/.NAME.jsonl until the last one is written. A file from elsewhere is not touched.

    Raises BenchmarkError for rows of other weights, and whatever the metric itself raises.
    """
    from tqdm.auto import tqdm

    # ---- the images without a score
    path = benchmark.folder / "scores" / f"{metric.name}.jsonl"
    part = path.with_name(f".{path.name}")
    if path.with_suffix(".csv").exists() or (path.exists() and not _is_measured(path)):
        return
    existing = path if path.exists() else part
    done = {(row["id"], row["model"]) for row in _rows_by(existing, metric)}
    left = [
        (name, model, file)
        for model, files in benchmark.images.items()
        for name, file in files.items()
        if (name, model) not in done
    ]
    if not left:
        existing.replace(path)
        return

    # ---- score them
    score = metric.load()
    if existing == path:
        path.replace(part)
    for name, model, file in tqdm(left, desc=metric.name, unit="image", disable=None):
        value = _score(metric, score, file, benchmark.prompts[name], find_face)
        append_row(part, {"id": name, "model": model, "score": value, "by": metric.by})
    part.replace(path)


def _is_measured(path: Path) -> bool:
    return any("by" in row for row in read_rows(path)[0][:1])


def _rows_by(path: Path, metric: Metric) -> list[dict[str, Any]]:
    rows = read_rows(path)[0] if path.is_file() else []
    other = next((row.get("by") for row in rows if row.get("by") != metric.by), None)
    if other is not None:
        raise BenchmarkError(
            f"{path} was measured by {other}, but now {metric.name} is {metric.by}: remove the file to measure"
            " again, or give the weights and the detector of the file"
        )
    return resume_rows(path)  # cuts off a torn line, so only once the file is known to be ours


def _score(
    metric: Metric, score: Score, file: Path, prompt: str, find_face: Callable[[Path], Face | None]
) -> float | None:
    try:
        face = find_face(file) if metric.needs_face else None
        return None if metric.needs_face and face is None else score(load_image(file), prompt, face)
    except ImageError as error:
        logger.warning("%s: no score: %s", metric.name, error)
        return None


def face_finder(detector: str | Detector) -> Callable[[Path], Face | None]:
    """Return the function file -> its representative face, or None; each file is searched once for all metrics."""

    @functools.cache
    def find(file: Path) -> Face | None:
        image = load_image(file)
        return representative_face(detect_faces(image, detector), image.size)

    return find
