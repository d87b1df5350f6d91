"""The local page on which a person reviews the portraits of stage 3, the last filter of AuthFace (section 3.1).

    python -m faceprior.human_eval review data/portraits       # then open the address that it prints
    python stages/03_curate_portraits.py                       # the same command as before applies the decisions

The page shows one portrait at a time with its caption and what was measured on it, beside the share of all portraits
below it. Every decision is in review.jsonl, beside the manifest, before the next portrait is shown; the same command
resumes. The page moves no files: stage 3 moves rejected portraits to rejected/ and others back. Its rows are

    {"id": "portrait_00003_1a2b3c4d", "decision": "reject", "reason": "retouched skin"}

in the order of the decisions, the last one about a portrait counts; "decision" is keep or reject, "reason" optional.
"""

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from faceprior.config import REVIEW_FILE
from faceprior.human_eval.pages import BLOCKS, EVENTS, make_key, make_magnifier, make_picture
from faceprior.jsonl import MANIFEST, read_rows, require_keys, rewrite_rows
from faceprior.photos import decode_text
from faceprior.sorting import BY_HAND, REJECTED, is_by_hand
from faceprior.tables import markdown_table, number_text

if TYPE_CHECKING:
    import gradio

KEEP, REJECT = "keep", "reject"
DECIDED = {"": "not decided", KEEP: "kept", REJECT: "**rejected**"}

RULES = """
**K** keep. **R** reject. **C** type a reason, **Enter** rejects with it, **Esc** leaves it. **Backspace** takes the
last decision back. **←** **→** look at others, whose decisions can be changed. **Z** magnifies at the pointer.

Keep authentic photographs of one face: sharp, with real skin. Reject what is blurred, noisy or compressed, over-smooth
or retouched, covered, badly lit, misaligned, or no photograph.
"""

UNSEEN = ("id", "image", "thumbnail", "reason")  # of a row: not among its texts

Row = dict[str, Any]


def read_review(path: str | Path) -> dict[str, str]:
    """Return the portraits that a person rejected: id -> reason, empty where there is none.

    path: the page's file (.jsonl), or a text file of ids, one a line. Raises FileNotFoundError without the file,
    ValueError for a line that breaks a rule.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no review file {path}: it lists the ids of rejected portraits, one per line")
    if path.suffix != ".jsonl":
        try:
            return dict.fromkeys(decode_text(path.read_bytes()).split(), "")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text in UTF-8 ({error}): save it as such, with an id a line") from error
    last = {row["id"]: row for row in _read_decisions(path)}
    return {identity: row.get("reason", "") for identity, row in last.items() if row["decision"] == REJECT}


def _read_decisions(path: Path) -> list[Row]:
    rows, problems = read_rows(path)
    for number, row in enumerate(rows, 1):
        try:
            require_keys(row, {"id": str, "decision": str} | ({"reason": str} if "reason" in row else {}))
            if row["decision"] not in (KEEP, REJECT):
                raise ValueError(f"`decision` has to be {KEEP} or {REJECT} but is {row['decision']!r}")
        except ValueError as error:
            problems.append((f"{path}, row {number}", str(error)))
    if problems:
        place, reason = problems[0]
        raise ValueError(f"{place}: {reason}: fix or remove the line")
    return rows


class Portraits(NamedTuple):
    """What there is to review. rows: by id, in their order; measures: name -> all its values, sorted, (N,)."""

    rows: dict[str, Row]
    measures: dict[str, np.ndarray]


class Progress(NamedTuple):
    """Numbers of portraits: decided ones, the rejected ones among them, and all."""

    decided: int
    rejected: int
    total: int


class Review:
    """The decisions about a folder of portraits. All of their state is review.jsonl, read again for every decision.

    Portraits that stage 3 moved to rejected/ by an earlier review are shown, too; where there is no review.jsonl yet,
    their rejection is its beginning.

    Raises FileNotFoundError without a manifest, ValueError for a file that breaks a rule.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.path = self.folder / REVIEW_FILE
        self.portraits = _find_portraits(self.folder)
        if not self.portraits.rows:
            raise ValueError(f"{self.folder / MANIFEST} holds no portrait: stages/03_curate_portraits.py accepts some")

    def _read(self) -> list[Row]:
        if self.path.is_file():
            return _read_decisions(self.path)
        moved = [row for row in self.portraits.rows.values() if "reason" in row]
        return [_decision(row["id"], REJECT, row["reason"].removeprefix(BY_HAND).removeprefix(": ")) for row in moved]

    def decisions(self) -> dict[str, Row]:
        """Return the last row of review.jsonl about each portrait that is there."""
        return {row["id"]: row for row in self._read() if row["id"] in self.portraits.rows}

    def current(self) -> str | None:
        """Return the first portrait without a decision; None when all are decided."""
        decisions = self.decisions()
        return next((identity for identity in self.portraits.rows if identity not in decisions), None)

    def progress(self) -> Progress:
        decisions = [row["decision"] for row in self.decisions().values()]
        return Progress(len(decisions), decisions.count(REJECT), len(self.portraits.rows))

    def neighbour(self, identity: str | None, step: int) -> str:
        """Return the portrait that is `step` places further, the first or last at the ends. None: after the last."""
        order = list(self.portraits.rows)
        place = len(order) if identity is None else order.index(identity)
        return order[min(max(place + step, 0), len(order) - 1)]

    def decide(self, identity: str, decision: str, reason: str = "") -> None:
        """Write a decision, KEEP or REJECT. reason: of a rejection."""
        rewrite_rows(self.path, [*self._read(), _decision(identity, decision, reason)])

    def undo(self) -> str | None:
        """Take back the last decision; returns its portrait, None if there is no decision."""
        rows = self._read()
        if not rows:
            return None
        rewrite_rows(self.path, rows[:-1])
        return rows[-1]["id"] if rows[-1]["id"] in self.portraits.rows else None


def _decision(identity: str, decision: str, reason: str) -> Row:
    given = {"reason": " ".join(reason.split())} if decision == REJECT and reason.strip() else {}
    return {"id": identity, "decision": decision, **given}


def _find_portraits(folder: Path) -> Portraits:
    manifest, rejected = folder / MANIFEST, folder / REJECTED
    if not manifest.is_file():
        raise FileNotFoundError(f"no portraits in {folder}: `python stages/03_curate_portraits.py` makes them")
    return _read_portraits(*(path for path in (manifest, rejected) if path.is_file()))


def _read_portraits(*paths: Path) -> Portraits:
    return _parse_portraits(paths, tuple((path.stat().st_mtime_ns, path.stat().st_size) for path in paths))


@functools.lru_cache(maxsize=1)
def _parse_portraits(paths: tuple[Path, ...], changed: tuple[tuple[int, int], ...]) -> Portraits:
    """Read the rows that have a portrait; 10,000 take a second, so they are kept until the files have changed."""
    rows = [row for path in paths for row in read_rows(path)[0] if isinstance(row.get("image"), str)]
    rows = [row for row in rows if "reason" not in row or is_by_hand(row)]
    by_id = {row["id"]: row for row in sorted(rows, key=lambda row: row["id"])}
    values: dict[str, list[float]] = {}
    for row in by_id.values():
        for name, value in _measures(row).items():
            values.setdefault(name, []).append(value)
    return Portraits(by_id, {name: np.sort(numbers) for name, numbers in values.items()})


def _measures(row: Row) -> dict[str, float]:
    """Return all numbers of a row by their names."""
    numbers = {k: v for k, v in _flat(row).items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {name: float(value) for name, value in numbers.items()}


def _flat(row: Row) -> Row:
    """Return a row with the keys of its objects as its own: {"quality": {"noise": 1}} -> {"noise": 1}."""
    items = (value.items() if isinstance(value, dict) else [(key, value)] for key, value in row.items())
    return {key: value for own in items for key, value in own}


# ---- the page


def review_page(folder: str | Path) -> "gradio.Blocks":
    """Return the page on which a person reviews a folder of stage 3; `pages.launch` serves it, with this folder."""
    import gradio as gr

    with gr.Blocks(title="Review portraits", **BLOCKS) as page:
        name = gr.Textbox(visible="hidden", elem_id="shown")
        shown = gr.Textbox(visible="hidden")
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                picture = make_picture("portrait", large=True)
            with gr.Column(scale=2, min_width=300):
                progress, title = gr.Markdown(elem_id="progress"), gr.Markdown(elem_id="title")
                with gr.Row():
                    keep = make_key("k", "K keep", variant="primary")
                    reject = make_key("r", "R reject", variant="stop")
                    undo = make_key("Backspace", "⌫ take back")
                reason = gr.Textbox(label="Reason of a rejection (optional)", max_length=200, elem_id="reason")
                with gr.Row():
                    before, after = make_key("ArrowLeft", "←"), make_key("ArrowRight", "→")
                    comment = make_key("c", "C reason")
                    make_magnifier()
                details = gr.Markdown(elem_id="details")
                gr.Markdown(RULES)

        view = [name, shown, progress, title, picture, reason, details]
        page.load(functools.partial(_open, folder), None, view, **EVENTS)
        comment.click(None, js="() => { document.querySelector('#reason input, #reason textarea').focus(); }")
        leave = "() => { document.activeElement.blur(); }"
        reason.submit(functools.partial(_act, folder, REJECT), [name, shown, reason], view, **EVENTS)
        reason.submit(None, js=leave)
        for key, button in {KEEP: keep, REJECT: reject, "undo": undo, "before": before, "after": after}.items():
            act = functools.partial(_act, folder, key)
            button.click(act, [name, shown, reason], view, trigger_mode="multiple", **EVENTS)
    return page


def _open(folder: str | Path) -> list[Any]:
    review = Review(folder)
    return _portrait(review, review.current())


def _act(folder: str | Path, key: str, name: str, shown: str, reason: str) -> list[Any]:
    """Return the page after a key. name, shown: the portrait, and its decision, on the page when it was pressed."""
    review = Review(folder)
    identity = name if name in review.portraits.rows else None
    if key in ("before", "after"):
        return _portrait(review, review.neighbour(identity, 1 if key == "after" else -1))
    if key == "undo":
        return _portrait(review, review.undo() or review.current())
    if identity is not None and _decided(review, identity) == shown:  # else an extra key, or decided in another window
        review.decide(identity, key, reason)
    return _portrait(review, review.current())


def _decided(review: Review, identity: str) -> str:
    return review.decisions().get(identity, {}).get("decision", "")


def _portrait(review: Review, identity: str | None) -> list[Any]:
    """Return a portrait as the parts of the page: id, decision, progress, title, picture, reason, details."""
    done = review.progress()
    progress = f"{done.decided} of {done.total} reviewed, {done.rejected} rejected"
    if identity is None:
        thanks = "### All portraits are reviewed\n\n`python stages/03_curate_portraits.py`, with the settings that made"
        return ["", "", progress, thanks + " them, applies the decisions.", None, "", ""]
    row = review.portraits.rows[identity]
    decision = review.decisions().get(identity, {})
    number = list(review.portraits.rows).index(identity) + 1
    title = f"### {number}: `{identity}`, {DECIDED[decision.get('decision', '')]}"
    picture = review.folder / row["image"]
    if not picture.is_file():
        title += f"\n\n`{row['image']}` is missing: stage 3 may have moved it; open the page again."
    image = str(picture) if picture.is_file() else None
    decided, reason = decision.get("decision", ""), decision.get("reason", "")
    return [identity, decided, progress, title, image, reason, _details(review, row)]


def _details(review: Review, row: Row) -> str:
    """Return the caption, then all measures with the share of portraits that are below, and other texts of a row."""
    texts = {key: value for key, value in _flat(row).items() if isinstance(value, str | list) and key not in UNSEEN}
    paragraphs = [f"**{key}** {_plain(value)}" for key, value in texts.items()]
    lines = []
    for name, value in _measures(row).items():
        values = review.portraits.measures[name]
        lines.append((_plain(name), number_text(value), f"{np.searchsorted(values, value) / len(values):.0%}"))
    return "\n\n".join([*paragraphs, markdown_table(("measure", "value", "portraits below"), lines)])


def _plain(value: str | list[Any]) -> str:
    """Return a text, or a list of them, with what Markdown and HTML would take for marks escaped."""
    text = value if isinstance(value, str) else ", ".join(map(str, value))
    return re.sub(r"([\\`*_{}\[\]<>#$~|])", r"\\\1", " ".join(text.split()))
