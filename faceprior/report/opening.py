"""The opening: what each of the three jobs did, before and after, at a glance.

Nothing is chosen by its looks: of the held-out pairs, the samples and the evaluated faces it is the middle one by the
difference of its scores, and the first one where there are no scores.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from faceprior.evaluation.methods import INPUT, REFERENCE
from faceprior.html import EmbeddedImage, Lost
from faceprior.report import evaluation, pairs, restoration
from faceprior.report.run import NUMBER, STAGES, Run, number
from faceprior.report.summary import format_number

SIDE = 512  # pixels, of an image
SHIPPED = "shipped weights"


@dataclass(frozen=True)
class Job:
    """A job of the product. before, after: None until the stage has made them; about: which images they are.

    third: the same by this run, where `after` is by the weights that ship, and third_name, its caption.
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
    third: EmbeddedImage | None = None
    third_name: str = ""


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
    """Where the weights that ship have drawn, too, they are what is shown: this run may be a short trial."""
    folder = STAGES["04_guidance_tune"]
    rows = run.rows(f"{folder}/samples.jsonl", {"before": str, "after": str})
    text, command = "A generator learns to step away from spoiled faces.", "stages/04_guidance_tune.py"
    if not rows:
        return Job("Tune", "guidance", text, command)
    sides = {"before": "untuned", "after": "this run"}
    if all(isinstance(row.get("shipped"), str) for row in rows):
        sides = {"before": "untuned", "shipped": SHIPPED, "after": "this run"}
    ends = list(sides)[:2]
    row, which = _chosen(rows, [f"score_{side}" for side in ends], "sample")
    alts = {"before": "before tuning", "after": "after tuning", "shipped": SHIPPED}
    before, after, *third = (run.image(folder, row[side], alts[side], SIDE) for side in sides)
    names = [_name(text, number(row, f"score_{side}")) for side, text in sides.items()]
    origin = _origin(run, folder)
    if third:
        origin = f"Right: by the LoRA that ships. Below: {origin[0].lower()}{origin[1:]}"
    about = f"The same prompt and noise: {which}."
    return Job(
        "Tune", "guidance", text, command, before, after, (names[0], names[1]), about, origin, *third, *names[2:]
    )


def _restore(run: Run) -> Job:
    """Faces of the evaluation where there are any: the restorer may have been trained on those of its own samples."""
    text, command = "Faces are found, cleaned and pasted back.", "faceprior restore photo.jpg -o restored"
    names, folder = ("degraded", "restored"), restoration.FOLDER
    method, rows = _evaluated(run)
    if rows:
        row, which = _chosen(rows, [f"score_{name}" for name in names], "face")
        before, after = (run.image(evaluation.FOLDER, row[name], f"{name} face", SIDE) for name in names)
        origin = _origin(run, folder) if row["source"] == folder else f"By {run.plain(method)}."
        names = tuple(_name(name, row[f"score_{name}"]) for name in names)
        return Job("Restore", "evaluation", text, command, before, after, names, f"Of the evaluation: {which}.", origin)
    rows = run.rows(f"{folder}/samples.jsonl", dict.fromkeys(restoration.KINDS, str))
    if not rows:
        return Job("Restore", "restoration", text, command)
    before, after = (run.image(folder, rows[0][name], f"{name} face", SIDE) for name in names)
    about = "A face of the training set, degraded anew: the first sample."
    return Job("Restore", "restoration", text, command, before, after, names, about, _origin(run, folder))


def _evaluated(run: Run) -> tuple[str, list[dict]]:
    """Return the first evaluated model that restores, and a row of images and scores for each of its faces.

    Folders of finished images count only where no model restored: they may be another program's.
    """
    found = {
        method: rows
        for (protocol, method), rows in evaluation.images_by_method(run).items()
        if protocol == "restoration"
    }
    others = [name for name in found if name not in (INPUT, REFERENCE)]
    models = [name for name in others if any("seconds" in row for row in found[name].values())]
    method = next(iter(models or others), "")
    return method, [
        {
            "degraded": found[INPUT][item]["image"],
            "restored": row["image"],
            "score_degraded": number(found[INPUT][item], "face_score"),
            "score_restored": number(row, "face_score"),
            "source": row.get("source"),
        }
        for item, row in found.get(method, {}).items()
        if item in found.get(INPUT, {})
    ]


def _chosen(rows: list[dict], scores: list[str], what: str) -> tuple[dict, str]:
    """Return the row in the middle by the gain from one score to the other, and which of the rows that is."""
    scored = [row for row in rows if None not in [number(row, key) for key in scores]]
    chosen = _middle(scored, lambda row: number(row, scores[1]) - number(row, scores[0]))
    if chosen is None:
        return rows[0], f"the first {what}"
    row, count = chosen
    return row, f"of {count} {what}s the middle one by the gain of its Face Score"


def _name(text: str, score: float | None) -> str:
    return text if score is None else f"{text}: {score:.1f}"


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
