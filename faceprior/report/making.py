"""How it was made: the commands that were run, the versions of the libraries, the settings of the stages."""

import shlex
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from faceprior.html import Lost
from faceprior.models import library_versions
from faceprior.report.run import BAD_INPUT, STAGES, Run, number
from faceprior.report.summary import duration

SETTINGS = 20_000  # characters of a file of settings that are shown


def describe(run: Run) -> dict[str, Any]:
    rows = run.rows("commands.jsonl")
    seconds = [number(row, "seconds") for row in rows]
    return {
        "commands": [
            (command_text(run, row.get("command")), None if time is None else duration(time))
            for row, time in zip(rows, seconds, strict=True)
        ],
        "total": duration(sum(time for time in seconds if time is not None)),
        "versions": library_versions(),
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "settings": {stage: settings_text(run, folder) for stage, folder in STAGES.items()},
    }


def command_text(run: Run, command: Any) -> str:
    """Return a command as it is typed: the program by its name, paths below the root relative to it."""
    words = [str(word) for word in command] if isinstance(command, list) else str(command).split()
    return shlex.join([Path(words[0]).name, *(run.plain(word) for word in words[1:])]) if words else ""


def settings_text(run: Run, folder: str) -> str | Lost | None:
    """Return the text of a stage's settings, None where none were saved."""
    place = f"{folder}/config.yaml"
    try:
        return run.plain(run.path(place).read_text(encoding="utf-8"), SETTINGS)
    except FileNotFoundError:
        return None
    except BAD_INPUT as error:
        run.note(place, error)
        return Lost(f"{place} cannot be read.")
