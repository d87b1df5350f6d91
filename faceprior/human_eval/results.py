"""The tables of a benchmark folder as rows of stage 7's results: (method, measure, numbers)."""

from collections.abc import Collection, Iterator
from typing import Any

from faceprior.evaluation.figures import interval
from faceprior.evaluation.measures import Measure
from faceprior.human_eval.tables import Tables
from faceprior.metrics import fraction_interval
from faceprior.tables import NOT_MEASURED

SHARES = {"score_1": "share of score 1", "score_2": "share of score 2", "score_3": "share of score 3"}
Row = tuple[str, Measure, dict[str, Any]]


def table_rows(tables: Tables, columns: Collection[str]) -> Iterator[Row]:
    """Yield the numbers of Tables 1, 2 and 4 whose columns are wanted.

    columns: keys as in Face Score's published tables: score_1, score_2, score_3 and average of a model; accuracy,
    pearson, median_MODEL and std_MODEL of a metric, the last two of whatever models were ranked.
    """
    families = {key.partition("_")[0] for key in columns}
    rows = [*_of_models(tables), *_of_metrics(tables)]
    yield from (row for row in rows if row[1].key.partition("_")[0] in families)


def _of_models(tables: Tables) -> Iterator[Row]:
    n = tables.triplets
    for model in tables.table_1:
        counts = {key: round(getattr(model, key) * n) for key in SHARES}
        for key, title in SHARES.items():
            _, low, high = fraction_interval([True] * counts[key] + [False] * (n - counts[key]))
            numbers = {"value": getattr(model, key), "low": low, "high": high, "n": n}
            yield model.model, Measure(key, title, None, "", spec=".2%"), numbers
        labels = [label for label, key in enumerate(SHARES, 1) for _ in range(counts[key])]
        numbers = {"value": model.average, "n": n} | _ends(interval(labels))
        yield model.model, Measure("average", "average score", None, spec=".4f"), numbers


def _of_metrics(tables: Tables) -> Iterator[Row]:
    for accurate, statistics in zip(tables.table_2, tables.table_4, strict=True):
        name = accurate.metric
        note = accurate.note if accurate.accuracy is not None else NOT_MEASURED + accurate.note
        numbers = {"value": accurate.accuracy, "low": accurate.low, "high": accurate.high}
        yield name, Measure("accuracy", "accuracy", None, spec=".2%"), numbers | {"n": accurate.pairs, "note": note}
        numbers = {"value": statistics.pearson, "n": statistics.images, "note": note} | _ends(statistics.interval)
        yield name, Measure("pearson", "Pearson correlation", None, spec=".4f"), numbers
        for spread in statistics.models:
            about = {"n": spread.images, "note": note}
            median = Measure(f"median_{spread.model}", f"median, {spread.model}", None, "", spec=".4f")
            deviation = Measure(f"std_{spread.model}", f"standard deviation, {spread.model}", None, "", spec=".4f")
            yield name, median, {"value": spread.median} | about | _ends(spread.median_interval)
            yield name, deviation, {"value": spread.std} | about | _ends(spread.std_interval)


def _ends(ends: tuple[float, float] | None) -> dict[str, float | None]:
    return dict(zip(("low", "high"), ends or (None, None), strict=True))
