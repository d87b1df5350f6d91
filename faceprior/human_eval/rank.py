"""The local page on which people rank the faces of a benchmark (Face Score, 4.2 and 8.4; AuthFace, Table 3).

    python -m faceprior.human_eval rank FOLDER           # then open the address that it prints

The page shows a prompt and its three images in an order that does not reveal the models. Every answer is in
FOLDER/rankings/NAME.csv before the next triplet is shown; the same name resumes. `python -m faceprior.human_eval tables
FOLDER` makes the tables of the answers.
"""

import functools
import random
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from faceprior.human_eval.files import (
    RANKED_MODELS,
    Benchmark,
    BenchmarkError,
    read_ranking,
    write_ranking,
)
from faceprior.human_eval.pages import (
    BLOCKS,
    EVENTS,
    enter,
    load_or_warn,
    make_entry,
    make_key,
    make_magnifier,
    make_picture,
    require_name,
)

if TYPE_CHECKING:
    import gradio

PLACES = ("1", "2", "3")  # of the images, from left to right

VIEW = 5 + len(PLACES)  # parts of the page that a triplet fills

RULES = """
- Look at the **faces** only. Whether the image fits the prompt, its composition and its beauty do not count.
- A **plausible** face comes first, a beautiful one second.
- In an image of several people, compare the most frontal and representative face.
- Where only some images lack a face, those are the worst. Where **no image** has a valid face, discard the triplet.
"""

KEYS = """
**1** **2** **3** the best image first, then the next, then the worst. **=** before an image: as good as the last.
**0** no image has a valid face. **Backspace** takes back: the last key, or the last triplet. **Z** magnifies.
"""


class Progress(NamedTuple):
    """Numbers of triplets: answered ones, the discarded ones among them, and all."""

    answered: int
    discarded: int
    total: int


class Ranking:
    """One annotator's ranking of a benchmark. All of its state is the annotator's file, read again for every answer.

    models: which three to rank, needed where the benchmark has more; an annotator's file keeps its own.
    Raises BenchmarkError for a file, a name or models that break a rule.
    """

    def __init__(self, benchmark: Benchmark, annotator: str, models: tuple[str, ...] = ()):
        self.benchmark, self.annotator = benchmark, require_name(annotator)
        self.path = self.benchmark.folder / "rankings" / f"{self.annotator}.csv"
        self.models = _ranked_models(self.benchmark.images, {model for _, model in self._read()} | set(models))
        for model in self.models:
            for name in self.benchmark.prompts.keys() - self.benchmark.images[model].keys():
                image = self.benchmark.folder / "images" / model / f"{name}.png"
                raise BenchmarkError(f"no image of {model} for the prompt {name!r}: add {image}, or remove the prompt")

    def _read(self) -> dict[tuple[str, str], int | None]:
        return read_ranking(self.path, self.benchmark, complete=False) if self.path.is_file() else {}

    def current(self) -> str | None:
        """Return the id of the first prompt without an answer; None when all are answered."""
        answered = {name for name, _ in self._read()}
        return next((name for name in self.benchmark.prompts if name not in answered), None)

    def progress(self) -> Progress:
        scores = {name: score for (name, _), score in self._read().items()}
        return Progress(len(scores), sum(score is None for score in scores.values()), len(self.benchmark.prompts))

    def shown(self, name: str) -> list[str]:
        """Return the models in the order of their places: shuffled, always alike for a prompt and an annotator."""
        models = list(self.models)
        random.Random(f"{self.annotator}/{name}").shuffle(models)
        return models

    def images(self, name: str) -> list[Image.Image | None]:
        """Return the images of a prompt by their places; None, and a warning in the log, where one cannot be read."""
        return [load_or_warn(self.benchmark.images[model][name]) for model in self.shown(name)]

    def answer(self, name: str, scores: list[int] | None) -> None:
        """Write the scores of a prompt's images by their places, or None to discard the triplet."""
        ranking = self._read()
        places = dict(zip(self.shown(name), scores or [None] * RANKED_MODELS, strict=True))
        ranking |= {(name, model): places[model] for model in self.models}
        write_ranking(self.path, ranking)

    def undo(self) -> None:
        """Take back the last answer, if there is one."""
        ranking = self._read()
        if ranking:
            last = [*ranking][-1][0]
            write_ranking(self.path, {key: score for key, score in ranking.items() if key[0] != last})


def _ranked_models(images: dict[str, Any], wanted: set[str]) -> tuple[str, ...]:
    models = tuple(model for model in images if model in (wanted or images))
    if len(models) != RANKED_MODELS or wanted - images.keys():
        raise BenchmarkError(
            f"a triplet has {RANKED_MODELS} models, but these are {', '.join(sorted(wanted or images))}: name three of"
            f" {', '.join(images)} with --models"
        )
    return models


def press(order: str, key: str) -> str:
    """Return the order so far, such as "2>1", after a key: a place ("3" -> "2>1>3"), or "=" ("=", "3" -> "2>1=3")."""
    if key == "=":
        return order if not order or order.endswith("=") else order + "="
    if key in order:
        return order
    return order + key if not order or order.endswith("=") else f"{order}>{key}"


def take_back(order: str) -> str:
    """Return the order before its last key."""
    return order[:-1] if "=" in order[-2:] else order[:-2]


def is_whole(order: str) -> bool:
    return all(place in order for place in PLACES)


def order_scores(order: str) -> list[int]:
    """Return the score of each place, 3 minus the number of better ones: "2>1=3" -> [2, 3, 2]."""
    groups = [group.split("=") for group in order.split(">")]
    better = {place: sum(map(len, groups[:i])) for i, group in enumerate(groups) for place in group}
    return [RANKED_MODELS - better[place] for place in PLACES]


def rank_page(benchmark: Benchmark, models: tuple[str, ...] = ()) -> "gradio.Blocks":
    """Return the page on which people rank; `launch` serves it. models: as for `Ranking`."""
    import gradio as gr

    with gr.Blocks(title="Rank faces", **BLOCKS) as page:
        annotator, order = gr.State(), gr.State()
        entry = make_entry("Rank faces", RULES)
        with gr.Column(visible=False) as desk:
            with gr.Row():
                prompt, progress = gr.Markdown(elem_id="prompt"), gr.Markdown(elem_id="progress")
            name = gr.Textbox(visible="hidden", elem_id="shown")
            with gr.Row():
                images, buttons = zip(*(_place(place) for place in PLACES), strict=True)
            line = gr.Markdown(elem_id="order")
            with gr.Row():
                tie = make_key("=", "= as good as the last")
                discard = make_key("0", "0 no valid face")
                undo = make_key("Backspace", "⌫ take back")
                make_magnifier()
            gr.Markdown(KEYS + RULES)

        view = [name, order, line, prompt, progress, *images]
        entry.start(functools.partial(_start, benchmark, models), [desk, annotator, *view])
        keys = dict(zip(PLACES, buttons, strict=True)) | {"=": tie, "discard": discard, "undo": undo}
        for key, button in keys.items():
            act = functools.partial(_act, benchmark, models, key)
            button.click(act, [annotator, name, order], view, trigger_mode="multiple", **EVENTS)
    return page


def _place(place: str) -> "tuple[gradio.Image, gradio.Button]":
    import gradio as gr

    with gr.Column(min_width=200):
        return make_picture(place), make_key(place, place)


def _start(benchmark: Benchmark, models: tuple[str, ...], annotator: str) -> list[Any]:
    """Return the updates from the entry to the desk, or what is wrong with the name."""
    import gradio as gr

    def begin() -> list[Any]:
        ranking = Ranking(benchmark, annotator, models)
        return [gr.update(visible=True), ranking.annotator, *_triplet(ranking)]

    return enter(begin, 2 + VIEW)


def _act(benchmark: Benchmark, models: tuple[str, ...], key: str, annotator: str, name: str, order: str) -> list[Any]:
    """Return what a key does to the triplet `name` that was on the page when it was pressed."""
    import gradio as gr

    ranking = Ranking(benchmark, annotator, models)
    if (ranking.current() or "") != name:  # an extra key, or answered in another window
        return _triplet(ranking)
    if key == "undo" and not order:
        ranking.undo()
    elif not name:
        return [gr.skip()] * VIEW
    elif key == "discard":
        ranking.answer(name, None)
    else:
        order = take_back(order) if key == "undo" else press(order, key)
        if not is_whole(order):
            return [gr.skip(), order, _order_line(order), *[gr.skip()] * (VIEW - 3)]
        ranking.answer(name, order_scores(order))
    return _triplet(ranking)


def _triplet(ranking: Ranking) -> list[Any]:
    """Return the next triplet, as the VIEW parts of the page: its id, order, line, prompt, progress, images."""
    name, done = ranking.current(), ranking.progress()
    progress = f"{done.answered} of {done.total} ranked"
    if done.discarded:
        progress += f", {done.discarded} of them discarded"
    if name is None:
        thanks = f"### All triplets are ranked. Thank you!\n\nThe answers are in `{ranking.path}`."
        return ["", "", _order_line(""), thanks, progress, *[None] * len(PLACES)]
    prompt, images = f"### {ranking.benchmark.prompts[name]}", ranking.images(name)
    if empty := [place for place, image in zip(PLACES, images, strict=True) if image is None]:
        prompt += f"\n\nCannot be read: image {', '.join(empty)}. Rank it last, or discard the triplet."
    return [name, "", _order_line(""), prompt, progress, *images]


def _order_line(order: str) -> str:
    return f"## {' '.join(order).replace('>', '&gt;')}" if order else "## &nbsp;"
