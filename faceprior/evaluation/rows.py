"""rows.jsonl of an evaluation: one row per (protocol, method, item), to which measured values are added.

What is added is appended as a line of its own and joined to the row's first line when the file is read, so that a run
that is killed at any time loses one value at most.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from faceprior.evaluation.methods import Method
from faceprior.files import atomic_write
from faceprior.jsonl import append_row, read_rows, resume_rows, rewrite_rows

Row = dict[str, Any]
ROWS_FILE, WEIGHTS_FILE = "rows.jsonl", "weights.json"
# measures by what they are taken with, where that has another name
WEIGHTED = {"image_reward": "ir", "hps_v2": "hpsv2", "clip": "clip_score", "scorer": "face_score", "detector": "faces"}


class EvaluationRows:
    """The rows of a file, including those of an earlier run."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._rows: dict[tuple[str, str], dict[str, Row]] = {}
        self._selected: dict[str, frozenset[str]] = {}
        for row in resume_rows(self.path):
            if not {"protocol", "method", "id"} <= row.keys():
                raise FileExistsError(
                    f"{self.path} has rows of another version of stage 7: give another `output`, or `--overwrite` to"
                    " start over"
                )
            self._join(row)

    def _join(self, row: Row) -> Row:
        own = self._rows.setdefault((row["protocol"], row["method"]), {}).setdefault(row["id"], {})
        own.update(row)
        return own

    def add(self, protocol: str, method: str, item: str, **values: Any) -> Row:
        """Add values to a row, which is new or not, on the disk first."""
        row = {"protocol": protocol, "method": method, "id": item, **values}
        append_row(self.path, row)
        return self._join(row)

    def select(self, protocol: str, items: Iterable[str]) -> None:
        """Leave out of what `of` returns the rows of other items, which this run was not given; the file keeps them."""
        self._selected[protocol] = frozenset(items)

    def of(self, protocol: str, method: str) -> dict[str, Row]:
        """Return the rows of a method by the id of the item."""
        own = self._rows.setdefault((protocol, method), {})
        if protocol not in self._selected:
            return own
        return {item: row for item, row in own.items() if item in self._selected[protocol]}

    def of_protocol(self, protocol: str) -> list[Row]:
        methods = [method for own, method in self._rows if own == protocol]
        return [row for method in methods for row in self.of(protocol, method).values()]

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))

    def require_sources(self, protocol: str, methods: Iterable[Method]) -> None:
        """Raise FileExistsError where a method of this name had another source, or weights, in an earlier run."""
        way_out = "give it another name, another `output`, or `--overwrite` to start over"
        for method in methods:
            for row in self.of(protocol, method.name).values():
                if row.get("source", method.text) != method.text:
                    changed = f"{method.name} = {row['source']}, which is {method.text} now"
                    raise FileExistsError(f"{self.path} has rows of {changed}: {way_out}")
                if method.weights and row.get("weights", method.weights) != method.weights:
                    raise FileExistsError(
                        f"{self.path} has rows of {method.name}, but {method.source} holds other weights now: {way_out}"
                    )

    def require_same(self, protocol: str, method: str, key: str, values: Mapping[str, str]) -> None:
        """Raise FileExistsError where rows of a method were made of something else than `values`, by item, say now.

        key: `prompt`, or `contents`, the mark of the file that was measured or restored; unknown where it is empty.
        """
        for item, row in self.of(protocol, method).items():
            then, now = row.get(key), values.get(item)
            if then and now and then != now:
                what = f"the prompt {then!r}, which is {now!r} now" if key == "prompt" else "a file that has changed"
                raise FileExistsError(
                    f"{self.path}: the row {item} of {method} is of {what}: put it back (new ones may follow at the"
                    " end), give another `output`, or `--overwrite` to start over"
                )

    def compact(self) -> None:
        """Write the file anew, a line per row, in the order of protocol, method and item."""
        ordered = [own[item] for _, own in sorted(self._rows.items()) for item in sorted(own)]
        rewrite_rows(self.path, [dict(sorted(row.items())) for row in ordered])


def require_weights(output: Path, weights: Mapping[str, str]) -> None:
    """Raise FileExistsError where rows hold a measure by other weights than those that are given now.

    weights: name of WEIGHTED -> what it is, see `save_weights`. The files are only read: another process may be writing
    them.
    """
    path, former = output / ROWS_FILE, _saved_weights(output)
    taken = {key for row in read_rows(path)[0] for key in row} if path.is_file() else set()
    for name, now in weights.items():
        key = WEIGHTED.get(name, name)
        if key in taken and now and former.get(name, now) != now:
            raise FileExistsError(
                f"{path} has {key} by {former[name]}, but {name} is {now} now: give another `output`, or `--overwrite`"
                " to start over"
            )


def save_weights(output: Path, weights: Mapping[str, str]) -> None:
    """Keep what the measures are taken with, for `require_weights` of the next run; of what is gone, what it was."""
    former = _saved_weights(output)
    with atomic_write(output / WEIGHTS_FILE, "w") as file:
        json.dump({name: now or former.get(name, "") for name, now in weights.items()}, file, indent=1)


def _saved_weights(output: Path) -> dict[str, str]:
    path = output / WEIGHTS_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, or give another `output`") from None
    return found
