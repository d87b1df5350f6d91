"""The statistics of a human evaluation: labels from votes, metrics against labels (Face Score, 4.2, 4.3), mean ranks.

Labels are (triplets, models) integers 1..3, 3 for the best. Fractions and accuracies lie in [0, 1].
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from faceprior.tables import Estimate

LABELS = (1, 2, 3)

RESAMPLES = 2000  # of the bootstrap


@dataclass(frozen=True)
class ScoreFractions:
    """A row of Table 1: the fractions of a model's images with the label 1, 2 and 3, and the average label."""

    model: str
    score_1: float
    score_2: float
    score_3: float
    average: float


@dataclass(frozen=True)
class MetricAccuracy:
    """A row of Table 2: the fraction of pairs that a metric orders as people do, with its 95% interval.

    pairs: how many were compared. left_out: pairs that people order, but one of whose images has no score.
    note: why there is no accuracy.
    """

    metric: str
    accuracy: float | None = None
    low: float | None = None
    high: float | None = None
    pairs: int = 0
    left_out: int = 0
    note: str = ""


@dataclass(frozen=True)
class ModelMean:
    """A cell of Table 3: the mean score of a model's images; without: how many of them have no score."""

    metric: str
    model: str
    mean: float | None = None
    images: int = 0
    without: int = 0
    note: str = ""


@dataclass(frozen=True)
class ModelSpread:
    """Median and population standard deviation of a model's scores, normalised to [0, 1], with 95% intervals.

    images: how many have a score.
    """

    model: str
    median: float | None
    std: float | None
    images: int = 0
    median_interval: tuple[float, float] | None = None
    std_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class MetricStatistics:
    """A row of Table 4: a metric's Pearson correlation with the labels, and its spread per model.

    images: how many of all models have a score; interval: of the correlation, 95%.
    """

    metric: str
    pearson: float | None = None
    models: tuple[ModelSpread, ...] = ()
    note: str = ""
    images: int = 0
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class MeanRank:
    """A row of AuthFace's Table 3: the mean rank of a model's images, 1 for the best of three."""

    model: str
    rank: Estimate


def majority_vote(votes: np.ndarray) -> np.ndarray:
    """Return the label of each image: the score that most annotators gave it (4.2, step 4).

    votes: (annotators, triplets, models) of 1..3, 0 where an annotator discarded the triplet. Returns (triplets,
    models), 0 in triplets that half of the annotators or more discarded. Where two labels or more are given
    equally often, the label is the median of the image's votes, the lower one of an even number; of five votes
    this is always 2.
    """
    counts = _label_counts(votes)
    median = (counts.cumsum(-1) >= (counts.sum(-1, keepdims=True) + 1) // 2).argmax(-1) + 1
    tied = (counts == counts.max(-1, keepdims=True)).sum(-1) > 1
    labels = np.where(tied, median, counts.argmax(-1) + 1)
    return np.where(2 * counts.sum(-1) > len(votes), labels, 0)


def agreement(votes: np.ndarray) -> float:
    """Return the fraction of labels on which more than three of five annotators agree (4.2).

    votes: as for `majority_vote`; with another number of annotators, more than three fifths of them. Labels of
    discarded triplets do not count; an annotator who discarded a kept triplet agrees with nobody.
    """
    kept = majority_vote(votes) > 0
    return float((5 * _label_counts(votes).max(-1) > 3 * len(votes))[kept].mean())


def _label_counts(votes: np.ndarray) -> np.ndarray:
    """Return how many annotators gave 1, 2 and 3: (annotators, triplets, models) -> (triplets, models, 3)."""
    return np.stack([(votes == label).sum(0) for label in LABELS], axis=-1)


def score_fractions(labels: np.ndarray, models: Sequence[str]) -> tuple[ScoreFractions, ...]:
    """Return Table 1. labels: (triplets, models) of 1..3."""
    fractions = np.stack([(labels == label).mean(0) for label in LABELS], axis=-1)  # (models, 3)
    averages = labels.mean(0)
    return tuple(
        ScoreFractions(m, *map(float, f), float(a)) for m, f, a in zip(models, fractions, averages, strict=True)
    )


def win_rates(labels: np.ndarray) -> np.ndarray:
    """Return how often the row's label is the higher one, ties counted half: (triplets, models) -> (models, models)."""
    difference = labels[:, :, None] - labels[:, None, :]
    return ((difference > 0) + 0.5 * (difference == 0)).mean(0)


@dataclass(frozen=True)
class PairCounts:
    """A metric against people, per triplet: points won, pairs compared, pairs without a score; each (triplets,)."""

    points: np.ndarray
    pairs: np.ndarray
    left_out: np.ndarray


def compare_pairs(labels: np.ndarray, scores: np.ndarray) -> PairCounts:
    """Compare all pairs of each triplet (Fig. 3).

    labels: (triplets, models). scores: the same shape, NaN where there is none. A pair with equal labels is left
    out; one without both scores is counted as such. A metric wins a point for the order of the labels, half a
    point for equal scores.
    """
    first, second = map(list, zip(*itertools.combinations(range(labels.shape[1]), 2), strict=True))
    human = np.sign(labels[:, first] - labels[:, second])
    metric = np.sign(scores[:, first] - scores[:, second])  # NaN where a score is missing
    compared = (human != 0) & ~np.isnan(metric)
    points = np.where(metric == 0, 0.5, metric == human) * compared
    return PairCounts(points.sum(1), compared.sum(1), ((human != 0) & np.isnan(metric)).sum(1))


def bootstrap_interval(
    points: np.ndarray, pairs: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Return the 95% percentile interval of sum(points) / sum(pairs) over triplets that are drawn with replacement.

    points, pairs: (triplets,); triplets without a pair are never drawn. Pairs of one triplet depend on each
    other, so an interval over single pairs would be too narrow.
    """
    points, pairs = points[pairs > 0], pairs[pairs > 0]
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(pairs), size=len(pairs)) for _ in range(resamples))
    low, high = np.percentile([points[draw].sum() / pairs[draw].sum() for draw in draws], [2.5, 97.5])
    return float(low), float(high)


def interval_over_triplets(
    statistic: Callable[[np.ndarray], float], triplets: int, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """Return the 95% percentile interval of `statistic(places)` over triplets that are drawn with replacement.

    Draws of which it is not a number, as a correlation of equal labels, do not count. None where fewer than two
    triplets are there, or half of the draws do not count.
    """
    rng = np.random.default_rng(seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = [statistic(rng.integers(triplets, size=triplets)) for _ in range(resamples if triplets > 1 else 0)]
    known = [value for value in values if np.isfinite(value)]
    if 2 * len(known) <= resamples:
        return None
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def metric_accuracy(metric: str, labels: np.ndarray, scores: np.ndarray, seed: int = 0) -> MetricAccuracy:
    """Return a row of Table 2. labels, scores: as for `compare_pairs`."""
    counts = compare_pairs(labels, scores)
    pairs, left_out = int(counts.pairs.sum()), int(counts.left_out.sum())
    if pairs == 0:
        note = "no pair has two scores" if left_out else "people order no pair"
        return MetricAccuracy(metric, left_out=left_out, note=note)
    accuracy = float(counts.points.sum() / pairs)
    if (counts.pairs > 0).sum() < 2:
        return MetricAccuracy(metric, accuracy, None, None, pairs, left_out, "no interval from a single triplet")
    return MetricAccuracy(metric, accuracy, *bootstrap_interval(counts.points, counts.pairs, seed), pairs, left_out)


def metric_statistics(
    metric: str, labels: np.ndarray, scores: np.ndarray, models: Sequence[str], seed: int = 0
) -> MetricStatistics:
    """Return a row of Table 4, over the images of kept triplets that have a score.

    labels, scores: as for `compare_pairs`. The scores are normalised by the lowest and the highest of all models'
    images; the correlation is with the label, image by image. seed: of the intervals, `interval_over_triplets`.
    """
    scored = ~np.isnan(scores)
    if not scored.any() or np.ptp(scores[scored]) == 0:
        note = "all images have one score" if scored.any() else "no image has a score"
        return MetricStatistics(metric, None, tuple(ModelSpread(m, None, None) for m in models), note)
    low = scores[scored].min()
    normalised = (scores - low) / (scores[scored].max() - low)
    spreads = tuple(_spread(m, column, seed) for m, column in zip(models, normalised.T, strict=True))
    number = int(scored.sum())
    if np.ptp(labels[scored]) == 0:
        return MetricStatistics(metric, None, spreads, "people gave all images one score", number)

    def pearson(places: np.ndarray) -> float:
        there = scored[places]
        return np.corrcoef(labels[places][there], scores[places][there])[0, 1] if there.sum() > 1 else np.nan

    pearson_interval = interval_over_triplets(pearson, len(labels), seed)
    return MetricStatistics(
        metric, float(pearson(np.arange(len(labels)))), spreads, images=number, interval=pearson_interval
    )


def _spread(model: str, column: np.ndarray, seed: int) -> ModelSpread:
    """column: (triplets,) normalised scores of the model, NaN where there is none."""
    values = column[~np.isnan(column)]
    if not len(values):
        return ModelSpread(model, None, None)
    median, std = (
        interval_over_triplets(lambda places, of=of: of(values[places]), len(values), seed)
        for of in (np.median, np.std)
    )
    return ModelSpread(model, float(np.median(values)), float(values.std()), len(values), median, std)


def model_mean(metric: str, model: str, scores: Iterable[float | None]) -> ModelMean:
    """Return a row of Table 3. scores: of all the model's images, None where there is none."""
    scores = list(scores)
    values = [score for score in scores if score is not None]
    if not values:
        return ModelMean(metric, model, without=len(scores), note="no image has a score")
    return ModelMean(metric, model, float(np.mean(values)), len(values), len(scores) - len(values))


def mean_ranks(votes: np.ndarray, models: Sequence[str], seed: int = 0) -> tuple[MeanRank, ...]:
    """Return the mean rank of each model (AuthFace, appendix B and Table 3), with the interval of `crossed_estimate`.

    votes: as for `majority_vote`; a triplet that an annotator discarded has no rank of theirs. Equal images share the
    mean of their places, 1.5 for the two best, so that the mean ranks of three models always add up to 6.
    """
    better = (votes[:, :, None, :] > votes[:, :, :, None]).sum(-1)  # (annotators, triplets, models)
    equal = (votes[:, :, None, :] == votes[:, :, :, None]).sum(-1) - 1
    ranks = np.where(votes > 0, 1 + better + equal / 2, np.nan)
    return tuple(MeanRank(m, crossed_estimate(ranks[..., i], seed=seed)) for i, m in enumerate(models))


def crossed_estimate(values: np.ndarray, note: str = "", seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Return the mean of people's answers with a 95% interval for other people and other images.

    values: (people, images), NaN where there is no answer. The interval is the percentile bootstrap in which people and
    images are both drawn with replacement, so that an answer counts as often as its person times its image was drawn
    (the pigeonhole bootstrap; Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1). Answers of one
    person, and about one image, depend on each other: an interval that takes each as a draw of its own is too narrow.
    This one is on the wide side: up to sqrt(3) times as wide as need be where answers do not depend on each other.
    Of a single person, or a single image, only the other is drawn, and the note says so.
    """
    given = ~np.isnan(values)
    answers = int(given.sum())
    if answers == 0:
        return Estimate(reason="there is no answer", note=note)
    mean = float(values[given].mean())
    with_answer = np.ix_(given.any(1), given.any(0))
    values, given = values[with_answer], given[with_answer]
    people, images = values.shape
    if people == images == 1:
        return Estimate(mean, None, None, answers, "; ".join(filter(None, (note, "no interval from one answer"))))
    rng = np.random.default_rng(seed)
    drawn_people, drawn_images = (rng.multinomial(n, [1 / n] * n, resamples) for n in (people, images))
    sums = ((drawn_people @ np.where(given, values, 0)) * drawn_images).sum(1)  # (resamples,)
    counts = ((drawn_people @ given) * drawn_images).sum(1)
    low, high = np.percentile(sums[counts > 0] / counts[counts > 0], [2.5, 97.5])
    alone = "one person: the interval is for other images only" if people == 1 else ""
    alone = "one image: the interval is for other people only" if images == 1 else alone
    return Estimate(mean, float(low), float(high), answers, "; ".join(filter(None, (note, alone))))
