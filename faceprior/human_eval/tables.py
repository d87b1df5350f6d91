"""Tables 1 to 4 of Face Score (arXiv 2406.17100, 4.2 and 4.3) for a benchmark folder that people ranked, and the mean
ranks of AuthFace's Table 3 (arXiv 2410.09864).

People order the images that three models drew for each prompt; their votes become one label per image, and every metric
is asked how often it orders two images of a triplet as the labels do. Fractions and accuracies lie in [0, 1]; the
Markdown prints them as percentages. A metric without a file in scores/ has a row with the reason in place of numbers.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from faceprior.evaluation.tables import published_rows
from faceprior.files import atomic_write
from faceprior.human_eval.agreement import (
    LABELS,
    RESAMPLES,
    MeanRank,
    MetricAccuracy,
    MetricStatistics,
    ModelMean,
    ModelSpread,
    ScoreFractions,
    agreement,
    majority_vote,
    mean_ranks,
    metric_accuracy,
    metric_statistics,
    model_mean,
    score_fractions,
    win_rates,
)
from faceprior.human_eval.files import Benchmark, BenchmarkError, Scores, read_benchmark, read_rankings, read_scores
from faceprior.tables import EMPTY, Estimate, interval_text, markdown_table, markdown_text, number_text

# The paper's metrics in its order, then others of today. LocalX is X on the face with the prompt "A face" (4.3).
METRICS = {
    "IR": "ImageReward on the whole image and its prompt",
    "ASP": "the LAION aesthetic predictor on the whole image",
    "FQA": "ModelScope's `cv_manual_face-quality-assessment_fqa` on the face",
    "LocalIR": "ImageReward on the face",
    "HPS": "HPS v1 on the whole image and its prompt",
    "LocalHPS": "HPS v1 on the face",
    "FS": "Face Score, on the face",
    "HPSv2": "HPS v2 on the whole image and its prompt",
    "topiq_nr-face": "pyiqa's face quality `topiq_nr-face` on the face",
}


@dataclass(frozen=True)
class Tables:
    """The tables of a folder.

    triplets: the kept ones; discarded: ids of the others. agreement: None with a single annotator.
    human_ties: pairs of images with equal labels. win_rates: [i][j] = fraction of triplets in which the label of
    models[i] is higher than that of models[j], a tie counted half (so the diagonal is 1/2).
    missing: METRICS without a file in scores/; their rows in Tables 2 to 4 have a note in place of numbers.
    """

    models: tuple[str, ...]
    annotators: tuple[str, ...]
    triplets: int
    discarded: tuple[str, ...]
    agreement: float | None
    human_ties: int
    table_1: tuple[ScoreFractions, ...]
    table_2: tuple[MetricAccuracy, ...]
    table_3: tuple[ModelMean, ...]
    table_4: tuple[MetricStatistics, ...]
    mean_ranks: tuple[MeanRank, ...]
    win_rates: tuple[tuple[float, ...], ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Published:
    """The numbers that the paper prints."""

    source: str
    agreement: float
    table_1: tuple[ScoreFractions, ...]
    table_2: tuple[MetricAccuracy, ...]
    table_3: tuple[ModelMean, ...]
    table_4: tuple[MetricStatistics, ...]


def _read_published() -> Published:
    one, two, three, four = (published_rows(f"face_score_table{number}")["rows"] for number in (1, 2, 3, 4))
    values = {row["method"]: row["values"] for row in four}
    models = [row["method"] for row in one]
    return Published(
        source="Face Score, arXiv 2406.17100, 4.2 and Tables 1 to 4",
        agreement=0.933,
        table_1=tuple(ScoreFractions(row["method"], *row["values"].values()) for row in one),
        table_2=tuple(MetricAccuracy(row["method"], row["values"]["accuracy"]) for row in two),
        table_3=tuple(ModelMean("FS", row["method"], row["values"]["face_score"]) for row in three),
        table_4=tuple(
            MetricStatistics(
                metric,
                own["pearson"],
                tuple(ModelSpread(model, own[f"median_{model}"], own[f"std_{model}"]) for model in models),
            )
            for metric, own in values.items()
        ),
    )


PUBLISHED = _read_published()


# 20 people, 10 prompts
PUBLISHED_RANKS = (
    MeanRank("SDXL", Estimate(2.53)),
    MeanRank("SDXL tuned with semantic tags", Estimate(2.17)),
    MeanRank("SDXL tuned with photographic tags, too", Estimate(1.33)),
)


def tables(folder: str | Path, seed: int = 0, reasons: Mapping[str, str] | None = None) -> Tables:
    """Read a benchmark folder and make Tables 1 to 4.

    seed: of the bootstrap. reasons: metric -> why it could not be measured. METRICS come first, in their order; the
    row of a metric without a file has a note that says what it is and why it is missing.

    Raises FileNotFoundError for a missing part, BenchmarkError for a file that breaks a rule.
    """
    benchmark = read_benchmark(folder)
    rankings = read_rankings(benchmark)
    scores = read_scores(benchmark)
    labels = majority_vote(rankings.votes)
    kept = labels.any(1)
    if not kept.any():
        raise BenchmarkError(f"{benchmark.folder / 'rankings'}: every triplet was discarded: rank at least one")
    human = _Human(rankings.models, tuple(itertools.compress(benchmark.prompts, kept)), labels[kept])
    rows = [
        _measured(name, scores[name], benchmark, human, seed)
        if name in scores
        else _missing(name, benchmark.folder, (reasons or {}).get(name, "it has not been measured"))
        for name in dict.fromkeys([*METRICS, *scores])
    ]
    return Tables(
        models=rankings.models,
        annotators=rankings.annotators,
        triplets=int(kept.sum()),
        discarded=tuple(itertools.compress(benchmark.prompts, ~kept)),
        agreement=agreement(rankings.votes) if len(rankings.annotators) > 1 else None,
        human_ties=_count_ties(human.labels),
        table_1=score_fractions(human.labels, rankings.models),
        table_2=tuple(row.accuracy for row in rows),
        table_3=tuple(mean for row in rows for mean in row.means),
        table_4=tuple(row.statistics for row in rows),
        mean_ranks=mean_ranks(rankings.votes, rankings.models, seed),
        win_rates=tuple(tuple(map(float, row)) for row in win_rates(human.labels)),
        missing=tuple(name for name in METRICS if name not in scores),
    )


@dataclass(frozen=True)
class _Human:
    """The kept triplets: models, prompt ids and labels (triplets, 3)."""

    models: tuple[str, ...]
    prompts: tuple[str, ...]
    labels: np.ndarray


@dataclass(frozen=True)
class _MetricRows:
    """One metric's rows in Tables 2, 3 and 4."""

    accuracy: MetricAccuracy
    means: tuple[ModelMean, ...]
    statistics: MetricStatistics


def _measured(metric: str, scores: Scores, benchmark: Benchmark, human: _Human, seed: int) -> _MetricRows:
    values = scores.values
    of_triplets = [[values[name, model] for model in human.models] for name in human.prompts]
    array = np.array(of_triplets, dtype=np.float64)  # (triplets, 3); None becomes NaN
    means = (
        model_mean(metric, model, (values[name, model] for name in images))
        for model, images in benchmark.images.items()
    )
    accuracy = metric_accuracy(metric, human.labels, array, seed)
    return _MetricRows(
        replace(accuracy, note="; ".join(filter(None, (accuracy.note, scores.by)))),
        tuple(means),
        metric_statistics(metric, human.labels, array, human.models, seed),
    )


def _missing(metric: str, folder: Path, reason: str) -> _MetricRows:
    note = f"{METRICS[metric]}: no {folder / 'scores' / metric}.csv or .jsonl, and {reason}"
    return _MetricRows(
        MetricAccuracy(metric, note=note), (ModelMean(metric, "-", note=note),), MetricStatistics(metric, note=note)
    )


def _count_ties(labels: np.ndarray) -> int:
    pairs = itertools.combinations(labels.T, 2)
    return sum(int((first == second).sum()) for first, second in pairs)


def alignment_estimates(
    folder: str | Path, seed: int = 0, reasons: Mapping[str, str] | None = None
) -> dict[str, Estimate]:
    """Return every metric's accuracy of Table 2 by its name, in [0, 1]; n: pairs; the arguments are those of `tables`.

    A metric that was not measured has an estimate without a value, with the reason.
    """
    rows = tables(folder, seed, reasons).table_2
    return {row.metric: _accuracy_estimate(row) for row in rows}


def _accuracy_estimate(row: MetricAccuracy) -> Estimate:
    if row.accuracy is None:
        return Estimate(reason=row.note)
    left_out = f"{row.left_out} pairs without a score" if row.left_out else ""
    return Estimate(row.accuracy, row.low, row.high, row.pairs, "; ".join(filter(None, (row.note, left_out))))


def write_tables(
    folder: str | Path, output: str | Path | None = None, seed: int = 0, reasons: Mapping[str, str] | None = None
) -> Tables:
    """Make the tables of a folder and write them to tables.md and tables.json in `output`, by default the folder.

    seed, reasons: as for `tables`. The JSON holds {"measured": Tables, "paper": Published and the mean ranks}.
    """
    result = tables(folder, seed, reasons)
    output = Path(folder if output is None else output)
    with atomic_write(output / "tables.md", "w") as file:
        file.write(to_markdown(result))
    with atomic_write(output / "tables.json", "w") as file:
        paper = asdict(PUBLISHED) | {"mean_ranks": list(map(asdict, PUBLISHED_RANKS))}
        content = {"measured": asdict(result), "paper": paper}
        json.dump(content, file, indent=1, allow_nan=False, ensure_ascii=False)
    return result


def to_markdown(result: Tables) -> str:
    """Return the tables as Markdown, the rows of the paper below ours and marked as such."""
    sections = (
        _describe(result),
        _section("Table 1: scores that people gave", _fractions_table(result)),
        _section("Table 2: pairs that a metric orders as people do", _accuracy_table(result)),
        _section("Table 3: mean score per model", _means_table(result)),
        _section("Table 4: correlation with people, and spread of the normalised scores", _statistics_table(result)),
        _section("Mean rank: 1 for the best of three (AuthFace, arXiv 2410.09864, Table 3)", _ranks_table(result)),
        _section("Win rates: how often the row is better than the column, ties counted half", _wins_table(result)),
    )
    return "\n".join(sections)


def _describe(result: Tables) -> str:
    agreed = "not defined for one annotator" if result.agreement is None else f"{_percent(result.agreement)}%"
    agreed += f" (the paper: {_percent(PUBLISHED.agreement)}%)"
    discarded = f": {markdown_text(', '.join(result.discarded))}" if result.discarded else ""
    return f"""# Human evaluation

Rows marked "paper" are those of {PUBLISHED.source}.
Those marked "measured" are of this folder; for those marked "missing" Table 2 says what they need.
LocalX is X on the face with the prompt "A face".

- annotators: {len(result.annotators)} (the paper: 5): {markdown_text(", ".join(result.annotators))}
- triplets: {result.triplets} ranked, {len(result.discarded)} discarded{discarded}
- agreement (labels that more than three fifths of the annotators gave): {agreed}
- pairs that people did not order: {result.human_ties}, not counted in Table 2; a metric's own ties count half there
- intervals: 95%, bootstrap over triplets, those of mean ranks over triplets and annotators, {RESAMPLES} resamples
- mean ranks: of every annotator's own answers; equal images share the mean of their places
- "without": images or pairs without a score, which are not counted; compare metrics that lack the same ones
"""


def _fractions_table(result: Tables) -> str:
    header = ["model", *(f"score {label} (%)" for label in LABELS), "average", "source"]
    rows = [
        [row.model, *map(_percent, (row.score_1, row.score_2, row.score_3)), _number(row.average), source]
        for source, row in _beside(result, result.table_1, PUBLISHED.table_1)
    ]
    return markdown_table(header, rows)


def _accuracy_table(result: Tables) -> str:
    header = ["metric", "accuracy (%)", "95% interval", "pairs", "without", "source", "note"]
    rows = []
    for source, row in _beside(result, result.table_2, PUBLISHED.table_2):
        interval = EMPTY if row.low is None else f"{_percent(row.low)} to {_percent(row.high)}"
        counts = [str(row.pairs), str(row.left_out)] if source == "measured" else [EMPTY, EMPTY]
        rows.append([row.metric, _percent(row.accuracy), interval, *counts, source, row.note])
    return markdown_table(header, rows)


def _means_table(result: Tables) -> str:
    header = ["metric", "model", "mean", "images", "without", "source", "note"]
    rows = []
    for source, row in _beside(result, result.table_3, PUBLISHED.table_3):
        counts = [str(row.images), str(row.without)] if source == "measured" else [EMPTY, EMPTY]
        rows.append(
            [row.metric, row.model, number_text(row.mean, ".5g"), *counts, source, _short_note(source, row.note)]
        )
    return markdown_table(header, rows)


def _statistics_table(result: Tables) -> str:
    header = ["metric", "Pearson", "model", "median", "std", "source", "note"]
    rows = [
        [
            row.metric,
            _number(row.pearson),
            spread.model,
            number_text(spread.median, ".4f"),
            number_text(spread.std, ".4f"),
        ]
        + [source, _short_note(source, row.note)]
        for source, row in _beside(result, result.table_4, PUBLISHED.table_4)
        for spread in row.models or (ModelSpread("-", None, None),)
    ]
    return markdown_table(header, rows)


def _ranks_table(result: Tables) -> str:
    header = ["model", "mean rank", "95% interval", "answers", "source", "note"]
    rows = []
    for source, row in _beside(result, result.mean_ranks, PUBLISHED_RANKS):
        rank = row.rank
        answers = str(rank.n) if source == "measured" else EMPTY
        interval = interval_text(rank.low, rank.high, ".2f")
        rows.append([row.model, number_text(rank.value, ".2f"), interval, answers, source, rank.note])
    return markdown_table(header, rows)


def _wins_table(result: Tables) -> str:
    rows = [
        [model, *("-" if i == j else f"{_percent(rate)}%" for j, rate in enumerate(rates))]
        for i, (model, rates) in enumerate(zip(result.models, result.win_rates, strict=True))
    ]
    return markdown_table(["", *result.models], rows)


def _beside(result: Tables, own: Sequence[Any], paper: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yield (source, row): ours first, then the paper's."""
    for row in own:
        yield "missing" if getattr(row, "metric", None) in result.missing else "measured", row
    for row in paper:
        yield "paper", row


def _short_note(source: str, note: str) -> str:
    return "see Table 2" if source == "missing" else note


def _section(title: str, table: str) -> str:
    return f"## {title}\n\n{table}"


def _percent(fraction: float | None) -> str:
    """As the paper prints it, without the sign."""
    return number_text(fraction, ".2%").rstrip("%")


def _number(value: float | None) -> str:
    return number_text(value, ".4f")
