"""
What a score means: where it stands among the scores of a reference set of faces.

A Face Score has no unit, and another scorer has another scale. Stage 2 therefore saves, beside the weights, how the
held-out pairs score (`reference.json`), and every score comes with its percentile among their good faces.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from faceprior.images import atomic_write

REFERENCE_FILE = "reference.json"
QUANTILES = 101  # 0%, 1% ... 100%


@dataclass(frozen=True)
class ScoreReference:
    """How a scorer scores a set of (good, bad) face pairs.

    name: of the set. n: its pairs. good, bad: the 0%, 1% ... 100% quantiles of either side's scores, no unit.
    """

    name: str
    n: int
    good: tuple[float, ...]
    bad: tuple[float, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not isinstance(self.n, int) or self.n < 1:
            raise ValueError(f"a reference has a name and at least one pair, but these are {self.name!r} and {self.n}")
        for side in ("good", "bad"):
            object.__setattr__(self, side, _checked(getattr(self, side), side))

    @classmethod
    def from_scores(cls, name: str, good: Sequence[float], bad: Sequence[float]) -> "ScoreReference":
        """Measure a set of pairs: good, bad hold one score per pair."""
        if len(good) != len(bad) or len(good) == 0:
            raise ValueError(f"a reference needs a score per side and pair but got {len(good)} good and {len(bad)} bad")
        steps = np.linspace(0, 1, QUANTILES)
        return cls(name, len(good), *(tuple(np.quantile(side, steps).tolist()) for side in (good, bad)))

    @classmethod
    def load(cls, folder: str | Path) -> "ScoreReference | None":
        """Read `folder/reference.json`; None if there is none, ValueError if it is damaged."""
        path = Path(folder) / REFERENCE_FILE
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged ({error}): copy it again, or delete it (scores are then without a percentile)"
            ) from error

    def save(self, folder: str | Path) -> None:
        """Write `folder/reference.json`."""
        with atomic_write(Path(folder) / REFERENCE_FILE, "w") as file:
            json.dump(asdict(self), file)

    def percentile(self, score: float) -> float:
        """Per cent of the set's good faces that score lower, in [0, 100]; straight between two quantiles."""
        return float(np.interp(score, self.good, np.linspace(0, 100, QUANTILES)))


def _checked(values: Sequence[float], side: str) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    rising = all(a <= b for a, b in zip(numbers, numbers[1:], strict=False))
    if len(numbers) != QUANTILES or not all(map(math.isfinite, numbers)) or not rising:
        raise ValueError(f"`{side}` has to be {QUANTILES} finite numbers that never fall")
    return numbers
