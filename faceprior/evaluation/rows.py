"""rows.jsonl of an evaluation: one row per (protocol, method, item), to which measured values are added.

What is added is appended as a line of its own and joined to the row's first line when the file is read, so that a run
that is killed at any time loses one value at most.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from faceprior.evaluation.methods import Method
from faceprior.jsonl import append_row, read_rows, resume_rows, rewrite_rows

Row = dict[str, Any]
WEIGHTED = {"image_reward": "ir", "hps_v2": "hpsv2", "clip": "clip_score"}  # measures by the weights of other names


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
        """Raise FileExistsError where a method of this name had another source in an earlier run."""
        for method in methods:
            for row in self.of(protocol, method.name).values():
                if row.get("source", method.text) != method.text:
                    raise FileExistsError(
                        f"{self.path} has rows of {method.name} = {row['source']}, which is {method.text} now: give it "
                        "another name, another `output`, or `--overwrite` to start over"
                    )

    def compact(self) -> None:
        """Write the file anew, a line per row, in the order of protocol, method and item."""
        ordered = [own[item] for _, own in sorted(self._rows.items()) for item in sorted(own)]
        rewrite_rows(self.path, [dict(sorted(row.items())) for row in ordered])


def require_weights(path: Path, weights: Mapping[str, str], former: Mapping[str, str]) -> None:
    """Raise FileExistsError where rows hold a measure by other weights than those that are given now.

    The file is only read: another process may be writing it.
    """
    taken = {key for row in read_rows(path)[0] for key in row} if path.is_file() else set()
    for name, file in weights.items():
        key = WEIGHTED.get(name, name)
        if key in taken and former.get(name) != file:
            raise FileExistsError(
                f"{path} has {key} by {former.get(name, 'the weights of the cache')}, but `weights` has {name}={file}"
                " now: give another `output`, or `--overwrite` to start over"
            )
