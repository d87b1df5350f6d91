"""The local page on which people compare two images of a face at a time (AuthFace, appendix C and Table 5).

    python -m faceprior.human_eval compare FOLDER --methods ours other another    # then open the address that it prints

The page shows the first method's image of a face beside that of another method, "A" and "B", without their names. Each
person sees the questions in an order, and the sides, of their own. Every answer, with the side, is in
FOLDER/preferences/NAME.csv before the next question is shown; the same name resumes.
`python -m faceprior.human_eval preferences FOLDER` makes the table of the answers.
"""

import functools
import random
from typing import TYPE_CHECKING, Any, NamedTuple

from faceprior.human_eval.files import SAME, Answer, Comparison, read_answers, write_answers
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

SIDES = ("A", "B")

RULES = """
- Two images of the same face. Which is the better one: more **authentic** and more **pleasing**?
- Where both are equally good, or equally bad, say so.
"""

KEYS = """
**1** A is better. **2** B is better. **=** both are equally good. **Backspace** takes back the last answer.
**Z** magnifies both at the place of the pointer.
"""


class Question(NamedTuple):
    """A face and the two methods whose images of it are compared."""

    id: str
    first: str
    second: str


class Comparing:
    """One person's answers about a comparison. All of their state is the person's file, read again for every answer.

    Raises BenchmarkError for a file or a name that breaks a rule.
    """

    def __init__(self, comparison: Comparison, rater: str):
        self.comparison, self.rater = comparison, require_name(rater)
        self.path = comparison.folder / "preferences" / f"{self.rater}.csv"
        first, *others = comparison.methods
        self.questions = [Question(name, first, other) for name in comparison.images[first] for other in others]
        random.Random(self.rater).shuffle(self.questions)
        self._read()

    def _read(self) -> list[Answer]:
        return read_answers(self.path) if self.path.is_file() else []

    def current(self) -> int | None:
        """Return the number of the first question without an answer; None when all are answered."""
        answered = set(map(_question_of, self._read()))
        return next((i for i, question in enumerate(self.questions) if question not in answered), None)

    def answered(self) -> int:
        """Return how many of the questions are answered."""
        return len(set(self.questions) & set(map(_question_of, self._read())))

    def shown(self, number: int) -> tuple[str, str]:
        """Return the methods of A and B: sides at random, always alike for a question and a person."""
        name, *methods = self.questions[number]
        random.Random("/".join((self.rater, name, *methods))).shuffle(methods)
        return methods[0], methods[1]

    def answer(self, number: int, side: str) -> None:
        """Write the answer to a question. side: of the better image, A or B, or SAME."""
        shown = self.shown(number)
        preferred = dict(zip(SIDES, shown, strict=True)).get(side, SAME)
        write_answers(self.path, [*self._read(), Answer(*self.questions[number], shown[0], preferred)])

    def undo(self) -> None:
        """Take back the last answer to one of the questions, if there is one."""
        answers = self._read()
        own = [answer for answer in answers if _question_of(answer) in self.questions]
        if own:
            answers.remove(own[-1])
            write_answers(self.path, answers)


def _question_of(answer: Answer) -> Question:
    return Question(answer.id, answer.first, answer.second)


def compare_page(comparison: Comparison) -> "gradio.Blocks":
    """Return the page on which people compare; `pages.launch` serves it."""
    import gradio as gr

    with gr.Blocks(title="Compare faces", **BLOCKS) as page:
        rater = gr.State()
        entry = make_entry("Compare faces", RULES)
        with gr.Column(visible=False) as desk:
            with gr.Row():
                title, progress = gr.Markdown(elem_id="title"), gr.Markdown(elem_id="progress")
            number = gr.Textbox(visible="hidden", elem_id="shown")
            with gr.Row():
                images = []
                for side in SIDES:
                    with gr.Column(min_width=300):
                        gr.Markdown(f"### {side}")
                        images.append(make_picture(side, large=True))
            with gr.Row():
                keys = {"A": make_key("1", "1 A is better"), SAME: make_key("=", "= equally good")}
                keys |= {"B": make_key("2", "2 B is better"), "undo": make_key("Backspace", "⌫ take back")}
                make_magnifier()
            gr.Markdown(KEYS + RULES)

        view = [number, title, progress, *images]
        entry.start(functools.partial(_start, comparison), [desk, rater, *view])
        for key, button in keys.items():
            act = functools.partial(_act, comparison, key)
            button.click(act, [rater, number], view, trigger_mode="multiple", **EVENTS)
    return page


def _start(comparison: Comparison, rater: str) -> list[Any]:
    """Return the updates from the entry to the desk, or what is wrong with the name."""
    import gradio as gr

    def begin() -> list[Any]:
        comparing = Comparing(comparison, rater)
        return [gr.update(visible=True), comparing.rater, *_question(comparing)]

    return enter(begin, 5 + len(SIDES))


def _act(comparison: Comparison, key: str, rater: str, number: str) -> list[Any]:
    """Return the page after a key. number: of the question that was on the page when it was pressed."""
    comparing = Comparing(comparison, rater)
    current = comparing.current()
    if number == _text(current):  # else an extra key, or answered in another window
        if key == "undo":
            comparing.undo()
        elif current is not None:
            comparing.answer(current, key)
    return _question(comparing)


def _question(comparing: Comparing) -> list[Any]:
    """Return the next question as the parts of the page: its number, title, progress, images."""
    number = comparing.current()
    progress = f"{comparing.answered()} of {len(comparing.questions)} compared"
    if number is None:
        thanks = f"### All are compared. Thank you!\n\nThe answers are in `{comparing.path}`."
        return ["", thanks, progress, *[None] * len(SIDES)]
    name = comparing.questions[number].id
    images = [load_or_warn(comparing.comparison.images[method][name]) for method in comparing.shown(number)]
    title = "### Which face is better?"
    if empty := [side for side, image in zip(SIDES, images, strict=True) if image is None]:
        title += f"\n\nCannot be read: image {', '.join(empty)}."
    return [_text(number), title, progress, *images]


def _text(number: int | None) -> str:
    return "" if number is None else str(number)
