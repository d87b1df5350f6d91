"""The report: one HTML file, pictures embedded, that shows what each stage made below a folder.

    python -m faceprior.report results/demo                  # writes results/demo/report.html

It reads what is there. A stage that was not run is named with its command; a file that cannot be read is named at the
end, and the rest is written.
"""

import argparse
import platform
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template
from typing import Any

import faceprior
from faceprior.images import atomic_write
from faceprior.report.parts import (
    BAD_INPUT,
    Markup,
    Run,
    chips,
    duration,
    format_number,
    missing,
    not_made,
    number,
    render,
    table,
    tag,
)
from faceprior.report.sections import (
    restored_photographs,
    scored_photographs,
    write_pairs,
    write_portraits,
    write_restoration,
    write_scorer,
    write_tuning,
)

REPORT_FILE = "report.html"


TEMPLATE = Path(__file__).with_name("report.html")


MAX_BYTES = 8_000_000  # of the file; above it, all pictures are embedded smaller


SCALES = (1.0, 0.7, 0.5, 0.35)  # of the pictures' sides, tried in turn


PROBLEMS = 50  # most that are listed


PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class Section:
    """One part of the report: what it shows, who writes it, and the stage that makes it, if it is a stage's.

    folder: of the stage, below the root; file: without which there is nothing to show; summary: filled from done.json;
    photographs: what the part shows even when its stage was not run.
    """

    key: str
    title: str
    intro: str
    write: Callable[[Run, Markup], Markup]
    summary: str
    stage: str = ""
    folder: str = ""
    file: str = "metrics.jsonl"
    photographs: Callable[[Run], Markup] | None = None

    @property
    def command(self) -> str:
        return f"python stages/{self.stage}.py"

    def is_made(self, run: Run) -> bool:
        return not self.stage or (run.root / self.folder / self.file).is_file()

    def is_finished(self, run: Run) -> bool:
        done = "results.json" if self.file == "results.json" else "done.json"
        return not self.stage or (run.root / self.folder / done).is_file()


def write_report(root: str | Path, path: str | Path) -> Path:
    """Write what the stages left below `root` as one self-contained HTML file, whole or not at all; returns `path`.

    Pictures are embedded at a size that keeps the file below about 8 MB. Raises FileNotFoundError without `root`.
    """
    root, path = Path(root), Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: `make demo` makes results/demo")
    for scale in SCALES:
        text = page(Run(root, scale)).encode("utf-8", "replace")
        if len(text) <= MAX_BYTES:
            break
    with atomic_write(path) as file:
        file.write(text)
    return path


def page(run: Run) -> str:
    """Return the whole page as HTML."""
    titles = [(section.key, section.title, _state(run, section)) for section in SECTIONS]
    bodies = [run.attempt(section.title, _section, run, section) for section in SECTIONS]
    head = _head(run)
    if run.problems:
        titles.append(("problems", "What could not be read", f"{len(run.problems)} named"))
        bodies.append(_problems(run))
    links, parts = [], []
    for place, ((key, title, state), body) in enumerate(zip(titles, bodies, strict=True), 1):
        links.append(tag("li", tag("a", f"{place}. {title}", href=f"#{key}"), tag("span", state)))
        parts.append(tag("section", tag("h2", f"{place}. {title}"), body, id=key))
    contents = tag("nav", tag("ol", links), aria_label="Contents")
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title="faceprior: report", body=render(tag("header", head, contents), parts))


def _section(run: Run, section: Section) -> Markup:
    """Write a section, or say in one line which command makes what it shows."""
    intro = tag("p", section.intro)
    if section.is_made(run):
        more = missing("This stage is not finished: ", tag("code", section.command), " goes on with it.")
        return section.write(run, intro if section.is_finished(run) else render(intro, more))
    started = any((run.root / section.folder).glob("*"))
    note = not_made("Started, but nothing to show yet" if started else "This stage was not run", section.command)
    return render(intro, note, section.photographs(run) if section.photographs else None)


def _state(run: Run, section: Section) -> str:
    """Return what the contents say of a section."""
    if not section.is_made(run):
        return "not made"
    if not section.is_finished(run):
        return "not finished"
    try:
        return section.summary.format_map(run.read(f"{section.folder}/done.json"))[:60]
    except BAD_INPUT:
        return "made"


def _head(run: Run) -> Markup:
    lead = (
        "faceprior makes the faces of diffusion models better on one GPU: it builds pairs of a good and a spoiled "
        "face, learns from them to score faces, and tunes a generator with them. A generator tuned on clean portraits "
        "then serves as the prior that restores faces in blurred, noisy and compressed photographs."
    )
    things = [
        ("Score", "#scorer", "One number per face: how natural it looks.", "faceprior score photo.jpg"),
        ("Tune", "#guidance", "A generator learns to step away from spoiled faces.", "stages/04_guidance_tune.py"),
        ("Restore", "#restoration", "Faces are found, cleaned and pasted back.", "faceprior restore photo.jpg"),
    ]
    cards = [
        tag("div", tag("h3", tag("a", name, href=link)), tag("p", text), tag("code", command), class_="card")
        for name, link, text, command in things
    ]
    thing_list = tag("div", cards, class_="grid three")
    return render(tag("h1", "faceprior: report"), tag("p", lead, class_="lead"), thing_list, _banner(run))


def _banner(run: Run) -> Markup | None:
    """Say in plain words that networks are small, and which of them started untrained."""
    names = {"scorer": "scorer", "guided": "tuned generator", "prior": "portrait prior", "restorer": "restorer"}
    found = {name: run.read(f"checkpoints/{folder}/tiny.json") for folder, name in names.items()}
    tiny = [name for name, info in found.items() if info]
    if not tiny:
        return None
    untrained = [name for name in tiny if found[name].get("trained") is not True]
    who = f"The {'networks' if len(tiny) == len(names) else _listed(tiny)} behind these pictures"
    who += " is" if len(tiny) == 1 else " are"
    if untrained:
        title, some = "Untrained networks. ", "" if untrained == tiny else f" ({_listed(untrained)})"
        text = (
            f"{who} small and had not been trained{some} before the few steps of this run. Expect noise where a face "
            "should be, and read scores and tables as a test of the machinery: they say nothing about the method."
        )
    else:
        title = "Small networks. "
        text = (
            f"{who} small, made for trying the tools out in place of the published models. Expect rough pictures, and "
            "read the numbers as those of small models."
        )
    return tag("p", tag("b", title), text, class_="banner", role="note")


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _problems(run: Run) -> Markup:
    rows = list(run.problems.items())
    more = tag("p", f"{len(rows) - PROBLEMS:,} more are not listed.") if len(rows) > PROBLEMS else None
    intro = tag("p", "These files could not be read or shown; everything else is above.")
    return render(intro, table(["file", "reason"], rows[:PROBLEMS], class_="stack"), more)


def _write_evaluation(run: Run, intro: Markup) -> Markup:
    rows = run.read("results/results.json").get("rows")
    parts: dict[str, list[dict]] = {}
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict):
            parts.setdefault(str(row.get("part", "other")), []).append(row)
    if not parts:
        return render(intro, missing("results/results.json holds no numbers."))
    head = ["metric", "value", "95% interval", "n", "note"]
    tables = [
        render(tag("h3", part.capitalize()), table(head, [_cells(run, row) for row in own], class_="numbers stack"))
        for part, own in parts.items()
    ]
    return render(intro, tables)


def _cells(run: Run, row: dict[str, Any]) -> tuple:
    value, low, high, count = (number(row, key) for key in ("value", "low", "high", "n"))
    note = run.plain(row.get("note") or "", 300)
    if value is None:
        shown, note = tag("span", "not measured", class_="none"), note.removeprefix("not measured: ")
    else:
        shown = format_number(value)
    interval = None if low is None or high is None else f"{format_number(low)} to {format_number(high)}"
    name = run.plain(row.get("metric", "?"), 120)
    return name, shown, interval, None if count is None else format_number(count), note or None


def _write_making(run: Run, intro: Markup) -> Markup:
    versions = {"python": platform.python_version(), "faceprior": faceprior.__version__}
    versions |= {name: _version(name) for name in PACKAGES}
    date = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
    written = tag("p", f"This page was written on {date} in an environment with these versions.", class_="quiet small")
    commands = render(tag("h3", "Commands"), _commands(run))
    settings = [_settings(run, section) for section in SECTIONS if section.stage]
    return render(intro, commands, tag("h3", "Versions"), chips(versions), written, tag("h3", "Settings"), settings)


def _commands(run: Run) -> Markup:
    rows = run.rows("commands.jsonl")
    if not rows:
        return not_made("No commands were recorded", "make demo")
    seconds = [number(row, "seconds") for row in rows]
    cells = [
        (tag("code", command_text(run, row.get("command"))), None if time is None else duration(time))
        for row, time in zip(rows, seconds, strict=True)
    ]
    total = duration(sum(time for time in seconds if time is not None))
    return render(table(["command", "duration"], cells, class_="commands stack"), tag("p", f"Together {total}."))


def command_text(run: Run, command: Any) -> str:
    """Return a command as it is typed: the program by its name, paths below the root relative to it."""
    words = [str(word) for word in command] if isinstance(command, list) else str(command).split()
    return shlex.join([Path(words[0]).name, *(run.plain(word) for word in words[1:])]) if words else ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _settings(run: Run, section: Section) -> Markup:
    place = f"{section.folder}/config.yaml"
    try:
        text = run.plain((run.root / place).read_text(encoding="utf-8"), 20_000)
    except FileNotFoundError:
        return tag("p", f"{section.stage}: no settings were saved.", class_="quiet small")
    except BAD_INPUT as error:
        run.note(place, error)
        return missing(f"{place} cannot be read.")
    return tag("details", tag("summary", section.stage), tag("pre", text))


SECTIONS = (
    Section(
        "pairs",
        "Pairs of a good and a bad face",
        "A photograph is the good side. Its face is masked and drawn anew by an ordinary diffusion model, with more "
        "noise the larger the face: the bad side. Outside of the mask both are the same, pixel for pixel.",
        write_pairs,
        "{pairs} pairs, {rejected} rejected",
        "01_make_pairs",
        "data/pairs",
        "manifest.jsonl",
    ),
    Section(
        "scorer",
        "The face scorer",
        "A vision-language network learns to give the good face of a pair the higher score. A score has no unit; what "
        "counts is the order.",
        write_scorer,
        "accuracy {start_accuracy:.0%}, then {accuracy:.0%}",
        "02_train_scorer",
        "checkpoints/scorer",
        photographs=scored_photographs,
    ),
    Section(
        "portraits",
        "Portraits for the prior",
        "Only sharp and clean faces may teach the prior. Each photograph is aligned, measured and captioned; one that "
        "fails a limit is rejected with the number that failed.",
        write_portraits,
        "{accepted} accepted, {rejected} rejected",
        "03_curate_portraits",
        "data/portraits",
        "manifest.jsonl",
    ),
    Section(
        "guidance",
        "Guidance tuning",
        "The generator is tuned on the pairs: given a face with noise, its prediction is pushed from the bad face "
        "towards the good one. Below, the same prompts are drawn from the same noise.",
        write_tuning("checkpoints/guided", "guidance loss"),
        "{steps} steps on {pairs} pairs",
        "04_guidance_tune",
        "checkpoints/guided",
    ),
    Section(
        "prior",
        "Prior tuning",
        "The generator is tuned on the accepted portraits and their captions, so that it knows what clean skin, eyes "
        "and light look like. It is the prior of the restorer.",
        write_tuning("checkpoints/prior", "noise prediction error (MSE)"),
        "{steps} steps on {portraits} portraits",
        "05_prior_tune",
        "checkpoints/prior",
    ),
    Section(
        "restoration",
        "Restoration",
        "A ControlNet learns to steer the prior with a degraded face. Move the dividers, by mouse, finger or arrow "
        "keys, to compare.",
        write_restoration,
        "{steps} steps on {faces} faces",
        "06_train_restorer",
        "checkpoints/restorer",
        photographs=restored_photographs,
    ),
    Section(
        "evaluation",
        "Evaluation",
        "Measured on prompts, seeds and faces that were not trained on. What cannot be measured here says why.",
        _write_evaluation,
        "measured",
        "07_eval",
        "results",
        "results.json",
    ),
    Section(
        "making",
        "How it was made",
        "What was run, with what, and with which settings.",
        _write_making,
        "commands, versions, settings",
    ),
)


def main(argv: list[str] | None = None) -> None:
    """Write the report of a folder and print where it is."""
    parser = argparse.ArgumentParser(
        "python -m faceprior.report", description="Write the report of a run.", allow_abbrev=False
    )
    parser.add_argument("root", metavar="ROOT", type=Path, help="folder below which the stages were run")
    parser.add_argument("--output", metavar="FILE", type=Path, help=f"the HTML file (default: ROOT/{REPORT_FILE})")
    options = parser.parse_args(argv)
    try:
        print(write_report(options.root, options.output or options.root / REPORT_FILE))
    except OSError as error:
        parser.exit(1, f"faceprior.report: error: {error}\n")
