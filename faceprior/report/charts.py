"""Charts, as geometry in the units of an SVG drawing that templates/chart.html writes: curves and histograms."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 440, 250  # of a chart, in its own units
TOP, RIGHT, BOTTOM = 12, 24, 46  # margins; the left one depends on the texts
MAX_POINTS = 300  # of a drawn curve; longer ones are drawn as the means of equal stretches
NOISY = 60  # points from which on a curve is drawn pale, under its running mean
LINE, NAME = 30, 22  # height of a line of `box_chart`; characters of its name
DOTTED = 20  # points up to which they are dots as well
BESIDE_A_LIMIT = 20  # bins of a histogram with a limit, so that few values share a bin with it


@dataclass(frozen=True)
class Series:
    """One colour of a chart. lines: points of polylines, the first of two is pale; bars: (x, y, width, height)."""

    name: str
    lines: tuple[str, ...] = ()
    dots: Points = ()
    bars: Sequence[tuple[float, float, float, float]] = ()


@dataclass(frozen=True)
class Chart:
    """A chart; without axes there are no numbers to draw. mark: where a line across marks a limit, None without."""

    title: str
    axes: "Axes | None" = None
    series: tuple[Series, ...] = ()
    note: str = ""
    mark: float | None = None


class Axes:
    """The two axes of a chart: numbers to chart units (x, y), ticks as (position, text), and labels."""

    width, height, right, top, bottom = WIDTH, HEIGHT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM

    def __init__(self, xs: Sequence[float], ys: Sequence[float], x_label: str, y_label: str, counts: bool = False):
        x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
        x_ticks = [tick for tick in x_ticks if min(xs) - 1e-12 <= tick <= max(xs) + 1e-12] or x_ticks
        if counts:
            y_ticks = [tick for tick in y_ticks if float(tick).is_integer()]

        x_texts, x_unit = tick_texts(x_ticks)
        y_texts, y_unit = tick_texts(y_ticks)
        self.x_label, self.y_label = x_label + x_unit, y_label + y_unit
        self.left = 30 + 7.4 * max(map(len, y_texts))

        self.x = _scale(min([*xs, x_ticks[0]]), max([*xs, x_ticks[-1]]), self.left, self.right)
        self.y = _scale(y_ticks[0], y_ticks[-1], self.bottom, self.top)
        self.x_ticks = [(self.x(tick), text) for tick, text in zip(x_ticks, x_texts, strict=True)]
        self.y_ticks = [(self.y(tick), text) for tick, text in zip(y_ticks, y_texts, strict=True)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: round(start + (value - low) / ((high - low) or 1) * (end - start), 1)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers (1, 2 or 5 times a power of ten apart) whose ends enclose [low, high]."""
    if not high > low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_texts(values: Sequence[float]) -> tuple[list[str], str]:
    """Return tick texts of equal precision and the power of ten that they leave to the axis, as ` (×10⁻³)`."""
    largest = max(abs(value) for value in values)
    exponent = math.floor(math.log10(largest)) if largest else 0
    exponent = 0 if -3 < exponent < 5 else exponent // 3 * 3
    scaled = [value / 10.0**exponent for value in values]
    step = abs(scaled[1] - scaled[0]) if len(scaled) > 1 else 1
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    unit = f" (×10{str(exponent).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))})" if exponent else ""
    return [f"{value + 0.0:.{digits}f}" for value in scaled], unit


class NamedLines(Axes):
    """Axes of which the vertical one has a name in place of each number: 0 is the first, at the top."""

    def __init__(self, xs: Sequence[float], names: Sequence[str], x_label: str):
        super().__init__(xs, [0, 1], x_label, "")
        self.height = TOP + LINE * len(names) + BOTTOM
        self.bottom = self.height - BOTTOM
        x_ticks = ticks(min(xs), max(xs))
        texts, _ = tick_texts(x_ticks)
        self.left = 12 + 7.4 * max(map(len, names))
        self.x = _scale(x_ticks[0], x_ticks[-1], self.left, self.right)
        self.y = lambda line: round(TOP + LINE * (line + 0.5), 1)
        self.x_ticks = [(self.x(tick), text) for tick, text in zip(x_ticks, texts, strict=True)]
        self.y_ticks = [(self.y(line), name) for line, name in enumerate(names)]


# ---- curves


def line_chart(title: str, series: Mapping[str, Points], x_label: str, y_label: str) -> Chart:
    """Draw curves over one another; a long one pale, with its running mean in full colour."""
    series = {name: thinned(points) for name, points in series.items() if points}
    if not series:
        return Chart(title)
    every = [point for points in series.values() for point in points]
    axes = Axes([x for x, _ in every], [y for _, y in every], x_label, y_label)
    noisy = any(len(points) >= NOISY for points in series.values())
    note = "pale: as measured; full: running mean" if noisy else ""
    return Chart(title, axes, tuple(_curve(axes, name, points) for name, points in series.items()), note)


def band_chart(
    title: str, name: str, middle: Points, low: Points, high: Points, series: Mapping[str, Points], *labels: str
) -> Chart:
    """Draw a curve in full colour between the two pale ones of its interval, and one more of `series` over it."""
    every = [point for points in (middle, low, high, *series.values()) for point in points]
    axes = Axes([x for x, _ in every], [y for _, y in every], *labels)
    lines = tuple(" ".join(f"{axes.x(x)},{axes.y(y)}" for x, y in points) for points in (low, high, middle))
    return Chart(title, axes, (Series(name, lines), *(_curve(axes, *item) for item in series.items())))


def _curve(axes: Axes, name: str, points: Points) -> Series:
    curves = [points, running_mean(points)] if len(points) >= NOISY else [points]
    lines = tuple(" ".join(f"{axes.x(x)},{axes.y(y)}" for x, y in curve) for curve in curves)
    dots = [(axes.x(x), axes.y(y)) for x, y in points] if len(points) <= DOTTED else []
    return Series(name, lines, dots)


def thinned(points: Points) -> list[tuple[float, float]]:
    """Return the points in the order of x, at most MAX_POINTS: means of equal stretches at the stretch's end."""
    points = sorted(points)
    size = math.ceil(len(points) / MAX_POINTS) or 1
    pieces = [points[i : i + size] for i in range(0, len(points), size)]
    return [(piece[-1][0], sum(y for _, y in piece) / len(piece)) for piece in pieces]


def running_mean(points: Points) -> list[tuple[float, float]]:
    """Return each point with the mean of its neighbours, a 24th of the curve to each side."""
    reach = len(points) // 24
    windows = [points[max(i - reach, 0) : i + reach + 1] for i in range(len(points))]
    return [(x, sum(y for _, y in near) / len(near)) for (x, _), near in zip(points, windows, strict=True)]


# ---- histograms


def histogram(
    title: str,
    series: Mapping[str, Sequence[float]],
    x_label: str,
    y_label: str,
    limit: float | None = None,
    note: str = "",
) -> Chart:
    """Draw how often values fall into common bins, the series side by side in each bin. limit: a line across them."""
    values = [value for own in series.values() for value in own]
    if not values:
        return Chart(title)
    shown = values if limit is None else [*values, limit]
    count = min(14, max(5, round(len(values) ** 0.5))) if limit is None else BESIDE_A_LIMIT
    edges = ticks(min(shown), max(shown), count)
    counts = [bin_counts(own, edges) for own in series.values()]
    axes = Axes(edges, [0, *(count for own in counts for count in own)], x_label, y_label, counts=True)
    width = (axes.x(edges[1]) - axes.x(edges[0])) * 0.84 / len(counts)  # of a bar: 84% of a bin are for all series
    named = zip(series.items(), counts, strict=True)
    bars = [
        Series(f"{name} (n = {len(own)})", bars=_bars(axes, edges, own_counts, width, index))
        for index, ((name, own), own_counts) in enumerate(named)
    ]
    return Chart(title, axes, tuple(bars), note, None if limit is None else axes.x(limit))


def _bars(axes: Axes, edges: Sequence[float], counts: Sequence[int], width: float, index: int) -> list[tuple]:
    return [
        (round(axes.x(edge) + width * (0.095 + index), 1), axes.y(count))
        + (round(width, 1), round(axes.y(0) - axes.y(count), 1))
        for edge, count in zip(edges, counts, strict=False)
        if count
    ]


def bin_counts(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    """Return how many values are in each bin; the last edge belongs to the last bin."""
    counts = [0] * (len(edges) - 1)
    for value in values:
        place = int((value - edges[0]) / (edges[1] - edges[0]) + 1e-9)
        counts[min(max(place, 0), len(counts) - 1)] += 1
    return counts


# ---- distributions


def box_chart(title: str, series: Mapping[str, Sequence[float]], x_label: str) -> Chart:
    """Draw the distribution of each series on a line of its own: 5% to 95%, the quartiles, and the median."""
    series = {name: sorted(values) for name, values in series.items() if values}
    if not series:
        return Chart(title)
    marks = [[_quantile(own, q) for q in (0.05, 0.25, 0.5, 0.75, 0.95)] for own in series.values()]
    names = [name if len(name) <= NAME else f"{name[: NAME - 1]}…" for name in series]
    axes = NamedLines([mark for own in marks for mark in own], names, x_label)
    bars, dots = [], []
    for line, (low, first, median, third, high) in enumerate(marks):
        y = axes.y(line)
        for start, end, height in ((low, high, 2), (first, third, 12)):
            bars.append((axes.x(start), y - height / 2, round(max(1, axes.x(end) - axes.x(start)), 1), height))
        dots.append((axes.x(median), y))
    parts = (Series("5% to 95%, and the quartiles", bars=bars), Series("median", dots=dots))
    return Chart(title, axes, parts)


def _quantile(ordered: Sequence[float], q: float) -> float:
    """Return a quantile of sorted values, interpolated linearly."""
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
