"""The folder of a human evaluation: its layout, and reading it with checks (Face Score, 4.2 and 8.4; AuthFace, C).

A benchmark, whose images people rank:

    prompts.jsonl            {"id": "0001", "prompt": "a man in a suit"}, one a line; or prompts.csv: id,prompt
    images/MODEL/ID.png      one image per model and prompt, of any image suffix
    rankings/ANNOTATOR.csv   id,model,score: one row for each image of the three ranked models
    scores/METRIC.csv        id,model,score: one row for each image; or METRIC.jsonl, rows that `tables` measured,
                             or the lines that `faceprior score --json` printed about images/ (without --min-score)

Rankings: the three images of a prompt are its triplet. The score of an image is 3 minus the number of better
images in its triplet, so equal images have equal scores: 3,2,1 without a tie, 3,2,2 with two worst, 3,3,1 with
two best, 3,3,3. An annotator discards a triplet by leaving its three scores empty. The paper's "no valid faces
in any image" is read as "no image has a valid face": where only some lack one, those are the worst of a ranked
triplet. (Annotators told to discard also where one image lacks a face use the same files.)

An empty score of a metric (null in a .jsonl) stands for an image without a valid face, or one that was not measured.
In an image of several people the most frontal and representative face counts (`detect.representative_face`). What
`faceprior score --json` prints has no landmarks and no size of the image: there it is the largest one.

A comparison, whose images people judge in pairs, side by side:

    images/METHOD/NAME.png   one image per method and face, matched by name, of any image suffix
    preferences/RATER.csv    id,first,second,left,preferred: one row for each answer

Preferences: `id` is the name of the face. All rows about two methods name them in one order, as `first` and `second`;
`left` is the one that was on the left, and `preferred` the better one, or "same".

Nothing is repaired: a file that breaks a rule raises `BenchmarkError` with file, line, rule and way out.
"""

import csv
import io
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from faceprior.detect import Face, representative_face
from faceprior.files import IMAGE_SUFFIXES, atomic_write, natural_key
from faceprior.jsonl import read_rows, require_keys

RANKED_MODELS = 3

PROMPT_COLUMNS = ("id", "prompt")

SCORE_COLUMNS = ("id", "model", "score")

PREFERENCE_COLUMNS = ("id", "first", "second", "left", "preferred")

ANSWERS = ("rankings", "preferences")  # folders of what people said about the images

SAME = "same"  # the answer that neither of two images is better

Key = tuple[str, str]  # prompt id, model


class BenchmarkError(ValueError):
    """A file of a benchmark breaks a rule; the message names file, line, rule and way out."""


@dataclass(frozen=True)
class Benchmark:
    """The prompts, and the images that the models generated.

    prompts: by id, in the file's order. images: model -> prompt id -> file, models in natural order.
    """

    folder: Path
    prompts: dict[str, str]
    images: dict[str, dict[str, Path]]


@dataclass(frozen=True)
class Rankings:
    """How people ranked.

    models: the three ranked ones. votes: (annotators, prompts, 3) int64, the scores 1..3; 0 where the annotator
    discarded the triplet.
    """

    annotators: tuple[str, ...]
    models: tuple[str, ...]
    votes: np.ndarray


@dataclass(frozen=True)
class Scores:
    """The scores of a metric. values: (prompt id, model) -> score, None for an empty one. by: weights, where known."""

    values: dict[Key, float | None]
    by: str = ""


@dataclass(frozen=True)
class Comparison:
    """The images of a comparison.

    methods: the first one is compared with each of the others. images: method -> name -> file; all have the same names.
    """

    folder: Path
    methods: tuple[str, ...]
    images: dict[str, dict[str, Path]]


@dataclass(frozen=True)
class Answer:
    """What a person said about two images of a face. preferred: `first`, `second` or SAME."""

    id: str
    first: str
    second: str
    left: str
    preferred: str


def require_no_answers(folder: str | Path) -> None:
    """Raise FileExistsError for a folder whose images people have judged, before it is deleted."""
    answers = [path for name in ANSWERS if (path := Path(folder) / name).exists()]
    if answers:
        raise FileExistsError(f"{answers[0]} holds what people said about the images: move it, or give another folder")


def read_benchmark(folder: str | Path) -> Benchmark:
    """Read the prompts and list the images.

    Raises FileNotFoundError for a missing prompt file or images/, BenchmarkError for a broken rule.
    """
    folder = Path(folder)
    prompts = _read_prompts(folder)
    models = _image_folders(folder, "a benchmark holds its images as images/MODEL/PROMPT_ID.png")
    return Benchmark(folder, prompts, {model.name: _list_images(model, prompts) for model in models})


def _image_folders(folder: Path, layout: str) -> list[Path]:
    root = folder / "images"
    if not root.is_dir():
        raise FileNotFoundError(f"no {root}: {layout}")
    folders = sorted((path for path in root.iterdir() if path.is_dir() and _is_visible(path)), key=natural_key)
    if not folders:
        raise BenchmarkError(f"{root} holds no folder: {layout}")
    return folders


def _read_prompts(folder: Path) -> dict[str, str]:
    path = _only_one(folder / "prompts.jsonl", folder / "prompts.csv")
    if path is None:
        raise FileNotFoundError(
            f"no prompts.jsonl or prompts.csv in {folder}: a benchmark needs one of them, rows of `id` and `prompt`"
        )
    return read_prompt_table(path)


def read_prompt_table(path: str | Path) -> dict[str, str]:
    """Read a .csv or .jsonl file of `id` and `prompt` -> the prompts by id, in the file's order."""
    path = Path(path)
    rows = (
        _csv_rows(path, PROMPT_COLUMNS)
        if path.suffix == ".csv"
        else _json_rows(path, dict.fromkeys(PROMPT_COLUMNS, str))
    )
    prompts, lines = {}, {}
    for line, row in rows:
        name = row["id"]
        if not is_file_stem(name):
            raise BenchmarkError(
                f"{path}:{line}: the id {name!r} cannot be the name of an image: it must not be empty, begin with a dot"
                " or hold a slash or a control code; rename it"
            )
        if name in prompts:
            raise BenchmarkError(f"{path}:{line}: the id {name!r} is in line {lines[name]} already: remove one")
        prompts[name], lines[name] = row["prompt"], line
    if not prompts:
        raise BenchmarkError(f"{path} holds no prompt: write at least one, with its id")
    return prompts


def is_file_stem(name: str) -> bool:
    """Whether a prompt's id, or an annotator's name, can be the name of a file."""
    return bool(name) and not name.startswith(".") and name.isprintable() and not any(c in name for c in "/\\")


def _list_images(folder: Path, prompts: dict[str, str] | None = None) -> dict[str, Path]:
    images: dict[str, Path] = {}
    for path in sorted(folder.iterdir(), key=natural_key):
        if not _is_visible(path) or path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        if prompts is not None and path.stem not in prompts:
            raise BenchmarkError(
                f"{path}: no prompt has the id {path.stem!r}: add it to the prompts or remove the image"
            )
        if path.stem in images:
            raise BenchmarkError(f"{path}: {images[path.stem].name} is an image of this name already: remove one")
        images[path.stem] = path
    return images


def read_rankings(benchmark: Benchmark) -> Rankings:
    """Read every annotator's file in rankings/, which all rank the same three models.

    Raises FileNotFoundError where there is none, BenchmarkError for a broken rule.
    """
    files = list(_files(benchmark.folder / "rankings", (".csv",)))
    if not files:
        raise FileNotFoundError(
            f"no rankings in {benchmark.folder / 'rankings'}: write those of each annotator to ANNOTATOR.csv,"
            f" with the columns {','.join(SCORE_COLUMNS)}"
        )
    found = {path: read_ranking(path, benchmark) for path in files}
    models = _ranked_models(found)
    order = tuple(model for model in benchmark.images if model in models)
    votes = [[[scores[name, model] or 0 for model in order] for name in benchmark.prompts] for scores in found.values()]
    return Rankings(tuple(path.stem for path in files), order, np.array(votes, dtype=np.int64))


def read_ranking(path: str | Path, benchmark: Benchmark, complete: bool = True) -> dict[Key, int | None]:
    """Read one annotator's file: (prompt id, model) -> score, None in a discarded triplet.

    complete: refuse a file in which a triplet is missing; False reads a file that is still being written.
    """
    path = Path(path)
    cells = _read_cells(path, _csv_rows(path, SCORE_COLUMNS), benchmark, _parse_vote)
    models = sorted({model for _, model in cells}, key=natural_key)
    if len(models) > RANKED_MODELS or (complete and len(models) < RANKED_MODELS):
        raise BenchmarkError(
            f"{path} ranks {len(models)} models ({', '.join(models)}), but a triplet has {RANKED_MODELS}: keep the rows"
            " of three"
        )
    begun = {name for name, _ in cells}
    for name in benchmark.prompts:
        if complete or name in begun:
            _check_triplet(path, name, models, cells)
    return {key: score for key, (_, score) in cells.items()}


def write_ranking(path: str | Path, ranking: dict[Key, int | None]) -> None:
    """Write one annotator's file, as `read_ranking` returns it; after a crash it is whole, new or old."""
    rows = ([name, model, "" if score is None else score] for (name, model), score in ranking.items())
    _write_csv(path, SCORE_COLUMNS, rows)


def _check_triplet(path: Path, name: str, models: list[str], cells: dict[Key, tuple[int, int | None]]) -> None:
    for model in models:
        if (name, model) not in cells:
            raise BenchmarkError(
                f"{path}: no row for the image {name!r} of {model}: add it, leave the scores of the whole triplet empty"
                f" to discard it, or resume with `python -m faceprior.human_eval rank {path.parent.parent}`"
            )
    line = cells[name, models[0]][0]
    scores = [cells[name, model][1] for model in models]
    given = [score for score in scores if score is not None]
    if 0 < len(given) < len(scores):
        raise BenchmarkError(
            f"{path}:{line}: the triplet {name!r} is scored in part: score its images without a face as the worst, or"
            " leave all empty to discard it"
        )
    ranking = [RANKED_MODELS - sum(other > score for other in given) for score in given]
    if ranking != given:
        raise BenchmarkError(
            f"{path}:{line}: the scores {_commas(given)} of the triplet {name!r} ({', '.join(models)}) are no ranking:"
            f" a score is 3 minus the number of better images, so this order is written {_commas(ranking)}"
        )


def _ranked_models(rankings: dict[Path, dict[Key, int | None]]) -> set[str]:
    """Return the three models that all annotators rank."""
    first, *others = rankings
    models = {path: {model for _, model in ranking} for path, ranking in rankings.items()}
    for path in others:
        if models[path] != models[first]:
            raise BenchmarkError(
                f"{path} ranks {', '.join(sorted(models[path]))}, but {first} ranks {', '.join(sorted(models[first]))}:"
                " all annotators have to rank the same models"
            )
    return models[first]


def read_comparison(folder: str | Path, methods: tuple[str, ...] = ()) -> Comparison:
    """List the images of a comparison.

    methods: two at least, the first to compare with each of the others; by default all, in natural order. Raises
    FileNotFoundError without images/, BenchmarkError for a broken rule: an image that one of the methods lacks, too.
    """
    folder = Path(folder)
    folders = _image_folders(folder, "a comparison holds its images as images/METHOD/NAME.png")
    found = {path.name: path for path in folders}
    methods = methods or tuple(found)
    if len(methods) < 2 or len(set(methods)) < len(methods) or not set(methods) <= found.keys() or SAME in methods:
        raise BenchmarkError(
            f"the methods to compare have to be two or more of {', '.join(found)}, each once and none called {SAME!r},"
            f" but are {', '.join(methods)}: name them with --methods, the first to compare with each of the others"
        )
    images = {method: _list_images(found[method]) for method in methods}
    names = {name for own in images.values() for name in own}
    if not names:
        raise BenchmarkError(f"{folder / 'images'}: the folders of {', '.join(methods)} hold no image: add some")
    for method, own in images.items():
        for name in sorted(names - own.keys(), key=natural_key):
            raise BenchmarkError(f"{found[method]}: no image {name}.*, which another method has: add it or remove that")
    return Comparison(folder, methods, images)


def read_preferences(folder: str | Path, methods: tuple[str, ...] = ()) -> dict[str, list[Answer]]:
    """Read every person's answers about the images of a folder: RATER -> answers, in their order.

    methods: of a comparison, whose first one is then compared with the others here, too.

    Raises FileNotFoundError where there are none, BenchmarkError for a broken rule.
    """
    files = list(_files(Path(folder) / "preferences", (".csv",)))
    if not files:
        raise FileNotFoundError(
            f"no answers in {Path(folder) / 'preferences'}: `python -m faceprior.human_eval compare {folder}` asks for"
            f" them, or write each person's to RATER.csv, with the columns {','.join(PREFERENCE_COLUMNS)}"
        )
    answers = {path.stem: read_answers(path) for path in files}
    if not any(answers.values()):
        raise BenchmarkError(
            f"{files[0].parent} holds no answer: `python -m faceprior.human_eval compare {folder}` asks"
        )
    orders = {(methods[0], other) for other in methods[1:]}
    orders |= {(answer.first, answer.second) for own in answers.values() for answer in own}
    for first, second in sorted(orders):
        if (second, first) in orders:
            raise BenchmarkError(
                f"{files[0].parent}: {first} is compared with {second}, and {second} with {first}: swap `first` and"
                " `second` in some rows, or name the methods in the other order with --methods"
            )
    return answers


def read_answers(path: str | Path) -> list[Answer]:
    """Read one person's file of PREFERENCE_COLUMNS."""
    path = Path(path)
    answers: dict[tuple[str, frozenset[str]], int] = {}
    found = []
    for line, row in _csv_rows(path, PREFERENCE_COLUMNS):
        answer = Answer(**row)
        methods = {answer.first, answer.second}
        if not all(row.values()) or len(methods) < 2 or SAME in methods:
            raise BenchmarkError(
                f"{path}:{line}: a row names a face and two methods, none called {SAME!r}, but is"
                f" {','.join(row.values())}: fix it"
            )
        if answer.left not in methods or answer.preferred not in methods | {SAME}:
            raise BenchmarkError(
                f"{path}:{line}: `left` has to be {answer.first} or {answer.second}, `preferred` one of them or {SAME},"
                f" but they are {answer.left!r} and {answer.preferred!r}: fix the row"
            )
        key = answer.id, frozenset(methods)
        if key in answers:
            raise BenchmarkError(f"{path}:{line}: the same question is answered in line {answers[key]}: remove one")
        answers[key] = line
        found.append(answer)
    return found


def write_answers(path: str | Path, answers: list[Answer]) -> None:
    """Write one person's file, as `read_answers` returns it; after a crash it is whole, new or old."""
    _write_csv(path, PREFERENCE_COLUMNS, (astuple(answer) for answer in answers))


def _write_csv(path: str | Path, columns: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    with atomic_write(path, "w") as file:
        file.write(text.getvalue())


def read_scores(benchmark: Benchmark) -> dict[str, Scores]:
    """Read scores/, by metric; {} where there is no such folder."""
    paths = list(_files(benchmark.folder / "scores", (".csv", ".jsonl")))
    for path in paths:
        _only_one(path.with_suffix(".csv"), path.with_suffix(".jsonl"))
    return {path.stem: _read_metric(path, benchmark) for path in paths}


def _read_metric(path: Path, benchmark: Benchmark) -> Scores:
    by: set[str] = set()
    if path.suffix == ".csv":
        cells = _read_cells(path, _csv_rows(path, SCORE_COLUMNS), benchmark, _parse_number)
    else:
        cells = _read_cells(path, _measured_rows(path, by), benchmark, lambda score: score)
    for model, images in benchmark.images.items():
        for name in images:
            if (name, model) not in cells:
                raise BenchmarkError(
                    f"{path}: no row for the image {name!r} of {model}: measure it, or add it with an empty score"
                )
    return Scores({key: score for key, (_, score) in cells.items()}, ", ".join(sorted(by)))


def _measured_rows(path: Path, by: set[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield rows of SCORE_COLUMNS, from our own rows or from `faceprior score --json`; `by` collects their "by"."""
    for line, row in _json_rows(path, {}):
        try:
            if "id" in row:
                require_keys(row, {"id": str, "model": str, "score": (float, int, type(None)), "by": str})
                by.add(row["by"])
            else:
                row = _printed_row(row)
        except ValueError as error:
            raise BenchmarkError(f"{path}:{line}: {error}") from error
        yield line, row


def _printed_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row of an image from what `faceprior score --json` printed, with its representative face's score."""
    require_keys(row, {"file": str})
    if "error" in row:
        raise ValueError(f"{row['file']} could not be scored ({row['error']}): fix the image and score it again")
    require_keys(row, {"faces": list})
    file = Path(row["file"])
    return {"id": file.stem, "model": file.parent.name, "score": _representative_score(row["faces"])}


def _representative_score(faces: list[Any]) -> float | None:
    try:
        scores = {Face(face["box"], face.get("landmarks"), 1.0): face["score"] for face in faces}
        score = float(scores[representative_face(list(scores))]) if faces else None
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError("a face has to have a `box` of four numbers and a `score`: score the image again") from error
    if score is not None and not math.isfinite(score):
        raise ValueError(f"`score` has to be finite but is {score}: score the image again")
    return score


def _read_cells(
    path: Path,
    rows: Iterator[tuple[int, dict[str, Any]]],
    benchmark: Benchmark,
    parse: Callable[[Any], Any],
) -> dict[Key, tuple[int, Any]]:
    """Return (prompt id, model) -> (line, parsed score) of rows of SCORE_COLUMNS, one for each image that exists."""
    cells: dict[Key, tuple[int, Any]] = {}
    for line, row in rows:
        key = name, model = row["id"], row["model"]
        if name not in benchmark.images.get(model, {}):
            image = benchmark.folder / "images" / model / name
            raise BenchmarkError(f"{path}:{line}: no image {image}.* found: add the image or remove the row")
        if key in cells:
            raise BenchmarkError(
                f"{path}:{line}: the image {name!r} of {model} is in line {cells[key][0]} already: remove one"
            )
        try:
            cells[key] = line, parse(row["score"])
        except ValueError as error:
            raise BenchmarkError(f"{path}:{line}: {error}") from error
    return cells


def _parse_vote(text: str) -> int | None:
    if text not in ("", "1", "2", "3"):
        raise ValueError(f"`score` has to be 1, 2 or 3 but is {text!r}: give the best 3, or leave it empty to discard")
    return int(text) if text else None


def _parse_number(text: str) -> float | None:
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"`score` has to be a finite number but is {text!r}: leave it empty where there is none")
    return number


def _csv_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line, row) of a CSV file with exactly these columns, in any order."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = reader.fieldnames or ()
            if sorted(header) != sorted(columns):
                raise BenchmarkError(
                    f"{path}:1: the first line has to name the columns {','.join(columns)}, split by commas, but is"
                    f" {','.join(header)!r}: fix it"
                )
            for row in reader:
                if None in row or None in row.values():
                    raise BenchmarkError(
                        f"{path}:{reader.line_num}: a row has to have {len(columns)} cells ({','.join(columns)}): fix"
                        " it (a text with a comma needs quotes)"
                    )
                yield reader.line_num, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise BenchmarkError(f"{path} is no CSV file in UTF-8 ({error}): save it as one") from error


def _json_rows(path: Path, keys: dict[str, type]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, row) of a file of JSON lines whose rows have these keys."""
    rows, problems = read_rows(path)
    if problems:
        place, reason = problems[0]
        raise BenchmarkError(f"{place}: {reason}: fix or remove the line")
    lines = [number for number, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    for line, row in zip(lines, rows, strict=True):
        try:
            require_keys(row, keys)
        except ValueError as error:
            raise BenchmarkError(f"{path}:{line}: {error}: fix the line") from error
        yield line, row


def _files(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Yield a folder's files in natural order, all of these suffixes; a missing folder has none."""
    for path in sorted(folder.iterdir() if folder.is_dir() else (), key=natural_key):
        if not _is_visible(path):
            continue
        if path.suffix not in suffixes or not path.is_file():
            raise BenchmarkError(f"{path} is no {' or '.join(suffixes)} file: save it as one, or move it elsewhere")
        yield path


def _only_one(*paths: Path) -> Path | None:
    found = [path for path in paths if path.is_file()]
    if len(found) > 1:
        raise BenchmarkError(f"{found[0]} and {found[1].name} both exist: keep one")
    return found[0] if found else None


def _is_visible(path: Path) -> bool:
    return not path.name.startswith(".")


def _commas(scores: list[int]) -> str:
    return ",".join(map(str, scores))
