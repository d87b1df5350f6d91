"""The opening: what each of the three jobs did in this run, before and after, at a glance.

Nothing is chosen by its looks: of the held-out pairs and of the samples it is the middle one by the difference of its
scores, and the first one where there are no scores.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from faceprior.html import EmbeddedImage, Lost
from faceprior.report import pairs, restoration
from faceprior.report.run import NUMBER, STAGES, Run, number
from faceprior.report.summary import format_number

SIDE = 512  # pixels, of an image
SHIPPED = "shipped weights"


@dataclass(frozen=True)
class Job:
    """A job of the product. before, after: None until the stage has made them; about: which images they are.

    shipped: the same by the weights that ship, where the stage has made it, and shipped_name, its caption.
    """

    title: str
    section: str  # key of its section
    text: str
    command: str
    before: EmbeddedImage | None = None
    after: EmbeddedImage | None = None
    names: tuple[str, str] = ("before", "after")
    about: str = ""
    origin: str = ""
    shipped: EmbeddedImage | None = None
    shipped_name: str = ""


def describe(run: Run) -> list[Job | Lost]:
    jobs = (("Score", _score), ("Tune", _tune), ("Restore", _restore))
    return [run.attempt(title, make, run) for title, make in jobs]


def _score(run: Run) -> Job:
    folder = STAGES["02_train_scorer"]
    manifest = {row["id"]: row for row in run.rows(f"{pairs.FOLDER}/manifest.jsonl", {"id": str, "box": list})}
    rows = run.rows(f"{folder}/scores.jsonl", {"id": str, "good": NUMBER, "bad": NUMBER})
    chosen = _middle([row for row in rows if row["id"] in manifest], lambda row: row["good"] - row["bad"])
    text = "One number per face: how natural it looks."
    if chosen is None:
        return Job("Score", "scorer", text, "faceprior score photo.jpg")
    row, count = chosen
    pair = manifest[row["id"]]
    bad, good = (run.image(pairs.FOLDER, pair[s], f"scored {s} face", SIDE, pair["box"]) for s in ("bad", "good"))
    return Job(
        "Score",
        "scorer",
        text,
        "faceprior score photo.jpg",
        bad,
        good,
        (f"bad face: {row['bad']:.1f}", f"good face: {row['good']:.1f}"),
        f"A pair that was not trained on: of {count} the middle one by the difference of its scores.",
        _origin(run, folder),
    )


def _tune(run: Run) -> Job:
    folder = STAGES["04_guidance_tune"]
    rows = run.rows(f"{folder}/samples.jsonl", {"before": str, "after": str})
    scored = [row for row in rows if None not in _scores(row)]
    text, command = "A generator learns to step away from spoiled faces.", "stages/04_guidance_tune.py"
    if not rows:
        return Job("Tune", "guidance", text, command)
    names, about, row = ("untuned", "this run"), "The same prompt and noise: the first sample.", rows[0]
    if scored:
        row, count = _middle(scored, lambda row: _scores(row)[1] - _scores(row)[0])
        names = tuple(f"{name}: {score:.1f}" for name, score in zip(names, _scores(row), strict=True))
        about = f"The same prompt and noise: of {count} samples the middle one by the gain of its Face Score."
    before, after = (run.image(folder, row[side], f"{side} tuning", SIDE) for side in ("before", "after"))
    job = Job("Tune", "guidance", text, command, before, after, names, about, _origin(run, folder))
    if not isinstance(row.get("shipped"), str):
        return job
    score = number(row, "score_shipped")
    name = SHIPPED if score is None else f"{SHIPPED}: {score:.1f}"
    return replace(job, shipped=run.image(folder, row["shipped"], SHIPPED, SIDE), shipped_name=name)


def _restore(run: Run) -> Job:
    rows = run.rows(f"{restoration.FOLDER}/samples.jsonl", dict.fromkeys(restoration.KINDS, str))
    text, command = "Faces are found, cleaned and pasted back.", "faceprior restore photo.jpg -o restored"
    if not rows:
        return Job("Restore", "restoration", text, command)
    names = ("degraded", "restored")
    before, after = (run.image(restoration.FOLDER, rows[0][name], f"{name} face", SIDE) for name in names)
    about = "A face of the training set, degraded anew: the first sample."
    return Job("Restore", "restoration", text, command, before, after, names, about, _origin(run, restoration.FOLDER))


def _scores(row: dict) -> list[float | None]:
    return [number(row, f"score_{side}") for side in ("before", "after")]


def _middle(rows: list[dict], key: Callable[[dict], float]) -> tuple[dict, int] | None:
    """Return the row in the middle by `key`, and how many there are; None without any."""
    return (sorted(rows, key=key)[len(rows) // 2], len(rows)) if rows else None


def _origin(run: Run, folder: str) -> str:
    """Say which part of the weights this run made."""
    steps, shipped = number(run.read(f"{folder}/done.json"), "steps"), run.read(f"{folder}/tiny.json")
    if steps is None:
        return "By the stage's weights so far."
    here = f"{format_number(steps)} steps of this run"
    if not shipped:
        return f"By {here}."
    return f"By {here}, on the tiny weights that ship with faceprior{'' if _is_trained(shipped) else ', untrained'}."


def _is_trained(info: dict[str, Any]) -> bool:
    return info.get("trained") is True
