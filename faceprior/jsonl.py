"""JSON lines on disk: the rows of a manifest, of `metrics.jsonl`, of a results table.

A row is written after the files that it names, in one append, so a killed run leaves at most one incomplete last line.
Paths in rows are relative to the manifest's folder and may not lead out of it.
"""

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

MANIFEST = "manifest.jsonl"


def append_row(path: str | Path, row: dict[str, Any]) -> None:
    """Append one row and flush it to the disk, after removing an incomplete last line of a killed run.

    NaN and infinity are not valid JSON and raise ValueError.
    """
    line = _to_line(row)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _cut_torn_line(path)
    with open(path, "ab") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: str | Path) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Read a file of JSON lines into (rows, problems); a torn or foreign line is a problem (`file:line`, reason).

    A line with NaN or infinity is a problem, too. Blank lines are skipped.
    """
    rows, problems = [], []
    # not splitlines(), which also splits at characters that a string in a row may contain, such as U+2028
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode(), parse_constant=_refuse)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            rows.append(row)
        except ValueError as error:
            problems.append((f"{path}:{number}", f"torn or foreign row ({error})"))
    return rows, problems


def read_manifest(
    folder: str | Path, parse: Callable[[Path, dict[str, Any]], T], what: str, stage: str
) -> tuple[list[T], list[tuple[str, str]]]:
    """Read `folder/manifest.jsonl`, each row by `parse(folder, row)` -> (items, problems as (place, reason)).

    A torn row, and one for which `parse` raises an error, is a problem and skipped; what, stage: words for the
    errors. Raises FileNotFoundError without a manifest, ValueError if no usable row is left.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"no {what}s in {folder}: `python stages/{stage}.py` makes them, with the same `--config`"
        )
    rows, problems = read_rows(path)
    items = []
    for number, row in enumerate(rows, 1):
        try:
            items.append(parse(folder, row))
        except (ValueError, TypeError, OSError) as error:
            problems.append((f"{path}: {row.get('id', f'row {number}')}", str(error)))
    if not items:
        reason = f"; the first problem: {': '.join(problems[0])}" if problems else ""
        raise ValueError(f"{path} has no usable {what}{reason}")
    return items, problems


def resume_rows(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of an earlier run, after removing an incomplete last line."""
    path = Path(path)
    if not path.is_file():
        return []
    _cut_torn_line(path)
    rows, problems = read_rows(path)
    if problems:
        place, reason = problems[0]
        raise ValueError(f"{place}: {reason}; remove the line to resume, or start over with `--overwrite`")
    return rows


class KeyedRows(dict[str, dict[str, Any]]):
    """The rows of a file by their key, including those of an earlier run; an existing key is not written again."""

    def __init__(self, path: str | Path, key: str = "id"):
        super().__init__((row[key], row) for row in resume_rows(path))
        self.path, self.key = path, key

    def add(self, row: dict[str, Any]) -> None:
        if row[self.key] not in self:
            append_row(self.path, row)
            self[row[self.key]] = row

    def replace(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows in place of those with the same keys, all or none."""
        self.update({row[self.key]: row for row in rows})
        rewrite_rows(self.path, self.values())

    def remove(self, keys: Iterable[str]) -> None:
        """Remove rows from the file; keys without a row are ignored."""
        if gone := self.keys() & set(keys):
            rewrite_rows(self.path, [row for key, row in self.items() if key not in gone])
            for key in gone:
                del self[key]


def rewrite_rows(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace the file by `rows`, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        file.writelines(map(_to_line, rows))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _to_line(row: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8, which Python stores as lone surrogates
        return (json.dumps(row, allow_nan=False) + "\n").encode()


def _cut_torn_line(path: Path) -> None:
    """Remove what follows the last newline."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not valid JSON")


def sort_rows(path: str | Path, key: str = "id") -> list[dict[str, Any]]:
    """Sort a file's rows by a key, so that interrupted and uninterrupted runs write the same file."""
    rows = sorted(resume_rows(path), key=lambda row: row[key])
    rewrite_rows(path, rows)
    return rows


def require_keys(row: dict[str, Any], keys: dict[str, type | tuple[type, ...]]) -> None:
    """Check that `row` has `keys`, each of its type and every number finite; ValueError names the first that fails."""
    for key, kind in keys.items():
        if key not in row:
            raise ValueError(f"the row has no `{key}`")
        value = row[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"`{key}` has to be {names} but is {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{key}` has to be finite but is {value}")


def resolve_file(folder: str | Path, relative: str) -> Path:
    """Return the file that a row names, which must exist below `folder`.

    Raises ValueError for an absolute path or one that leads out of `folder`, FileNotFoundError for a missing file.
    """
    folder, path = Path(folder), Path(folder) / relative
    if Path(relative).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{relative!r} leads out of {folder}: paths in a manifest are relative to its folder")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    return path
