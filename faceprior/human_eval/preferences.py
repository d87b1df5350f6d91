"""Which of two methods people prefer: the table of AuthFace's AB test (arXiv 2410.09864, appendix C and Table 5).

For each pair of methods: the shares of answers that prefer the first, neither, and the second, with 95% intervals, and
whether the first wins more faces, and more people, than chance would give it.

Intervals are for other people AND other faces: `agreement.crossed_estimate` draws both with replacement. Where all
answers are alike it has no spread, and Wilson's interval for the smaller one of the numbers of people and faces, of
those above one, stands in its place. The sign tests (two-sided, ties left out) have one trial per face, won by the
method that more people prefer, and one per person, won by the method that the person prefers more often.
"""

import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from faceprior.files import atomic_write
from faceprior.human_eval.agreement import RESAMPLES, crossed_estimate
from faceprior.human_eval.files import SAME, Answer, read_preferences
from faceprior.metrics import fraction_interval
from faceprior.tables import EMPTY, Estimate, interval_text, markdown_table, markdown_text, number_text


@dataclass(frozen=True)
class SignTest:
    """How many trials the first method won and lost, and the two-sided probability of such a split by chance."""

    won: int
    lost: int
    p_value: float | None


@dataclass(frozen=True)
class Preference:
    """A row of Table 5. first_preferred, same, second_preferred: shares of the answers, in [0, 1], which add up to 1.

    people, faces: how many there were; not all people need to have seen all faces. over_faces, over_people: sign tests.
    """

    first: str
    second: str
    first_preferred: Estimate
    same: Estimate
    second_preferred: Estimate
    people: int
    faces: int
    over_faces: SignTest
    over_people: SignTest


# 20 people, 20 faces: method -> shares of answers that prefer AuthFace, neither, and the method
PUBLISHED = {
    "GFPGAN": (0.7075, 0.025, 0.2675),
    "PSFRGAN": (0.9175, 0.0075, 0.075),
    "CodeFormer": (0.7525, 0.0125, 0.235),
    "DR2": (0.89, 0.005, 0.105),
    "BFRffusion": (0.7275, 0.02, 0.2525),
    "SUPIR": (0.765, 0.01, 0.225),
}


def preferences(folder: str | Path, seed: int = 0) -> list[Preference]:
    """Return a row for every pair of methods that people compared in a folder, in the order of its first answer.

    seed: of the bootstrap. Raises FileNotFoundError without answers, BenchmarkError for a file that breaks a rule.
    """
    by_rater = read_preferences(folder)
    answers = [(rater, answer) for rater, own in by_rater.items() for answer in own]
    pairs = dict.fromkeys((answer.first, answer.second) for _, answer in answers)
    order = sorted(pairs, key=lambda pair: pair[0])  # stable: all rows of one first method together
    return [
        _preference(first, second, [(r, a) for r, a in answers if (a.first, a.second) == (first, second)], seed)
        for first, second in order
    ]


def _preference(first: str, second: str, answers: list[tuple[str, Answer]], seed: int) -> Preference:
    raters = list(dict.fromkeys(rater for rater, _ in answers))
    faces = list(dict.fromkeys(answer.id for _, answer in answers))
    signs = np.full((len(raters), len(faces)), np.nan)  # 1 for the first method, 0 for neither, -1 for the second
    for rater, answer in answers:
        signs[raters.index(rater), faces.index(answer.id)] = {first: 1, SAME: 0, second: -1}[answer.preferred]
    first_preferred, same, second_preferred = (_share(signs, sign, seed) for sign in (1, 0, -1))
    return Preference(
        first=first,
        second=second,
        first_preferred=first_preferred,
        same=same,
        second_preferred=second_preferred,
        people=len(raters),
        faces=len(faces),
        over_faces=sign_test(np.nansum(signs, axis=0)),
        over_people=sign_test(np.nansum(signs, axis=1)),
    )


def _share(signs: np.ndarray, sign: int, seed: int) -> Estimate:
    """Return the share of answers with a sign. signs: (people, faces), NaN where there is no answer."""
    estimate = crossed_estimate(np.where(np.isnan(signs), np.nan, signs == sign), seed=seed)
    if estimate.value not in (0, 1) or estimate.low is None:
        return estimate
    trials = min((n for n in signs.shape if n > 1), default=1)
    wilson = fraction_interval([bool(estimate.value)] * trials)
    note = f"all answers are alike: Wilson's interval for {trials} trials"
    return _with_note(replace(estimate, low=wilson.low, high=wilson.high), note)


def sign_test(differences: Iterable[float]) -> SignTest:
    """Test whether positive differences are as likely as negative ones; zeros are left out (Dixon and Mood 1946).

    p_value: None where all are zero.
    """
    from scipy import stats

    won, lost = (int(sum(sign * difference > 0 for difference in differences)) for sign in (1, -1))
    p_value = float(stats.binomtest(won, won + lost).pvalue) if won + lost else None
    return SignTest(won, lost, p_value)


def preference_estimates(folder: str | Path, seed: int = 0) -> dict[tuple[str, str], dict[str, Estimate]]:
    """Return the shares of `preferences`: (first, second) -> {first: share, "same": share, second: share}.

    The note of the first share holds the sign tests.
    """
    rows = {(row.first, row.second): row for row in preferences(folder, seed)}
    return {
        pair: {pair[0]: _with_note(row.first_preferred, _tests(row)), SAME: row.same, pair[1]: row.second_preferred}
        for pair, row in rows.items()
    }


def _with_note(estimate: Estimate, note: str) -> Estimate:
    return replace(estimate, note="; ".join(filter(None, (estimate.note, note))))


def _tests(row: Preference) -> str:
    tests = (("faces", row.over_faces), ("people", row.over_people))
    return ", ".join(f"sign test over {unit} {_test_text(test)}" for unit, test in tests)


def _test_text(test: SignTest) -> str:
    return f"{test.won} : {test.lost}" + ("" if test.p_value is None else f", p = {test.p_value:.2g}")


def write_preferences(folder: str | Path, output: str | Path | None = None, seed: int = 0) -> list[Preference]:
    """Make the rows of a folder; write preferences.md and preferences.json to `output`, by default the folder.

    The JSON holds {"measured": the rows, "paper": Table 5 as method -> shares}.
    """
    rows = preferences(folder, seed)
    output = Path(folder if output is None else output)
    with atomic_write(output / "preferences.md", "w") as file:
        file.write(to_markdown(rows))
    with atomic_write(output / "preferences.json", "w") as file:
        content = {"measured": list(map(asdict, rows)), "paper": PUBLISHED}
        json.dump(content, file, indent=1, allow_nan=False, ensure_ascii=False)
    return rows


def to_markdown(rows: list[Preference]) -> str:
    """Return the rows as Markdown, a table per first method; the paper's below."""
    sections = [
        f"## {markdown_text(first)} against other methods\n\n{_table(list(own))}"
        for first, own in itertools.groupby(rows, key=lambda row: row.first)
    ]
    published = [[second, *(number_text(share, ".2%") for share in shares)] for second, shares in PUBLISHED.items()]
    paper = markdown_table(["method", "AuthFace preferred", "same", "method preferred"], published)
    return f"""# Preferences

Shares of the answers to "which face is better?", sides at random. Intervals are for other people and other faces: 95%,
bootstrap over both, {RESAMPLES} resamples; Wilson's where all answers are alike. Sign tests: faces, or people, that the
first method won and lost, ties left out.

{chr(10).join(sections)}
## The paper's: AuthFace (arXiv 2410.09864, Table 5; 20 people, 20 faces)

{paper}"""


def _table(rows: list[Preference]) -> str:
    header = ["method", f"{rows[0].first} preferred", "95% interval", "same", "95% interval", "method preferred"]
    header += ["95% interval", "people", "faces", "answers", "over faces", "over people", "note"]
    return markdown_table(header, map(_cells, rows))


def _cells(row: Preference) -> list[str]:
    shares = (row.first_preferred, row.same, row.second_preferred)
    numbers = [
        text
        for share in shares
        for text in (number_text(share.value, ".2%"), interval_text(share.low, share.high, ".1%"))
    ]
    counts = [str(row.people), str(row.faces), str(row.same.n)]
    notes = "; ".join(dict.fromkeys(filter(None, (share.note for share in shares))))
    return [row.second, *numbers, *counts, _test_text(row.over_faces), _test_text(row.over_people), notes or EMPTY]
