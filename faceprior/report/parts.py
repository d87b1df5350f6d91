"""What the report is put together from: a reader that notes what it cannot read, HTML tags, charts as SVG, a slider.

Text becomes HTML in one place, `render`: a plain `str` is escaped, a `Markup` is HTML already.
"""

import base64
import html
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from faceprior.images import load_image
from faceprior.jsonl import read_rows, require_keys, resolve_file

Points = Sequence[tuple[float, float]]


PNG_PIXELS, PNG_BYTES = 120_000, 40_000  # a picture whose PNG has not more of both is embedded without loss


JPEG_QUALITY = 88


MAX_POINTS = 300  # of a drawn curve; longer ones are drawn as the means of equal stretches


BAD_INPUT = (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError)  # of what files hold


_VOID = frozenset({"br", "img", "input", "link", "meta"})


_WIDTH, _HEIGHT = 440, 250  # of a chart, in its own units


_TOP, _RIGHT, _BOTTOM = 12, 24, 46


_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class Markup(str):
    """HTML, not to be escaped again."""


def render(*children: object) -> Markup:
    """Join children to HTML: Markup as it is, None as nothing, lists member by member, all else escaped as text."""
    pieces = []
    for child in children:
        if isinstance(child, Markup):
            pieces.append(child)
        elif isinstance(child, list | tuple):
            pieces.append(render(*child))
        elif child is not None:
            pieces.append(html.escape(_CONTROL.sub("\ufffd", str(child))))
    return Markup("".join(pieces))


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """Return an element. `class_` and `text_anchor` become `class` and `text-anchor`; True is a bare attribute."""
    text = name
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            text += f" {key}"
        elif value is not None and value is not False:
            text += f' {key}="{render(str(value))}"'
    return Markup(f"<{text}>") if name in _VOID else Markup(f"<{text}>{render(*children)}</{name}>")


@dataclass
class Run:
    """Reads the files of a run; what cannot be read goes to `problems` and is never raised."""

    root: Path
    scale: float = 1.0
    problems: dict[str, str] = field(default_factory=dict)

    def plain(self, text: object, limit: int = 600) -> str:
        """Return a text with paths relative to the root, and its end cut off when it is very long."""
        text = str(text)
        for folder in {str(self.root.resolve()), str(self.root.absolute()), str(self.root)} - {"."}:
            text = re.sub(rf"(?<![\w./-]){re.escape(folder)}/", "", text)
        return text if len(text) <= limit else text[: limit - 1] + "…"

    def note(self, place: object, reason: object) -> None:
        self.problems[self.plain(place)] = self.plain(reason) or type(reason).__name__

    def attempt(self, place: object, make: Callable[..., Markup | None], *args: Any) -> Markup:
        """Return what `make` gives, or one line that says that the file at `place` could not be shown."""
        try:
            return make(*args) or Markup()
        except BAD_INPUT as error:
            reason = f"no `{error.args[0]}`" if isinstance(error, KeyError) and error.args else error
            self.note(place, reason)
            return missing(f"{self.plain(place)} could not be shown: {self.plain(reason)}")

    def read(self, file: str) -> dict[str, Any]:
        """Return a JSON or YAML object, {} where there is none."""
        try:
            text = (self.root / file).read_text(encoding="utf-8")
            value = yaml.safe_load(text) if file.endswith(".yaml") else json.loads(text)
            if not isinstance(value, dict):
                raise ValueError("not an object of keys and values")
            return value
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            self.note(file, error)
            return {}

    def rows(self, file: str, keys: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Return the rows of a file that have `keys`, each of its type; [] where there is no file."""
        try:
            rows, problems = read_rows(self.root / file)
        except FileNotFoundError:
            return []
        except (OSError, RecursionError) as error:
            rows, problems = [], [(file, str(error))]
        for place, reason in problems:
            self.note(place, reason)
        return [row for place, row in enumerate(rows, 1) if self._whole(file, place, row, keys or {})]

    def _whole(self, file: str, place: int, row: dict[str, Any], keys: Mapping[str, Any]) -> bool:
        try:
            require_keys(row, keys)
            for key in keys:
                if isinstance(row[key], int) and number(row, key) is None:
                    raise ValueError(f"`{key}` is no number that can be drawn")
            return True
        except ValueError as error:
            self.note(f"{file}: {row.get('id', f'row {place}')}", error)
            return False

    def picture(self, folder: str, name: str, alt: str, side: int = 320, box: Any = None) -> Markup:
        """Return an embedded picture, or its part around a face box; a placeholder if it cannot be read."""
        try:
            image = self.load(folder, name)
            image = image if box is None else image.crop(face_window(box, image.size))
            return self.embed(image, alt, side)
        except BAD_INPUT as error:
            self.note(f"{folder}/{name}", error)
            return tag("div", "cannot be read", class_="lost", role="img", aria_label=f"{alt}: cannot be read")

    def load(self, folder: str, name: str) -> Image.Image:
        return load_image(resolve_file(self.root / folder, name))

    def embed(self, image: Image.Image, alt: str, side: int) -> Markup:
        width, height = image.size
        uri = data_uri(image, max(48, round(side * self.scale)))
        return tag("img", src=uri, alt=self.plain(alt, 200), width=width, height=height, draggable="false")


def face_window(box: Any, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the square (xyxy, pixels) around a face box, 1.6 times its longer side, as far as the picture reaches."""
    x0, y0, x1, y1 = (float(value) for value in box)
    side = max(8, min(round(1.6 * max(x1 - x0, y1 - y0)), *size))
    left = min(max(round((x0 + x1 - side) / 2), 0), size[0] - side)
    top = min(max(round((y0 + y1 - side) / 2), 0), size[1] - side)
    return left, top, left + side, top + side


def number(row: Mapping[str, Any], key: str) -> float | None:
    """Return a row's number, None where there is none or it is not finite."""
    value = row.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100
    return value if is_number else None


def points(rows: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return the (step, value) pairs of a metric, the last one of each step."""
    measured = [row for row in rows if number(row, "step") is not None and number(row, key) is not None]
    return list({row["step"]: row[key] for row in measured}.items())


def missing(*words: object) -> Markup:
    """Return the line that stands where something is missing."""
    return tag("p", *words, class_="missing")


def not_made(what: str, command: str) -> Markup:
    """Return the line that says which command makes what is missing."""
    return missing(f"{what}: ", tag("code", command), " makes it.")


def data_uri(image: Image.Image, side: int) -> str:
    """Return an RGB picture as a data URI, its longer side at most `side`: PNG where that is small, else JPEG."""
    image = image.copy()
    image.thumbnail((side, side), Image.LANCZOS)
    png, jpeg = io.BytesIO(), io.BytesIO()
    if image.width * image.height <= PNG_PIXELS:
        image.save(png, "PNG")
        if png.tell() <= PNG_BYTES:
            return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    image.save(jpeg, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()


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


def table(head: Sequence[str], rows: Iterable[Sequence[object]], class_: str | None = None) -> Markup:
    """Return a table whose cells carry their column's name, so that a narrow window can stack them."""
    body = [tag("tr", [tag("td", cell, data_label=name) for name, cell in zip(head, row, strict=True)]) for row in rows]
    columns = tag("thead", tag("tr", [tag("th", name, scope="col") for name in head]))
    return tag("table", columns, tag("tbody", body), class_=class_)


def chips(values: Mapping[str, object]) -> Markup:
    """Return a line of short facts, name and value."""
    return tag("ul", [tag("li", name, " ", tag("b", value)) for name, value in values.items()], class_="chips")


def figure(picture: Markup, caption: object) -> Markup:
    return tag("figure", picture, tag("figcaption", caption))


def slider(before: Markup, after: Markup, names: tuple[str, str], about: str) -> Markup:
    """Lay two pictures over one another, with a divider that a range input, the mouse or a finger moves."""
    labels = [tag("span", name, class_=f"name {side}") for name, side in zip(names, ("left", "right"), strict=True)]
    frame = tag("div", before, tag("div", after, class_="over"), tag("i"), labels, class_="frame")
    control = tag(
        "input", type="range", min=0, max=100, value=50, step=1, aria_label=f"{about}: {names[0]} to {names[1]}"
    )
    return tag("div", frame, control, class_="slider")


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


def line_chart(title: str, series: Mapping[str, Points], x_label: str, y_label: str) -> Markup:
    """Draw curves over one another; a long one pale, with its running mean in full colour."""
    series = {name: _thinned(points) for name, points in series.items() if points}
    if not series:
        return tag("p", f"{title}: no numbers were written.", class_="quiet")
    every = [point for points in series.values() for point in points]
    axes = _Axes([x for x, _ in every], [y for _, y in every], x_label, y_label)
    marks = [_curve(axes, points, index) for index, points in enumerate(series.values())]
    smooth = any(len(points) >= 60 for points in series.values())
    note = "pale: as measured; full: running mean" if smooth else ""
    return _chart(title, axes, marks, list(series), note)


def _curve(axes: "_Axes", points: Points, index: int) -> list[Markup]:
    if len(points) < 60:
        dots = [tag("circle", cx=axes.x(x), cy=axes.y(y), r=3, class_=f"dot s{index}") for x, y in points]
        return [_path(axes, points, f"line s{index}"), *(dots if len(points) <= 20 else [])]
    return [_path(axes, points, f"line pale s{index}"), _path(axes, _running_mean(points), f"line s{index}")]


def _path(axes: "_Axes", points: Points, class_: str) -> Markup:
    return tag("polyline", points=" ".join(f"{axes.x(x)},{axes.y(y)}" for x, y in points), class_=class_)


def _thinned(points: Points) -> list[tuple[float, float]]:
    points = sorted(points)
    size = math.ceil(len(points) / MAX_POINTS) or 1
    pieces = [points[i : i + size] for i in range(0, len(points), size)]
    return [(piece[-1][0], sum(y for _, y in piece) / len(piece)) for piece in pieces]


def _running_mean(points: Points) -> list[tuple[float, float]]:
    reach = len(points) // 24
    windows = [points[max(i - reach, 0) : i + reach + 1] for i in range(len(points))]
    return [(x, sum(y for _, y in near) / len(near)) for (x, _), near in zip(points, windows, strict=True)]


def histogram(title: str, series: Mapping[str, Sequence[float]], x_label: str, y_label: str) -> Markup:
    """Draw how often values fall into common bins, the series side by side in each bin."""
    values = [value for own in series.values() for value in own]
    if not values:
        return tag("p", f"{title}: no numbers were written.", class_="quiet")
    edges = ticks(min(values), max(values), min(14, max(5, round(len(values) ** 0.5))))
    counts = {name: _counts(own, edges) for name, own in series.items()}
    axes = _Axes(edges, [0, *(n for own in counts.values() for n in own)], x_label, y_label, whole=True)
    width = (axes.x(edges[1]) - axes.x(edges[0])) * 0.84 / len(counts)
    bars = []
    for index, own in enumerate(counts.values()):
        for edge, count in zip(edges, own, strict=False):
            left = axes.x(edge) + width * (0.095 + index)
            height = axes.y(0) - axes.y(count)
            place = {"x": f"{left:.1f}", "y": axes.y(count), "width": f"{width:.1f}", "height": f"{height:.1f}"}
            bars.append(tag("rect", **place, class_=f"bar s{index}") if count else None)
    return _chart(title, axes, bars, [f"{name} (n = {len(own)})" for name, own in series.items()])


def _counts(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    counts = [0] * (len(edges) - 1)
    for value in values:
        place = int((value - edges[0]) / (edges[1] - edges[0]) + 1e-9)
        counts[min(max(place, 0), len(counts) - 1)] += 1
    return counts


class _Axes:
    """The two axes of a chart: numbers to chart units, ticks and their texts."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], x_label: str, y_label: str, whole: bool = False):
        self.x_ticks, self.y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
        if whole:
            self.x_ticks = [tick for tick in self.x_ticks if min(xs) <= tick + 1e-12 and tick - 1e-12 <= max(xs)]
            self.y_ticks = [tick for tick in self.y_ticks if float(tick).is_integer()]
        else:
            self.x_ticks = [tick for tick in self.x_ticks if tick <= max(xs) and tick >= min(xs)] or self.x_ticks
        self.x_texts, x_unit = _texts(self.x_ticks)
        self.y_texts, y_unit = _texts(self.y_ticks)
        self.x_label, self.y_label = x_label + x_unit, y_label + y_unit
        self.left = 30 + 7.4 * max(map(len, self.y_texts))
        self.x = self._scale(min([*xs, self.x_ticks[0]]), max([*xs, self.x_ticks[-1]]), self.left, _WIDTH - _RIGHT)
        self.y = self._scale(self.y_ticks[0], self.y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)

    @staticmethod
    def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
        return lambda value: round(start + (value - low) / ((high - low) or 1) * (end - start), 1)

    def draw(self) -> list[Markup]:
        """Return the grid, the tick texts and the names of the axes."""
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        parts = []
        for tick, text in zip(self.y_ticks, self.y_texts, strict=True):
            y = self.y(tick)
            parts.append(tag("line", x1=self.left, x2=right, y1=y, y2=y, class_="grid"))
            parts.append(tag("text", text, x=self.left - 6, y=y + 4, text_anchor="end"))
        parts.append(tag("line", x1=self.left, x2=right, y1=bottom, y2=bottom, class_="axis"))
        for tick, text in zip(self.x_ticks, self.x_texts, strict=True):
            x = self.x(tick)
            parts.append(tag("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
            parts.append(tag("text", text, x=x, y=bottom + 18, text_anchor="middle"))
        middle = (self.left + right) / 2
        parts.append(tag("text", self.x_label, x=middle, y=_HEIGHT - 6, text_anchor="middle", class_="label"))
        turn = f"translate(13 {(_TOP + bottom) / 2}) rotate(-90)"
        parts.append(tag("text", self.y_label, transform=turn, text_anchor="middle", class_="label"))
        return parts


def _texts(values: Sequence[float]) -> tuple[list[str], str]:
    """Return tick texts of equal precision and the power of ten that they leave to the axis, as ` (×10⁻³)`."""
    largest = max(abs(value) for value in values)
    exponent = math.floor(math.log10(largest)) if largest else 0
    exponent = 0 if -3 < exponent < 5 else exponent // 3 * 3
    scaled = [value / 10.0**exponent for value in values]
    step = abs(scaled[1] - scaled[0]) if len(scaled) > 1 else 1
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    unit = f" (×10{str(exponent).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))})" if exponent else ""
    return [f"{value + 0.0:.{digits}f}" for value in scaled], unit


def _chart(title: str, axes: _Axes, marks: list, names: Sequence[str], note: str = "") -> Markup:
    keys = [tag("span", tag("i", class_=f"key s{index}"), name) for index, name in enumerate(names)]
    caption = tag("figcaption", tag("b", title), keys if len(names) > 1 else None, tag("span", note) if note else None)
    drawing = tag("svg", axes.draw(), marks, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=title)
    return tag("figure", caption, drawing, class_="chart")
