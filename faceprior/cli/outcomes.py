"""What `faceprior restore` did with each file, in words, and all of it in one line."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

COMMON_REASONS = 3  # that the summary names


@dataclass(frozen=True)
class Outcome:
    """What was done with one file. line: in words; restored: number of faces; left: why each of the others was not.

    key: of its card in the report.
    """

    file: str
    line: str
    restored: int = 0
    left: tuple[str, ...] = ()
    error: str | None = None
    key: str | None = None

    @property
    def faces(self) -> dict[str, Any]:
        """The faces as the record keeps them."""
        return {"restored": self.restored, "left": list(self.left)}


class Summary:
    """Counts outcomes. total: files that were given."""

    def __init__(self, total: int):
        self.total, self.done, self.restored, self.without = total, 0, 0, 0
        self.reasons: Counter[str] = Counter()
        self.failed: dict[str, str] = {}

    def add(self, outcome: Outcome) -> None:
        self.done += 1
        if outcome.error is not None:
            self.failed[outcome.file] = outcome.error
            return
        self.restored += outcome.restored
        self.reasons.update(map(reason_kind, outcome.left))
        self.without += not outcome.restored and not outcome.left

    @property
    def text(self) -> str:
        """`400 files: 912 faces restored, 41 left (30: ...), 12 files without a face, 2 failed`."""
        parts = [f"{counted(self.restored, 'face')} restored"]
        if left := self.reasons.total():
            common = self.reasons.most_common(COMMON_REASONS)
            others = left - sum(number for _, number in common)
            reasons = [f"{number}: {reason}" for reason, number in common] + [f"{others}: other reasons"] * bool(others)
            parts.append(f"{left} left ({'; '.join(reasons)})")
        if self.without:
            parts.append(f"{counted(self.without, 'file')} without a face")
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        if self.done < self.total:
            parts.append(f"{self.total - self.done} not reached: the same command resumes")
        return f"{counted(self.total, 'file')}: {', '.join(parts)}"


def reason_kind(reason: str) -> str:
    """What reasons have in common: the words without the measured numbers, or what stands before a colon."""
    return re.sub(r"-?\d[\d.,]*(?<![.,])", "…", reason.partition(": ")[0])


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
