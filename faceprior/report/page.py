"""The page: its sections in the order of the stages, its head, and the HTML that the templates make of them."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from faceprior.files import atomic_write
from faceprior.html import Lost, environment
from faceprior.report import evaluation, making, opening, pairs, photographs, portraits, restoration, scorer, tuning
from faceprior.report.charts import Chart
from faceprior.report.run import BAD_INPUT, STAGES, Run, stage_folders

MAX_BYTES = 8_000_000  # of the file; above it, all images are embedded smaller
SCALES = (1.0, 0.7, 0.5, 0.35)  # of the images' sides, tried in turn
PROBLEMS = 50  # most that are listed


@dataclass(frozen=True)
class Section:
    """One part of the report, made by a stage or, without one, always there.

    describe: what its template shows, once the stage has written `file` to its folder. photographs: template and values
    of what it shows of the real photographs, with or without the stage. summary: its line in the contents, filled from
    done.json.
    """

    key: str
    title: str
    intro: str
    template: str
    describe: Callable[[Run], dict[str, Any]]
    summary: str
    stage: str = ""
    file: str = "metrics.jsonl"
    done: str = "done.json"
    photographs: tuple[str, Callable[[Run], dict[str, Any]]] | None = None

    @property
    def command(self) -> str:
        return f"python stages/{self.stage}.py"

    def folder(self, run: Run) -> Path:
        return run.path(STAGES[self.stage])

    def state(self, run: Run) -> str:
        """Return "not run", "started" (nothing to show yet), "not finished" or "finished"."""
        if not self.stage:
            return "finished"
        if not (self.folder(run) / self.file).is_file():
            return "started" if any(self.folder(run).glob("*")) else "not run"
        return "finished" if (self.folder(run) / self.done).is_file() else "not finished"


SECTIONS = (
    Section(
        "pairs",
        "Pairs of a good and a bad face",
        "A photograph is the good side. Its face is masked and inpainted by an ordinary diffusion model, with more "
        "noise the larger the face: the bad side. Outside of the mask both are the same, pixel for pixel.",
        "pairs.html",
        pairs.describe,
        "{pairs} pairs, {rejected} rejected",
        "01_make_pairs",
        file="manifest.jsonl",
    ),
    Section(
        "scorer",
        "The face scorer",
        "A vision-language network learns to give the good face of a pair the higher score. A score has no unit; only "
        "the order counts.",
        "scorer.html",
        scorer.describe,
        "accuracy {start_accuracy:.0%}, then {accuracy:.0%}",
        "02_train_scorer",
        photographs=("scored.html", photographs.scored),
    ),
    Section(
        "portraits",
        "Portraits for the prior",
        "The prior learns from sharp and clean faces only. Each photograph is aligned, measured and captioned; one "
        "that fails a limit is rejected with the number that failed.",
        "portraits.html",
        portraits.describe,
        "{accepted} accepted, {rejected} rejected",
        "03_curate_portraits",
        file="manifest.jsonl",
    ),
    Section(
        "guidance",
        "Guidance tuning",
        "The generator is tuned on the pairs: given a face with noise, its prediction is pushed from the bad face "
        "towards the good one. Below, images of the same prompts from the same noise.",
        "tuning.html",
        functools.partial(tuning.describe, folder=STAGES["04_guidance_tune"], loss="guidance loss"),
        "{steps} steps on {pairs} pairs",
        "04_guidance_tune",
    ),
    Section(
        "prior",
        "Prior tuning",
        "The generator is tuned on the accepted portraits and their captions, so that it knows what clean skin, eyes "
        "and light look like. It is the prior of the restorer.",
        "tuning.html",
        functools.partial(tuning.describe, folder=STAGES["05_prior_tune"], loss="noise prediction error (MSE)"),
        "{steps} steps on {portraits} portraits",
        "05_prior_tune",
    ),
    Section(
        "restoration",
        "Restoration",
        "A ControlNet learns to steer the prior with a degraded face. Move the dividers, by mouse, finger or arrow "
        "keys, to compare.",
        "restoration.html",
        restoration.describe,
        "{steps} steps on {faces} faces",
        "06_train_restorer",
        photographs=("restored.html", photographs.restored),
    ),
    Section(
        "evaluation",
        "Evaluation",
        "Measured on prompts, seeds and faces that were not trained on. A number that cannot be measured here says "
        "why.",
        "evaluation.html",
        evaluation.describe,
        "measured",
        "07_eval",
        file="results.json",
        done="results.json",
    ),
    Section(
        "making",
        "How it was made",
        "The commands that were run, the versions of the libraries, and the settings.",
        "making.html",
        making.describe,
        "commands, versions, settings",
    ),
)


def write_report(root: str | Path, path: str | Path, folders: Iterable[str | Path] = ()) -> Path:
    """Write what the stages left below `root` as one self-contained HTML file, whole or not at all; returns `path`.

    folders: to which stages wrote that were given another `--output`; they take the place of those below `root`.
    Images are embedded at a size that keeps the file below about 8 MB. Raises FileNotFoundError without `root`, and for
    a folder that no stage wrote; ValueError for two folders of one stage.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: `make demo` makes results/demo")
    return _write(root, Path(path), page, stage_folders(folders))


def write_evaluation(folder: str | Path, path: str | Path) -> Path:
    """Write what stage 7 left in a folder as one self-contained HTML file, as `write_report` does; returns `path`."""
    return _write(Path(folder), Path(path), evaluation_page)


def _write(root: Path, path: Path, make: Callable[[Run], str], folders: Mapping[str, Path] | None = None) -> Path:
    for scale in SCALES:
        text = make(Run(root, scale, folders or {})).encode("utf-8", "replace")
        if len(text) <= MAX_BYTES:
            break
    with atomic_write(path) as file:
        file.write(text)
    return path


def evaluation_page(run: Run) -> str:
    """Return the page of the evaluation in the folder `run.root` as HTML."""
    results = run.read("results.json")
    shown = run.attempt("results.json", evaluation.describe, run, ".", evaluation.ENDS)
    body = shown if isinstance(shown, Lost) else _render("evaluation.html", section=None, state="", **shown)
    problems = list(run.problems.items())
    return _render(
        "evaluation_page.html",
        body=body,
        methods=run.attempt("results.json", evaluation.sources, run, results),
        versions=run.attempt("results.json", evaluation.versions, run, results),
        settings=making.settings_text(run, "."),
        problems=problems[:PROBLEMS],
        more=f"{len(problems) - PROBLEMS:,}" if len(problems) > PROBLEMS else None,
    )


def page(run: Run) -> str:
    """Return the whole page as HTML."""
    # ---- one section after the other: (key, title, summary, body)
    parts = [
        (section.key, section.title, _summary(run, section), run.attempt(section.title, _section, run, section))
        for section in SECTIONS
    ]
    banner, jobs = _banner(run), opening.describe(run)

    # ---- what all of the above could not read
    if run.problems:
        problems = list(run.problems.items())
        more = f"{len(problems) - PROBLEMS:,}" if len(problems) > PROBLEMS else None
        body = _render("problems.html", problems=problems[:PROBLEMS], more=more)
        parts.append(("problems", "What could not be read", f"{len(problems)} named", body))
    return _render("run_page.html", parts=parts, banner=banner, jobs=jobs)


def _section(run: Run, section: Section) -> Markup:
    state = section.state(run)
    if state in ("not run", "started"):
        body = _render("not_made.html", section=section, state=state)
    else:
        body = _render(section.template, section=section, state=state, **section.describe(run))
    if section.photographs:
        template, describe = section.photographs
        body += _render(template, **describe(run))
    return body


def _summary(run: Run, section: Section) -> str:
    """Return a section's line in the contents."""
    state = section.state(run)
    if state != "finished":
        return "not made" if state in ("not run", "started") else state
    try:
        done = run.read(f"{STAGES[section.stage]}/done.json") if section.stage else {}
        return section.summary.format_map(done)[:60]
    except BAD_INPUT:
        return "made"


def _banner(run: Run) -> dict[str, str] | None:
    """Say which networks are small, and which of them started untrained."""
    names = {"scorer": "scorer", "guided": "tuned generator", "prior": "portrait prior", "restorer": "restorer"}
    found = {name: run.read(f"checkpoints/{folder}/tiny.json") for folder, name in names.items()}
    tiny = [name for name, info in found.items() if info]
    if not tiny:
        return None
    untrained = [name for name in tiny if found[name].get("trained") is not True]
    who = f"The {'networks' if len(tiny) == len(names) else _listed(tiny)} behind these images"
    who += " is" if len(tiny) == 1 else " are"
    if not untrained:
        text = (
            f"{who} small, made for trying the tools out in place of the published models. Expect rough images, and "
            "read the numbers as those of small models."
        )
        return {"title": "Small networks.", "text": text}
    some = "" if untrained == tiny else f" ({_listed(untrained)})"
    text = (
        f"{who} small and had not been trained{some} before the few steps of this run. Expect noise where a face "
        "should be, and read scores and tables as a test of the code: they say nothing about the method."
    )
    return {"title": "Untrained networks.", "text": text}


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


# ---- templates


def svg(charts: Sequence[Chart]) -> str:
    """Return charts side by side as one SVG file."""
    width = sum(chart.axes.width for chart in charts)
    height = max(chart.axes.height + _HEAD * (1 + len(chart.series)) for chart in charts)
    return str(_render("charts.svg", charts=charts, width=width, height=height, line=_HEAD))


_HEAD = 18  # height of a line above a chart


def _render(template: str, **values: Any) -> Markup:
    return Markup(_environment().get_template(template).render(values))


@functools.cache
def _environment() -> Environment:
    return environment(Path(__file__).with_name("templates"))
